// The forward pass: for each tile of query lanes, block by block of keys, Sᵀ = K Qᵀ, the online
// softmax (Milakov and Gimelshein 2018; Dao et al. 2022, "FlashAttention"), Oᵀ = Oᵀ·correction + Vᵀ Pᵀ.
//
// Rules that keep it accurate and bitwise reproducible:
//  1. a block's O and row sum start from zero and are then added to the running ones; above kSpan keys
//     in two levels. One chain over all keys would be several times outside the numerics rule;
//  2. blocks are cut at absolute multiples of kBlock, and only keys masked for every lane are left out;
//  3. exp2(0) is exactly 1, and a masked weight is exactly 0, so such keys change nothing;
//  4. a maximum of -inf is guarded, so that no correction is inf or NaN;
//  5. one order over D and over keys, whatever the register tile;
//  6. no contraction by the compiler: FMAs are written out;
//  7. how a call is cut depends on its own sizes, never on batch, heads or threads.
#pragma once

#include "scores.h"

namespace {

// max * unit, or 0 where there is no key yet, so that differences stay finite.
inline Vec scaled(Vec max, Vec unit) {
  return select(equal(max, set(-kInfinity)), zero(), max * unit);
}
inline Vec correction(Vec old_max, Vec new_max, Vec unit) {
  const Vec factor = exp2(scaled(old_max, unit) - scaled(new_max, unit));
  return select(equal(old_max, set(-kInfinity)), zero(), factor);
}

// Scores to log2 units: the scale is still to come unless transform_scores has applied it.
inline bool transforms(const Forward& call) {
  const Bias& bias = call.bias;
  return call.softcap != 0 || bias.slopes || bias.distance_values || bias.dense;
}
inline float score_unit(const Forward& call) {
  const float scale = call.scale < 0 ? -call.scale : call.scale;
  return transforms(call) ? kLog2e : scale * kLog2e;
}

template <int N>
struct StoreScores {
  float* scores;
  template <int R>
  void operator()(int64_t row, Vec (&c)[R][N]) const {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
      for (int n = 0; n < N; ++n)
        store(scores + (row + r) * (N * Vec::kLanes) + n * Vec::kLanes, c[r][n]);
  }
};

template <int N>
struct AddToOut {
  float* out;
  const float* factor;  // [lanes]
  template <int R>
  void operator()(int64_t row, Vec (&c)[R][N]) const {
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

// True if a row of V that some lane may not attend to holds inf or NaN: 0 * inf must not leak there.
inline bool masked_rows_not_finite(const Block& block, const float* value, int64_t stride,
                                   int64_t Dv) {
  constexpr int W = Vec::kLanes;
  Vec seen = zero();  // v * 0 is NaN where v is not finite, and stays so
  for (int64_t row = block.begin; row < block.end; ++row) {
    if (row == block.core_begin && block.core_end > row) row = block.core_end;
    if (row == block.end) break;
    const float* p = value + row * stride;
    int64_t d = 0;
    for (; d + W <= Dv; d += W) seen = fma(load(p + d), zero(), seen);
    if (d < Dv) seen = fma(load_some(p + d, Dv - d), zero(), seen);
  }
  return any(is_nan(seen));
}

// Vᵀ Pᵀ where weights marked as masked (-0) take no part; same order as multiply_rows. Rare and slow.
template <int N>
[[gnu::noinline]] void multiply_guarded(const float* value, int64_t stride, const float* weights,
                                        int64_t T, int64_t Dv, AddToOut<N> use) {
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

template <int N>
void attend_block(const Forward& call, Tile& tile, const Workspace& work, int64_t key_of_block) {
  constexpr int W = Vec::kLanes, L = N * W;
  Block block{key_of_block, 0, minimum(kBlock, call.Lk - key_of_block), 0, 0};
  trim_block(tile, block);
  if (block.begin >= block.end) return;
  if (work.allowed) {
    read_allowed(tile, block, work.allowed);
    if (block.begin >= block.end) return;
  }
  const float* key = call.key + tile.b * call.key_stride[0] + tile.hkv * call.key_stride[1] +
                     block.key * call.key_stride[2];
  const float* value = call.value + tile.b * call.value_stride[0] +
                       tile.hkv * call.value_stride[1] + block.key * call.value_stride[2];

  multiply_rows<N, false>(key, call.key_stride[2], tile.query, call.D, block.begin, block.end,
                          StoreScores<N>{work.scores});
  if (transforms(call)) {
    if (call.bias.dense) read_bias(call, tile, block, work.bias);
    transform_scores<N>(call, tile, block, work);
    // A dense bias may hold -inf, which masks as well.
    if (call.bias.dense) block.core_begin = block.core_end = block.begin;
  }

  const Vec unit = set(score_unit(call));
  Vec old_max[N], new_max[N], shift[N], sum[N];
#pragma GCC unroll 3
  for (int n = 0; n < N; ++n) new_max[n] = old_max[n] = load(tile.inner.max + n * W);
  mask_scores<N>(tile, block, work, block.begin, block.core_begin, new_max);
  take_max<N>(work, block.core_begin, block.core_end, new_max);
  mask_scores<N>(tile, block, work, block.core_end, block.end, new_max);
#pragma GCC unroll 3
  for (int n = 0; n < N; ++n) {
    shift[n] = scaled(new_max[n], unit);
    sum[n] = zero();
  }
  weigh_scores<N, true>(work, block.begin, block.core_begin, score_unit(call), shift, sum);
  weigh_scores<N, false>(work, block.core_begin, block.core_end, score_unit(call), shift, sum);
  weigh_scores<N, true>(work, block.core_end, block.end, score_unit(call), shift, sum);

  alignas(64) float factor[L];
#pragma GCC unroll 3
  for (int n = 0; n < N; ++n) {
    const Vec f = correction(old_max[n], new_max[n], unit);
    store(factor + n * W, f);
    store(tile.inner.max + n * W, new_max[n]);
    store(tile.inner.sum + n * W, fma(load(tile.inner.sum + n * W), f, sum[n]));
  }
  const AddToOut<N> add{tile.inner.out, factor};
  const float* rows = value + block.begin * call.value_stride[2];
  const float* weights = work.scores + block.begin * L;
  const int64_t T = block.end - block.begin;
  if (masked_rows_not_finite(block, value, call.value_stride[2], call.Dv))
    multiply_guarded<N>(rows, call.value_stride[2], weights, T, call.Dv, add);
  else
    multiply_rows<N, true>(rows, call.value_stride[2], weights, T, 0, call.Dv, add);
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

// The sinks join the softmax, the result is normalised and written as rows of `out`.
inline void finish_tile(const Forward& call, Tile& tile) {
  constexpr int W = Vec::kLanes;
  const int64_t lanes = tile.lanes();
  Partial& total = call.Lk > kSpan ? tile.outer : tile.inner;
  const float unit = score_unit(call);
  alignas(64) float divisor[kMaxLanes];
  for (int lane = 0; lane < lanes; ++lane) {
    const float max = total.max[lane];
    float shift = max == -kInfinity ? 0.0f : max * unit, sum = total.sum[lane], factor = 1.0f;
    const LaneId id = lane_id(call, tile, lane);
    if (call.sinks) {  // an extra logit that carries no value
      const float sink = call.sinks[id.head] * kLog2e;
      const float top = max == -kInfinity || sink > shift ? sink : shift;
      factor = max == -kInfinity ? 0.0f : __builtin_exp2f(shift - top);
      sum = sum * factor + (sink == -kInfinity ? 0.0f : __builtin_exp2f(sink - top));
      shift = top;
    }
    divisor[lane] = sum == 0.0f ? 0.0f : factor / sum;
    if (call.lse && lane < tile.count)
      call.lse[(tile.b * call.Hq + id.head) * call.Lq + id.row] =
          sum == 0.0f ? -kInfinity : float(double(shift) * kLn2 + __builtin_log(double(sum)));
  }
  for (int64_t v = 0; v < lanes; v += W) {
    const Vec scale = load(divisor + v);
    float* rows_out[W];
    const int64_t real = minimum(W, tile.count - v);
    for (int i = 0; i < real; ++i) {
      const LaneId id = lane_id(call, tile, int(v) + i);
      rows_out[i] = call.out + tile.b * call.out_stride[0] + id.head * call.out_stride[1] +
                    id.row * call.out_stride[2];
    }
    for (int64_t d = 0; d < call.Dv; d += W) {
      const int64_t columns = minimum(W, call.Dv - d);
      Vec rows[W];
      for (int64_t i = 0; i < W; ++i)
        rows[i] = i < columns ? load(total.out + (d + i) * lanes + v) * scale : zero();
      transpose(rows);
      for (int64_t i = 0; i < real; ++i) {
        if (columns == W)
          store(rows_out[i] + d, rows[i]);
        else
          store_some(rows_out[i] + d, rows[i], columns);
      }
    }
  }
}

// How a call is cut: every (b, hkv) has Lq * G flat queries; a work item is up to kTilesPerItem tiles,
// which walk the keys together so that K and V are read from cache.
constexpr int kTilesPerItem = 4;

inline int64_t flat_queries(const Forward& call) { return call.Lq * (call.Hq / call.Hkv); }
inline int64_t item_lanes(const Forward&) { return kTilesPerItem * kMaxLanes; }
inline int64_t items_per_head(const Forward& call) {
  return (flat_queries(call) + item_lanes(call) - 1) / item_lanes(call);
}
inline int64_t num_items(const Forward& call) {
  return call.B * call.Hkv * items_per_head(call);
}

// Hands out pieces of scratch memory; with a null start it only adds up.
struct Arena {
  char* start;
  int64_t used = 0;
  template <class T>
  T* take(int64_t n) {
    T* p = start ? reinterpret_cast<T*>(start + used) : nullptr;
    used += (n * int64_t(sizeof(T)) + 63) / 64 * 64;
    return p;
  }
};

struct Scratch {
  Tile* tiles;
  Workspace work;
  int64_t bytes;
};
inline Scratch lay_out(const Forward& call, void* start) {
  Arena arena{static_cast<char*>(start)};
  Scratch scratch;
  scratch.tiles = arena.take<Tile>(kTilesPerItem);
  scratch.work.scores = arena.take<float>(kBlock * kMaxLanes);
  scratch.work.bias = call.bias.dense ? arena.take<float>(kBlock * kMaxLanes) : nullptr;
  const bool dense = call.mask.kind == PlanKind::dense;
  scratch.work.allowed = dense ? arena.take<float>(kBlock * kMaxLanes) : nullptr;
  for (int i = 0; i < kTilesPerItem; ++i) {
    float* query = arena.take<float>(call.D * kMaxLanes);
    float* inner = arena.take<float>(call.Dv * kMaxLanes);
    float* outer = call.Lk > kSpan ? arena.take<float>(call.Dv * kMaxLanes) : nullptr;
    if (!start) continue;
    scratch.tiles[i].query = query;
    scratch.tiles[i].inner.out = inner;
    scratch.tiles[i].outer.out = outer;
  }
  scratch.bytes = arena.used;
  return scratch;
}

int64_t scratch_bytes(const Forward& call) { return lay_out(call, nullptr).bytes; }

void forward(const Forward& call, int64_t item, void* memory) {
  const Scratch scratch = lay_out(call, memory);
  const int64_t per_head = items_per_head(call);
  const int64_t bh = item / per_head;
  // Late queries first: under a causal mask they are the longest.
  int64_t first = (per_head - 1 - item % per_head) * item_lanes(call);
  const int64_t end = minimum(first + item_lanes(call), flat_queries(call));

  int num_tiles = 0;
  Range keys{int32_t(call.Lk), 0};
  for (; first < end; first += kMaxLanes, ++num_tiles) {
    Tile& tile = scratch.tiles[num_tiles];
    tile.b = bh / call.Hkv;
    tile.hkv = bh % call.Hkv;
    tile.first = first;
    tile.count = int(minimum(kMaxLanes, end - first));
    tile.vectors = (tile.count + Vec::kLanes - 1) / Vec::kLanes;
    start_tile(call, tile);
    if (tile.keys.begin < keys.begin) keys.begin = tile.keys.begin;
    if (tile.keys.end > keys.end) keys.end = tile.keys.end;
  }

  for (int64_t key = keys.begin / kBlock * kBlock; key < keys.end; key += kBlock) {
    const bool span_ends = (key + kBlock) % kSpan == 0 || key + kBlock >= keys.end;
    for (int i = 0; i < num_tiles; ++i) {
      Tile& tile = scratch.tiles[i];
      if (key < tile.keys.end && key + kBlock > tile.keys.begin) {
        if (tile.vectors == 3) attend_block<3>(call, tile, scratch.work, key);
        if (tile.vectors == 2) attend_block<2>(call, tile, scratch.work, key);
        if (tile.vectors == 1) attend_block<1>(call, tile, scratch.work, key);
      }
      if (call.Lk > kSpan && span_ends) merge(call, tile.lanes(), tile.inner, tile.outer);
    }
  }
  for (int i = 0; i < num_tiles; ++i) finish_tile(call, scratch.tiles[i]);
}

}  // namespace
