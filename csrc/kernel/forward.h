// The forward pass: for each tile of query lanes, block by block of keys, Sᵀ = K Qᵀ, the online
// softmax (Milakov and Gimelshein 2018; Dao et al. 2022, "FlashAttention"), Oᵀ = Oᵀ·correction + Vᵀ
// Pᵀ.
//
// Rules that keep it accurate and bitwise reproducible:
//  1. a block's O and row sum start from zero and are then added to the running ones; above kSpan
//  keys
//     in two levels. One chain over all keys would be several times outside the numerics rule;
//  2. blocks are cut at absolute multiples of kBlock, and only keys masked for every lane are left
//  out;
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

// Whether scores become logits in natural units before the softmax (sinks are given in those).
inline bool transforms(const Forward& call) {
  return call.softcap != 0 || call.sinks || has_bias(call.bias);
}
// From such scores to log2 units: the scale is still to come unless transform_scores has applied
// it.
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

// Vᵀ Pᵀ where weights marked as masked (-0) take no part; same order as multiply_rows. Rare and
// slow.
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

// K and V of one block, as they lie in memory or packed.
struct KeyValue {
  const float *key, *value;  // row 0 of the block
  int64_t key_stride, value_stride;
};

// Sᵀ = K Qᵀ for the block's rows. D is summed in pieces: a chain over a long head is less exact
// than the matrix product it is measured against, and with few queries (then a dot product with
// many partial sums) even more so.
template <int N>
inline void compute_scores(const Forward& call, const Tile& tile, const Workspace& work,
                           const KeyValue& kv, const Block& block, float* running_max) {
  const int64_t piece = call.Lq * (call.Hq / call.Hkv) <= 16 ? 32 : 128;
  const auto max_after = [&](int64_t d) { return d < call.D ? nullptr : running_max; };
  multiply_rows<N, false>(kv.key, kv.key_stride, tile.query, minimum(piece, call.D), block.begin,
                          block.end, *work.soon,
                          StoreScores<N, false>{work.scores, max_after(piece)});
  for (int64_t d = piece; d < call.D; d += piece)
    multiply_rows<N, false>(kv.key + d, kv.key_stride, tile.query + d * N * Vec::kLanes,
                            minimum(piece, call.D - d), block.begin, block.end, *work.soon,
                            StoreScores<N, true>{work.scores, max_after(d + piece)});
}

template <int N>
void attend_block(const Forward& call, Tile& tile, const Workspace& work, const KeyValue& kv,
                  int64_t key_of_block) {
  constexpr int W = Vec::kLanes, L = N * W;
  Block block{key_of_block, 0, minimum(kBlock, call.Lk - key_of_block), 0, 0};
  trim_block(tile, block);
  if (block.begin >= block.end) return;
  if (work.allowed) {
    read_allowed(tile, block, work.allowed);
    if (block.begin >= block.end) return;
  }
  Vec old_max[N], new_max[N], shift[N], sum[N];
#pragma GCC unroll 3
  for (int n = 0; n < N; ++n) old_max[n] = load(tile.inner.max + n * W);
  // Where the scores are final as they come, their maximum is taken while they are in registers.
  const bool final =
      !transforms(call) && block.core_begin == block.begin && block.core_end == block.end;
  compute_scores<N>(call, tile, work, kv, block, final ? tile.inner.max : nullptr);
  if (transforms(call)) {
    if (call.bias.dense) read_bias(call, tile, block, work.bias);
    transform_scores<N>(call, tile, block, work);
    // A dense bias may hold -inf, which masks as well.
    if (call.bias.dense) block.core_begin = block.core_end = block.begin;
  }

  const Vec unit = set(score_unit(call));
#pragma GCC unroll 3
  for (int n = 0; n < N; ++n) new_max[n] = load(tile.inner.max + n * W);
  if (!final) {
    mask_scores<N>(tile, block, work, block.begin, block.core_begin, new_max);
    take_max<N>(work, block.core_begin, block.core_end, new_max);
    mask_scores<N>(tile, block, work, block.core_end, block.end, new_max);
  }
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
  const float* rows = kv.value + block.begin * kv.value_stride;
  const float* weights = work.scores + block.begin * L;
  const int64_t T = block.end - block.begin;
  if (masked_rows_not_finite(block, kv.value, kv.value_stride, call.Dv))
    multiply_guarded<N>(rows, kv.value_stride, weights, T, call.Dv, add);
  else
    multiply_rows<N, true>(rows, kv.value_stride, weights, T, 0, call.Dv, *work.soon, add);
}

