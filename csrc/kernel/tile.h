// A tile: up to three vectors of query lanes of one (batch, key/value head), with all that belongs to
// a lane. The G query heads of a group share their K and V, so they are stacked on the lanes too:
// lane i of a tile holds flat query f = first + i, which is row f / G of head hkv * G + f % G.
#pragma once

#include "../attention.h"

using namespace manyheads;

namespace {

constexpr float kInfinity = __builtin_inff();
constexpr float kLog2e = 0x1.715476p+0f;
constexpr double kLn2 = 0x1.62e42fefa39efp-1;

constexpr int kMaxVectors = 3;
constexpr int kMaxLanes = kMaxVectors * Vec::kLanes;
// Keys are worked through in blocks cut at absolute multiples of this.
constexpr int kBlock = 128;
// Past this many keys, sums over blocks are kept in two levels: one chain of additions over all
// blocks would leave the numerics rule behind.
constexpr int64_t kSpan = 16384;

struct Range {
  int32_t begin, end;
};

inline int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t maximum(int64_t a, int64_t b) { return a > b ? a : b; }

// Running result of one tile over some keys: out is unnormalised, relative to 2^(scaled maximum).
struct Partial {
  float* out;  // [Dv][lanes]
  alignas(64) float max[kMaxLanes];  // of the raw scores; -inf: no key yet
  alignas(64) float sum[kMaxLanes];
};

struct Tile {
  int64_t b, hkv, first;
  int vectors, count;  // lanes = vectors * kLanes, of which `count` are real; the rest copy the last
  int num_ranges;
  Range keys;    // hull of all lanes' keys
  float* query;  // [D][lanes]
  Partial inner, outer;
  alignas(64) int32_t position[kMaxLanes];
  alignas(64) int32_t begin[kMaxRanges][kMaxLanes], end[kMaxRanges][kMaxLanes];
  alignas(64) float slope[kMaxLanes];
  alignas(64) int32_t distance_base[kMaxLanes];  // of the lane's row of distance_values
  const float* bias_row[kMaxLanes];
  const uint8_t* allowed_row[kMaxLanes];

