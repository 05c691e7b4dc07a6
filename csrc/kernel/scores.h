// From a block of raw scores Sᵀ = K Qᵀ to weights Pᵀ and the running maximum and sum: softcap,
// bias, mask and the online softmax, all vertical, one lane per query.
#pragma once

#include "product.h"
#include "tile.h"

namespace {

// One block of keys for one tile. Rows are keys; only rows [begin, end) are computed, since no lane
// may attend to the others. Rows [core_begin, core_end) need no mask: every lane may attend to
// them.
struct Block {
  int64_t key;  // absolute position of row 0
  int64_t begin, end, core_begin, core_end;
};

// Whose block of K and V a packed copy is: that at `key` of head b * Hkv + hkv.
struct Slot {
  int64_t head, key;
  bool finite;  // V holds neither inf nor NaN; kept by pairs.h alone
};

struct Workspace {
  float* scores;                    // [kBlock][lanes]: raw scores, then weights
  float* bias;                      // [kBlock][lanes] where the call has a dense bias
  float* allowed;                   // [kBlock][lanes] of 0 and 1 where it has a dense mask
  float* softcap_slopes = nullptr;  // [kBlock][lanes], written where a backward pass wants them
  Slot* slots;                      // null unless rows of K or V have to be packed
  float* packed;  // a slot's [kBlock][D] of K, then [kBlock][Dv] of V, or the one that needs it
  Prefetcher* soon;
};

// to[row][lane] for rows [begin, end) of a block, from one row of memory per lane:
// read(lane, row, n) gives n values from `row` on.
template <class Read>
inline void transpose_rows(int64_t lanes, int64_t begin, int64_t end, float* to, Read read) {
  constexpr int W = Vec::kLanes;
  for (int64_t row = begin; row < end; row += W) {
    const int64_t n = minimum(W, end - row);
    for (int64_t lane = 0; lane < lanes; lane += W) {
      Vec values[W];
      for (int i = 0; i < W; ++i) values[i] = read(int(lane) + i, row, n);
      transpose(values);
      for (int64_t i = 0; i < n; ++i) store(to + (row + i) * lanes + lane, values[i]);
    }
  }
}

inline void read_bias(const Forward& call, const Tile& tile, const Block& block, float* to) {
  const bool one_per_row = call.bias.dense_stride[3] == 0;
  transpose_rows(tile.lanes(), block.begin, block.end, to, [&](int lane, int64_t row, int64_t n) {
    const float* p = tile.bias_row[lane];
    if (one_per_row) return set(*p);
    p += block.key + row;
    return n == Vec::kLanes ? load(p) : load_some(p, n);
  });
}

// Reads a dense mask's block and trims the block to the rows that some lane may attend to.
inline void read_allowed(const Tile& tile, Block& block, float* to) {
  const int64_t lanes = tile.lanes();
  transpose_rows(lanes, block.begin, block.end, to, [&](int lane, int64_t row, int64_t n) {
    const Vec bytes = load_bytes(tile.allowed_row[lane] + block.key + row, n);
    return select(equal(bytes, zero()), zero(), set(1.0f));  // a byte of True may hold any bits
  });
  const auto count = [&](int64_t row) {
    Vec sum = zero();
    for (int64_t i = 0; i < lanes; i += Vec::kLanes) sum = sum + load(to + row * lanes + i);
    return sum;
  };
  const Vec full = set(float(tile.vectors));
  while (block.begin < block.end && all(equal(count(block.begin), zero()))) ++block.begin;
  while (block.begin < block.end && all(equal(count(block.end - 1), zero()))) --block.end;
  block.core_begin = block.core_end = block.begin;
  while (block.core_end < block.end && all(equal(count(block.core_end), full))) ++block.core_end;
}

// Trims a block to the hull of its lanes' ranges and finds its core.
inline void trim_block(const Tile& tile, Block& block) {
  const int64_t lanes = tile.lanes();
  const int32_t first = int32_t(block.key + block.begin), last = int32_t(block.key + block.end);
  int32_t hull_begin = last, hull_end = first, core_begin = first, core_end = last;
  for (int r = 0; r < tile.num_ranges; ++r) {
    for (int64_t i = 0; i < lanes; ++i) {
      const int32_t begin = tile.begin[r][i], end = tile.end[r][i];
      const int32_t low = begin > first ? begin : first, high = end < last ? end : last;
      const bool empty = low >= high;
      const int32_t hull_low = empty ? last : low, hull_high = empty ? first : high;
      hull_begin = hull_low < hull_begin ? hull_low : hull_begin;
      hull_end = hull_high > hull_end ? hull_high : hull_end;
      core_begin = begin > core_begin ? begin : core_begin;
      core_end = end < core_end ? end : core_end;
    }
  }
  if (tile.num_ranges > 1) {  // a core only where one of the ranges covers the hull for each lane
    core_begin = hull_begin;
    core_end = hull_end;
    for (int64_t i = 0; i < lanes; ++i) {
      bool covered = false;
      for (int r = 0; r < tile.num_ranges; ++r)
        covered |= tile.begin[r][i] <= hull_begin && tile.end[r][i] >= hull_end;
      if (!covered) core_end = core_begin;
    }
  }
  // Whole steps of rows: a register tile of one or two rows takes as long as one of four.
  const int64_t rows = block.end;
  block.begin = (hull_begin - block.key) / kRowStep * kRowStep;
  block.end = minimum((hull_end - block.key + kRowStep - 1) / kRowStep * kRowStep, rows);
  if (hull_begin >= hull_end) block.end = block.begin;
  block.core_begin = minimum(maximum(core_begin - block.key, block.begin), block.end);
  block.core_end = maximum(minimum(core_end - block.key, block.end), block.core_begin);
}

// tanh by an odd polynomial near 0, where (1 - e) / (1 + e) with e = exp(-2|x|) would cancel.
inline Vec tanh(Vec x) {
  const Vec t = abs(x), z = x * x;
  const Vec e = exp2(t * set(-2 * kLog2e));
  const Vec far = (set(1.0f) - e) / (set(1.0f) + e);
  Vec p = set(-0x1.b3a652p-8f);
  p = fma(p, z, set(0x1.5cf24p-6f));
  p = fma(p, z, set(-0x1.b98accp-5f));
  p = fma(p, z, set(0x1.110f22p-3f));
  p = fma(p, z, set(-0x1.555552p-2f));
  const Vec near = fma(t * z, p, t);
  const Vec result = select(less(t, set(0.5f)), near, far);
  return select(has_sign(x), zero() - result, result);
}

// s = each(row, n, s) for the block's scores, in place.
template <int N, class Each>
[[gnu::always_inline]] inline void transform_rows(const Block& block, const Workspace& work,
                                                  Each each) {
  for (int64_t row = block.begin; row < block.end; ++row) {
#pragma GCC unroll 3
    for (int n = 0; n < N; ++n) {
      float* p = work.scores + row * (N * Vec::kLanes) + n * Vec::kLanes;
      store(p, each(row, n, load(p)));
    }
  }
}

template <int N>
[[gnu::noinline]] void apply_softcap(const Forward& call, const Block& block, const Workspace& work,
                                     Vec scale) {
  const Vec cap = set(call.softcap), to_cap = scale / cap;
  transform_rows<N>(block, work, [&](int64_t, int, Vec s) { return cap * tanh(s * to_cap); });
}

// The softcap's derivative 1 - tanh², from scores that it has just capped.
template <int N>
[[gnu::noinline]] void keep_softcap_slopes(const Forward& call, const Block& block,
                                           const Workspace& work) {
  const Vec one = set(1.0f), cap = set(call.softcap);
  for (int64_t i = block.begin * N; i < block.end * N; ++i) {
    const Vec t = load(work.scores + i * Vec::kLanes) / cap;
    store(work.softcap_slopes + i * Vec::kLanes, (one - t) * (one + t));
  }
}

template <int N>
[[gnu::noinline]] void add_alibi(const Tile& tile, const Block& block, const Workspace& work,
                                 Vec scale) {
  VecI position[N];
  Vec minus_slope[N];
  for (int n = 0; n < N; ++n) {
    position[n] = load_int(tile.position + n * Vec::kLanes);
    minus_slope[n] = zero() - load(tile.slope + n * Vec::kLanes);
  }
  transform_rows<N>(block, work, [&](int64_t row, int n, Vec s) {
    const Vec ahead = to_float(set_int(int32_t(block.key + row)) - position[n]);
    return fma(minus_slope[n], abs(ahead), s * scale);
  });
}

template <int N>
[[gnu::noinline]] void add_distance_values(const Bias& bias, const Tile& tile, const Block& block,
                                           const Workspace& work, Vec scale) {
  const VecI last = set_int(int32_t(bias.num_distances - 1));
  VecI position[N], base[N];
  for (int n = 0; n < N; ++n) {
    position[n] = load_int(tile.position + n * Vec::kLanes);
    base[n] = load_int(tile.distance_base + n * Vec::kLanes);
  }
  transform_rows<N>(block, work, [&](int64_t row, int n, Vec s) {
    const VecI ahead = set_int(int32_t(block.key + row + bias.distance_offset)) - position[n];
    const VecI index = max(min(ahead, last), set_int(0)) + base[n];
    return fma(s, scale, gather(bias.distance_values, index));
  });
}

// scale, softcap and bias, in place: raw scores become logits in natural units. The first pass that
// runs takes the scale along.
template <int N>
inline void transform_scores(const Forward& call, const Tile& tile, const Block& block,
                             const Workspace& work) {
  const Bias& bias = call.bias;
  Vec scale = set(call.scale < 0 ? -call.scale : call.scale);
  const auto take_scale = [&] {
    const Vec taken = scale;
    scale = set(1.0f);
    return taken;
  };
  if (call.softcap != 0) apply_softcap<N>(call, block, work, take_scale());
  if (work.softcap_slopes) keep_softcap_slopes<N>(call, block, work);
  if (bias.slopes) add_alibi<N>(tile, block, work, take_scale());
  if (bias.distance_values) add_distance_values<N>(bias, tile, block, work, take_scale());
  if (bias.dense || (call.sinks && call.softcap == 0 && !has_bias(bias))) {
    const Vec factor = take_scale();
    transform_rows<N>(block, work, [&](int64_t row, int n, Vec s) {
      if (!bias.dense) return s * factor;
      return fma(s, factor, load(work.bias + row * (N * Vec::kLanes) + n * Vec::kLanes));
    });
  }
}

// Scores that a lane may not attend to become -inf, whatever they were; `max` takes in the rest.
template <int N>
[[gnu::noinline]] void mask_scores(const Tile& tile, const Block& block, const Workspace& work,
                                   int64_t begin, int64_t end, Vec (&running)[N]) {
  constexpr int W = Vec::kLanes, L = N * W;
  const Vec minus_infinity = set(-kInfinity);
  for (int64_t row = begin; row < end; ++row) {
    const VecI key = set_int(int32_t(block.key + row));
#pragma GCC unroll 3
    for (int n = 0; n < N; ++n) {
      float* p = work.scores + row * L + n * W;
      Lanes allowed;
      if (work.allowed) {
        allowed = equal(load(work.allowed + row * L + n * W), set(1.0f));
      } else {
        allowed = within(load_int(tile.begin[0] + n * W), key, load_int(tile.end[0] + n * W));
        for (int r = 1; r < tile.num_ranges; ++r)
          allowed = either(
              allowed, within(load_int(tile.begin[r] + n * W), key, load_int(tile.end[r] + n * W)));
      }
      const Vec s = select(allowed, load(p), minus_infinity);
      store(p, s);
      running[n] = max(running[n], s);
    }
  }
}

template <int N>
inline void take_max(const float* scores, int64_t begin, int64_t end, Vec (&running)[N]) {
  constexpr int W = Vec::kLanes, L = N * W;
  for (int64_t row = begin; row < end; ++row)
#pragma GCC unroll 3
    for (int n = 0; n < N; ++n) running[n] = max(running[n], load(scores + row * L + n * W));
}

// A score of -inf has the weight -0, not +0: it marks a pair that does not attend, and adding -0
// changes nothing.
inline Vec masked_weight(Vec score, Vec weight) {
  return select(equal(score, set(-kInfinity)), set(-0.0f), weight);
}

// Weights 2^((s - base) * unit) of rows [begin, end), in place, added to `sum` in key order. The
// difference is taken first: a product of a huge maximum would be rounded by more than the exponent
// holds.
template <int N, bool kMasked>
[[gnu::noinline]] void weigh_scores(const Workspace& work, int64_t begin, int64_t end, Vec unit,
                                    const Vec (&base)[N], Vec (&sum)[N]) {
  constexpr int W = Vec::kLanes, L = N * W;
  Vec largest[N], total[N];
#pragma GCC unroll 3
  for (int n = 0; n < N; ++n) {
    largest[n] = base[n];
    total[n] = sum[n];
  }
  for (int64_t row = begin; row < end; ++row) {
#pragma GCC unroll 3
    for (int n = 0; n < N; ++n) {
      float* p = work.scores + row * L + n * W;
      const Vec s = load(p);
      Vec weight = exp2((s - largest[n]) * unit);
      if constexpr (kMasked) weight = masked_weight(s, weight);
      store(p, weight);
      total[n] = total[n] + weight;
    }
  }
#pragma GCC unroll 3
  for (int n = 0; n < N; ++n) sum[n] = total[n];
}

}  // namespace
