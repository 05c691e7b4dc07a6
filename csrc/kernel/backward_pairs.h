// The products of the backward pass on pairs of bfloat16, as those of the forward pass in pairs.h:
// K, Q, V and dO are what they are, P and dS are rounded, every sum is float32.
//
//   product             pairs along    packed
//   Sᵀ = K Qᵀ           columns        K by rows once per superblock, Qᵀ once per tile
//   dPᵀ = V dOᵀ         columns        V and dOᵀ likewise
//   dV += Pᵀ dO         queries        P rounded in place of its rows, dO by pairs of rows per tile
//   dK += dSᵀ Q         queries        dS and Q likewise
//   dQᵀ += Kᵀ dSᵀ       keys           K by columns once per superblock, pairs of dS's rows
//
// Scores have the forward pass's own bits, and delta is a product of the same kind as dP, so that
// what backward_block.h promises of both holds here too.
#pragma once

#include "backward.h"
#include "entry_pairs.h"

namespace {

// Lanes of a row of P and dS by queries, a whole number of tiles of pairs.
constexpr int64_t kQueryPairs = (kMaxLanes + 2 * kLinePairs - 1) / (2 * kLinePairs) * kLinePairs;

// K and V of a superblock, or of one of its blocks, packed; and K as it lies.
struct PairKeysBackward {
  const Pair *key, *value;  // [keys][pairs of a row]
  const Pair* key_columns;  // [blocks][D][kKeyPairs]
  const uint8_t* finite;    // [blocks]: without inf and NaN in K, which are 0 in key_columns
  const uint16_t* key_rows;
  int64_t key_stride;
};

// Rows of one lane each, by pairs of rows: panel after panel, each [query pairs][panel's columns],
// padded with zeros to whole tiles.
inline void pack_panel_pairs(int64_t count, int64_t width, Pair* to, const void* const* rows) {
  constexpr int W = Vec::kLanes;
  const int64_t pairs = pairs_of_row(count);
  for_panels(width, [&](auto panel, int64_t first) {
    constexpr int N = panel.vectors;
    Pair* q = to + first * pairs;
    const auto at = [&](int64_t lane) { return static_cast<const uint16_t*>(rows[lane]) + first; };
    const auto store_row = [&](const uint16_t* row, const uint16_t* next) {
#pragma GCC unroll 3
      for (int n = 0; n < N; ++n, q += W) {
        const int64_t i = n * W, columns = minimum(width - first - i, W);
        store(q, zip(row + i, next ? next + i : nullptr, columns));
      }
    };
    int64_t lane = 0;
    for (; lane + 2 <= count; lane += 2) store_row(at(lane), at(lane + 1));
    if (lane < count) store_row(at(lane), nullptr);
    for (Pair* const end = to + (first + N * W) * pairs; q < end; q += W) store(q, no_pairs());
  });
}

// P and dS of some rows of a block, rounded.
struct NarrowedRows {
  Pair *weights, *grads;  // [rows][kQueryPairs]: pairs of neighbouring queries
  Pair* grads_by_key;     // [rows / 2][lanes]: pairs of neighbouring keys
};

template <int N, class Half>
[[gnu::always_inline]] inline void narrow_two(int64_t row, const Vec (&weight)[2][N],
                                              const Vec (&grad)[2][N], const NarrowedRows& to) {
  constexpr int W = Vec::kLanes, L = N * W;
  Pair* const weights = to.weights + row * kQueryPairs;
  Pair* const grads = to.grads + row * kQueryPairs;
#pragma GCC unroll 3
  for (int n = 0; n < N; ++n) {
    const int64_t i = n * (W / 2);
    const VecPairs both{Half::round(grad[0][n], grad[1][n])};
    store_halves(weights + i, weights + kQueryPairs + i,
                 VecPairs{Half::round(weight[0][n], weight[1][n])});
    store_halves(grads + i, grads + kQueryPairs + i, both);
    store(to.grads_by_key + row / 2 * L + n * W, zip_halves(both.v));
  }
  if constexpr (N == 1) {  // up to a whole tile of pairs, where other tiles' lanes may lie
    store_halves(weights + W / 2, weights + kQueryPairs + W / 2, no_pairs());
    store_halves(grads + W / 2, grads + kQueryPairs + W / 2, no_pairs());
  }
}

// The block's rows of P and dS, and zeros for others of [begin, end), both even. With
// kDifferentiates they are made here from S and dP, as differentiate does.
template <int N, class Half, bool kDifferentiates>
[[gnu::noinline]] void narrow_rows(const BackwardTile& t, const BackwardWork& work, Vec unit,
                                   const Block& block, int64_t begin, int64_t end,
                                   const NarrowedRows& to) {
  constexpr int W = Vec::kLanes, L = N * W;
  Vec max[N], inverse[N], delta[N];
#pragma GCC unroll 3
  for (int n = 0; n < N; ++n) {
    max[n] = load(t.max + n * W);
    inverse[n] = load(t.inverse_sum + n * W);
    delta[n] = load(t.delta + n * W);
  }
  const auto take = [&](int64_t row, int n, bool masks, Vec& weight, Vec& grad) {
    weight = load(work.forward.scores + row * L + n * W);
    grad = load(work.grad + row * L + n * W);
    if constexpr (kDifferentiates) {
      const Lanes masked = equal(weight, set(-kInfinity));
      weight = exp2((weight - max[n]) * unit) * inverse[n];
      grad = weight * (grad - delta[n]);
      if (!masks) return;
      weight = select(masked, set(-0.0f), weight);
      grad = select(masked, set(-0.0f), grad);
    }
  };
  Vec weight[2][N], grad[2][N];
  const auto at_edge = [&](int64_t row) {
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
#pragma GCC unroll 3
      for (int n = 0; n < N; ++n) {
        weight[i][n] = grad[i][n] = zero();
        if (row + i >= block.begin && row + i < block.end)
          take(row + i, n, true, weight[i][n], grad[i][n]);
      }
    narrow_two<N, Half>(row, weight, grad, to);
  };
  int64_t row = begin;
  for (; row < block.core_begin; row += 2) at_edge(row);
  for (; row + 2 <= block.core_end; row += 2) {
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
#pragma GCC unroll 3
      for (int n = 0; n < N; ++n) take(row + i, n, false, weight[i][n], grad[i][n]);
    narrow_two<N, Half>(row, weight, grad, to);
  }
  for (; row < end; row += 2) at_edge(row);
}

template <class Unit>
struct PairsBackward {
  using Half = typename Unit::Half;
  using Keys = PairKeysBackward;
  static constexpr bool kDifferentiates = true;
  static int64_t column_pairs(const Forward& call) {
    return round_up(call.D, Vec::kLanes) * kKeyPairs;
  }
  static int64_t packed_floats(const Forward& call, int64_t keys) {
    const int64_t blocks = keys / kBlock;
    return keys * (key_pairs(call) + pairs_of_row(call.Dv)) + blocks * column_pairs(call) + blocks;
  }
  static constexpr int64_t kNarrowedFloats = 2 * kBlock * kQueryPairs + kKeyPairs * kMaxLanes;
  static int64_t column_floats(int64_t width) { return pairs_of_row(width) * kMaxLanes; }
  static int64_t row_floats(int64_t width) { return padded(width) * kQueryPairs; }

