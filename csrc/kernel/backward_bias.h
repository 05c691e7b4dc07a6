// Gradients of what is added to the scores, from dS of one tile and block: sums over queries, keys
// or distances. Vertical where keys are summed; where queries are, dS is transposed first, so that
// a query's keys lie side by side.
#pragma once

#include "backward_block.h"

namespace {

// What kind of sum a dense bias's gradient is; an axis of size 1 stands for all.
inline bool dense_by_pair(const Backward& back) {
  return back.grad_dense && back.grad_dense_stride[2] && back.grad_dense_stride[3];
}
inline bool dense_by_key(const Backward& back) {
  return back.grad_dense && !back.grad_dense_stride[2] && back.grad_dense_stride[3];
}
inline bool dense_by_row(const Backward& back) {
  return back.grad_dense && !back.grad_dense_stride[3];
}
inline bool wants_by_query(const Backward& back) {
  return dense_by_pair(back) || dense_by_key(back) || back.grad_distance_values;
}
inline bool wants_bias_gradients(const Backward& back) {
  return back.grad_slopes || dense_by_row(back) || wants_by_query(back);
}

template <int N>
[[gnu::noinline]] void sum_over_keys(const Backward& back, const BackwardWork& work,
                                     const Block& block, BackwardTile& t) {
  constexpr int W = Vec::kLanes, L = N * W;
  for (int n = 0; n < N; ++n) {
    const VecI position = load_int(t.tile.position + n * W);
    Vec plain = zero(), far = zero();
    for (int64_t row = block.begin; row < block.end; ++row) {
      const Vec grad = load(work.grad + row * L + n * W);
      const Vec ahead = to_float(set_int(int32_t(block.key + row)) - position);
      plain = plain + grad;
      far = fma(grad, zero() - abs(ahead), far);
    }
    if (dense_by_row(back)) store(t.row_sum + n * W, load(t.row_sum + n * W) + plain);
    if (back.grad_slopes) store(t.distance_sum + n * W, load(t.distance_sum + n * W) + far);
  }
}

template <int N>
[[gnu::noinline]] void transpose_grad(const BackwardWork& work, const Block& block) {
  constexpr int W = Vec::kLanes, L = N * W;
  for (int64_t row = block.begin; row < block.end; row += W) {
    for (int n = 0; n < N; ++n) {
      Vec values[W];
      for (int64_t i = 0; i < W; ++i)
        values[i] = row + i < block.end ? load(work.grad + (row + i) * L + n * W) : zero();
      transpose(values);
      for (int64_t i = 0; i < W; ++i)
        store(work.by_query + (n * W + i) * kQueryRow + row - block.begin, values[i]);
    }
  }
}

inline void add_row(const float* from, int64_t n, float* to) {
  constexpr int W = Vec::kLanes;
  int64_t i = 0;
  for (; i + W <= n; i += W) store(to + i, load(to + i) + load(from + i));
  if (i < n) store_some(to + i, load_some(to + i, n - i) + load_some(from + i, n - i), n - i);
}

inline float sum_row(const float* from, int64_t n) {
  constexpr int W = Vec::kLanes;
  Vec sum = zero();
  int64_t i = 0;
  for (; i + W <= n; i += W) sum = sum + load(from + i);
  if (i < n) sum = sum + load_some(from + i, n - i);
  float lanes[W], total = 0;
  store(lanes, sum);
  for (int j = 0; j < W; ++j) total += lanes[j];
  return total;
}

// One query's dS for n keys, the first of which has distance index `index` (not yet clamped).
inline void add_distances(const float* grad, int64_t n, int64_t index, int64_t num, float* values) {
  const int64_t low = minimum(maximum(-index, 0), n);
  const int64_t high = maximum(minimum(num - index, n), low);
  if (low > 0) values[0] += sum_row(grad, low);
  if (high > low) add_row(grad + low, high - low, values + index + low);
  if (n > high) values[num - 1] += sum_row(grad + high, n - high);
}

// dS of the block into every sum that a bias wants.
template <int N>
inline void add_bias_gradients(const Backward& back, const BackwardWork& work, const Block& block,
                               const KeySums& keys, int64_t keys_per_head, BackwardTile& t) {
  if (back.grad_slopes || dense_by_row(back)) sum_over_keys<N>(back, work, block, t);
  if (!wants_by_query(back)) return;
  transpose_grad<N>(work, block);
  const Bias& bias = back.forward.bias;
  const Tile& tile = t.tile;
  const int64_t group = back.forward.Hq / back.forward.Hkv, n = block.end - block.begin;
  const int64_t key = block.key + block.begin;
  for (int lane = 0; lane < tile.count; ++lane) {
    const float* grad = work.by_query + lane * kQueryRow;
    const int64_t head = tile.head[lane], member = head - tile.hkv * group;
    if (back.grad_distance_values)
      add_distances(grad, n, key - tile.position[lane] + bias.distance_offset, bias.num_distances,
                    keys.distance_values + member * bias.num_distances);
    if (dense_by_key(back))
      add_row(grad, n, keys.dense_keys + member * keys_per_head + key - keys.key);
    if (dense_by_pair(back)) {
      const int64_t* stride = back.grad_dense_stride;
      add_row(grad, n,
              back.grad_dense + tile.b * stride[0] + head * stride[1] + tile.row[lane] * stride[2] +
                  key);
    }
  }
}

}  // namespace
