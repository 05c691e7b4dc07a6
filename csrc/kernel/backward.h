// The backward pass: how it is cut, and the walk of each part.
//
//  start   clears memory
//  rows    for every tile of queries: which keys it sees, and delta of each row
//  keys    one pass over keys. A unit is one key/value head, or with split_keys one superblock of
//          it, a run of key blocks cut at absolute multiples. It walks the queries that see the
//          superblock, keeps the sums dK and dV in scratch, and flushes them after every span of
//          queries. Each superblock's dQ is added to dQ in the order of superblocks: at once by
//          whoever has the whole head, in the next stage where superblocks ran side by side. So
//          the bits are the same either way, and for any number of threads.
//  finish  that next stage, and sums over the batch for what is shared by it
#pragma once

#include "backward_bias.h"

namespace {

// Few superblocks: split_keys keeps one dQ for each.
constexpr int64_t kMaxSuperblocks = 16;
constexpr int64_t kMinSuperblock = 4 * kBlock;
// Tiles that walk the keys of a superblock together, and tiles to one span of queries.
constexpr int64_t kGroupTiles = 4;
constexpr int64_t kSpanTiles = 64;
// Tiles to one item of the stages that run over queries.
constexpr int64_t kItemTiles = 8;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t superblock_keys(const Forward& call) {
  const int64_t keys = ceil_div(call.Lk, kMaxSuperblocks * kBlock) * kBlock;
  return maximum(keys, kMinSuperblock);
}
inline int64_t num_superblocks(const Forward& call) {
  return ceil_div(call.Lk, superblock_keys(call));
}
inline int64_t tile_lanes(const Forward& call) { return tile_vectors(call) * Vec::kLanes; }
inline int64_t tiles_per_head(const Forward& call) {
  return ceil_div(flat_queries(call), tile_lanes(call));
}
inline int64_t num_slots(const Backward& back) {
  return back.split_keys ? num_superblocks(back.forward) : 1;
}

// Memory of the whole call, for all threads. A slot is a superblock under split_keys, else all.
struct Shared {
  uint8_t* touched;           // [slots][B * Hkv][tiles]: whether dQ of the slot was written
  double* slopes;             // [slots][B, Hq]
  double* distance_values;    // [slots][B, Hq, N]
  double* dense_rows;         // [slots][B, Hq, Lq or 1]
  double* dense_keys;         // [B, Hq, Lk]
  int64_t zeroed;             // bytes up to here begin as zeros
  float *delta, *sink_terms;  // [B, Hq, Lq]
  Range* keys;                // [B * Hkv][tiles]
  float* partial;             // [slots - 1][B, Hq, Lq, D], dQ of every slot but the first
  int64_t bytes;
};

inline int64_t dense_row_count(const Backward& back) {
  return back.grad_dense_stride[2] ? back.forward.Lq : 1;
}

inline Shared lay_out_shared(const Backward& back) {
  const Forward& call = back.forward;
  Arena arena{static_cast<char*>(back.shared)};
  Shared shared;
  const int64_t slots = num_slots(back), heads = call.B * call.Hq, rows = heads * call.Lq;
  const int64_t tiles = call.B * call.Hkv * tiles_per_head(call);
  shared.touched = arena.take<uint8_t>(slots * tiles);
  shared.slopes = arena.take<double>(back.grad_slopes ? slots * heads : 0);
  shared.distance_values =
      arena.take<double>(back.grad_distance_values ? slots * heads * call.bias.num_distances : 0);
  shared.dense_rows =
      arena.take<double>(dense_by_row(back) ? slots * heads * dense_row_count(back) : 0);
  shared.dense_keys = arena.take<double>(dense_by_key(back) ? heads * call.Lk : 0);
  shared.zeroed = arena.used;
  shared.delta = arena.take<float>(rows);
  shared.sink_terms = arena.take<float>(back.grad_sinks ? rows : 0);
  shared.keys = arena.take<Range>(tiles);
  shared.partial = arena.take<float>(back.grad_query ? (slots - 1) * rows * call.D : 0);
  shared.bytes = arena.used;
  return shared;
}

int64_t backward_shared_bytes(const Backward& back) { return lay_out_shared(back).bytes; }
int64_t partial_bytes(const Backward& back) {
  const Forward& call = back.forward;
  const int64_t floats = (num_superblocks(call) - 1) * call.B * call.Hq * call.Lq * call.D;
  return floats * int64_t(sizeof(float));
}

// Memory of one thread.
struct BackwardScratch {
  BackwardTile* tiles;
  BackwardWork work;
  KeySums sums;
  float *key, *value;  // copies of a superblock, where rows do not follow each other
  int64_t bytes;
};

inline BackwardScratch lay_out(const Backward& back, void* start) {
  const Forward& call = back.forward;
  Arena arena{static_cast<char*>(start)};
  BackwardScratch scratch{};
  const int64_t keys = superblock_keys(call), block = kBlock * kMaxLanes;
  const int64_t group = call.Hq / call.Hkv;
  BackwardWork& work = scratch.work;
  scratch.tiles = arena.take<BackwardTile>(kGroupTiles);
  work.forward.soon = arena.take<Prefetcher>(1);
  work.forward.scores = arena.take<float>(block);
  work.forward.bias = call.bias.dense ? arena.take<float>(block) : nullptr;
  work.forward.allowed = call.mask.kind == PlanKind::dense ? arena.take<float>(block) : nullptr;
  work.forward.softcap_slopes = call.softcap != 0 ? arena.take<float>(block) : nullptr;
  work.grad = arena.take<float>(block);
  work.kept = call.dropout_threshold ? arena.take<float>(block) : nullptr;
  work.by_query = wants_by_query(back) ? arena.take<float>(kMaxLanes * kQueryRow) : nullptr;
  work.zeros = arena.take<float>(maximum(call.D, call.Dv));
  scratch.key = packs_key(call) ? arena.take<float>(keys * call.D) : nullptr;
  scratch.value = packs_value(call) ? arena.take<float>(keys * call.Dv) : nullptr;
  KeySums& sums = scratch.sums;
  sums.grad_key = back.grad_key ? arena.take<float>(keys * padded(call.D)) : nullptr;
  sums.grad_value = back.grad_value ? arena.take<float>(keys * padded(call.Dv)) : nullptr;
  sums.distance_values =
      back.grad_distance_values ? arena.take<float>(group * call.bias.num_distances) : nullptr;
  sums.dense_keys = dense_by_key(back) ? arena.take<float>(group * keys) : nullptr;
  for (int64_t i = 0; i < kGroupTiles; ++i) {
    float* query = arena.take<float>(call.D * kMaxLanes);
    float* grad_out = arena.take<float>(call.Dv * kMaxLanes);
    float* query_rows = arena.take<float>(padded(call.D) * kMaxLanes);
    float* grad_rows = arena.take<float>(padded(call.Dv) * kMaxLanes);
    float* grad_query = arena.take<float>(call.D * kMaxLanes);
    if (!start) continue;
    BackwardTile& t = scratch.tiles[i];
    t.tile.query = query;
    t.grad_out = grad_out;
    t.query_rows = query_rows;
    t.grad_rows = grad_rows;
    t.grad_query = grad_query;
  }
  scratch.bytes = arena.used;
  return scratch;
}

int64_t backward_scratch_bytes(const Backward& back) { return lay_out(back, nullptr).bytes; }

inline void name_tile(const Forward& call, int64_t head, int64_t index, Tile& tile) {
  const int64_t lanes = tile_lanes(call);
  tile.b = head / call.Hkv;
  tile.hkv = head % call.Hkv;
  tile.first = index * lanes;
  tile.count = int(minimum(lanes, flat_queries(call) - tile.first));
  tile.vectors = (tile.count + Vec::kLanes - 1) / Vec::kLanes;
}

// Index of a lane's row in the tensors [B, Hq, Lq].
inline int64_t row_index(const Forward& call, const Tile& tile, int lane) {
  return (tile.b * call.Hq + tile.head[lane]) * call.Lq + tile.row[lane];
}

// A lane's row of `data`, or zeros for a row that attended to nothing, which has no part in any
// gradient whatever it holds.
inline const void* attending_row(const Forward& call, const Tile& tile, const void* data,
                                 const int64_t (&stride)[3], const float* zeros, int lane) {
  if (call.row_sum[row_index(call, tile, lane)] == 0) return zeros;
  return row_at(data, call.type, stride, tile.b, tile.head[lane], tile.row[lane]);
}

// Stage `rows`.

// delta = sum over columns of dO * O, in the pieces and order in which dP is summed, less dlse.
inline void find_delta(const Backward& back, const Tile& tile, const float* zeros,
                       const Shared& shared) {
  constexpr int W = Vec::kLanes;
  const Forward& call = back.forward;
  const int64_t piece = piece_of_columns(call);
  for (int first = 0; first < tile.count; first += W) {
    const void *rows[W], *grad_rows[W];
    for (int i = 0; i < W; ++i) {
      rows[i] = attending_row(call, tile, call.out, call.out_stride, zeros, first + i);
      grad_rows[i] =
          attending_row(call, tile, back.grad_out, back.grad_out_stride, zeros, first + i);
    }
    Vec total = zero(), sum = zero();
    for (int64_t d = 0; d < call.Dv; d += W) {
      const int64_t columns = minimum(W, call.Dv - d);
      Vec out[W], grad[W];
      for (int i = 0; i < W; ++i) {
        out[i] = load_row(call.type, rows[i], d, columns);
        grad[i] = load_row(call.type, grad_rows[i], d, columns);
      }
      transpose(out);
      transpose(grad);
      for (int64_t i = 0; i < columns; ++i) {
        sum = fma(out[i], grad[i], sum);
        if ((d + i + 1) % piece != 0) continue;
        total = total + sum;
        sum = zero();
      }
    }
    float delta[W];
    store(delta, call.Dv % piece == 0 ? total : total + sum);
    for (int i = 0; i < W && first + i < tile.count; ++i) {
      const int64_t row = row_index(call, tile, first + i);
      const bool nothing = call.row_sum[row] == 0;
      if (back.grad_lse && !nothing) delta[i] -= back.grad_lse[row];
      shared.delta[row] = delta[i];
      if (!back.grad_sinks) continue;
      float sink[W], weight[W];
      store(sink, set(call.sinks[tile.head[first + i]] - call.row_max[row]));
      store(weight, exp2(load(sink) * set(kLog2e)));
      shared.sink_terms[row] = nothing ? 0.0f : -weight[0] / call.row_sum[row] * delta[i];
    }
  }
}

inline void run_rows(const Backward& back, int64_t item, const BackwardScratch& scratch) {
  const Forward& call = back.forward;
  const Shared shared = lay_out_shared(back);
  const int64_t per_head = tiles_per_head(call), tiles = call.B * call.Hkv * per_head;
  for (int64_t i = item * kItemTiles; i < minimum((item + 1) * kItemTiles, tiles); ++i) {
    Tile& tile = scratch.tiles[0].tile;
    name_tile(call, i / per_head, i % per_head, tile);
    place_tile(call, tile);
    shared.keys[i] = tile.keys;
    find_delta(back, tile, scratch.work.zeros, shared);
  }
}

// Stage `keys`.

// One key/value head's superblock.
struct Unit {
  int64_t b, hkv, superblock, begin, end;  // keys
  int64_t head(const Forward& call) const { return b * call.Hkv + hkv; }
};

inline void start_backward_tile(const Backward& back, const Shared& shared, const float* zeros,
                                BackwardTile& t) {
  const Forward& call = back.forward;
  Tile& tile = t.tile;
  place_tile(call, tile);
  pack_query(call, tile);
  const auto grad_of = [&](int lane) {
    return attending_row(call, tile, back.grad_out, back.grad_out_stride, zeros, lane);
  };
  pack_columns(call, tile, call.Dv, set(1.0f), t.grad_out, grad_of);
  if (back.grad_value) pack_panels(call, tile.count, call.Dv, t.grad_rows, grad_of);
  if (back.grad_key)
    pack_panels(call, tile.count, call.D, t.query_rows, [&](int lane) {
      return attending_row(call, tile, call.query, call.query_stride, zeros, lane);
    });
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

template <int N>
void backward_block(const Backward& back, BackwardTile& t, const BackwardWork& work,
                    const KeyValue& kv, int64_t key_of_block, const KeySums& sums) {
  const Forward& call = back.forward;
  Prefetcher& soon = *work.forward.soon;
  Block block;
  if (!find_block(call, t.tile, work.forward, key_of_block, block)) return;
  multiply_columns<N>(call, kv.key, kv.key_stride, t.tile.query, call.D, block, soon,
                      work.forward.scores, nullptr);
  make_logits<N>(call, t.tile, block, work.forward);
  Vec unused[N];
  for (int n = 0; n < N; ++n) unused[n] = zero();
  mask_scores<N>(t.tile, block, work.forward, block.begin, block.core_begin, unused);
  mask_scores<N>(t.tile, block, work.forward, block.core_end, block.end, unused);
  multiply_columns<N>(call, kv.value, kv.value_stride, t.grad_out, call.Dv, block, soon, work.grad,
                      nullptr);
  if (work.kept) {
    find_kept<N>(call, t.tile, block, work.kept);
    multiply_block<N>(block, work.kept, work.grad);
  }
  const Vec unit = set(score_unit(call));
  differentiate<N, true>(t, work, unit, block.begin, block.core_begin);
  differentiate<N, false>(t, work, unit, block.core_begin, block.core_end);
  differentiate<N, true>(t, work, unit, block.core_end, block.end);
  if (work.kept) multiply_block<N>(block, work.kept, work.forward.scores);
  add_bias_gradients<N>(back, work, block, sums, superblock_keys(call), t);
  if (call.softcap != 0) through_softcap<N>(work, block);
  if (back.grad_value)
    multiply_queries<N>(t, block, work.forward.scores, t.grad_rows, call.Dv, soon,
                        rows_of(sums.grad_value, sums, block, call.Dv));
  if (back.grad_key)
    multiply_queries<N>(t, block, work.grad, t.query_rows, call.D, soon,
                        rows_of(sums.grad_key, sums, block, call.D));
  if (back.grad_query) multiply_keys<N>(call, t, work, kv, block);
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

inline KeyValue load_superblock(const Backward& back, const Unit& unit,
                                const BackwardScratch& scratch) {
  const Forward& call = back.forward;
  const void* k = row_at(call.key, call.type, call.key_stride, unit.b, unit.hkv, unit.begin);
  const void* v = row_at(call.value, call.type, call.value_stride, unit.b, unit.hkv, unit.begin);
  KeyValue kv{static_cast<const float*>(k), static_cast<const float*>(v), call.D, call.Dv};
  const int64_t rows = unit.end - unit.begin;
  if (scratch.key) {
    pack_rows(call.type, k, call.key_stride[2], rows, call.D, scratch.key);
    kv.key = scratch.key;
  }
  if (scratch.value) {
    pack_rows(call.type, v, call.value_stride[2], rows, call.Dv, scratch.value);
    kv.value = scratch.value;
  }
  return kv;
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
inline void run_group(const Backward& back, const Unit& unit, const KeyValue& kv,
                      const BackwardScratch& scratch, int64_t count, const Shared& shared) {
  Range keys{int32_t(unit.end), int32_t(unit.begin)};
  for (int64_t i = 0; i < count; ++i) {
    BackwardTile& t = scratch.tiles[i];
    start_backward_tile(back, shared, scratch.work.zeros, t);
    if (t.tile.keys.begin < keys.begin) keys.begin = t.tile.keys.begin;
    if (t.tile.keys.end > keys.end) keys.end = t.tile.keys.end;
  }
  const int64_t begin = maximum(keys.begin, unit.begin) / kBlock * kBlock;
  const int64_t end = minimum(keys.end, unit.end);
  for (int64_t key = begin; key < end; key += kBlock) {
    const int64_t row = key - unit.begin;
    const KeyValue block{kv.key + row * kv.key_stride, kv.value + row * kv.value_stride,
                         kv.key_stride, kv.value_stride};
    for (int64_t i = 0; i < count; ++i) {
      BackwardTile& t = scratch.tiles[i];
      if (key >= t.tile.keys.end || key + kBlock <= t.tile.keys.begin) continue;
      const int vectors = t.tile.vectors;
      if (vectors == 3) backward_block<3>(back, t, scratch.work, block, key, scratch.sums);
      if (vectors == 2) backward_block<2>(back, t, scratch.work, block, key, scratch.sums);
      if (vectors == 1) backward_block<1>(back, t, scratch.work, block, key, scratch.sums);
    }
  }
  for (int64_t i = 0; i < count; ++i) flush_tile(back, unit, scratch.tiles[i], shared);
}

inline void run_unit(const Backward& back, const Unit& unit, BackwardScratch& scratch) {
  const Forward& call = back.forward;
  const Shared shared = lay_out_shared(back);
  const int64_t tiles = tiles_per_head(call);
  const Range* seen = shared.keys + unit.head(call) * tiles;
  const KeyValue kv = load_superblock(back, unit, scratch);
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
      run_group(back, unit, kv, scratch, count, shared);
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
        run_unit(back, {b, hkv, s, s * size, minimum((s + 1) * size, call.Lk)}, scratch);
}

// Stage `finish`.

// Adds up the slots' dQ of one tile, in order, into the first's; zeros where nothing was attended
// to.
inline void finish_query(const Backward& back, const Shared& shared, Tile& tile, int64_t index) {
  constexpr int W = Vec::kLanes;
  const Forward& call = back.forward;
  const int64_t tiles = call.B * call.Hkv * tiles_per_head(call), slots = num_slots(back);
  const bool written = shared.touched[index];
  if (written && slots == 1) return;
  name_lanes(call, tile);
  const QueryRows to = query_rows_of(back, shared, 0);
  for (int lane = 0; lane < tile.count; ++lane) {
    float* p = at_lane(to.data, to.stride, tile, lane);
    for (int64_t d = 0; d < call.D; d += W) {
      const int64_t columns = minimum(W, call.D - d);
      Vec sum = written ? load_some(p + d, columns) : zero();
      for (int64_t slot = 1; slot < slots; ++slot) {
        if (!shared.touched[slot * tiles + index]) continue;
        const QueryRows from = query_rows_of(back, shared, slot);
        sum = sum + load_some(at_lane(from.data, from.stride, tile, lane) + d, columns);
      }
      store_some(p + d, sum, columns);
    }
  }
}

// values[0] += values[1..n), each of `size` numbers.
inline void fold(double* values, int64_t n, int64_t size) {
  for (int64_t i = 1; i < n; ++i)
    for (int64_t j = 0; j < size; ++j) values[j] += values[i * size + j];
}

// Gradients shared by the batch, or by heads: small sums, in one fixed order.
inline void finish_parameters(const Backward& back, const Shared& shared) {
  const Forward& call = back.forward;
  const int64_t slots = num_slots(back), heads = call.B * call.Hq;
  if (back.grad_sinks) {
    for (int64_t h = 0; h < call.Hq; ++h) {
      double sum = 0;
      for (int64_t b = 0; b < call.B; ++b)
        for (int64_t row = 0; row < call.Lq; ++row)
          sum += double(shared.sink_terms[(b * call.Hq + h) * call.Lq + row]);
      back.grad_sinks[h] = float(sum);
    }
  }
  if (back.grad_slopes) {
    fold(shared.slopes, slots * call.B, call.Hq);
    for (int64_t h = 0; h < call.Hq; ++h) back.grad_slopes[h] = float(shared.slopes[h]);
  }
  if (back.grad_distance_values) {
    const int64_t size = call.Hq * call.bias.num_distances;
    fold(shared.distance_values, slots * call.B, size);
    for (int64_t i = 0; i < size; ++i)
      back.grad_distance_values[i] = float(shared.distance_values[i]);
  }
  if (!dense_by_row(back) && !dense_by_key(back)) return;
  double* values = dense_by_row(back) ? shared.dense_rows : shared.dense_keys;
  const int64_t count = dense_by_row(back) ? dense_row_count(back) : call.Lk;
  if (dense_by_row(back)) fold(values, slots, heads * count);
  const int64_t* stride = back.grad_dense_stride;
  const int64_t batches = stride[0] ? call.B : 1, members = stride[1] ? call.Hq : 1;
  if (batches == 1) fold(values, call.B, call.Hq * count);
  for (int64_t b = 0; b < batches; ++b) {
    double* of_batch = values + b * call.Hq * count;
    if (members == 1) fold(of_batch, call.Hq, count);
    for (int64_t i = 0; i < members * count; ++i)
      back.grad_dense[b * members * count + i] = float(of_batch[i]);
  }
}

inline int64_t query_items(const Forward& call) {
  return ceil_div(call.B * call.Hkv * tiles_per_head(call), kItemTiles);
}

inline void run_finish(const Backward& back, int64_t item, const BackwardScratch& scratch) {
  const Forward& call = back.forward;
  const Shared shared = lay_out_shared(back);
  if (item == 0) return finish_parameters(back, shared);
  if (!back.grad_query) return;
  const int64_t per_head = tiles_per_head(call), tiles = call.B * call.Hkv * per_head;
  for (int64_t i = (item - 1) * kItemTiles; i < minimum(item * kItemTiles, tiles); ++i) {
    Tile& tile = scratch.tiles[0].tile;
    name_tile(call, i / per_head, i % per_head, tile);
    finish_query(back, shared, tile, i);
  }
}

int64_t num_stage_items(const Backward& back, Stage stage) {
  const Forward& call = back.forward;
  if (stage == Stage::start) return 1;
  if (stage == Stage::rows) return query_items(call);
  if (stage == Stage::finish) return 1 + query_items(call);
  const HeadGroups groups = head_groups(back);
  return groups.b * groups.hkv * (back.split_keys ? num_superblocks(call) : 1);
}

void backward(const Backward& back, Stage stage, int64_t item, void* memory) {
  if (stage == Stage::start) {
    __builtin_memset(back.shared, 0, size_t(lay_out_shared(back).zeroed));
    return;
  }
  BackwardScratch scratch = lay_out(back, memory);
  clear_sums(const_cast<float*>(scratch.work.zeros), maximum(back.forward.D, back.forward.Dv));
  scratch.work.forward.soon->clear();
  if (stage == Stage::rows) run_rows(back, item, scratch);
  if (stage == Stage::keys) run_keys(back, item, scratch);
  if (stage == Stage::finish) run_finish(back, item, scratch);
}

}  // namespace