  int lanes() const { return vectors * Vec::kLanes; }
};

struct LaneId {
  int64_t row, head;
};
inline LaneId lane_id(const Forward& call, const Tile& tile, int lane) {
  const int64_t group = call.Hq / call.Hkv;
  const int64_t flat = tile.first + (lane < tile.count ? lane : tile.count - 1);
  return {flat / group, tile.hkv * group + flat % group};
}

// The keys that `row` may attend to, as ranges clamped to [0, Lk); the meaning of each plan is
// defined in manyheads/spec.py. A dense plan leaves the whole row, and is read per block.
inline void find_ranges(const Forward& call, int64_t b, LaneId id, int64_t position, int lane,
                        Tile& tile) {
  const Mask& mask = call.mask;
  const auto put = [&](int r, int64_t begin, int64_t end) {
    tile.begin[r][lane] = int32_t(minimum(maximum(begin, 0), call.Lk));
    tile.end[r][lane] = int32_t(minimum(maximum(end, 0), call.Lk));
  };
  switch (mask.kind) {
    case PlanKind::full:
    case PlanKind::dense:
      put(0, 0, call.Lk);
      break;
    case PlanKind::band: {
      const int64_t start = mask.key_start.at(b), end = minimum(mask.key_end.at(b), call.Lk);
      const int64_t window_end = minimum(end, position + mask.right.at(b) + 1);
      const int64_t first_end = minimum(mask.first_within_right ? window_end : end,
                                        start + mask.first_n.at(b));
      put(0, maximum(start, position - mask.left.at(b)), window_end);
      if (tile.num_ranges > 1) put(1, start, first_end);
      break;
    }
    case PlanKind::intervals: {
      const int32_t* range = mask.ranges + b * mask.ranges_stride[0] +
                             id.head * mask.ranges_stride[1] + id.row * mask.ranges_stride[2];
      for (int r = 0; r < tile.num_ranges; ++r) put(r, range[2 * r], range[2 * r + 1]);
      break;
    }
  }
}

inline int count_ranges(const Mask& mask) {
  if (mask.kind == PlanKind::intervals) return int(mask.num_ranges);
  const bool first = mask.kind == PlanKind::band && (mask.first_n.values || mask.first_n.value > 0);
  return first ? 2 : 1;
}

// Qᵀ of the tile's lanes: [D][lanes]. The sign of a negative scale goes here, so that the kernel's
// running maximum is that of the scaled scores too.
inline void pack_query(const Forward& call, Tile& tile) {
  constexpr int W = Vec::kLanes;
  const int64_t lanes = tile.lanes();
  const Vec sign = set(call.scale < 0 ? -1.0f : 1.0f);
  for (int v = 0; v < tile.vectors; ++v) {
    const float* source[W];
    for (int i = 0; i < W; ++i) {
      const LaneId id = lane_id(call, tile, v * W + i);
      source[i] = call.query + tile.b * call.query_stride[0] + id.head * call.query_stride[1] +
                  id.row * call.query_stride[2];
    }
    for (int64_t d = 0; d < call.D; d += W) {
      const int64_t columns = minimum(W, call.D - d);
      Vec rows[W];
      for (int i = 0; i < W; ++i)
        rows[i] = columns == W ? load(source[i] + d) : load_some(source[i] + d, columns);
      transpose(rows);
      for (int64_t i = 0; i < columns; ++i)
        store(tile.query + (d + i) * lanes + v * W, rows[i] * sign);
    }
  }
}

inline void clear(Partial& partial, int64_t lanes, int64_t Dv) {
  for (int64_t i = 0; i < Dv * lanes; i += Vec::kLanes) store(partial.out + i, zero());
  for (int64_t i = 0; i < lanes; i += Vec::kLanes) {
    store(partial.max + i, set(-kInfinity));
    store(partial.sum + i, zero());
  }
}

// tile.b, hkv, first, count, vectors and the buffers are set; this fills in the rest.
inline void start_tile(const Forward& call, Tile& tile) {
  const Bias& bias = call.bias;
  tile.num_ranges = count_ranges(call.mask);
  tile.keys = {int32_t(call.Lk), 0};
  for (int lane = 0; lane < tile.lanes(); ++lane) {
    const LaneId id = lane_id(call, tile, lane);
    const int64_t position = call.positions
                                 ? call.positions[tile.b * call.positions_stride + id.row]
                                 : call.query_start.at(tile.b) + id.row;
    tile.position[lane] = int32_t(position);
    find_ranges(call, tile.b, id, position, lane, tile);
    for (int r = 0; r < tile.num_ranges; ++r) {
      if (tile.begin[r][lane] >= tile.end[r][lane]) continue;
      if (tile.begin[r][lane] < tile.keys.begin) tile.keys.begin = tile.begin[r][lane];
      if (tile.end[r][lane] > tile.keys.end) tile.keys.end = tile.end[r][lane];
    }
    if (bias.slopes) tile.slope[lane] = bias.slopes[id.head];
    if (bias.distance_values)
      tile.distance_base[lane] = int32_t(id.head * bias.num_distances);
    if (bias.dense)
      tile.bias_row[lane] = bias.dense + tile.b * bias.dense_stride[0] +
                            id.head * bias.dense_stride[1] + id.row * bias.dense_stride[2];
    if (call.mask.kind == PlanKind::dense)
      tile.allowed_row[lane] = call.mask.allowed + tile.b * call.mask.allowed_stride[0] +
                               id.head * call.mask.allowed_stride[1] +
                               id.row * call.mask.allowed_stride[2];
  }
  pack_query(call, tile);
  clear(tile.inner, tile.lanes(), call.Dv);
  if (call.Lk > kSpan) clear(tile.outer, tile.lanes(), call.Dv);
}

}  // namespace
