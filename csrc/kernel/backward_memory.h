// How a backward call is cut into superblocks and tiles, and the memory it takes: what all threads
// share, and what each has for itself.
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
  float* packed;  // copies of K and V of a superblock, as the products want them
  int64_t bytes;
};

template <class Products>
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
  work.narrowed = arena.take<float>(Products::kNarrowedFloats);
  scratch.packed = arena.take<float>(Products::packed_floats(call, keys));
  KeySums& sums = scratch.sums;
  sums.grad_key = back.grad_key ? arena.take<float>(keys * padded(call.D)) : nullptr;
  sums.grad_value = back.grad_value ? arena.take<float>(keys * padded(call.Dv)) : nullptr;
  sums.distance_values =
      back.grad_distance_values ? arena.take<float>(group * call.bias.num_distances) : nullptr;
  sums.dense_keys = dense_by_key(back) ? arena.take<float>(group * keys) : nullptr;
  for (int64_t i = 0; i < kGroupTiles; ++i) {
    float* query = arena.take<float>(Products::column_floats(call.D));
    float* grad_out = arena.take<float>(Products::column_floats(call.Dv));
    float* query_rows = arena.take<float>(Products::row_floats(call.D));
    float* grad_rows = arena.take<float>(Products::row_floats(call.Dv));
    float* grad_query = arena.take<float>(padded(call.D) * kMaxLanes);
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

inline void name_tile(const Forward& call, int64_t head, int64_t index, Tile& tile) {
  const int64_t lanes = tile_lanes(call);
  tile.b = head / call.Hkv;
  tile.hkv = head % call.Hkv;
  tile.first = index * lanes;
  tile.count = int(minimum(lanes, flat_queries(call) - tile.first));
  tile.vectors = (tile.count + Vec::kLanes - 1) / Vec::kLanes;
}

// A lane's row of `data`, or zeros for a row that attended to nothing, which has no part in any
// gradient whatever it holds.
inline const void* attending_row(const Forward& call, const Tile& tile, const void* data,
                                 const int64_t (&stride)[3], const float* zeros, int lane) {
  if (call.row_sum[row_index(call, tile, lane)] == 0) return zeros;
  return row_at(data, call.type, stride, tile.b, tile.head[lane], tile.row[lane]);
}

}  // namespace
