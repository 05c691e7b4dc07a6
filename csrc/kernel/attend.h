// One tile of queries against one block of keys: Sᵀ = K Qᵀ, the online softmax (Milakov and
// Gimelshein 2018; Dao et al. 2022, "FlashAttention"), Oᵀ = Oᵀ · correction + Vᵀ Pᵀ.
//
// Rules that keep it accurate and bitwise reproducible:
//  1. A block's O and row sum start from zero and are then added to the running ones; above kSpan
//     keys in two levels. One chain over all keys would be several times outside the numerics rule.
//  2. Blocks are cut at absolute multiples of kBlock, and only keys masked for every lane are left
//     out.
//  3. exp2(0) is exactly 1, and a masked weight is exactly 0, so such keys change nothing.
//  4. A maximum of -inf is guarded, so that no correction is inf or NaN.
//  5. One order over D and over keys, whatever the register tile.
//  6. No contraction by the compiler: FMAs are written out.
//  7. What is summed in which order depends on a call's own sizes, never on batch, heads, threads
//     or the other queries of a tile.
#pragma once

#include "dropout.h"

namespace {

// The maximum, or 0 where there is no key yet, so that differences stay finite.
inline Vec guarded(Vec max) { return select(equal(max, set(-kInfinity)), zero(), max); }

// What sums relative to the old maximum are multiplied by.
inline Vec correction(Vec old_max, Vec new_max, Vec unit) {
  const Vec factor = exp2((guarded(old_max) - guarded(new_max)) * unit);
  return select(equal(old_max, set(-kInfinity)), zero(), factor);
}

// Whether scores become logits in natural units before the softmax (sinks are given in those).
inline bool transforms(const Forward& call) {
  return call.softcap != 0 || call.sinks || has_bias(call.bias);
}
// From scores to log2 units: the scale is still to come unless transform_scores has applied it.
inline float score_unit(const Forward& call) {
  const float scale = call.scale < 0 ? -call.scale : call.scale;
  return transforms(call) ? kLog2e : scale * kLog2e;
}

template <int N, bool kAdd>
struct StoreScores {
  float* scores;
  float* running_max;  // [lanes], or null
  template <int R>
  void operator()(int64_t row, Vec (&c)[R][N]) const {
    constexpr int W = Vec::kLanes;
    float* first = scores + row * (N * W);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 3
      for (int n = 0; n < N; ++n) {
        float* p = first + (r * N + n) * W;
        if (kAdd) c[r][n] = load(p) + c[r][n];
        store(p, c[r][n]);
      }
    }
    if (!running_max) return;
#pragma GCC unroll 3
    for (int n = 0; n < N; ++n) {
      Vec largest = load(running_max + n * W);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) largest = max(largest, c[r][n]);
      store(running_max + n * W, largest);
    }
  }
};

template <int N>
struct AddToOut {
  float* out;
  const float* factor;  // [lanes]
  template <int R>
  void operator()(int64_t row, Vec (&c)[R][N]) const noexcept {  // see pairs_amx.h
#pragma GCC unroll 3
    for (int n = 0; n < N; ++n) {
      const Vec f = load(factor + n * Vec::kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        float* p = out + (row + r) * (N * Vec::kLanes) + n * Vec::kLanes;
        store(p, fma(load(p), f, c[r][n]));
      }
    }
  }
};

// The weights of a block in place of its scores; only rows beside its core need the mask.
template <int N>
inline void weigh_block(const Workspace& work, const Block& block, Vec unit, const Vec (&base)[N],
                        Vec (&sum)[N]) {
  weigh_scores<N, true>(work, block.begin, block.core_begin, unit, base, sum);
  weigh_scores<N, false>(work, block.core_begin, block.core_end, unit, base, sum);
  weigh_scores<N, true>(work, block.core_end, block.end, unit, base, sum);
}

// True if a row of V that some lane may not attend to holds inf or NaN: 0 * inf must not leak
// there.
inline bool masked_rows_not_finite(const Block& block, const float* value, int64_t stride,
                                   int64_t Dv) {
  constexpr int W = Vec::kLanes;
  Vec seen = zero();  // v * 0 is NaN where v is not finite
  for (int64_t row = block.begin; row < block.end; ++row) {
    if (row == block.core_begin && block.core_end > row) row = block.core_end;
    if (row == block.end) break;
    const float* p = value + row * stride;
    Vec in_row = zero();
    int64_t d = 0;
    for (; d + W <= Dv; d += W) in_row = fma(load(p + d), zero(), in_row);
    if (d < Dv) in_row = fma(load_some(p + d, Dv - d), zero(), in_row);
    seen = seen + in_row;
  }
  return any(is_nan(seen));
}