  static Keys load(const Forward& call, const void* k, const void* v, int64_t rows, float* packed) {
    const int64_t keys = superblock_keys(call), blocks = keys / kBlock;
    Pair* const key = reinterpret_cast<Pair*>(packed);
    Pair* const value = key + keys * key_pairs(call);
    Pair* const columns = value + keys * pairs_of_row(call.Dv);
    uint8_t* const finite = reinterpret_cast<uint8_t*>(columns + blocks * column_pairs(call));
    const uint16_t* const key_rows = static_cast<const uint16_t*>(k);
    const int64_t stride = call.key_stride[2];
    pack_pairs(key_rows, stride, rows, call.D, key);
    pack_pairs(static_cast<const uint16_t*>(v), call.value_stride[2], rows, call.Dv, value);
    for (int64_t i = 0; i * kBlock < rows; ++i)
      finite[i] = pack_columns<Half>(key_rows + i * kBlock * stride, stride,
                                     minimum(kBlock, rows - i * kBlock), call.D,
                                     columns + i * column_pairs(call));
    return {key, value, columns, finite, key_rows, stride};
  }
  static Keys block_at(const Forward& call, const Keys& kv, int64_t row) {
    const int64_t i = row / kBlock;
    return {kv.key + row * key_pairs(call),          kv.value + row * pairs_of_row(call.Dv),
            kv.key_columns + i * column_pairs(call), kv.finite + i,
            kv.key_rows + row * kv.key_stride,       kv.key_stride};
  }

