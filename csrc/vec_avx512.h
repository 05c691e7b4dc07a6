// Vec for AVX-512 (F, BW, DQ, VL): 16 float lanes, 32 registers.
// Every vec_*.h offers the same names; the kernels are written over them and nothing else.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "exponent.h"

namespace {

struct Vec {
  static constexpr int kLanes = 16;
  static constexpr int kRows3 = 8, kRows2 = 12,
                       kRows1 = 16;  // micro-kernel rows at 3, 2, 1 vectors
  __m512 v;
};
struct VecI {
  __m512i v;
};
using Lanes = __mmask16;  // one bit per lane

inline Vec zero() { return {_mm512_setzero_ps()}; }
inline Vec set(float x) { return {_mm512_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load_some(const float* p, int64_t n) {  // lanes n.. are zero and not read
  return {_mm512_maskz_loadu_ps(Lanes((1u << n) - 1), p)};
}
inline Vec load_bytes(const uint8_t* p, int64_t n) {  // the first n bytes as floats, then zeros
  return {_mm512_cvtepi32_ps(
      _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(Lanes(n >= 16 ? 0xffff : (1u << n) - 1), p)))};
}
inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x.v); }
inline void store_some(float* p, Vec x, int64_t n) {
  _mm512_mask_storeu_ps(p, Lanes((1u << n) - 1), x.v);
}

// 16 values of a half type, or n and zeros. bfloat16 is put into the upper halves by one
// permutation, not a conversion and a shift; one of bytes is half the work of one of words.
inline Vec widen_bfloat16(__m512i bits, int half = 0) {
#ifdef __AVX512VBMI__
  const __m512i first = _mm512_set_epi16(
      0x1f1e, 0, 0x1d1c, 0, 0x1b1a, 0, 0x1918, 0, 0x1716, 0, 0x1514, 0, 0x1312, 0, 0x1110, 0,
      0x0f0e, 0, 0x0d0c, 0, 0x0b0a, 0, 0x0908, 0, 0x0706, 0, 0x0504, 0, 0x0302, 0, 0x0100, 0);
  const __m512i from = _mm512_or_si512(first, _mm512_set1_epi8(char(32 * half)));
  return {_mm512_castsi512_ps(_mm512_maskz_permutexvar_epi8(0xccccccccccccccccu, from, bits))};
#else
  const __m512i first = _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0, 7, 0,
                                         6, 0, 5, 0, 4, 0, 3, 0, 2, 0, 1, 0, 0, 0);
  const __m512i from = _mm512_or_si512(first, _mm512_set1_epi16(short(16 * half)));
  return {_mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, from, bits))};
#endif
}
inline Vec load_bfloat16(const uint16_t* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return widen_bfloat16(_mm512_castsi256_si512(bits));
}
inline Vec load_some_bfloat16(const uint16_t* p, int64_t n) {
  return widen_bfloat16(_mm512_castsi256_si512(_mm256_maskz_loadu_epi16(Lanes((1u << n) - 1), p)));
}
inline void load_two_bfloat16(const uint16_t* p, Vec& first, Vec& second) {  // 32 values
  const __m512i bits = _mm512_loadu_si512(p);
  first = widen_bfloat16(bits, 0);
  second = widen_bfloat16(bits, 1);
}
inline Vec load_float16(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline Vec load_some_float16(const uint16_t* p, int64_t n) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(Lanes((1u << n) - 1), p))};
}
inline void store_bfloat16(uint16_t* p, Vec x) {  // to the nearest, ties to even; NaN stays NaN
  const __m512i bits = _mm512_castps_si512(x.v), high = _mm512_srli_epi32(bits, 16);
  const __m512i even = _mm512_and_si512(high, _mm512_set1_epi32(1));
  const __m512i bias = _mm512_add_epi32(even, _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
  const __m512i result = _mm512_mask_or_epi32(rounded, _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q),
                                              high, _mm512_set1_epi32(0x40));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(result));
}
inline void store_float16(uint16_t* p, Vec x) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x.v, kNearest));
}

inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }  // a * b + c
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }

inline Vec select(Lanes which, Vec yes, Vec no) {
  return {_mm512_mask_blend_ps(which, no.v, yes.v)};
}
inline Lanes equal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ); }
inline Lanes less(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
inline Lanes is_nan(Vec a) { return _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q); }
inline Lanes has_sign(Vec a) { return _mm512_movepi32_mask(_mm512_castps_si512(a.v)); }
inline Lanes both(Lanes a, Lanes b) { return a & b; }
inline Lanes either(Lanes a, Lanes b) { return a | b; }
inline bool any(Lanes a) { return a != 0; }
inline bool all(Lanes a) { return a == 0xffff; }
inline uint32_t bits(Lanes a) { return a; }  // bit i: lane i

