// Vec for NEON on 64-bit ARM: 4 float lanes, 32 registers.
// Every vec_*.h offers the same names; the kernels are written over them and nothing else.
#pragma once

#include <arm_neon.h>

#include <cstdint>

#include "exponent.h"

namespace {

struct Vec {
  static constexpr int kLanes = 4;
  static constexpr int kRows3 = 8, kRows2 = 12,
                       kRows1 = 16;  // micro-kernel rows at 3, 2, 1 vectors
  float32x4_t v;
};
struct VecI {
  int32x4_t v;
};
struct Lanes {  // all bits of a lane set, or none
  uint32x4_t v;
};

inline Vec set(float x) { return {vdupq_n_f32(x)}; }
inline Vec zero() { return set(0.0f); }
inline Vec load(const float* p) { return {vld1q_f32(p)}; }
inline Vec load_some(const float* p, int64_t n) {  // lanes n.. are zero and not read
  float lanes[4] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}
inline Vec load_bytes(const uint8_t* p, int64_t n) {  // the first n bytes as floats, then zeros
  uint32_t bytes = 0;
  __builtin_memcpy(&bytes, p, n >= 4 ? 4 : n);
  const uint16x8_t wide = vmovl_u8(vcreate_u8(bytes));
  return {vcvtq_f32_u32(vmovl_u16(vget_low_u16(wide)))};
}
inline void store(float* p, Vec x) { vst1q_f32(p, x.v); }
inline void store_some(float* p, Vec x, int64_t n) {
  float lanes[4];
  store(lanes, x);
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}

// 4 values of a half type, or n and zeros
inline Vec load_bfloat16(const uint16_t* p) {
  return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16))};
}
inline Vec load_float16(const uint16_t* p) {
  return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)))};
}
inline Vec load_some_bfloat16(const uint16_t* p, int64_t n) {
  uint16_t lanes[4] = {};
  __builtin_memcpy(lanes, p, n * sizeof(uint16_t));
  return load_bfloat16(lanes);
}
inline void load_two_bfloat16(const uint16_t* p, Vec& first, Vec& second) {  // 8 values
  first = load_bfloat16(p);
  second = load_bfloat16(p + 4);
}
inline Vec load_some_float16(const uint16_t* p, int64_t n) {
  uint16_t lanes[4] = {};
  __builtin_memcpy(lanes, p, n * sizeof(uint16_t));
  return load_float16(lanes);
}
inline void store_bfloat16(uint16_t* p, Vec x) {  // to the nearest, ties to even; NaN stays NaN
  const uint32x4_t bits = vreinterpretq_u32_f32(x.v), high = vshrq_n_u32(bits, 16);
  const uint32x4_t bias = vaddq_u32(vandq_u32(high, vdupq_n_u32(1)), vdupq_n_u32(0x7fff));
  const uint32x4_t rounded = vshrq_n_u32(vaddq_u32(bits, bias), 16);
  const uint32x4_t quiet = vorrq_u32(high, vdupq_n_u32(0x40));
  vst1_u16(p, vmovn_u32(vbslq_u32(vceqq_f32(x.v, x.v), rounded, quiet)));
}
inline void store_float16(uint16_t* p, Vec x) {
  vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(x.v)));
}

