// A tile: up to three vectors of query lanes of one (batch, key/value head), with all that belongs
// to a lane. The G query heads of a group share their K and V, so they are stacked on the lanes
// too: lane i of a tile holds flat query f = first + i, which is row f / G of head hkv * G + f % G.
#pragma once

#include "half.h"

using namespace manyheads;

namespace {

constexpr float kInfinity = __builtin_inff();
constexpr float kLog2e = 0x1.715476p+0f;

constexpr int kMaxVectors = 3;
constexpr int kMaxLanes = kMaxVectors * Vec::kLanes;
// Keys are worked through in blocks cut at absolute multiples of this.
constexpr int kBlock = 128;
// And trimmed, where no lane attends, in steps of this.
constexpr int kRowStep = 4;
// Where scores are kept, the largest of so many is too.
constexpr int kPeakKeys = 32;
// Past this many keys, sums over blocks are kept in two levels: one chain of additions over all
// blocks would leave the numerics rule behind.
constexpr int64_t kSpan = 16384;

struct Range {
  int32_t begin, end;
};

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

inline int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t maximum(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Sums and differences of two such numbers and a row stay inside int32.
inline int32_t within_bounds(int64_t x) {
  return int32_t(maximum(minimum(x, kUnbounded), -kUnbounded));
}

// Running result of one tile over some keys: out is unnormalised, relative to 2^(scaled maximum).
struct Partial {
  float* out;                        // [Dv][lanes]
  alignas(64) float max[kMaxLanes];  // of the raw scores; -inf: no key yet
  alignas(64) float sum[kMaxLanes];
};

struct Tile {
  int64_t b, hkv, first;
  int vectors,
      count;  // lanes = vectors * kLanes, of which `count` are real; the rest copy the last
  int num_ranges;
  Range keys;    // hull of all lanes' keys
  float* query;  // [D][lanes], or as pairs.h packs it
  Partial inner, outer;
  float* kept;   // [Lk][lanes], where its scores are to stay for the statistics, or null
  float* peaks;  // [Lk / kPeakKeys][lanes]: their largest, of so many keys each
  alignas(64) int32_t row[kMaxLanes], head[kMaxLanes];  // of each lane
  alignas(64) int32_t position[kMaxLanes];
  alignas(64) int32_t begin[kMaxRanges][kMaxLanes], end[kMaxRanges][kMaxLanes];
  alignas(64) float slope[kMaxLanes];
  alignas(64) int32_t distance_base[kMaxLanes];  // of the lane's row of distance_values
  const float* bias_row[kMaxLanes];
  const uint8_t* allowed_row[kMaxLanes];

  int lanes() const { return vectors * Vec::kLanes; }
};

inline Partial& total_of(const Forward& call, Tile& tile) {
  return call.Lk > kSpan ? tile.outer : tile.inner;
}

inline void name_lanes(const Forward& call, Tile& tile) {
  const int32_t group = int32_t(call.Hq / call.Hkv), head = int32_t(tile.hkv) * group;
  int32_t row = int32_t(tile.first / group), member = int32_t(tile.first % group);
  for (int lane = 0; lane < tile.lanes(); ++lane) {
    tile.row[lane] = row;
    tile.head[lane] = head + member;
    if (lane + 1 < tile.count && ++member == group) {
      member = 0;
      ++row;
    }
  }
}

// Row [b, head, row] of a [B, H, L, D] tensor.
template <class Void>
inline Void* row_at(Void* data, Type type, const int64_t (&stride)[3], int64_t b, int64_t head,
                    int64_t row) {
  const int64_t element = b * stride[0] + head * stride[1] + row * stride[2];
  return reinterpret_cast<Void*>(uintptr_t(data) + uintptr_t(element * size_of(type)));
}

// Element [b, head, row, 0] of a [B, H, L, D] tensor for one lane.
template <class T>
inline T* at_lane(T* data, const int64_t (&stride)[3], const Tile& tile, int64_t lane) {
  return data + tile.b * stride[0] + tile.head[lane] * stride[1] + tile.row[lane] * stride[2];
}

// Index of a lane's row in the tensors [B, Hq, Lq].
inline int64_t row_index(const Forward& call, const Tile& tile, int lane) {
  return (tile.b * call.Hq + tile.head[lane]) * call.Lq + tile.row[lane];
}

// The keys that each lane may attend to, as ranges clamped to [0, Lk); the meaning of each plan is
// defined in manyheads/spec.py. A dense plan leaves the whole row, and is read per block.
inline void find_ranges(const Forward& call, Tile& tile) {
  const Mask& mask = call.mask;
  const int32_t Lk = int32_t(call.Lk);
  const auto clamp = [Lk](int32_t x) { return x < 0 ? 0 : x > Lk ? Lk : x; };
  const auto smaller = [](int32_t x, int32_t y) { return x < y ? x : y; };
  const auto larger = [](int32_t x, int32_t y) { return x > y ? x : y; };
  if (mask.kind == PlanKind::intervals) {
    for (int lane = 0; lane < tile.lanes(); ++lane) {
      const int32_t* range = at_lane(mask.ranges, mask.ranges_stride, tile, lane);
      for (int r = 0; r < tile.num_ranges; ++r) {
        tile.begin[r][lane] = clamp(range[2 * r]);
        tile.end[r][lane] = clamp(range[2 * r + 1]);
      }
    }
  } else if (mask.kind == PlanKind::band) {
    const int32_t left = within_bounds(mask.left.at(tile.b));
    const int32_t right = within_bounds(mask.right.at(tile.b));
    const int32_t start = clamp(int32_t(mask.key_start.at(tile.b)));
    const int32_t end = clamp(int32_t(mask.key_end.at(tile.b)));
    const int32_t first = clamp(start + clamp(int32_t(mask.first_n.at(tile.b))));
    for (int lane = 0; lane < tile.lanes(); ++lane) {
      const int32_t position = tile.position[lane];
      const int32_t window_end =
          right == kUnbounded ? end : clamp(smaller(end, position + right + 1));
      tile.begin[0][lane] = left == kUnbounded ? start : clamp(larger(start, position - left));
      tile.end[0][lane] = window_end;
      tile.begin[1][lane] = start;
      tile.end[1][lane] = smaller(first, mask.first_within_right ? window_end : end);
    }
  } else {
    for (int lane = 0; lane < tile.lanes(); ++lane) {
      tile.begin[0][lane] = 0;
      tile.end[0][lane] = Lk;
    }
  }
  int32_t hull_begin = Lk, hull_end = 0;
  for (int r = 0; r < tile.num_ranges; ++r) {
    for (int lane = 0; lane < tile.lanes(); ++lane) {
      const int32_t begin = tile.begin[r][lane], end = tile.end[r][lane];
      hull_begin = smaller(hull_begin, begin < end ? begin : Lk);
      hull_end = larger(hull_end, begin < end ? end : 0);
    }
  }
  tile.keys = {hull_begin, hull_end};
}

inline int count_ranges(const Mask& mask) {
  if (mask.kind == PlanKind::intervals) return int(mask.num_ranges);
  const bool first = mask.kind == PlanKind::band && (mask.first_n.values || mask.first_n.value > 0);
  return first ? 2 : 1;
}

inline int64_t flat_queries(const Forward& call) { return call.Lq * (call.Hq / call.Hkv); }

inline bool has_bias(const Bias& bias) { return bias.slopes || bias.distance_values || bias.dense; }

// to[column][lane] = factor * row_of(lane)[column].
template <class RowOf>
inline void pack_columns(const Forward& call, const Tile& tile, int64_t width, Vec factor,
                         float* to, RowOf row_of) {
  constexpr int W = Vec::kLanes;
  const int64_t lanes = tile.lanes();
  for (int v = 0; v < tile.vectors; ++v) {
    const void* source[W];
    for (int i = 0; i < W; ++i) source[i] = row_of(v * W + i);
    for (int64_t d = 0; d < width; d += W) {
      const int64_t columns = minimum(W, width - d);
      Vec rows[W];
      for (int i = 0; i < W; ++i) rows[i] = load_row(call.type, source[i], d, columns);
      transpose(rows);
      for (int64_t i = 0; i < columns; ++i) store(to + (d + i) * lanes + v * W, rows[i] * factor);
    }
  }
}

// Qᵀ of the tile's lanes: [D][lanes]. The sign of a negative scale goes here, so that the kernel's
// running maximum is that of the scaled scores too.
inline void pack_query(const Forward& call, Tile& tile) {
  pack_columns(call, tile, call.D, set(call.scale < 0 ? -1.0f : 1.0f), tile.query, [&](int lane) {
    return row_at(call.query, call.type, call.query_stride, tile.b, tile.head[lane],
                  tile.row[lane]);
  });
}

inline void clear(Partial& partial, int64_t lanes, int64_t Dv) {
  for (int64_t i = 0; i < Dv * lanes; i += Vec::kLanes) store(partial.out + i, zero());
  for (int64_t i = 0; i < lanes; i += Vec::kLanes) {
    store(partial.max + i, set(-kInfinity));
    store(partial.sum + i, zero());
  }
}

inline void find_positions(const Forward& call, Tile& tile) {
  const int32_t start = within_bounds(call.query_start.at(tile.b));
  for (int lane = 0; lane < tile.lanes(); ++lane) tile.position[lane] = start + tile.row[lane];
  if (!call.positions) return;
  const int32_t* positions = call.positions + tile.b * call.positions_stride;
  for (int lane = 0; lane < tile.lanes(); ++lane) tile.position[lane] = positions[tile.row[lane]];
}

inline void find_bias(const Forward& call, Tile& tile) {
  const Bias& bias = call.bias;
  for (int lane = 0; lane < tile.lanes(); ++lane) {
    const int32_t row = tile.row[lane], head = tile.head[lane];
    if (bias.slopes) tile.slope[lane] = bias.slopes[head];
    if (bias.distance_values) tile.distance_base[lane] = int32_t(head * bias.num_distances);
    if (bias.dense)
      tile.bias_row[lane] = bias.dense + tile.b * bias.dense_stride[0] +
                            head * bias.dense_stride[1] + row * bias.dense_stride[2];
  }
}

// The tile's lanes are named; this fills in where they stand and what they may see.
inline void place_lanes(const Forward& call, Tile& tile) {
  tile.num_ranges = count_ranges(call.mask);
  find_positions(call, tile);
  find_ranges(call, tile);
  if (has_bias(call.bias)) find_bias(call, tile);
  if (call.mask.kind == PlanKind::dense)
    for (int lane = 0; lane < tile.lanes(); ++lane)
      tile.allowed_row[lane] = at_lane(call.mask.allowed, call.mask.allowed_stride, tile, lane);
}

// tile.b, hkv, first, count and vectors are set; this fills in what its lanes are and may see.
inline void place_tile(const Forward& call, Tile& tile) {
  name_lanes(call, tile);
  place_lanes(call, tile);
}

inline void clear_results(const Forward& call, Tile& tile) {
  clear(tile.inner, tile.lanes(), call.Dv);
  if (call.Lk > kSpan) clear(tile.outer, tile.lanes(), call.Dv);
}

// As place_tile, and clears the tile's results.
inline void start_tile(const Forward& call, Tile& tile) {
  tile.kept = nullptr;
  place_tile(call, tile);
  clear_results(call, tile);
}

}  // namespace