inline VecI set_int(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline VecI load_int(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
inline void store_int(int32_t* p, VecI x) { _mm512_storeu_si512(p, x.v); }
inline VecI select(Lanes which, VecI yes, VecI no) {
  return {_mm512_mask_blend_epi32(which, no.v, yes.v)};
}
inline VecI operator+(VecI a, VecI b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline VecI operator-(VecI a, VecI b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline VecI min(VecI a, VecI b) { return {_mm512_min_epi32(a.v, b.v)}; }
inline VecI max(VecI a, VecI b) { return {_mm512_max_epi32(a.v, b.v)}; }
inline VecI operator^(VecI a, VecI b) { return {_mm512_xor_si512(a.v, b.v)}; }
inline VecI low_half(VecI a) { return {_mm512_and_si512(a.v, _mm512_set1_epi32(0xffff))}; }
inline VecI high_half(VecI a) { return {_mm512_srli_epi32(a.v, 16)}; }
inline void multiply_wide(VecI a, uint32_t b, VecI& high, VecI& low) {  // unsigned, 64 bits
  const __m512i factor = _mm512_set1_epi32(int(b));
  const __m512i even = _mm512_mul_epu32(a.v, factor);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a.v, 32), factor);
  high.v = _mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
  low.v = _mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
}
inline Vec to_float(VecI a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline Lanes within(VecI low, VecI x, VecI high) {  // low <= x < high
  return _mm512_mask_cmplt_epi32_mask(_mm512_cmple_epi32_mask(low.v, x.v), x.v, high.v);
}
inline Vec gather(const float* base, VecI index) { return {_mm512_i32gather_ps(index.v, base, 4)}; }

inline VecI count_up(int32_t first) {  // first, first + 1, ...
  return set_int(first) +
         VecI{_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)};
}
inline float sum_of_lanes(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline float largest_lane(Vec a) { return _mm512_reduce_max_ps(a.v); }
// lane i: the sum of the lanes of rows[i]
inline Vec sum_lanes(const Vec (&rows)[16]) {
  __m512 a[8], b[4], c[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    a[i] = _mm512_add_ps(_mm512_unpacklo_ps(rows[2 * i].v, rows[2 * i + 1].v),
                         _mm512_unpackhi_ps(rows[2 * i].v, rows[2 * i + 1].v));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    b[i] = _mm512_add_ps(_mm512_shuffle_ps(a[2 * i], a[2 * i + 1], 0x44),
                         _mm512_shuffle_ps(a[2 * i], a[2 * i + 1], 0xee));
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    c[i] = _mm512_add_ps(_mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x88),
                         _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xdd));
  return {_mm512_add_ps(_mm512_shuffle_f32x4(c[0], c[1], 0x88),
                        _mm512_shuffle_f32x4(c[0], c[1], 0xdd))};
}

// x - floor(x)
inline Vec fraction(Vec x) {
  return {_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
}
// a * 2^floor(x), or 0 where x < kNothing; vscalefps takes the floor by itself.
inline Vec times_power(Vec a, Vec x) {
  const __mmask16 counts = _mm512_cmp_ps_mask(x.v, _mm512_set1_ps(kNothing), _CMP_NLT_UQ);
  return {_mm512_maskz_scalef_ps(counts, a.v, x.v)};
}

// 2^x for x <= 0 and a little above; exactly 1 at 0, 0 below kNothing (so at -inf),
// NaN at NaN. 2^x = 2^floor(x) 2^f
// with f in [0, 1): a degree-6 minimax polynomial for 2^f (relative error 6.5e-8 in float32) whose
// constant term is pinned to 1.
inline Vec exp2(Vec x) {
  const __m512 f = fraction(x).v;
  __m512 p = _mm512_set1_ps(0x1.c54176p-13f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.46d64cp-10f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.3d0b92p-7f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.c68912p-5f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.ebfd58p-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.62e42cp-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return times_power({p}, x);
}

// rows[i] lane j <-> rows[j] lane i
inline void transpose(Vec (&rows)[16]) {
  __m512 a[16], b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps(rows[i].v, rows[i + 1].v);
    a[i + 1] = _mm512_unpackhi_ps(rows[i].v, rows[i + 1].v);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm512_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    a[i] = _mm512_shuffle_f32x4(b[i], b[i + 4], 0x88);
    a[i + 4] = _mm512_shuffle_f32x4(b[i], b[i + 4], 0xdd);
    a[i + 8] = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0x88);
    a[i + 12] = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    rows[i].v = _mm512_shuffle_f32x4(a[i], a[i + 8], 0x88);
    rows[i + 4].v = _mm512_shuffle_f32x4(a[i + 4], a[i + 12], 0x88);
    rows[i + 8].v = _mm512_shuffle_f32x4(a[i], a[i + 8], 0xdd);
    rows[i + 12].v = _mm512_shuffle_f32x4(a[i + 4], a[i + 12], 0xdd);
  }
}

}  // namespace
