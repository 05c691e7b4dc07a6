// Pairs of half-precision numbers, beside Vec for AVX-512: the words of the products in
// kernel/pairs.h. In products of bfloat16 subnormal numbers count as zero, and so do subnormal
// results.
#pragma once

#include "attention.h"
#include "vec_avx512.h"

namespace {

// Two neighbouring terms of a sum of products.
struct alignas(4) Pair {
  uint16_t first, second;
};
struct VecPairs {
  __m512i v;
};

inline VecPairs load(const Pair* p) { return {_mm512_loadu_si512(p)}; }
// The first n of 2 * kLanes numbers, then zeros, which are not read.
inline VecPairs load_some(const uint16_t* p, int64_t n) {
  return {_mm512_maskz_loadu_epi16(__mmask32((uint64_t(1) << n) - 1), p)};
}
inline void store(Pair* p, VecPairs x) { _mm512_storeu_si512(p, x.v); }
inline VecPairs no_pairs() { return {_mm512_setzero_si512()}; }
inline VecPairs set(Pair x) {
  return {_mm512_set1_epi32(int32_t(uint32_t(x.second) << 16 | x.first))};
}
// c + a.first * b.first + a.second * b.second, in bfloat16
inline Vec fma(VecPairs a, VecPairs b, Vec c) {
  return {_mm512_dpbf16_ps(c.v, (__m512bh)a.v, (__m512bh)b.v)};
}

// As exp2, of degree 5 (relative error 9.4e-8 before rounding): one step less, for weights that are
// rounded to a half type. Degree 4 (2.9e-6) would show in the log-sum-exp, which is float32.
inline Vec short_exp2(Vec x) {
  const Vec f = fraction(x);
  Vec p = set(0x1.e974fcp-10f);
  p = fma(p, f, set(0x1.277854p-7f));
  p = fma(p, f, set(0x1.c91ce6p-5f));
  p = fma(p, f, set(0x1.ebdb56p-3f));
  p = fma(p, f, set(0x1.62e4bap-1f));
  p = fma(p, f, set(1.0f));
  return times_power(p, x);
}

// The sign of both numbers turned.
inline VecPairs operator-(VecPairs x) {
  return {_mm512_xor_si512(x.v, _mm512_set1_epi32(int32_t(0x80008000)))};
}

// What a half type is: its exponent's bits; its rounding, to the nearest with ties to even and NaN
// to NaN; the factor that keeps the weights, at most 1, in its range of full precision; and whether
// its range holds the gradients of scores, so that the backward pass can be computed in it.
struct Bfloat16 {
  static constexpr manyheads::Type kType = manyheads::Type::bfloat16;
  static constexpr uint16_t kExponent = 0x7f80;
  static constexpr float kWeightScale = 1;
  static constexpr bool kHasBackward = true;
  static __m512i round(Vec low, Vec high) { return (__m512i)_mm512_cvtne2ps_pbh(high.v, low.v); }
  static float widen(uint16_t half) {
    const uint32_t bits = uint32_t(half) << 16;
    float x;
    __builtin_memcpy(&x, &bits, sizeof x);
    return x;
  }
};
struct Float16 {
  static constexpr manyheads::Type kType = manyheads::Type::float16;
  static constexpr uint16_t kExponent = 0x7c00;
  static constexpr float kWeightScale = 1 << 15;
  static constexpr bool kHasBackward = false;
  static __m512i round(Vec low, Vec high) {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtps_ph(low.v, kNearest)),
                              _mm512_cvtps_ph(high.v, kNearest), 1);
  }
  static float widen(uint16_t half) {
    return _mm512_cvtss_f32(_mm512_cvtph_ps(_mm256_set1_epi16(int16_t(half))));
  }
};

template <class Half>
inline __mmask32 are_finite(VecPairs x) {
  const __m512i exponent = _mm512_set1_epi16(Half::kExponent);
  return _mm512_cmpneq_epi16_mask(_mm512_and_si512(x.v, exponent), exponent);
}
template <class Half>
inline bool all_finite(VecPairs x) {
  return are_finite<Half>(x) == 0xffffffff;
}
template <class Half>
inline VecPairs only_finite(VecPairs x) {  // inf and NaN become 0
  return {_mm512_maskz_mov_epi16(are_finite<Half>(x), x.v)};
}

// Lane i: number i of the lower and of the upper half.
inline VecPairs zip_halves(__m512i halves) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                      21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                      11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return {_mm512_permutexvar_epi16(_mm512_load_si512(kOrder), halves)};
}
// Lane i: number i of two rows, of which n are read; a null row is zeros.
inline VecPairs zip(const uint16_t* first, const uint16_t* second, int64_t n) {
  const __mmask16 real = Lanes((1u << n) - 1);
  const __m256i low = _mm256_maskz_loadu_epi16(real, first);
  const __m256i high = _mm256_maskz_loadu_epi16(second ? real : 0, second);
  return zip_halves(_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
}
template <class Half>
inline VecPairs zip(Vec first, Vec second) {
  return zip_halves(Half::round(first, second));
}
inline void store_halves(Pair* first, Pair* second, VecPairs x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(first), _mm512_castsi512_si256(x.v));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(second), _mm512_extracti64x4_epi64(x.v, 1));
}

inline void transpose(VecPairs (&rows)[16]) {  // words are moved, whatever they mean
  Vec bits[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) bits[i] = {_mm512_castsi512_ps(rows[i].v)};
  transpose(bits);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) rows[i] = {_mm512_castps_si512(bits[i].v)};
}

}  // namespace
