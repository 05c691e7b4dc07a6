// Vec for AVX2 and FMA: 8 float lanes, 16 registers.
// Every vec_*.h offers the same names; the kernels are written over them and nothing else.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "exponent.h"

namespace {

struct Vec {
  static constexpr int kLanes = 8;
  static constexpr int kRows3 = 4, kRows2 = 6, kRows1 = 8;  // micro-kernel rows at 3, 2, 1 vectors
  __m256 v;
};
struct VecI {
  __m256i v;
};
struct Lanes {  // all bits of a lane set, or none
  __m256 v;
};

inline __m256i first_lanes(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Vec zero() { return {_mm256_setzero_ps()}; }
inline Vec set(float x) { return {_mm256_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vec load_some(const float* p, int64_t n) {  // lanes n.. are zero and not read
  return {_mm256_maskload_ps(p, first_lanes(n))};
}
inline Vec load_bytes(const uint8_t* p, int64_t n) {  // the first n bytes as floats, then zeros
  uint64_t bytes = 0;
  __builtin_memcpy(&bytes, p, n >= 8 ? 8 : n);
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(bytes))))};
}
inline void store(float* p, Vec x) { _mm256_storeu_ps(p, x.v); }
inline void store_some(float* p, Vec x, int64_t n) { _mm256_maskstore_ps(p, first_lanes(n), x.v); }

// 8 values of a half type, or n and zeros
inline Vec load_bfloat16(const uint16_t* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
}
inline Vec load_float16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline Vec load_some_bfloat16(const uint16_t* p, int64_t n) {
  uint16_t lanes[8] = {};
  __builtin_memcpy(lanes, p, n * sizeof(uint16_t));
  return load_bfloat16(lanes);
}
inline void load_two_bfloat16(const uint16_t* p, Vec& first, Vec& second) {  // 16 values
  first = load_bfloat16(p);
  second = load_bfloat16(p + 8);
}
inline Vec load_some_float16(const uint16_t* p, int64_t n) {
  uint16_t lanes[8] = {};
  __builtin_memcpy(lanes, p, n * sizeof(uint16_t));
  return load_float16(lanes);
}
inline void store_bfloat16(uint16_t* p, Vec x) {  // to the nearest, ties to even; NaN stays NaN
  const __m256i bits = _mm256_castps_si256(x.v), high = _mm256_srli_epi32(bits, 16);
  const __m256i even = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const __m256i bias = _mm256_add_epi32(even, _mm256_set1_epi32(0x7fff));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
  const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
  const __m256i result = _mm256_blendv_epi8(rounded, quiet, nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(result, result), 0xd8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
inline void store_float16(uint16_t* p, Vec x) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.v, kNearest));
}

inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }  // a * b + c
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }

