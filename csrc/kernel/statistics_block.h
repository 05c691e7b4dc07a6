// One tile of queries against one block of keys, measured: scores again, as the forward pass had
// them, then what is asked of them and of the weights. A pass over the block for each: it lies in
// the first cache, and what is not asked for costs nothing.
#pragma once

#include "statistics_top.h"

namespace {

// Sums over the rows of a block are summed by so many rows first: one chain over all of them would
// be less exact than the sums they are measured against.
constexpr int64_t kChain = 16;

// Weights w = P * l in place of scores, for rows [begin, end). With kEntropy, sum += w * (s - max).
template <int N, bool kMasked, bool kEntropy>
[[gnu::noinline]] void weigh_rows(const MeasuredTile& t, float* scores, int64_t begin, int64_t end,
                                  Vec unit, Vec (&sum)[N]) {
  constexpr int W = Vec::kLanes, L = N * W;
  const Vec lowest = set(-0x1p+126f);  // so that 0 * (s - max) is 0
  Vec largest[N], total[N];
#pragma GCC unroll 3
  for (int n = 0; n < N; ++n) {
    largest[n] = load(t.max + n * W);
    total[n] = sum[n];
  }
  while (begin < end) {
    Vec part[N];
#pragma GCC unroll 3
    for (int n = 0; n < N; ++n) part[n] = zero();
    for (const int64_t stop = minimum(begin + kChain, end); begin < stop; ++begin) {
#pragma GCC unroll 3
      for (int n = 0; n < N; ++n) {
        float* p = scores + begin * L + n * W;
        const Vec s = load(p), below = s - largest[n];
        Vec weight = exp2(below * unit);
        if constexpr (kMasked) weight = select(equal(s, set(-kInfinity)), zero(), weight);
        if constexpr (kEntropy) part[n] = fma(weight, max(below, lowest), part[n]);
        store(p, weight);
      }
    }
#pragma GCC unroll 3
    for (int n = 0; n < N; ++n) total[n] = total[n] + part[n];
  }
#pragma GCC unroll 3
  for (int n = 0; n < N; ++n) sum[n] = total[n];
}

template <int N, bool kEntropy>
inline void weigh_block(const MeasuredTile& t, const Block& block, float* scores, Vec unit,
                        Vec (&sum)[N]) {
  weigh_rows<N, true, kEntropy>(t, scores, block.begin, block.core_begin, unit, sum);
  weigh_rows<N, false, kEntropy>(t, scores, block.core_begin, block.core_end, unit, sum);
  weigh_rows<N, true, kEntropy>(t, scores, block.core_end, block.end, unit, sum);
}

template <int N>
inline void add_to_sum(MeasuredTile& t, int which, const Vec (&sum)[N]) {
#pragma GCC unroll 3
  for (int n = 0; n < N; ++n) {
    float* p = t.inner[which] + n * Vec::kLanes;
    store(p, load(p) + sum[n]);
  }
}

// sum = the sum over rows [begin, end) of term(row, n).
template <int N, class Term>
[[gnu::always_inline]] inline void sum_terms(int64_t begin, int64_t end, Vec (&sum)[N], Term term) {
  Vec total[N];
#pragma GCC unroll 3
  for (int n = 0; n < N; ++n) total[n] = zero();
  while (begin < end) {
    Vec part[N];
#pragma GCC unroll 3
    for (int n = 0; n < N; ++n) part[n] = zero();
    for (const int64_t stop = minimum(begin + kChain, end); begin < stop; ++begin)
#pragma GCC unroll 3
      for (int n = 0; n < N; ++n) part[n] = term(begin, n, part[n]);
#pragma GCC unroll 3
    for (int n = 0; n < N; ++n) total[n] = total[n] + part[n];
  }
#pragma GCC unroll 3
  for (int n = 0; n < N; ++n) sum[n] = total[n];
}

template <int N>
[[gnu::noinline]] void sum_rows(const float* weights, int64_t begin, int64_t end, Vec (&sum)[N]) {
  constexpr int W = Vec::kLanes, L = N * W;
  sum_terms<N>(begin, end, sum, [&](int64_t row, int n, Vec so_far) {
    return so_far + load(weights + row * L + n * W);
  });
}

template <int N>
[[gnu::noinline]] void sum_distances(MeasuredTile& t, const Block& block, const float* weights) {
  constexpr int W = Vec::kLanes, L = N * W;
  VecI position[N];
  Vec sum[N];
#pragma GCC unroll 3
  for (int n = 0; n < N; ++n) position[n] = load_int(t.tile->position + n * W);
  sum_terms<N>(block.begin, block.end, sum, [&](int64_t row, int n, Vec so_far) {
    const VecI away = set_int(int32_t(block.key + row)) - position[n];
    return fma(load(weights + row * L + n * W), abs(to_float(away)), so_far);
  });
  add_to_sum<N>(t, kDistanceSum, sum);
}

template <int N>
inline void sum_first_keys(const Statistics& stats, MeasuredTile& t, const Block& block,
                           const float* weights) {
  for (int64_t i = 0; i < stats.num_first; ++i) {
    const int64_t end = minimum(block.end, stats.first_keys[i] - block.key);
    if (end <= block.begin) continue;
    Vec sum[N];
    sum_rows<N>(weights, block.begin, end, sum);
    add_to_sum<N>(t, kFirstSums + int(i), sum);
  }
}

template <int N>
inline void take_offsets(const Statistics& stats, MeasuredTile& t, const Block& block,
                         const float* weights) {
  for (int64_t i = 0; i < stats.num_offsets; ++i) {
    const int64_t away = stats.offsets[i] - block.key;
    if (t.high + away < block.begin || t.low + away >= block.end) continue;
    for (int lane = 0; lane < t.tile->count; ++lane) {
      const int64_t row = t.tile->position[lane] + away;
      if (row >= block.begin && row < block.end)
        t.at_offset[i][lane] = weights[row * (N * Vec::kLanes) + lane];
    }
  }
}

// received[key][lane] += P of the rows that count, summed over the tile's vectors. Under kBroken a
// row may be NaN: 0 times that must not count.
template <int N, bool kBroken>
[[gnu::noinline]] void add_received(const MeasuredTile& t, const Block& block, const float* weights,
                                    float* received) {
  constexpr int W = Vec::kLanes, L = N * W;
  Vec factor[N];
#pragma GCC unroll 3
  for (int n = 0; n < N; ++n) factor[n] = load(t.received_by + n * W);
  for (int64_t row = block.begin; row < block.end; ++row) {
    Vec sum = load(received + row * W);
#pragma GCC unroll 3
    for (int n = 0; n < N; ++n) {
      Vec weight = load(weights + row * L + n * W);
      if constexpr (kBroken) weight = select(equal(factor[n], zero()), zero(), weight);
      sum = fma(weight, factor[n], sum);
    }
    store(received + row * W, sum);
  }
}

// Sums of P over the keys of each column of the heat map, from `column` on, take the place of the
// block's first weights; returns how many.
template <int N>
inline int64_t pool_keys(const MeasuredTile& t, const Pooling& keys, const Block& block,
                         float* weights, int64_t& column) {
  constexpr int W = Vec::kLanes, L = N * W;
  const int64_t length = keys.end - keys.begin, origin = keys.begin - block.key;
  const int64_t end = minimum(block.end, keys.end - block.key);
  int64_t row = maximum(block.begin, origin), count = 0;
  column = (row - origin) * keys.cells / length;
  for (; row < end; ++count) {
    const int64_t stop = ceil_div((column + count + 1) * length, keys.cells) + origin;
    Vec sum[N];
    sum_rows<N>(weights, row, minimum(stop, end), sum);
#pragma GCC unroll 3
    for (int n = 0; n < N; ++n)
      store(weights + count * L + n * W, sum[n] * load(t.inverse_sum + n * W));
    row = stop;
  }
  return count;
}

// Overwrites the weights.
template <int N>
[[gnu::noinline]] void add_to_map(const Statistics& stats, const MeasuredTile& t,
                                  const Block& block, float* weights) {
  constexpr int W = Vec::kLanes, L = N * W;
  const int64_t heads = stacked_heads(stats.forward);
  int64_t column;
  const int64_t count = pool_keys<N>(t, stats.pooled_keys, block, weights, column);
  for (int64_t first = 0; first < count; first += W) {
    const int64_t columns = minimum(W, count - first);
    const MapRow* to = t.map_rows;
    const MapRow* const end = to + t.num_map_rows;
    for (int n = 0; n < N; ++n) {
      Vec lanes[W];
      for (int i = 0; i < W; ++i)
        lanes[i] = i < columns ? load(weights + (first + i) * L + n * W) : zero();
      transpose(lanes);
      for (; to < end && to->vector == n; ++to) {
        Vec sum = lanes[to->lane];
        for (int i = 1; i < to->count; ++i) sum = sum + lanes[to->lane + i * heads];
        alignas(64) float by_column[W];
        store(by_column, sum);
        for (int64_t i = 0; i < columns; ++i) to->cells[column + first + i] += double(by_column[i]);
      }
    }
  }
}

template <int N, class Products>
void measure_block(const Statistics& stats, MeasuredTile& t, const Workspace& work,
                   const typename Products::Keys& kv, int64_t key_of_block, float* received) {
  const Forward& call = stats.forward;
  Tile& tile = *t.tile;
  Block block;
  if (!find_block(call, tile, work, key_of_block, block)) return;
  Vec largest[N], sum[N];
#pragma GCC unroll 3
  for (int n = 0; n < N; ++n) {
    largest[n] = load(t.largest + n * Vec::kLanes);
    sum[n] = zero();
  }
  float* const scores = tile.kept ? tile.kept + key_of_block * (N * Vec::kLanes) : work.scores;
  if (tile.kept) {
    if (call.bias.dense) block.core_begin = block.core_end = block.begin;
    if (stats.max_logit) {  // in the order below, on which NaN depends; the core's comes last
      take_max<N>(scores, block.begin, block.core_begin, largest);
      take_max<N>(scores, block.core_end, block.end, largest);
    }
  } else {
    Products::template compute_scores<N>(call, tile, work, kv, block, nullptr);
    make_logits<N>(call, tile, block, work);
    mask_scores<N>(tile, block, work, block.begin, block.core_begin, largest);
    mask_scores<N>(tile, block, work, block.core_end, block.end, largest);
  }
  if (stats.max_logit) {
    take_max<N>(scores, block.core_begin, block.core_end, largest);
#pragma GCC unroll 3
    for (int n = 0; n < N; ++n) store(t.largest + n * Vec::kLanes, largest[n]);
  }
  if (stats.top) find_top<N>(t, block, scores, stats.top);

  const Vec unit = set(score_unit(call));
  if (stats.entropy) {
    weigh_block<N, true>(t, block, scores, unit, sum);
    add_to_sum<N>(t, kEntropySum, sum);
  } else {
    weigh_block<N, false>(t, block, scores, unit, sum);
  }
  if (stats.mean_distance) sum_distances<N>(t, block, scores);
  sum_first_keys<N>(stats, t, block, scores);
  take_offsets<N>(stats, t, block, scores);
  if (stats.received)
    t.broken ? add_received<N, true>(t, block, scores, received)
             : add_received<N, false>(t, block, scores, received);
  if (t.num_map_rows) add_to_map<N>(stats, t, block, scores);
}

}  // namespace