inline Vec operator+(Vec a, Vec b) { return {vaddq_f32(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {vsubq_f32(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {vmulq_f32(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {vdivq_f32(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }  // a * b + c
// b where either is NaN, as everywhere else: vmaxq_f32 would make NaN stick.
inline Vec max(Vec a, Vec b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }
inline Vec abs(Vec a) { return {vabsq_f32(a.v)}; }

inline Vec select(Lanes which, Vec yes, Vec no) { return {vbslq_f32(which.v, yes.v, no.v)}; }
inline Lanes equal(Vec a, Vec b) { return {vceqq_f32(a.v, b.v)}; }
inline Lanes less(Vec a, Vec b) { return {vcltq_f32(a.v, b.v)}; }
inline Lanes is_nan(Vec a) { return {vmvnq_u32(vceqq_f32(a.v, a.v))}; }
inline Lanes has_sign(Vec a) { return {vcltzq_s32(vreinterpretq_s32_f32(a.v))}; }
inline Lanes both(Lanes a, Lanes b) { return {vandq_u32(a.v, b.v)}; }
inline Lanes either(Lanes a, Lanes b) { return {vorrq_u32(a.v, b.v)}; }
inline bool any(Lanes a) { return vmaxvq_u32(a.v) != 0; }
inline bool all(Lanes a) { return vminvq_u32(a.v) != 0; }
inline uint32_t bits(Lanes a) {  // bit i: lane i
  return vaddvq_u32(vandq_u32(a.v, uint32x4_t{1, 2, 4, 8}));
}

inline VecI set_int(int32_t x) { return {vdupq_n_s32(x)}; }
inline VecI load_int(const int32_t* p) { return {vld1q_s32(p)}; }
inline void store_int(int32_t* p, VecI x) { vst1q_s32(p, x.v); }
inline VecI select(Lanes which, VecI yes, VecI no) { return {vbslq_s32(which.v, yes.v, no.v)}; }
inline VecI operator+(VecI a, VecI b) { return {vaddq_s32(a.v, b.v)}; }
inline VecI operator-(VecI a, VecI b) { return {vsubq_s32(a.v, b.v)}; }
inline VecI min(VecI a, VecI b) { return {vminq_s32(a.v, b.v)}; }
inline VecI max(VecI a, VecI b) { return {vmaxq_s32(a.v, b.v)}; }
inline VecI operator^(VecI a, VecI b) { return {veorq_s32(a.v, b.v)}; }
inline VecI low_half(VecI a) { return {vandq_s32(a.v, vdupq_n_s32(0xffff))}; }
inline VecI high_half(VecI a) {
  return {vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(a.v), 16))};
}
inline void multiply_wide(VecI a, uint32_t b, VecI& high, VecI& low) {  // unsigned, 64 bits
  const uint32x4_t x = vreinterpretq_u32_s32(a.v);
  const uint32x2_t factor = vdup_n_u32(b);
  const uint32x4_t first = vreinterpretq_u32_u64(vmull_u32(vget_low_u32(x), factor));
  const uint32x4_t last = vreinterpretq_u32_u64(vmull_u32(vget_high_u32(x), factor));
  low.v = vreinterpretq_s32_u32(vuzp1q_u32(first, last));
  high.v = vreinterpretq_s32_u32(vuzp2q_u32(first, last));
}
inline Vec to_float(VecI a) { return {vcvtq_f32_s32(a.v)}; }
inline Lanes within(VecI low, VecI x, VecI high) {  // low <= x < high
  return {vandq_u32(vcleq_s32(low.v, x.v), vcltq_s32(x.v, high.v))};
}
inline Vec gather(const float* base, VecI index) {
  float32x4_t v = vdupq_n_f32(base[vgetq_lane_s32(index.v, 0)]);
  v = vld1q_lane_f32(base + vgetq_lane_s32(index.v, 1), v, 1);
  v = vld1q_lane_f32(base + vgetq_lane_s32(index.v, 2), v, 2);
  v = vld1q_lane_f32(base + vgetq_lane_s32(index.v, 3), v, 3);
  return {v};
}

inline VecI count_up(int32_t first) {  // first, first + 1, ...
  const int32_t lanes[4] = {0, 1, 2, 3};
  return set_int(first) + load_int(lanes);
}
inline float sum_of_lanes(Vec a) { return vaddvq_f32(a.v); }
inline float largest_lane(Vec a) {
  const Vec b = max(a, {vextq_f32(a.v, a.v, 2)});
  return vgetq_lane_f32(max(b, {vextq_f32(b.v, b.v, 1)}).v, 0);
}
// lane i: the sum of the lanes of rows[i]
inline Vec sum_lanes(const Vec (&rows)[4]) {
  return {vpaddq_f32(vpaddq_f32(rows[0].v, rows[1].v), vpaddq_f32(rows[2].v, rows[3].v))};
}

// 2^x for x <= 0 and a little above; exactly 1 at 0, 0 below kNothing (so at -inf), NaN
// at NaN.
// The same method and polynomial as in vec_avx2.h.
inline Vec exp2(Vec x) {
  const float32x4_t low = vdupq_n_f32(kNothing);
  const float32x4_t y = vmaxq_f32(low, x.v);  // NaN stays NaN
  const float32x4_t n = vrndnq_f32(y);
  const float32x4_t f = vsubq_f32(y, n);
  float32x4_t p = vdupq_n_f32(0x1.41fbbcp-13f);
  p = vfmaq_f32(vdupq_n_f32(0x1.5f3e54p-10f), p, f);
  p = vfmaq_f32(vdupq_n_f32(0x1.3b2d4cp-7f), p, f);
  p = vfmaq_f32(vdupq_n_f32(0x1.c6aee8p-5f), p, f);
  p = vfmaq_f32(vdupq_n_f32(0x1.ebfbdcp-3f), p, f);
  p = vfmaq_f32(vdupq_n_f32(0x1.62e430p-1f), p, f);
  p = vfmaq_f32(vdupq_n_f32(1.0f), p, f);
  const int32x4_t exponent = vshlq_n_s32(vcvtq_s32_f32(n), 23);  // 0 at NaN, which p holds already
  const int32x4_t power = vaddq_s32(vreinterpretq_s32_f32(p), exponent);
  const uint32x4_t nothing = vcltq_f32(x.v, low);
  return {vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_s32(power), nothing))};
}

// rows[i] lane j <-> rows[j] lane i
inline void transpose(Vec (&rows)[4]) {
  const float32x4x2_t a = vtrnq_f32(rows[0].v, rows[1].v), b = vtrnq_f32(rows[2].v, rows[3].v);
  rows[0].v = vcombine_f32(vget_low_f32(a.val[0]), vget_low_f32(b.val[0]));
  rows[1].v = vcombine_f32(vget_low_f32(a.val[1]), vget_low_f32(b.val[1]));
  rows[2].v = vcombine_f32(vget_high_f32(a.val[0]), vget_high_f32(b.val[0]));
  rows[3].v = vcombine_f32(vget_high_f32(a.val[1]), vget_high_f32(b.val[1]));
}

}  // namespace
