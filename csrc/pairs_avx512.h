// Pairs of bfloat16 for AVX512-BF16, beside Vec for AVX-512: the words of the products in
// kernel/pairs.h. Subnormal numbers count as zero in these products, and so do subnormal results.
#pragma once

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
// c + a.first * b.first + a.second * b.second
inline Vec fma(VecPairs a, VecPairs b, Vec c) {
  return {_mm512_dpbf16_ps(c.v, (__m512bh)a.v, (__m512bh)b.v)};
}

// The sign of both numbers turned.
inline VecPairs operator-(VecPairs x) {
  return {_mm512_xor_si512(x.v, _mm512_set1_epi32(int32_t(0x80008000)))};
}
inline __mmask32 are_finite(VecPairs x) {
  const __m512i exponent = _mm512_set1_epi16(0x7f80);
  return _mm512_cmpneq_epi16_mask(_mm512_and_si512(x.v, exponent), exponent);
}
inline bool all_finite(VecPairs x) { return are_finite(x) == 0xffffffff; }
inline VecPairs only_finite(VecPairs x) {  // inf and NaN become 0
  return {_mm512_maskz_mov_epi16(are_finite(x), x.v)};
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
// Both rounded to the nearest, ties to even, one after the other; NaN stays NaN.
inline VecPairs narrow(Vec first, Vec second) {
  return {(__m512i)_mm512_cvtne2ps_pbh(second.v, first.v)};
}
inline VecPairs zip(Vec first, Vec second) { return zip_halves(narrow(first, second).v); }
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
