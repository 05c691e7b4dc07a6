// How a call is cut to be measured, and the memory that takes: what all threads share, and what
// each has for itself.
//
// The query heads that share a key/value head are stacked on the lanes as in tile.h, but only as
// many as divide a vector: then lane i of every vector is of one head, and sums over queries may
// add vectors to each other.
#pragma once

#include "forward.h"

namespace {

// Rows of one head are summed over in so many spans at most, one item each.
constexpr int64_t kMaxRowSpans = 16;

// The greatest common divisor of a group's heads and a vector's lanes.
inline int64_t stacked_heads(const Forward& call) {
  int64_t heads = call.Hq / call.Hkv;
  for (int64_t lanes = Vec::kLanes; lanes != 0;) {
    const int64_t rest = heads % lanes;
    heads = lanes;
    lanes = rest;
  }
  return heads;
}
inline int64_t num_stacks(const Forward& call) { return call.B * call.Hq / stacked_heads(call); }
inline int64_t stacked_queries(const Forward& call) { return call.Lq * stacked_heads(call); }

// Scores that the forward pass keeps for the statistics should not leave the second cache.
constexpr int64_t kKeptScores = int64_t(3) << 17;
inline int64_t kept_scores(const Forward& call) {  // of one tile
  return ceil_div(call.Lk, kBlock) * kBlock * tile_vectors(call) * Vec::kLanes;
}
bool keeps_scores(const Forward& call) { return call.Lk > 0 && kept_scores(call) <= kKeptScores; }

// Tiles that walk the keys together.
inline int64_t group_tiles(const Statistics& stats) {
  const int64_t most = kItemVectors / tile_vectors(stats.forward);
  return stats.attends ? minimum(most, kKeptScores / kept_scores(stats.forward)) : most;
}
inline int64_t group_lanes(const Statistics& stats) {
  return group_tiles(stats) * tile_vectors(stats.forward) * Vec::kLanes;
}
// A whole number of groups.
inline int64_t span_lanes(const Statistics& stats) {
  const int64_t groups = ceil_div(stacked_queries(stats.forward), group_lanes(stats));
  return ceil_div(groups, kMaxRowSpans) * group_lanes(stats);
}
inline int64_t num_row_spans(const Statistics& stats) {
  return ceil_div(stacked_queries(stats.forward), span_lanes(stats));
}

// Stacked queries [first, end) of heads head, head + 1, ... of b.
struct RowSpan {
  int64_t b, head, index, first, end;
};
inline RowSpan find_row_span(const Statistics& stats, int64_t item) {
  const Forward& call = stats.forward;
  const int64_t spans = num_row_spans(stats), stack = item / spans, lanes = span_lanes(stats);
  const int64_t per_batch = call.Hq / stacked_heads(call);
  const int64_t index = spans - 1 - item % spans;  // late queries first, as find_item has them
  return {stack / per_batch, stack % per_batch * stacked_heads(call), index, index * lanes,
          minimum((index + 1) * lanes, stacked_queries(call))};
}

inline int64_t cell_of(const Pooling& pooling, int64_t index) {
  return (index - pooling.begin) * pooling.cells / (pooling.end - pooling.begin);
}

// The heat map's rows that a span of query rows may have a part in: from `first` on,
// `cells_per_span` of them.
inline int64_t cells_per_span(const Statistics& stats) {
  const Pooling& pooled = stats.pooled_rows;
  if (!stats.heat_map || pooled.end == pooled.begin) return 0;
  const int64_t rows = span_lanes(stats) / stacked_heads(stats.forward);
  return minimum(pooled.cells, rows * pooled.cells / (pooled.end - pooled.begin) + 2);
}
inline int64_t first_cell(const Statistics& stats, int64_t span) {
  const Pooling& pooled = stats.pooled_rows;
  const int64_t rows = span_lanes(stats) / stacked_heads(stats.forward);
  const int64_t row = minimum(maximum(span * rows, pooled.begin), pooled.end - 1);
  return minimum(cell_of(pooled, row), pooled.cells - cells_per_span(stats));
}
inline int64_t map_size(const Statistics& stats) {
  return cells_per_span(stats) * stats.pooled_keys.cells;
}

// Sums over the rows of each span, which the last stage adds up in their order.
struct SharedSums {
  float* received;  // [spans][B, Hq, Lk]
  float* heat_map;  // [spans][B, Hq, cells_per_span, cells]
  int64_t bytes;
};
inline SharedSums lay_out_sums(const Statistics& stats) {
  const Forward& call = stats.forward;
  Arena arena{static_cast<char*>(stats.shared)};
  SharedSums sums;
  const int64_t heads = num_row_spans(stats) * call.B * call.Hq;
  sums.received = arena.take<float>(stats.received ? heads * call.Lk : 0);
  sums.heat_map = arena.take<float>(heads * map_size(stats));
  sums.bytes = arena.used;
  return sums;
}

// Lanes of one head in one vector of a tile that fall into the same row of the heat map: `lane`
// and those `stacked_heads` apart.
struct MapRow {
  int vector, lane, count;
  double* cells;
};

// Sums over keys for each row, in two levels: those of kSumSpan keys are summed by themselves.
constexpr int64_t kSumSpan = 16 * kBlock;
enum RowSum : int { kEntropySum, kDistanceSum, kFirstSums, kMaxRowSums = kFirstSums + kMaxMasses };

constexpr int kMaxWaiting = 16;

struct MeasuredTile {
  Tile* tile;
  // inverse_sum is 0 for lanes that only fill the tile; received_by is too for those that do not
  // count there.
  alignas(64) float max[kMaxLanes], inverse_sum[kMaxLanes], received_by[kMaxLanes];
  alignas(64) float largest[kMaxLanes];  // score
  alignas(64) float inner[kMaxRowSums][kMaxLanes], outer[kMaxRowSums][kMaxLanes];
  alignas(64) float at_offset[kMaxMasses][kMaxLanes];
  float* top_scores;  // [top][kMaxLanes], descending
  int32_t* top_keys;  // [top][kMaxLanes]
  // Scores above `floor`, of which there are few, wait to be sorted in; -inf where none waits.
  alignas(64) float floor[kMaxLanes], waiting_scores[kMaxWaiting][kMaxLanes];
  alignas(64) int32_t waiting_keys[kMaxWaiting][kMaxLanes], num_waiting[kMaxLanes];
  int32_t low, high;  // positions of its lanes
  bool broken;        // has a row whose sum is not a number
  int num_map_rows;
  MapRow map_rows[kMaxLanes];
};

struct StatisticsScratch {
  Scratch forward;
  MeasuredTile* tiles;    // those of `forward`
  float* received;        // [kBlock][kLanes]: of one block, not yet summed over lanes
  double* received_sums;  // [stacked heads][Lk]
  double* map_sums;       // [stacked heads][cells_per_span][cells]
  int64_t bytes;
};

template <class Products>
inline StatisticsScratch lay_out(const Statistics& stats, void* start) {
  const Forward& call = stats.forward;
  StatisticsScratch scratch;
  scratch.forward = lay_out<Products>(call, start);
  Arena arena{static_cast<char*>(start), scratch.forward.bytes};
  const int64_t heads = stacked_heads(call);
  scratch.tiles = arena.take<MeasuredTile>(kMaxTiles);
  scratch.received = arena.take<float>(stats.received ? kBlock * Vec::kLanes : 0);
  scratch.received_sums = arena.take<double>(stats.received ? heads * call.Lk : 0);
  scratch.map_sums = arena.take<double>(heads * map_size(stats));
  const int64_t kept = stats.attends ? kept_scores(call) : 0;
  float* const scores_kept = arena.take<float>(kept * group_tiles(stats));
  const int64_t num_peaks = kept / kPeakKeys;
  float* const peaks = arena.take<float>(num_peaks * group_tiles(stats));
  for (int i = 0; i < kMaxTiles; ++i) {
    float* scores = arena.take<float>(stats.top * kMaxLanes);
    int32_t* keys = arena.take<int32_t>(stats.top * kMaxLanes);
    if (!start) continue;
    scratch.tiles[i].tile = &scratch.forward.tiles[i];
    scratch.tiles[i].top_scores = scores;
    scratch.tiles[i].top_keys = keys;
    Tile& tile = *scratch.tiles[i].tile;
    tile.kept = kept && i < group_tiles(stats) ? scores_kept + i * kept : nullptr;
    tile.peaks = tile.kept ? peaks + i * num_peaks : nullptr;
  }
  scratch.bytes = arena.used;
  return scratch;
}

// Whether anything is asked of these query rows.
inline bool any_wanted(const Statistics& stats, int64_t begin, int64_t end) {
  if (stats.entropy || stats.max_logit || stats.mean_distance || stats.num_first ||
      stats.num_offsets || stats.top)
    return true;
  if (stats.received && end > stats.received_from) return true;
  return stats.heat_map && begin < stats.pooled_rows.end && end > stats.pooled_rows.begin;
}

}  // namespace