// Vᵀ Pᵀ where weights marked as masked (-0) take no part, in multiply_rows' order. Rare and slow.
template <int N, class Use>
[[gnu::noinline]] void multiply_guarded(const float* value, int64_t stride, const float* weights,
                                        int64_t T, int64_t Dv, Use use) {
  for (int64_t d = 0; d < Dv; ++d) {
    Vec c[1][N];
    for (int n = 0; n < N; ++n) c[0][n] = zero();
    for (int64_t t = 0; t < T; ++t) {
      for (int n = 0; n < N; ++n) {
        const Vec w = load(weights + (t * N + n) * Vec::kLanes);
        const Lanes masked = both(has_sign(w), equal(w, zero()));
        c[0][n] = select(masked, c[0][n], fma(set(value[t * stride + d]), w, c[0][n]));
      }
    }
    use(d, c);
  }
}

// K and V of one block, as they lie in memory or packed.
struct KeyValue {
  const float *key, *value;  // row 0 of the block
  int64_t key_stride, value_stride;
};

// Columns are summed in pieces of so many: a chain over a long head is less exact than the matrix
// product it is measured against, and with few queries (then a dot product with many partial sums)
// even more so.
inline int64_t piece_of_columns(const Forward& call) {
  return call.Lq * (call.Hq / call.Hkv) <= 16 ? 8 : 128;
}

// scores[row][lane] = sum over columns of rows[row][column] * columns[column][lane] for the block's
// rows: Sᵀ = K Qᵀ.
template <int N>
inline void multiply_columns(const Forward& call, const float* rows, int64_t stride,
                             const float* columns, int64_t width, const Block& block,
                             Prefetcher& soon, float* scores, float* running_max) {
  const int64_t piece = piece_of_columns(call);
  const auto max_after = [&](int64_t d) { return d < width ? nullptr : running_max; };
  multiply_rows<N, false>(rows, stride, columns, minimum(piece, width), block.begin, block.end,
                          soon, StoreScores<N, false>{scores, max_after(piece)});
  for (int64_t d = piece; d < width; d += piece)
    multiply_rows<N, false>(rows + d, stride, columns + d * N * Vec::kLanes,
                            minimum(piece, width - d), block.begin, block.end, soon,
                            StoreScores<N, true>{scores, max_after(d + piece)});
}

// The rows of a block that a tile computes, [begin, end); false if there are none.
inline bool find_block(const Forward& call, const Tile& tile, const Workspace& work,
                       int64_t key_of_block, Block& block) {
  block = {key_of_block, 0, minimum(kBlock, call.Lk - key_of_block), 0, 0};
  trim_block(tile, block);
  if (work.allowed && block.begin < block.end) read_allowed(tile, block, work.allowed);
  return block.begin < block.end;
}

// From raw scores to logits in natural units, where they differ by more than the scale.
template <int N>
inline void make_logits(const Forward& call, const Tile& tile, Block& block,
                        const Workspace& work) {
  if (!transforms(call)) return;
  if (call.bias.dense) read_bias(call, tile, block, work.bias);
  transform_scores<N>(call, tile, block, work);
  // A dense bias may hold -inf, which masks as well.
  if (call.bias.dense) block.core_begin = block.core_end = block.begin;
}

// The block's logits, masked, for the statistics of rows whose maximum is not known yet.
template <int N>
inline void keep_scores(const Tile& tile, const Block& block, const float* scores) {
  constexpr int W = Vec::kLanes, L = N * W;
  float* const kept = tile.kept + block.key * L;
  for (int64_t row = block.begin; row < block.end;) {
    const int64_t group = row / kPeakKeys;
    float* const peak = tile.peaks + (block.key / kPeakKeys + group) * L;
    Vec largest[N];
#pragma GCC unroll 3
    for (int n = 0; n < N; ++n) largest[n] = set(-kInfinity);
    for (const int64_t end = minimum((group + 1) * kPeakKeys, block.end); row < end; ++row) {
#pragma GCC unroll 3
      for (int n = 0; n < N; ++n) {
        const Vec s = load(scores + row * L + n * W);
        store(kept + row * L + n * W, s);
        largest[n] = max(largest[n], s);
      }
    }
#pragma GCC unroll 3
    for (int n = 0; n < N; ++n) store(peak + n * W, largest[n]);
  }
}