  static void pack(const Backward& back, BackwardTile& t, const void* const* queries,
                   const void* const* grads) {
    const Forward& call = back.forward;
    pack_query_pairs(call, t.tile);
    pack_column_pairs(t.tile.vectors, call.Dv, false, reinterpret_cast<Pair*>(t.grad_out),
                      [&](int lane) { return grads[lane]; });
    Pair* const grad_rows = reinterpret_cast<Pair*>(t.grad_rows);
    Pair* const query_rows = reinterpret_cast<Pair*>(t.query_rows);
    if (back.grad_value) pack_panel_pairs(t.tile.count, call.Dv, grad_rows, grads);
    if (back.grad_key) pack_panel_pairs(t.tile.count, call.D, query_rows, queries);
  }

  // Every row of `left` with every one of `right`, as dP is: it is the product that has the order.
  static Vec dot_rows(const Forward& call, const void* const* left, const void* const* right,
                      Prefetcher& soon) {
    constexpr int W = Vec::kLanes;
    constexpr int64_t kMostPairs = kMaxHeadDim / 2;
    alignas(64) Pair rows[W * kMostPairs], columns[kMostPairs * W];
    alignas(64) float products[W * W], diagonal[W];
    for (int i = 0; i < W; ++i)
      pack_pairs(static_cast<const uint16_t*>(left[i]), 0, 1, call.Dv,
                 rows + i * pairs_of_row(call.Dv));
    pack_column_pairs(1, call.Dv, false, columns, [&](int lane) { return right[lane]; });
    Unit::template scores<1>(rows, call.Dv, columns, Block{0, 0, W, 0, 0}, soon, products, nullptr);
    for (int i = 0; i < W; ++i) diagonal[i] = products[i * W + i];
    return ::load(diagonal);
  }

  template <int N>
  static void compute_scores(const Forward& call, const BackwardTile& t, const BackwardWork& work,
                             const Keys& kv, const Block& block) {
    Unit::template scores<N>(kv.key, call.D, reinterpret_cast<const Pair*>(t.tile.query), block,
                             *work.forward.soon, work.forward.scores, nullptr);
  }
  template <int N>
  static void compute_grads(const Forward& call, const BackwardTile& t, const BackwardWork& work,
                            const Keys& kv, const Block& block) {
    Unit::template scores<N>(kv.value, call.Dv, reinterpret_cast<const Pair*>(t.grad_out), block,
                             *work.forward.soon, work.grad, nullptr);
  }

