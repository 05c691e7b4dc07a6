// One tile of queries against one block of keys, backward. With P the weights, dO and dP the
// gradients of output and weights, S the logits and delta = rowsum(dO * O) - dlse:
//
//   Sᵀ = K Qᵀ    P = exp(S - max) / sum    dPᵀ = V dOᵀ    dS = P * (dP - delta)
//   dV += Pᵀ dO    dK += dSᵀ Q    dQᵀ += Kᵀ dSᵀ
//
// Five products, all by the one micro-kernel. Scores are recomputed in the forward pass's own
// order, so that S - max is what it was there, bit for bit, however large both are. delta is summed
// in the order of dP: where one key has all the weight, dP - delta is exactly 0.
//
// Sums over keys and over queries start from zero for every block or tile and are then added.
#pragma once

#include "forward.h"

namespace {

// Q and dO are packed as the products want them: what is said here is of those in float32.
struct BackwardTile {
  Tile tile;                      // tile.query is Qᵀ [D][lanes]
  float* grad_out;                // dOᵀ [Dv][lanes]
  float *query_rows, *grad_rows;  // Q and dO in panels of columns, see pack_panels
  float* grad_query;              // dQᵀ [D][lanes], without the scale, summed over a superblock
  alignas(64) float max[kMaxLanes], inverse_sum[kMaxLanes], delta[kMaxLanes];
  alignas(64) float row_sum[kMaxLanes];       // of dS over a superblock
  alignas(64) float distance_sum[kMaxLanes];  // of -dS |p - j| likewise
};

// Sums that belong to one head's superblock of keys, over a span of queries.
struct KeySums {
  int64_t key;                   // its first key
  float *grad_key, *grad_value;  // [keys][D], [keys][Dv], rows padded to whole vectors
  float* distance_values;        // [G][N]
  float* dense_keys;             // [G][keys]
};

struct BackwardWork {
  Workspace forward;  // its scores become weights
  float* grad;        // [kBlock][lanes]: dP, then dS
  float* kept;        // [kBlock][lanes] under dropout: what weights are multiplied by
  float* by_query;    // [lanes][kQueryRow]: dS transposed, where a bias wants it
  float* narrowed;    // P and dS in bfloat16, where pairs of those are multiplied
  const float* zeros;
};
constexpr int64_t kQueryRow = kBlock + Vec::kLanes;

inline int64_t padded(int64_t width) {
  return (width + Vec::kLanes - 1) / Vec::kLanes * Vec::kLanes;
}

// Calls each(panel, first column) for panels of 1 to 3 vectors that make up `width` columns.
template <int N>
struct Panel {
  static constexpr int vectors = N;
};
template <class Each>
[[gnu::always_inline]] inline void for_panels(int64_t width, Each each) {
  int64_t left = padded(width) / Vec::kLanes, first = 0;
  while (left > 0) {
    const int vectors = left == 2 || left == 4 ? 2 : left == 1 ? 1 : 3;
    if (vectors == 3) each(Panel<3>{}, first);
    if (vectors == 2) each(Panel<2>{}, first);
    if (vectors == 1) each(Panel<1>{}, first);
    left -= vectors;
    first += vectors * Vec::kLanes;
  }
}

// Rows of one lane each, as the micro-kernel wants them for its second operand: panel after panel,
// each [count][panel's columns], padded with zeros.
template <class RowOf>
inline void pack_panels(const Forward& call, int64_t count, int64_t width, float* to,
                        RowOf row_of) {
  constexpr int W = Vec::kLanes;
  for_panels(width, [&](auto panel, int64_t first) {
    constexpr int N = panel.vectors;
    float* q = to + first * count;
    for (int64_t lane = 0; lane < count; ++lane) {
      const void* row = row_of(int(lane));
#pragma GCC unroll 3
      for (int n = 0; n < N; ++n, q += W) {
        const int64_t column = first + n * W;
        store(q, load_row(call.type, row, column, minimum(width - column, W)));
      }
    }
  });
}

// Weights P in place of scores and dS in place of dP, for rows [begin, end). Where kMasked, a pair
// that does not attend gets -0 for both, whatever dP is.
template <int N, bool kMasked>
[[gnu::noinline]] void differentiate(const BackwardTile& t, const BackwardWork& work, Vec unit,
                                     int64_t begin, int64_t end) {
  constexpr int W = Vec::kLanes, L = N * W;
  Vec max[N], inverse[N], delta[N];
#pragma GCC unroll 3
  for (int n = 0; n < N; ++n) {
    max[n] = load(t.max + n * W);
    inverse[n] = load(t.inverse_sum + n * W);
    delta[n] = load(t.delta + n * W);
  }
  for (int64_t row = begin; row < end; ++row) {
#pragma GCC unroll 3
    for (int n = 0; n < N; ++n) {
      float* p = work.forward.scores + row * L + n * W;
      float* q = work.grad + row * L + n * W;
      const Vec s = load(p);
      Vec weight = exp2((s - max[n]) * unit) * inverse[n];
      Vec grad = weight * (load(q) - delta[n]);
      if constexpr (kMasked) {
        const Lanes masked = equal(s, set(-kInfinity));
        weight = select(masked, set(-0.0f), weight);
        grad = select(masked, set(-0.0f), grad);
      }
      store(p, weight);
      store(q, grad);
    }
  }
}

template <int N>
[[gnu::noinline]] void through_softcap(const BackwardWork& work, const Block& block) {
  for (int64_t i = block.begin * N; i < block.end * N; ++i) {
    float* p = work.grad + i * Vec::kLanes;
    const Vec grad = load(p), slope = load(work.forward.softcap_slopes + i * Vec::kLanes);
    store(p, select(equal(grad, zero()), grad, grad * slope));  // a masked slope may be NaN
  }
}

// Where a superblock's sums for the rows of this block begin.
inline float* rows_of(float* sums, const KeySums& keys, const Block& block, int64_t width) {
  return sums + (block.key - keys.key) * padded(width);
}

// sums[key] += sum over the tile's queries of left[key][query] * right[query], for one block.
template <int N>
inline void multiply_queries(const BackwardTile& t, const Block& block, const float* left,
                             const float* right, int64_t width, Prefetcher& soon, float* sums) {
  const int64_t count = t.tile.count, stride = padded(width);
  for_panels(width, [&](auto panel, int64_t first) {
    multiply_rows<panel.vectors, false>(left, N * Vec::kLanes, right + first * count, count,
                                        block.begin, block.end, soon,
                                        AddToRows<panel.vectors>{sums + first, stride});
  });
}

template <int N>
inline void multiply_keys(const Forward& call, const BackwardTile& t, const BackwardWork& work,
                          const KeyValue& kv, const Block& block) {
  constexpr int L = N * Vec::kLanes;
  const float* rows = kv.key + block.begin * kv.key_stride;
  const float* grad = work.grad + block.begin * L;
  const int64_t T = block.end - block.begin;
  const AddToRows<N> add{t.grad_query, L};
  if (masked_rows_not_finite(block, kv.key, kv.key_stride, call.D))
    multiply_guarded<N>(rows, kv.key_stride, grad, T, call.D, add);
  else
    multiply_rows<N, true>(rows, kv.key_stride, grad, T, 0, call.D, *work.forward.soon, add);
}

}  // namespace