// out = out * factor + Vᵀ Pᵀ for the block's weights.
template <int N>
inline void add_values(const Forward& call, const Workspace& work, const KeyValue& kv,
                       const Block& block, AddToOut<N> add) {
  const float* rows = kv.value + block.begin * kv.value_stride;
  const float* weights = work.scores + block.begin * (N * Vec::kLanes);
  const int64_t T = block.end - block.begin;
  if (masked_rows_not_finite(block, kv.value, kv.value_stride, call.Dv))
    multiply_guarded<N>(rows, kv.value_stride, weights, T, call.Dv, add);
  else
    multiply_rows<N, true>(rows, kv.value_stride, weights, T, 0, call.Dv, *work.soon, add);
}

// `Products` is how the two products, and the weights between them, are computed: Widened in
// forward.h, or those of pairs.h.
template <int N, class Products>
void attend_block(const Forward& call, Tile& tile, const Workspace& work,
                  const typename Products::Keys& kv, int64_t key_of_block) {
  constexpr int W = Vec::kLanes, L = N * W;
  Block block;
  if (!find_block(call, tile, work, key_of_block, block)) return;
  Vec old_max[N], new_max[N], base[N], sum[N];
#pragma GCC unroll 3
  for (int n = 0; n < N; ++n) old_max[n] = load(tile.inner.max + n * W);
  // Where the scores are final as they come, their maximum is taken while they are in registers.
  const bool final =
      !transforms(call) && block.core_begin == block.begin && block.core_end == block.end;
  Products::template compute_scores<N>(call, tile, work, kv, block,
                                       final ? tile.inner.max : nullptr);
  make_logits<N>(call, tile, block, work);

  const Vec unit = set(score_unit(call));
#pragma GCC unroll 3
  for (int n = 0; n < N; ++n) new_max[n] = load(tile.inner.max + n * W);
  if (!final) {
    mask_scores<N>(tile, block, work, block.begin, block.core_begin, new_max);
    take_max<N>(work.scores, block.core_begin, block.core_end, new_max);
    mask_scores<N>(tile, block, work, block.core_end, block.end, new_max);
  }
  if (tile.kept) keep_scores<N>(tile, block, work.scores);
#pragma GCC unroll 3
  for (int n = 0; n < N; ++n) {
    base[n] = guarded(new_max[n]);
    sum[n] = zero();
  }
  Products::template weigh<N>(call, work, block, unit, base, sum);

  alignas(64) float factor[L];
#pragma GCC unroll 3
  for (int n = 0; n < N; ++n) {
    const Vec f = correction(old_max[n], new_max[n], unit);
    store(factor + n * W, f);
    store(tile.inner.max + n * W, new_max[n]);
    store(tile.inner.sum + n * W, fma(load(tile.inner.sum + n * W), f, sum[n]));
  }
  if (call.dropout_threshold) drop_weights<N>(call, tile, block, work);
  Products::template add_values<N>(call, work, kv, block, AddToOut<N>{tile.inner.out, factor});
}

// Folds `from` into `into` and clears it. Both relative to their own maxima.
inline void merge(const Forward& call, int64_t lanes, Partial& from, Partial& into) {
  const Vec unit = set(score_unit(call));
  for (int64_t i = 0; i < lanes; i += Vec::kLanes) {
    const Vec from_max = load(from.max + i), into_max = load(into.max + i);
    const Vec both_max = max(from_max, into_max);
    const Vec a = correction(into_max, both_max, unit), b = correction(from_max, both_max, unit);
    store(into.max + i, both_max);
    store(into.sum + i, fma(load(from.sum + i), b, load(into.sum + i) * a));
    for (int64_t d = 0; d < call.Dv; ++d) {
      float* p = into.out + d * lanes + i;
      store(p, fma(load(from.out + d * lanes + i), b, load(p) * a));
    }
  }
  clear(from, lanes, call.Dv);
}

}  // namespace
