// Vec for any machine: 4 float lanes in the compiler's own vector type, no instruction of any ISA
// named. Every vec_*.h offers the same names; the kernels are written over them and nothing else.
#pragma once

#include <cstdint>

#include "exponent.h"

namespace {

struct Vec {
  static constexpr int kLanes = 4;
  static constexpr int kRows3 = 3, kRows2 = 4, kRows1 = 8;  // micro-kernel rows at 3, 2, 1 vectors
  typedef float Type __attribute__((vector_size(16)));
  Type v;
};
struct VecI {
  typedef int32_t Type __attribute__((vector_size(16)));
  Type v;
};
using Lanes = VecI;  // all bits of a lane set, or none

inline Vec set(float x) { return {Vec::Type{x, x, x, x}}; }
inline Vec zero() { return set(0.0f); }
inline Vec load_some(const float* p, int64_t n) {  // lanes n.. are zero and not read
  Vec x = zero();
  for (int64_t i = 0; i < n; ++i) x.v[i] = p[i];
  return x;
}
inline Vec load(const float* p) {
  Vec x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
inline Vec load_bytes(const uint8_t* p, int64_t n) {  // the first n bytes as floats, then zeros
  Vec x = zero();
  for (int64_t i = 0; i < (n < 4 ? n : 4); ++i) x.v[i] = p[i];
  return x;
}
inline void store(float* p, Vec x) { __builtin_memcpy(p, &x, sizeof x); }
inline void store_some(float* p, Vec x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = x.v[i];
}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}
inline float from_float16(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16, rest = half & 0x7fff;
  if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | (rest & 0x3ff) << 13);  // inf, NaN
  // As a float's bits the exponent is 112 too small; the product also makes subnormals normal.
  return float_of(sign | bits_of(float_of(rest << 13) * 0x1p+112f));
}
inline uint16_t to_float16(float x) {  // to the nearest, ties to even; NaN stays NaN
  const uint32_t sign = bits_of(x) >> 16 & 0x8000, rest = bits_of(x) & 0x7fffffff;
  if (rest > 0x7f800000) return uint16_t(sign | 0x7e00 | (rest >> 13 & 0x3ff));
  if (rest >= 0x477ff000) return uint16_t(sign | 0x7c00);  // 65520 and more: inf
  if (rest < 0x38800000)  // below 2^-14: this sum's last bit is float16's smallest step
    return uint16_t(sign | (bits_of(float_of(rest) + 0.5f) - bits_of(0.5f)));
  return uint16_t(sign | (((rest + 0xfff + (rest >> 13 & 1)) >> 13) - (112 << 10)));
}
inline uint16_t to_bfloat16(float x) {
  const uint32_t bits = bits_of(x), high = bits >> 16;
  return uint16_t(x != x ? high | 0x40 : (bits + 0x7fff + (high & 1)) >> 16);
}
// 4 values of a half type, or n and zeros
inline Vec load_bfloat16(const uint16_t* p) {
  Vec x = zero();
  for (int i = 0; i < 4; ++i) x.v[i] = float_of(uint32_t(p[i]) << 16);
  return x;
}
inline Vec load_float16(const uint16_t* p) {
  Vec x = zero();
  for (int i = 0; i < 4; ++i) x.v[i] = from_float16(p[i]);
  return x;
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
inline void store_bfloat16(uint16_t* p, Vec x) {
  for (int i = 0; i < 4; ++i) p[i] = to_bfloat16(x.v[i]);
}
inline void store_float16(uint16_t* p, Vec x) {
  for (int i = 0; i < 4; ++i) p[i] = to_float16(x.v[i]);
}

inline Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
inline Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
inline Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
// a * b + c. Without the instruction, a double holds the product exactly and the sum nearly so: two
// roundings to float would leave the numerics rule.
inline Vec fma(Vec a, Vec b, Vec c) {
#ifdef __FP_FAST_FMAF
  for (int i = 0; i < 4; ++i) c.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
  return c;
#else
  typedef float Pair __attribute__((vector_size(8)));
  typedef double Wide __attribute__((vector_size(16)));
  const auto low = [](Vec x) {
    return __builtin_convertvector(__builtin_shufflevector(x.v, x.v, 0, 1), Wide);
  };
  const auto high = [](Vec x) {
    return __builtin_convertvector(__builtin_shufflevector(x.v, x.v, 2, 3), Wide);
  };
  const Pair first = __builtin_convertvector(low(a) * low(b) + low(c), Pair);
  const Pair second = __builtin_convertvector(high(a) * high(b) + high(c), Pair);
  return {__builtin_shufflevector(first, second, 0, 1, 2, 3)};
#endif
}
inline Vec select(Lanes which, Vec yes, Vec no) { return {which.v ? yes.v : no.v}; }
inline Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }

inline Lanes equal(Vec a, Vec b) { return {a.v == b.v}; }
inline Lanes less(Vec a, Vec b) { return {a.v < b.v}; }
inline Lanes is_nan(Vec a) { return {a.v != a.v}; }
inline Lanes has_sign(Vec a) { return {(VecI::Type)(a.v) < 0}; }
inline Lanes both(Lanes a, Lanes b) { return {a.v & b.v}; }
inline Lanes either(Lanes a, Lanes b) { return {a.v | b.v}; }
inline bool any(Lanes a) { return a.v[0] | a.v[1] | a.v[2] | a.v[3]; }
inline bool all(Lanes a) { return a.v[0] & a.v[1] & a.v[2] & a.v[3]; }
inline uint32_t bits(Lanes a) {  // bit i: lane i
  return uint32_t((a.v[0] & 1) | (a.v[1] & 2) | (a.v[2] & 4) | (a.v[3] & 8));
}
inline Vec abs(Vec a) { return {(Vec::Type)((VecI::Type)(a.v) & 0x7fffffff)}; }

inline VecI set_int(int32_t x) { return {VecI::Type{x, x, x, x}}; }
inline VecI load_int(const int32_t* p) {
  VecI x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
inline void store_int(int32_t* p, VecI x) { __builtin_memcpy(p, &x, sizeof x); }
inline VecI select(Lanes which, VecI yes, VecI no) { return {which.v ? yes.v : no.v}; }
inline VecI operator+(VecI a, VecI b) { return {a.v + b.v}; }
inline VecI operator-(VecI a, VecI b) { return {a.v - b.v}; }
inline VecI min(VecI a, VecI b) { return {a.v < b.v ? a.v : b.v}; }
inline VecI max(VecI a, VecI b) { return {a.v > b.v ? a.v : b.v}; }
inline VecI operator^(VecI a, VecI b) { return {a.v ^ b.v}; }
inline VecI low_half(VecI a) { return {a.v & 0xffff}; }
inline VecI high_half(VecI a) { return {(a.v >> 16) & 0xffff}; }
inline void multiply_wide(VecI a, uint32_t b, VecI& high, VecI& low) {  // unsigned, 64 bits
  for (int i = 0; i < 4; ++i) {
    const uint64_t product = uint64_t(uint32_t(a.v[i])) * b;
    high.v[i] = int32_t(uint32_t(product >> 32));
    low.v[i] = int32_t(uint32_t(product));
  }
}
inline Vec to_float(VecI a) { return {__builtin_convertvector(a.v, Vec::Type)}; }
inline Lanes within(VecI low, VecI x, VecI high) {  // low <= x < high
  return {(low.v <= x.v) & (x.v < high.v)};
}
inline Vec gather(const float* base, VecI index) {
  return {Vec::Type{base[index.v[0]], base[index.v[1]], base[index.v[2]], base[index.v[3]]}};
}

inline VecI count_up(int32_t first) {  // first, first + 1, ...
  return {VecI::Type{first, first + 1, first + 2, first + 3}};
}
inline float sum_of_lanes(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
inline float largest_lane(Vec a) {
  const Vec b = max(a, {__builtin_shufflevector(a.v, a.v, 2, 3, 0, 1)});
  return b.v[0] > b.v[1] ? b.v[0] : b.v[1];
}
// lane i: the sum of the lanes of rows[i]
inline Vec sum_lanes(const Vec (&rows)[4]) {
  Vec sums;
  for (int i = 0; i < 4; ++i) sums.v[i] = sum_of_lanes(rows[i]);
  return sums;
}

// 2^x for x <= 0 and a little above; exactly 1 at 0, 0 below kNothing (so at -inf), NaN
// at NaN.
// The same method and polynomial as in vec_avx2.h.
inline Vec exp2(Vec x) {
  const Vec low = set(kNothing);
  const Vec y = select(less(x, low), low, x);
  const Vec magic = set(0x1.8p+23f);  // adding it leaves the nearest integer in the low bits
  const Vec n = (y + magic) - magic;
  const Vec f = y - n;
  Vec p = set(0x1.41fbbcp-13f);
  p = fma(p, f, set(0x1.5f3e54p-10f));
  p = fma(p, f, set(0x1.3b2d4cp-7f));
  p = fma(p, f, set(0x1.c6aee8p-5f));
  p = fma(p, f, set(0x1.ebfbdcp-3f));
  p = fma(p, f, set(0x1.62e430p-1f));
  p = fma(p, f, set(1.0f));
  // Unsigned: where x is NaN the number overflows, and it may be negative.
  typedef uint32_t Bits __attribute__((vector_size(16)));
  const Bits exponent = ((Bits)(y + magic).v - 0x4b400000u) << 23;
  const Vec power = {(Vec::Type)((Bits)(p.v) + exponent)};
  return select(less(x, low), zero(), select(is_nan(x), x, power));
}

// rows[i] lane j <-> rows[j] lane i
inline void transpose(Vec (&rows)[4]) {
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < i; ++j) {
      const float x = rows[i].v[j];
      rows[i].v[j] = rows[j].v[i];
      rows[j].v[i] = x;
    }
  }
}

}  // namespace
