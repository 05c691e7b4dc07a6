// The one micro-kernel: C[r][lane] = sum over t of A[r][t] * B[t][lane].
//
// A is broadcast, one number at a time, from where it lies in memory; B and C have `N` vectors of
// lanes. Numbers of A and B are floats, or pairs of bfloat16 along t (pairs.h). 8 x 3, 12 x 2 or 16
// x 1 accumulators hide the FMA's latency and need fewer loads than two load ports give. Each
// C[r][lane] is one chain of FMAs in ascending t from zero, whatever R and N are: that is what
// makes results independent of how work was cut.
#pragma once

#include <cstdint>

#include "prefetch.h"

namespace {

template <int N>
constexpr int kRows = N == 3   ? Vec::kRows3
                      : N == 2 ? Vec::kRows2
                               : Vec::kRows1;

// How many steps of a product there are to one prefetch.
constexpr int kStepsPerLine = 2;

template <int R, int N, class Number>
[[gnu::always_inline]] inline void multiply_step(Vec (&c)[R][N], const Number* a, int64_t a_row,
                                                 const Number* b) {
  decltype(load(b)) lanes[N];
#pragma GCC unroll 3
  for (int n = 0; n < N; ++n) lanes[n] = load(b + n * Vec::kLanes);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const auto x = set(a[r * a_row]);
#pragma GCC unroll 3
    for (int n = 0; n < N; ++n) c[r][n] = fma(x, lanes[n], c[r][n]);
  }
}

// One register tile. `Use` takes the finished tile: use(row, c). Out of line, so that each has the
// registers to itself.
template <int R, int N, bool kRowsAdjacent, class Number, class Use>
[[gnu::noinline]] void multiply_tile(const Number* a, int64_t stride, const Number* b, int64_t T,
                                     int64_t row, const void* const* soon, Use use) {
  const int64_t a_row = kRowsAdjacent ? 1 : stride, a_step = kRowsAdjacent ? stride : 1;
  a += row * a_row;
  Vec c[R][N];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
    for (int n = 0; n < N; ++n) c[r][n] = zero();
  int64_t t = 0;
  for (; t + kStepsPerLine <= T; t += kStepsPerLine) {
    __builtin_prefetch(*soon++, 0, 2);
#pragma GCC unroll 2
    for (int i = 0; i < kStepsPerLine; ++i) {
      multiply_step<R, N>(c, a, a_row, b);
      a += a_step;
      b += N * Vec::kLanes;
    }
  }
  for (; t < T; ++t) {
    multiply_step<R, N>(c, a, a_row, b);
    a += a_step;
    b += N * Vec::kLanes;
  }
  use(row, c);
}

// C for rows [begin, end) of A: full register tiles first, then halves of what is left.
// A is [rows][T]: with kRowsAdjacent a[t * stride + row] (V, used as its transpose), otherwise
// a[row * stride + t] (K). B is [T][N * kLanes], T at most kMaxSteps.
constexpr int64_t kMaxSteps = 128;

template <int N, bool kRowsAdjacent, int R = kRows<N>, class Number, class Use>
inline void multiply_rows(const Number* a, int64_t stride, const Number* b, int64_t T,
                          int64_t begin, int64_t end, Prefetcher& soon, Use use) {
  for (; end - begin >= R; begin += R) {
    const void* lines[kMaxSteps / kStepsPerLine];
    soon.take(lines, T / kStepsPerLine, b);
    multiply_tile<R, N, kRowsAdjacent>(a, stride, b, T, begin, lines, use);
  }
  if constexpr (R > 1) {
    constexpr int kNext = R > 8 ? 8 : R / 2;
    multiply_rows<N, kRowsAdjacent, kNext>(a, stride, b, T, begin, end, soon, use);
  }
}

// sums[row] += c, rows `stride` apart.
template <int N>
struct AddToRows {
  float* sums;
  int64_t stride;
  template <int R>
  void operator()(int64_t row, Vec (&c)[R][N]) const {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 3
      for (int n = 0; n < N; ++n) {
        float* p = sums + (row + r) * stride + n * Vec::kLanes;
        store(p, load(p) + c[r][n]);
      }
    }
  }
};

}  // namespace