// Rows [begin, end) of `from`, packed at the same rows of `to`.
inline void pack_rows(const float* from, int64_t stride, int64_t begin, int64_t end, int64_t width,
                      float* to) {
  constexpr int W = Vec::kLanes;
  for (int64_t row = begin; row < end; ++row) {
    const float* p = from + row * stride;
    float* q = to + row * width;
    int64_t d = 0;
    for (; d + W <= width; d += W) store(q + d, load(p + d));
    if (d < width) store_some(q + d, load_some(p + d, width - d), width - d);
  }
}

// The block of keys starting at `key`. Rows that do not follow each other closely, as in memory
// laid out [B, L, H, D], fall on few cache sets when their distance is a power of two; they are
// copied.
inline KeyValue load_block(const Forward& call, const Workspace& work, int64_t b, int64_t hkv,
                           int64_t key, Range keys) {
  KeyValue kv{
      call.key + b * call.key_stride[0] + hkv * call.key_stride[1] + key * call.key_stride[2],
      call.value + b * call.value_stride[0] + hkv * call.value_stride[1] +
          key * call.value_stride[2],
      call.key_stride[2], call.value_stride[2]};
  const int64_t begin = maximum(keys.begin - key, 0) / kRowStep * kRowStep;
  const int64_t end = minimum(keys.end - key + kRowStep - 1, minimum(kBlock, call.Lk - key));
  if (kv.key_stride != call.D) {
    pack_rows(kv.key, kv.key_stride, begin, end, call.D, work.key);
    kv.key = work.key;
    kv.key_stride = call.D;
  }
  if (kv.value_stride != call.Dv) {
    pack_rows(kv.value, kv.value_stride, begin, end, call.Dv, work.value);
    kv.value = work.value;
    kv.value_stride = call.Dv;
  }
  return kv;
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

// A sink is an extra logit that takes part in the softmax and carries no value. A lane that
// attended to no key is left alone.
inline void add_sinks(const Forward& call, const Tile& tile, Partial& total) {
  constexpr int W = Vec::kLanes;
  const int64_t lanes = tile.lanes();
  const Vec unit = set(score_unit(call)), minus_infinity = set(-kInfinity);
  alignas(64) float sinks[kMaxLanes];
  for (int64_t i = 0; i < lanes; ++i) sinks[i] = call.sinks[tile.head[i]];
  for (int64_t i = 0; i < lanes; i += W) {
    const Vec old_max = load(total.max + i), sink = load(sinks + i);
    const Vec new_max = select(equal(old_max, minus_infinity), old_max, max(old_max, sink));
    const Vec factor = correction(old_max, new_max, unit);
    const Vec extra =
        select(equal(old_max, minus_infinity), zero(), correction(sink, new_max, unit));
    store(total.max + i, new_max);
    store(total.sum + i, fma(load(total.sum + i), factor, extra));
    for (int64_t d = 0; d < call.Dv; ++d)
      store(total.out + d * lanes + i, load(total.out + d * lanes + i) * factor);
  }
}

// log-sum-exp per lane, in natural units.
inline void store_lse(const Forward& call, const Tile& tile, const Partial& total) {
  const float unit = score_unit(call);
  for (int lane = 0; lane < tile.count; ++lane) {
    const float max = total.max[lane], sum = total.sum[lane];
    const double shift = max == -kInfinity ? 0.0f : max * unit;
    call.lse[(tile.b * call.Hq + tile.head[lane]) * call.Lq + tile.row[lane]] =
        sum == 0 ? -kInfinity : float(shift * kLn2 + __builtin_log(double(sum)));
  }
}

// a / b given 1 / b: one Newton step makes it as exact as a division, at a fraction of the time.
inline Vec divide(Vec a, Vec b, Vec inverse) {
  const Vec quotient = a * inverse;
  const Vec rest = fma(zero() - quotient, b, a);  // NaN where the quotient is not finite
  return select(is_nan(rest), quotient, fma(rest, inverse, quotient));
}

// Normalises the result and writes it as rows of `out`; a lane that attended to nothing gives
// zeros.
inline void finish_tile(const Forward& call, Tile& tile) {
  constexpr int W = Vec::kLanes;
  const int64_t lanes = tile.lanes();
  Partial& total = total_of(call, tile);
  if (call.sinks) add_sinks(call, tile, total);
  if (call.lse) store_lse(call, tile, total);
  for (int64_t v = 0; v < lanes; v += W) {
    const Vec sum = load(total.sum + v);
    const Vec inverse = select(equal(sum, zero()), zero(), set(1.0f) / sum);
    float* rows_out[W];
    const int64_t real = minimum(W, tile.count - v);
    for (int i = 0; i < real; ++i) rows_out[i] = at_lane(call.out, call.out_stride, tile, v + i);
    for (int64_t d = 0; d < call.Dv; d += W) {
      const int64_t columns = minimum(W, call.Dv - d);
      Vec rows[W];
      for (int64_t i = 0; i < W; ++i)
        rows[i] =
            i < columns ? divide(load(total.out + (d + i) * lanes + v), sum, inverse) : zero();
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

// How a call is cut: every (b, hkv) has Lq * G flat queries; a work item is up to kItemVectors
// vectors of them in tiles, which walk the keys together so that K and V are read from cache.
constexpr int kItemVectors = 12;
constexpr int kMaxTiles = kItemVectors / 2;

// Three vectors are the fastest tile; two lose less where lanes differ in the few keys they see.
inline int tile_vectors(const Forward& call) {
  const Mask& mask = call.mask;
  constexpr int64_t kFewKeys = 256;
  if (mask.kind == PlanKind::intervals) return 2;
  if (mask.kind != PlanKind::band) return 3;
  const bool causal = mask.right.value < kUnbounded || mask.right.values;
  const int64_t window = mask.left.values ? kUnbounded : mask.left.value + mask.right.value + 1;
  const int64_t keys = minimum(window, causal ? call.Lk / 2 : call.Lk);
  return keys * (call.Hq / call.Hkv) <= kFewKeys ? 2 : 3;
}
inline int64_t flat_queries(const Forward& call) { return call.Lq * (call.Hq / call.Hkv); }
inline int64_t items_per_head(const Forward& call) {
  constexpr int64_t kItemLanes = kItemVectors * Vec::kLanes;
  return (flat_queries(call) + kItemLanes - 1) / kItemLanes;
}
inline int64_t num_items(const Forward& call) { return call.B * call.Hkv * items_per_head(call); }

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
  scratch.tiles = arena.take<Tile>(kMaxTiles);
  scratch.work.soon = arena.take<Prefetcher>(1);
  scratch.work.scores = arena.take<float>(kBlock * kMaxLanes);
  scratch.work.bias = call.bias.dense ? arena.take<float>(kBlock * kMaxLanes) : nullptr;
  scratch.work.key = call.key_stride[2] == call.D ? nullptr : arena.take<float>(kBlock * call.D);
  scratch.work.value =
      call.value_stride[2] == call.Dv ? nullptr : arena.take<float>(kBlock * call.Dv);
  const bool dense = call.mask.kind == PlanKind::dense;
  scratch.work.allowed = dense ? arena.take<float>(kBlock * kMaxLanes) : nullptr;
  for (int i = 0; i < kMaxTiles; ++i) {
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

// Flat queries [first, end) of one (b, hkv).
struct Item {
  int64_t b, hkv, first, end;
};
inline Item find_item(const Forward& call, int64_t index) {
  const int64_t per_head = items_per_head(call), bh = index / per_head;
  // Late queries first: under a causal mask they are the longest.
  const int64_t first = (per_head - 1 - index % per_head) * kItemVectors * Vec::kLanes;
  return {bh / call.Hkv, bh % call.Hkv, first,
          minimum(first + kItemVectors * Vec::kLanes, flat_queries(call))};
}

// Rows [begin, end) of one head of a [B, H, L, D] tensor.
inline void want_rows(Prefetcher& soon, const float* data, const int64_t (&stride)[3], int64_t b,
                      int64_t head, int64_t begin, int64_t end, int64_t width) {
  soon.want(data + b * stride[0] + head * stride[1] + begin * stride[2], stride[2] * 4, end - begin,
            width * 4);
}
inline void want_query_rows(Prefetcher& soon, const Forward& call, const float* data,
                            const int64_t (&stride)[3], const Item& item, int64_t width) {
  const int64_t group = call.Hq / call.Hkv;
  for (int64_t g = 0; g < group; ++g)
    want_rows(soon, data, stride, item.b, item.hkv * group + g, item.first / group,
              (item.end + group - 1) / group, width);
}

// What to have in cache by the time the block at `key` is done: its V, the next block's K and, near
// the item's end, the rows it will write and the next item's queries and first keys.
inline void fetch_ahead(const Forward& call, const Workspace& work, const Item& item, int64_t key,
                        Range keys, int64_t likely_next) {
  constexpr int64_t kNearEnd = 3 * kBlock;
  Prefetcher& soon = *work.soon;
  const int64_t block_end = minimum(key + kBlock, keys.end), left = keys.end - key;
  const bool first = key <= keys.begin, near_end = left <= kNearEnd;
  // Near the end the list runs on from block to block, so that the last lines have time to come.
  if (first || !near_end) soon.clear();
  const int64_t next_end = minimum(block_end + kBlock, keys.end);
  if (work.value)  // packed already; the next block's rows are wanted when it begins
    want_rows(soon, call.value, call.value_stride, item.b, item.hkv, block_end, next_end, call.Dv);
  else
    want_rows(soon, call.value, call.value_stride, item.b, item.hkv, key, block_end, call.Dv);
  want_rows(soon, call.key, call.key_stride, item.b, item.hkv, block_end, next_end, call.D);
  if (!near_end || (left + kBlock <= kNearEnd && !first)) return;
  want_query_rows(soon, call, call.out, call.out_stride, item, call.Dv);
  if (likely_next < 0) return;
  const Item next = find_item(call, likely_next);
  want_query_rows(soon, call, call.query, call.query_stride, next, call.D);
  // Items of a head come last rows first: a window's keys then start that much earlier.
  const int64_t rows = (next.end - next.first) / (call.Hq / call.Hkv);
  const bool same_head = next.hkv == item.hkv && next.b == item.b;
  const int64_t next_key = same_head ? maximum(keys.begin - rows, 0) : 0;
  want_rows(soon, call.key, call.key_stride, next.b, next.hkv, next_key,
            minimum(next_key + kBlock, call.Lk), call.D);
}

// `likely_next` is a guess at the item this thread will be given next; its queries are fetched
// ahead.
void forward(const Forward& call, int64_t index, int64_t likely_next, void* memory) {
  const Scratch scratch = lay_out(call, memory);
  const Item item = find_item(call, index);
  int num_tiles = 0;
  Range keys{int32_t(call.Lk), 0};
  const int lanes = tile_vectors(call) * Vec::kLanes;
  for (int64_t first = item.first; first < item.end; first += lanes, ++num_tiles) {
    Tile& tile = scratch.tiles[num_tiles];
    tile.b = item.b;
    tile.hkv = item.hkv;
    tile.first = first;
    tile.count = int(minimum(lanes, item.end - first));
    tile.vectors = (tile.count + Vec::kLanes - 1) / Vec::kLanes;
    start_tile(call, tile);
    if (tile.keys.begin < keys.begin) keys.begin = tile.keys.begin;
    if (tile.keys.end > keys.end) keys.end = tile.keys.end;
  }

  for (int64_t key = keys.begin / kBlock * kBlock; key < keys.end; key += kBlock) {
    const KeyValue kv = load_block(call, scratch.work, item.b, item.hkv, key, keys);
    fetch_ahead(call, scratch.work, item, key, keys, likely_next);
    const bool span_ends = (key + kBlock) % kSpan == 0 || key + kBlock >= keys.end;
    for (int i = 0; i < num_tiles; ++i) {
      Tile& tile = scratch.tiles[i];
      if (key < tile.keys.end && key + kBlock > tile.keys.begin) {
        if (tile.vectors == 3) attend_block<3>(call, tile, scratch.work, kv, key);
        if (tile.vectors == 2) attend_block<2>(call, tile, scratch.work, kv, key);
        if (tile.vectors == 1) attend_block<1>(call, tile, scratch.work, kv, key);
      }
      if (call.Lk > kSpan && span_ends) merge(call, tile.lanes(), tile.inner, tile.outer);
    }
  }
  for (int i = 0; i < num_tiles; ++i) finish_tile(call, scratch.tiles[i]);
}

}  // namespace
