// The products of pairs.h on AMX: 16 keys, or 16 columns of V, by 16 queries to a tile.
#pragma once

#include "../tiles_amx.h"
#include "pairs.h"

namespace {

// Functions handed on are noexcept: without optimisation GCC prepares for exceptions otherwise, and
// that would be a symbol shared with other files.
//
// Two sets of N tiles of sums, one for rows of A and one for lanes of B. A set is stored while the
// other one is being summed: storing takes as long as multiplying otherwise.
constexpr int kRowTile = 6, kLaneTile = 7;
template <int N, int kSet>
constexpr int kSums = kSet ? N : 0;

// The sums of 16 rows of `a` [rows][a_pairs] with `b` [pairs][lanes] into set kSet; the other set
// goes to `previous` [16][lanes] unless that is null.
template <class Half, int N, int kSet>
[[gnu::always_inline]] inline void sum_tiles(const Pair* a, int64_t a_pairs, const Pair* b,
                                             int64_t pairs, float* previous) {
  constexpr int W = Vec::kLanes;
  constexpr int64_t kStride = N * W * 4;
  for_tiles<0, N>([](auto n) noexcept { zero_tile<kSums<N, kSet> + decltype(n)::value>(); });
  for (int64_t p = 0; p < pairs; p += kLinePairs) {
    load_tile_once<kRowTile>(a + p, a_pairs * 4);
    for_tiles<0, N>([&](auto n) noexcept {
      constexpr int i = decltype(n)::value;
      load_tile<kLaneTile>(b + p * (N * W) + i * W, kStride);
      multiply_tiles<kSums<N, kSet> + i, kRowTile, kLaneTile>(Half{});
      if (previous && p == 0) store_tile<kSums<N, !kSet> + i>(previous + i * W, kStride);
    });
  }
}

// As many times 16 rows as there are `groups`; use(i, c) when the sums c [16][lanes] of group i are
// in memory, at sums + (i & ring) * 16 * lanes.
template <class Half, int N, class Use>
[[gnu::always_inline]] inline void multiply_groups(const Pair* a, int64_t a_pairs, const Pair* b,
                                                   int64_t pairs, int64_t groups, float* sums,
                                                   int64_t ring, Use use) {
  constexpr int64_t kFloats = kTileRows * N * Vec::kLanes;
  const auto at = [&](int64_t i) noexcept { return sums + (i & ring) * kFloats; };
  for (int64_t i = 0; i < groups; ++i, a += kTileRows * a_pairs) {
    float* const previous = i ? at(i - 1) : nullptr;
    i % 2 ? sum_tiles<Half, N, 1>(a, a_pairs, b, pairs, previous)
          : sum_tiles<Half, N, 0>(a, a_pairs, b, pairs, previous);
    if (i) use(i - 1, previous);
  }
  const int64_t last = groups - 1;
  for_tiles<0, N>([&](auto n) noexcept {
    constexpr int i = decltype(n)::value, W = Vec::kLanes;
    last % 2 ? store_tile<kSums<N, 1> + i>(at(last) + i * W, N * W * 4)
             : store_tile<kSums<N, 0> + i>(at(last) + i * W, N * W * 4);
  });
  use(last, at(last));
}

template <class HalfType>
struct TileUnit {
  using Half = HalfType;
  static constexpr int64_t kTerms = 2 * kLinePairs;
  static constexpr bool kFetchesAhead = false;  // made no difference
  static void begin_item() { set_up_tiles(); }
  static void end_item() { give_back_tiles(); }

  template <int N>
  static void scores(const Forward& call, const Tile& tile, const Workspace& work,
                     const PairKeys& kv, const Block& block, float* running_max) {
    constexpr int W = Vec::kLanes;
    const int64_t pairs = key_pairs(call), first = block.begin / kTileRows * kTileRows;
    Vec largest[N];
#pragma GCC unroll 3
    for (int n = 0; n < N; ++n) largest[n] = running_max ? load(running_max + n * W) : zero();
    multiply_groups<Half, N>(
        kv.key + first * pairs, pairs, reinterpret_cast<const Pair*>(tile.query), pairs,
        (block.end - first + kTileRows - 1) / kTileRows, work.scores + first * (N * W), -1,
        [&](int64_t i, const float*) noexcept {
          const int64_t row = first + i * kTileRows;
          if (running_max)
            take_max<N>(work, maximum(row, block.begin), minimum(row + kTileRows, block.end),
                        largest);
        });
#pragma GCC unroll 3
    for (int n = 0; n < N; ++n)
      if (running_max) store(running_max + n * W, largest[n]);
  }

  template <int N>
  static void values(const Forward& call, const Workspace&, const PairKeys& kv, const Pair* weights,
                     int64_t begin, int64_t end, AddToOut<N> add) {
    constexpr int W = Vec::kLanes, L = N * W;
    alignas(64) float sums[2 * kTileRows * L];
    const Vec unscale = set(1 / Half::kWeightScale);
    Vec factor[N];
#pragma GCC unroll 3
    for (int n = 0; n < N; ++n) factor[n] = load(add.factor + n * W);
    multiply_groups<Half, N>(
        kv.value + begin / 2, kKeyPairs, weights + begin / 2 * L, (end - begin) / 2,
        (call.Dv + kTileRows - 1) / kTileRows, sums, 1,
        [&](int64_t group, const float* c) noexcept {
          const int64_t first = group * kTileRows;
          float* to = add.out + first * L;
          const int64_t rows = minimum(kTileRows, call.Dv - first);
          for (int64_t row = 0; row < rows; ++row, to += L, c += L)
#pragma GCC unroll 3
            for (int n = 0; n < N; ++n)
              store(to + n * W, fma(load(to + n * W), factor[n], load(c + n * W) * unscale));
        });
  }
};

}  // namespace