  template <int N>
  static void add_products(const Backward& back, const BackwardTile& t, const BackwardWork& work,
                           const Keys& kv, const Block& block, bool final, const KeySums& sums) {
    constexpr int64_t L = N * Vec::kLanes;
    const Forward& call = back.forward;
    Prefetcher& soon = *work.forward.soon;
    const int64_t begin = block.begin / Unit::kTerms * Unit::kTerms;
    const int64_t end = round_up(block.end, Unit::kTerms);
    const Vec unit = set(score_unit(call));
    NarrowedRows rows;
    rows.weights = reinterpret_cast<Pair*>(work.narrowed);
    rows.grads = rows.weights + kBlock * kQueryPairs;
    rows.grads_by_key = rows.grads + kBlock * kQueryPairs;
    final ? narrow_rows<N, Half, true>(t, work, unit, block, begin, end, rows)
          : narrow_rows<N, Half, false>(t, work, unit, block, begin, end, rows);
    if (back.grad_value)
      multiply_query_pairs(t, block, rows.weights, t.grad_rows, call.Dv, soon,
                           rows_of(sums.grad_value, sums, block, call.Dv));
    if (back.grad_key)
      multiply_query_pairs(t, block, rows.grads, t.query_rows, call.D, soon,
                           rows_of(sums.grad_key, sums, block, call.D));
    if (!back.grad_query) return;
    Unit::template accumulate<N>(kv.key_columns + begin / 2, kKeyPairs,
                                 rows.grads_by_key + begin / 2 * L, (end - begin) / 2, 0, call.D,
                                 soon, t.grad_query, L);
    if (!*kv.finite)
      add_not_finite<N, Half>(kv.key_rows, kv.key_stride, call.D, block, rows.grads_by_key,
                              t.grad_query);
  }

  // sums[key] += sum over the tile's queries of left[key][query] * right[query], for the block.
  static void multiply_query_pairs(const BackwardTile& t, const Block& block, const Pair* left,
                                   const float* right, int64_t width, Prefetcher& soon,
                                   float* sums) {
    const int64_t count = t.tile.count, packed = pairs_of_row(count);
    for_panels(width, [&](auto panel, int64_t first) {
      Unit::template accumulate<panel.vectors>(
          left, kQueryPairs, reinterpret_cast<const Pair*>(right) + first * packed,
          Unit::pairs_of(count), block.begin, block.end, soon, sums + first, padded(width));
    });
  }
};

template <class Unit>
int64_t pair_backward_scratch_bytes(const Backward& back) {
  return multiplies<Unit>(back.forward) ? lay_out<PairsBackward<Unit>>(back, nullptr).bytes
                                        : backward_scratch_bytes(back);
}

template <class Unit>
void pair_backward(const Backward& back, Stage stage, int64_t item, void* scratch) {
  if (!multiplies<Unit>(back.forward)) return backward(back, stage, item, scratch);
  Unit::begin_item();
  run_stage<PairsBackward<Unit>>(back, stage, item, scratch);
  Unit::end_item();
}

// The statistics see a call's scores as its backward pass does.
template <class Unit>
int64_t pair_statistics_scratch_bytes(const Statistics& stats) {
  return multiplies<Unit>(stats.forward) ? lay_out<Pairs<Unit>>(stats, nullptr).bytes
                                         : statistics_scratch_bytes(stats);
}

template <class Unit>
void pair_statistics_begin(const Statistics& stats, void* scratch) {
  multiplies<Unit>(stats.forward) ? forget_slots<Pairs<Unit>>(stats.forward, scratch)
                                  : statistics_begin(stats, scratch);
}

template <class Unit>
void pair_statistics(const Statistics& stats, Stage stage, int64_t item, void* scratch) {
  if (!multiplies<Unit>(stats.forward)) return statistics(stats, stage, item, scratch);
  Unit::begin_item();
  run_statistics<Pairs<Unit>>(stats, stage, item, scratch);
  Unit::end_item();
}

// Scores are cheap here: computing them again takes no longer than keeping them.
template <class Unit>
bool pairs_keep_scores(const Forward& call) {
  return !multiplies<Unit>(call) && keeps_scores(call);
}

template <class Unit>
constexpr StatisticsKernels kPairStatistics{
    statistics_shared_bytes, pair_statistics_scratch_bytes<Unit>,
    num_statistics_items,    pair_statistics_begin<Unit>,
    pair_statistics<Unit>,   pairs_keep_scores<Unit>};

}  // namespace