inline Vec select(Lanes which, Vec yes, Vec no) { return {_mm256_blendv_ps(no.v, yes.v, which.v)}; }
inline Lanes equal(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
inline Lanes less(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
inline Lanes is_nan(Vec a) { return {_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q)}; }
inline Lanes has_sign(Vec a) {
  return {_mm256_castsi256_ps(_mm256_srai_epi32(_mm256_castps_si256(a.v), 31))};
}
inline Lanes both(Lanes a, Lanes b) { return {_mm256_and_ps(a.v, b.v)}; }
inline Lanes either(Lanes a, Lanes b) { return {_mm256_or_ps(a.v, b.v)}; }
inline bool any(Lanes a) { return _mm256_movemask_ps(a.v) != 0; }
inline bool all(Lanes a) { return _mm256_movemask_ps(a.v) == 0xff; }
inline uint32_t bits(Lanes a) { return uint32_t(_mm256_movemask_ps(a.v)); }  // bit i: lane i

inline VecI set_int(int32_t x) { return {_mm256_set1_epi32(x)}; }
inline VecI load_int(const int32_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
}
inline void store_int(int32_t* p, VecI x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.v);
}
inline VecI select(Lanes which, VecI yes, VecI no) {
  return {_mm256_blendv_epi8(no.v, yes.v, _mm256_castps_si256(which.v))};
}
inline VecI operator+(VecI a, VecI b) { return {_mm256_add_epi32(a.v, b.v)}; }
inline VecI operator-(VecI a, VecI b) { return {_mm256_sub_epi32(a.v, b.v)}; }
inline VecI min(VecI a, VecI b) { return {_mm256_min_epi32(a.v, b.v)}; }
inline VecI max(VecI a, VecI b) { return {_mm256_max_epi32(a.v, b.v)}; }
inline VecI operator^(VecI a, VecI b) { return {_mm256_xor_si256(a.v, b.v)}; }
inline VecI low_half(VecI a) { return {_mm256_and_si256(a.v, _mm256_set1_epi32(0xffff))}; }
inline VecI high_half(VecI a) { return {_mm256_srli_epi32(a.v, 16)}; }
inline void multiply_wide(VecI a, uint32_t b, VecI& high, VecI& low) {  // unsigned, 64 bits
  const __m256i factor = _mm256_set1_epi32(int(b));
  const __m256i even = _mm256_mul_epu32(a.v, factor);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a.v, 32), factor);
  high.v = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
  low.v = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
}
inline Vec to_float(VecI a) { return {_mm256_cvtepi32_ps(a.v)}; }
inline Lanes within(VecI low, VecI x, VecI high) {  // low <= x < high
  return {_mm256_castsi256_ps(
      _mm256_andnot_si256(_mm256_cmpgt_epi32(low.v, x.v), _mm256_cmpgt_epi32(high.v, x.v)))};
}
inline Vec gather(const float* base, VecI index) { return {_mm256_i32gather_ps(base, index.v, 4)}; }

inline VecI count_up(int32_t first) {  // first, first + 1, ...
  return set_int(first) + VecI{_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)};
}
inline float sum_of_lanes(Vec a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
inline float largest_lane(Vec a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
// lane i: the sum of the lanes of rows[i]
inline Vec sum_lanes(const Vec (&rows)[8]) {
  __m256 a[4], b[2];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    a[i] = _mm256_add_ps(_mm256_unpacklo_ps(rows[2 * i].v, rows[2 * i + 1].v),
                         _mm256_unpackhi_ps(rows[2 * i].v, rows[2 * i + 1].v));
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    b[i] = _mm256_add_ps(_mm256_shuffle_ps(a[2 * i], a[2 * i + 1], 0x44),
                         _mm256_shuffle_ps(a[2 * i], a[2 * i + 1], 0xee));
  return {_mm256_add_ps(_mm256_permute2f128_ps(b[0], b[1], 0x20),
                        _mm256_permute2f128_ps(b[0], b[1], 0x31))};
}

// 2^x for x <= 0 and a little above; exactly 1 at 0, 0 below kNothing (so at -inf), NaN
// at NaN.
// 2^x = 2^n 2^f with n the nearest integer: a degree-6 minimax polynomial for 2^f on [-1/2, 1/2]
// (relative error 7.9e-8 in float32) whose constant term is pinned to 1; n goes into the exponent.
inline Vec exp2(Vec x) {
  const __m256 low = _mm256_set1_ps(kNothing);
  const __m256 y = _mm256_max_ps(low, x.v);  // in this order NaN stays NaN
  const __m256 n = _mm256_round_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256 f = _mm256_sub_ps(y, n);
  __m256 p = _mm256_set1_ps(0x1.41fbbcp-13f);
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0x1.5f3e54p-10f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0x1.3b2d4cp-7f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0x1.c6aee8p-5f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0x1.ebfbdcp-3f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0x1.62e430p-1f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(1.0f));
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  const __m256 power = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent));
  const __m256 is_number = _mm256_cmp_ps(x.v, x.v, _CMP_ORD_Q);
  const __m256 finite = _mm256_blendv_ps(p, power, is_number);  // keeps NaN untouched
  return {_mm256_andnot_ps(_mm256_cmp_ps(x.v, low, _CMP_LT_OQ), finite)};
}

// rows[i] lane j <-> rows[j] lane i
inline void transpose(Vec (&rows)[8]) {
  __m256 a[8], b[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(rows[i].v, rows[i + 1].v);
    a[i + 1] = _mm256_unpackhi_ps(rows[i].v, rows[i + 1].v);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    rows[i].v = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
    rows[i + 4].v = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
  }
}

}  // namespace
