// The stage `keys` of the backward pass (backward.h): units, the queries that walk each, and where
// their sums go.
#pragma once

#include "backward_memory.h"

namespace {

// One key/value head's superblock.
struct Unit {
  int64_t b, hkv, superblock, begin, end;  // keys
  int64_t head(const Forward& call) const { return b * call.Hkv + hkv; }
};

template <class Products>
inline void start_backward_tile(const Backward& back, const Shared& shared, const float* zeros,
                                BackwardTile& t) {
  const Forward& call = back.forward;
  Tile& tile = t.tile;
  place_tile(call, tile);
  const void *queries[kMaxLanes], *grads[kMaxLanes];
  for (int lane = 0; lane < tile.lanes(); ++lane) {
    queries[lane] = attending_row(call, tile, call.query, call.query_stride, zeros, lane);
    grads[lane] = attending_row(call, tile, back.grad_out, back.grad_out_stride, zeros, lane);
  }
  Products::pack(back, t, queries, grads);
  for (int lane = 0; lane < tile.lanes(); ++lane) {
    const int64_t row = row_index(call, tile, lane);
    const float max = call.row_max[row], sum = call.row_sum[row];
    t.max[lane] = max == -kInfinity ? 0.0f : max;
    t.inverse_sum[lane] = sum == 0 ? 0.0f : 1.0f / sum;
    t.delta[lane] = shared.delta[row];
    t.row_sum[lane] = t.distance_sum[lane] = 0;
  }
  for (int64_t i = 0; i < call.D * tile.lanes(); i += Vec::kLanes) store(t.grad_query + i, zero());
}

template <int N, class Products>
void backward_block(const Backward& back, BackwardTile& t, const BackwardWork& work,
                    const typename Products::Keys& kv, int64_t key_of_block, const KeySums& sums) {
  const Forward& call = back.forward;
  Block block;
  if (!find_block(call, t.tile, work.forward, key_of_block, block)) return;
  Products::template compute_scores<N>(call, t, work, kv, block);
  make_logits<N>(call, t.tile, block, work.forward);
  Vec unused[N];
  for (int n = 0; n < N; ++n) unused[n] = zero();
  mask_scores<N>(t.tile, block, work.forward, block.begin, block.core_begin, unused);
  mask_scores<N>(t.tile, block, work.forward, block.core_end, block.end, unused);
  Products::template compute_grads<N>(call, t, work, kv, block);
  if (work.kept) {
    find_kept<N>(call, t.tile, block, work.kept);
    multiply_block<N>(block, work.kept, work.grad);
  }
  // dS is final where nothing more becomes of it.
  const bool final = !work.kept && !wants_bias_gradients(back) && call.softcap == 0;
  if (!Products::kDifferentiates || !final) {
    const Vec unit = set(score_unit(call));
    differentiate<N, true>(t, work, unit, block.begin, block.core_begin);
    differentiate<N, false>(t, work, unit, block.core_begin, block.core_end);
    differentiate<N, true>(t, work, unit, block.core_end, block.end);
    if (work.kept) multiply_block<N>(block, work.kept, work.forward.scores);
    add_bias_gradients<N>(back, work, block, sums, superblock_keys(call), t);
    if (call.softcap != 0) through_softcap<N>(work, block);
  }
  Products::template add_products<N>(back, t, work, kv, block, final, sums);
}

// to = factor * from, or with `add` that much more; rows [0, rows) of `width`.
inline void write_rows(const float* from, int64_t rows, int64_t width, Vec factor, bool add,
                       float* to, int64_t stride) {
  constexpr int W = Vec::kLanes;
  for (int64_t row = 0; row < rows; ++row, from += padded(width), to += stride) {
    for (int64_t d = 0; d < width; d += W) {
      const int64_t columns = minimum(W, width - d);
      Vec x = load(from + d) * factor;
      if (add) x = x + load_some(to + d, columns);
      store_some(to + d, x, columns);
    }
  }
}

inline void clear_sums(float* sums, int64_t n) {
  if (sums) __builtin_memset(sums, 0, size_t(n) * sizeof(float));
}

inline void clear_keys(const Backward& back, const Unit& unit, const KeySums& sums) {
  const Forward& call = back.forward;
  const int64_t rows = unit.end - unit.begin, group = call.Hq / call.Hkv;
  clear_sums(sums.grad_key, rows * padded(call.D));
  clear_sums(sums.grad_value, rows * padded(call.Dv));
  clear_sums(sums.distance_values, group * call.bias.num_distances);
  clear_sums(sums.dense_keys, group * superblock_keys(call));
}

inline void flush_keys(const Backward& back, const Unit& unit, const KeySums& sums, bool add,
                       const Shared& shared) {
  const Forward& call = back.forward;
  const int64_t rows = unit.end - unit.begin, group = call.Hq / call.Hkv;
  if (back.grad_key) {
    const int64_t* stride = back.grad_key_stride;
    float* to = back.grad_key + unit.b * stride[0] + unit.hkv * stride[1] + unit.begin * stride[2];
    write_rows(sums.grad_key, rows, call.D, set(call.scale), add, to, stride[2]);
  }
  if (back.grad_value) {
    const int64_t* stride = back.grad_value_stride;
    float* to =
        back.grad_value + unit.b * stride[0] + unit.hkv * stride[1] + unit.begin * stride[2];
    write_rows(sums.grad_value, rows, call.Dv, set(1.0f), add, to, stride[2]);
  }
  const int64_t slot = back.split_keys ? unit.superblock : 0;
  const int64_t head = unit.b * call.Hq + unit.hkv * group;
  if (back.grad_distance_values) {
    const int64_t num = call.bias.num_distances;
    double* to = shared.distance_values + (slot * call.B * call.Hq + head) * num;
    for (int64_t i = 0; i < group * num; ++i) to[i] += double(sums.distance_values[i]);
  }
  if (dense_by_key(back)) {
    for (int64_t g = 0; g < group; ++g) {
      double* to = shared.dense_keys + (head + g) * call.Lk + unit.begin;
      const float* from = sums.dense_keys + g * superblock_keys(call);
      for (int64_t i = 0; i < rows; ++i) to[i] += double(from[i]);
    }
  }
}

// Rows of dQ [B, Hq, Lq, D] of one slot.
struct QueryRows {
  float* data;
  int64_t stride[3];
};
inline QueryRows query_rows_of(const Backward& back, const Shared& shared, int64_t slot) {
  const Forward& call = back.forward;
  const int64_t head = call.Lq * call.D, batch = call.Hq * head;
  if (slot > 0) return {shared.partial + (slot - 1) * call.B * batch, {batch, head, call.D}};
  const int64_t* stride = back.grad_query_stride;
  return {back.grad_query, {stride[0], stride[1], stride[2]}};
}

// dQᵀ of a tile, by rows, into its slot.
inline void flush_query(const Backward& back, const BackwardTile& t, bool add,
                        const QueryRows& to) {
  constexpr int W = Vec::kLanes;
  const Forward& call = back.forward;
  const Tile& tile = t.tile;
  const int64_t lanes = tile.lanes();
  const Vec scale = set(call.scale);
  for (int v = 0; v < tile.count; v += W) {
    const int64_t real = minimum(W, tile.count - v);
    float* rows_to[W];
    for (int i = 0; i < real; ++i) rows_to[i] = at_lane(to.data, to.stride, tile, v + i);
    for (int64_t d = 0; d < call.D; d += W) {
      const int64_t columns = minimum(W, call.D - d);
      Vec rows[W];
      for (int64_t i = 0; i < W; ++i)
        rows[i] = i < columns ? load(t.grad_query + (d + i) * lanes + v) * scale : zero();
      transpose(rows);
      for (int64_t i = 0; i < real; ++i) {
        Vec x = rows[i];
        if (add) x = x + load_some(rows_to[i] + d, columns);
        store_some(rows_to[i] + d, x, columns);
      }
    }
  }
}

// What is left of a tile after its keys of one superblock: dQ and its sums over keys.
inline void flush_tile(const Backward& back, const Unit& unit, const BackwardTile& t,
                       const Shared& shared) {
  const Forward& call = back.forward;
  const Tile& tile = t.tile;
  const int64_t slot = back.split_keys ? unit.superblock : 0, heads = call.B * call.Hq;
  const int64_t index = unit.head(call) * tiles_per_head(call) + tile.first / tile_lanes(call);
  uint8_t& touched = shared.touched[slot * call.B * call.Hkv * tiles_per_head(call) + index];
  if (back.grad_query) flush_query(back, t, touched, query_rows_of(back, shared, slot));
  touched = 1;
  for (int lane = 0; lane < tile.count; ++lane) {
    const int64_t head = slot * heads + tile.b * call.Hq + tile.head[lane];
    if (back.grad_slopes) shared.slopes[head] += double(t.distance_sum[lane]);
    if (!dense_by_row(back)) continue;
    const int64_t count = dense_row_count(back);
    shared.dense_rows[head * count + (count > 1 ? tile.row[lane] : 0)] += double(t.row_sum[lane]);
  }
}

// Has the rows of the tiles from `index` on, as many as make a group, in cache by the time this
// group is done.
inline void fetch_tiles(const Backward& back, const Unit& unit, int64_t index, Prefetcher& soon) {
  const Forward& call = back.forward;
  soon.clear();
  const int64_t lanes = tile_lanes(call), first = index * lanes;
  const int64_t end = minimum(first + kGroupTiles * lanes, flat_queries(call));
  if (first >= end) return;
  const Item item{unit.b, unit.hkv, first, end};
  want_query_rows(soon, call, call.query, call.query_stride, item, call.D);
  want_query_rows(soon, call, back.grad_out, back.grad_out_stride, item, call.Dv);
}

// `count` tiles, block by block of the keys that any of them sees.
template <class Products>
inline void run_group(const Backward& back, const Unit& unit, const typename Products::Keys& kv,
                      const BackwardScratch& scratch, int64_t count, const Shared& shared) {
  Range keys{int32_t(unit.end), int32_t(unit.begin)};
  for (int64_t i = 0; i < count; ++i) {
    BackwardTile& t = scratch.tiles[i];
    start_backward_tile<Products>(back, shared, scratch.work.zeros, t);
    if (t.tile.keys.begin < keys.begin) keys.begin = t.tile.keys.begin;
    if (t.tile.keys.end > keys.end) keys.end = t.tile.keys.end;
  }
  const int64_t begin = maximum(keys.begin, unit.begin) / kBlock * kBlock;
  const int64_t end = minimum(keys.end, unit.end);
  for (int64_t key = begin; key < end; key += kBlock) {
    const auto block = Products::block_at(back.forward, kv, key - unit.begin);
    for (int64_t i = 0; i < count; ++i) {
      BackwardTile& t = scratch.tiles[i];
      if (key >= t.tile.keys.end || key + kBlock <= t.tile.keys.begin) continue;
      const int vectors = t.tile.vectors;
      if (vectors == 3)
        backward_block<3, Products>(back, t, scratch.work, block, key, scratch.sums);
      if (vectors == 2)
        backward_block<2, Products>(back, t, scratch.work, block, key, scratch.sums);
      if (vectors == 1)
        backward_block<1, Products>(back, t, scratch.work, block, key, scratch.sums);
    }
  }
  for (int64_t i = 0; i < count; ++i) flush_tile(back, unit, scratch.tiles[i], shared);
}

template <class Products>
inline void run_unit(const Backward& back, const Unit& unit, BackwardScratch& scratch) {
  const Forward& call = back.forward;
  const Shared shared = lay_out_shared(back);
  const int64_t tiles = tiles_per_head(call);
  const Range* seen = shared.keys + unit.head(call) * tiles;
  const void* k = row_at(call.key, call.type, call.key_stride, unit.b, unit.hkv, unit.begin);
  const void* v = row_at(call.value, call.type, call.value_stride, unit.b, unit.hkv, unit.begin);
  const auto kv = Products::load(call, k, v, unit.end - unit.begin, scratch.packed);
  scratch.sums.key = unit.begin;
  bool flushed = false;
  for (int64_t span = 0; span < tiles; span += kSpanTiles) {
    bool any = false;
    for (int64_t i = span; i < minimum(span + kSpanTiles, tiles);) {
      int64_t count = 0;
      for (; i < minimum(span + kSpanTiles, tiles) && count < kGroupTiles; ++i)
        if (seen[i].begin < unit.end && seen[i].end > unit.begin)
          name_tile(call, unit.head(call), i, scratch.tiles[count++].tile);
      if (count == 0) continue;
      if (!any) clear_keys(back, unit, scratch.sums);
      any = true;
      fetch_tiles(back, unit, i, *scratch.work.forward.soon);
      run_group<Products>(back, unit, kv, scratch, count, shared);
    }
    if (!any) continue;
    flush_keys(back, unit, scratch.sums, flushed, shared);
    flushed = true;
  }
  if (flushed) return;
  clear_keys(back, unit, scratch.sums);
  flush_keys(back, unit, scratch.sums, false, shared);
}

// Heads that add to the same elements of a dense bias's gradient are one unit's, one after another.
struct HeadGroups {
  int64_t b, hkv;  // how many groups along each; the heads of the other axis are walked
};
inline HeadGroups head_groups(const Backward& back) {
  const Forward& call = back.forward;
  const bool direct = dense_by_pair(back);
  return {direct && !back.grad_dense_stride[0] ? 1 : call.B,
          direct && !back.grad_dense_stride[1] ? 1 : call.Hkv};
}

template <class Products>
inline void run_keys(const Backward& back, int64_t item, BackwardScratch& scratch) {
  const Forward& call = back.forward;
  const HeadGroups groups = head_groups(back);
  const int64_t count = groups.b * groups.hkv, group = item % count, size = superblock_keys(call);
  const int64_t b_each = call.B / groups.b, hkv_each = call.Hkv / groups.hkv;
  const int64_t b_first = group / groups.hkv * b_each, hkv_first = group % groups.hkv * hkv_each;
  // Under a causal mask the first superblocks are the longest: they are handed out first.
  const int64_t first = back.split_keys ? item / count : 0;
  const int64_t last = back.split_keys ? first + 1 : num_superblocks(call);
  for (int64_t b = b_first; b < b_first + b_each; ++b)
    for (int64_t hkv = hkv_first; hkv < hkv_first + hkv_each; ++hkv)
      for (int64_t s = first; s < last; ++s)
        run_unit<Products>(back, {b, hkv, s, s * size, minimum((s + 1) * size, call.Lk)}, scratch);
}

}  // namespace
