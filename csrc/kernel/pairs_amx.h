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

// The sums of 16 rows of `a` [rows][a_pairs] with `b` [pairs][lanes] into set kSet, beside what is
// in `from` unless that is null; the other set goes to `previous` unless that is. Rows of both are
// `stride` floats apart.
template <class Half, int N, int kSet>
[[gnu::always_inline]] inline void sum_tiles(const Pair* a, int64_t a_pairs, const Pair* b,
                                             int64_t pairs, const float* from, float* previous,
                                             int64_t stride) {
  constexpr int W = Vec::kLanes;
  for_tiles<0, N>([&](auto n) noexcept {
    constexpr int i = decltype(n)::value;
    from ? load_tile<kSums<N, kSet> + i>(from + i * W, stride * 4)
         : zero_tile<kSums<N, kSet> + i>();
  });
  for (int64_t p = 0; p < pairs; p += kLinePairs) {
    load_tile_once<kRowTile>(a + p, a_pairs * 4);
    for_tiles<0, N>([&](auto n) noexcept {
      constexpr int i = decltype(n)::value;
      load_tile<kLaneTile>(b + p * (N * W) + i * W, N * W * 4);
      multiply_tiles<kSums<N, kSet> + i, kRowTile, kLaneTile>(Half{});
      if (previous && p == 0) store_tile<kSums<N, !kSet> + i>(previous + i * W, stride * 4);
    });
  }
}

template <int N, int kSet>
[[gnu::always_inline]] inline void store_sums(float* to, int64_t stride) {
  for_tiles<0, N>([&](auto n) noexcept {
    constexpr int i = decltype(n)::value;
    store_tile<kSums<N, kSet> + i>(to + i * Vec::kLanes, stride * 4);
  });
}

// As many times 16 rows as there are `groups`; use(i, c) when the sums c [16][lanes] of group i are
// in memory, at sums + (i & ring) * 16 * lanes.
template <class Half, int N, class Use>
[[gnu::always_inline]] inline void multiply_groups(const Pair* a, int64_t a_pairs, const Pair* b,
                                                   int64_t pairs, int64_t groups, float* sums,
                                                   int64_t ring, Use use) {
  constexpr int64_t L = N * Vec::kLanes;
  const auto at = [&](int64_t i) noexcept { return sums + (i & ring) * (kTileRows * L); };
  for (int64_t i = 0; i < groups; ++i, a += kTileRows * a_pairs) {
    float* const previous = i ? at(i - 1) : nullptr;
    i % 2 ? sum_tiles<Half, N, 1>(a, a_pairs, b, pairs, nullptr, previous, L)
          : sum_tiles<Half, N, 0>(a, a_pairs, b, pairs, nullptr, previous, L);
    if (i) use(i - 1, previous);
  }
  const int64_t last = groups - 1;
  last % 2 ? store_sums<N, 1>(at(last), L) : store_sums<N, 0>(at(last), L);
  use(last, at(last));
}

// add(row, c) for rows [begin, end), of which `sums` begin with row `first`.
template <int N, class Add>
[[gnu::always_inline]] inline void add_rows(const float* sums, int64_t first, int64_t begin,
                                            int64_t end, const Add& add) {
  constexpr int W = Vec::kLanes;
  const auto add_some = [&](auto rows) noexcept {
    constexpr int R = decltype(rows)::value;
    for (; begin + R <= end; begin += R) {
      Vec c[R][N];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
        for (int n = 0; n < N; ++n) c[r][n] = load(sums + ((begin - first + r) * N + n) * W);
      add(begin, c);
    }
  };
  add_some(Number<4>{});
  add_some(Number<1>{});
}

template <class HalfType>
struct TileUnit {
  using Half = HalfType;
  static constexpr int64_t kTerms = 2 * kLinePairs;
  static void begin_item() { set_up_tiles(); }
  static void end_item() { give_back_tiles(); }

  static int64_t pairs_of(int64_t numbers) { return pairs_of_row(numbers); }

  template <int N>
  static void scores(const Pair* rows, int64_t width, const Pair* columns, const Block& block,
                     Prefetcher&, float* scores, float* running_max) {
    constexpr int W = Vec::kLanes;
    const int64_t pairs = pairs_of(width), first = block.begin / kTileRows * kTileRows;
    Vec largest[N];
#pragma GCC unroll 3
    for (int n = 0; n < N; ++n) largest[n] = running_max ? load(running_max + n * W) : zero();
    multiply_groups<Half, N>(rows + first * pairs, pairs, columns, pairs,
                             (block.end - first + kTileRows - 1) / kTileRows,
                             scores + first * (N * W), -1, [&](int64_t i, const float*) noexcept {
                               const int64_t row = first + i * kTileRows;
                               if (running_max)
                                 take_max<N>(scores, maximum(row, block.begin),
                                             minimum(row + kTileRows, block.end), largest);
                             });
#pragma GCC unroll 3
    for (int n = 0; n < N; ++n)
      if (running_max) store(running_max + n * W, largest[n]);
  }

  // Reads whole tiles: of `a` so many rows, of both so many pairs.
  template <int N, class Add>
  static void multiply(const Pair* a, int64_t stride, const Pair* b, int64_t pairs, int64_t begin,
                       int64_t end, Prefetcher&, Add add) {
    constexpr int64_t L = N * Vec::kLanes;
    alignas(64) float sums[2 * kTileRows * L];
    const int64_t first = begin / kTileRows * kTileRows;
    multiply_groups<Half, N>(
        a + first * stride, stride, b, pairs, (end - first + kTileRows - 1) / kTileRows, sums, 1,
        [&](int64_t group, const float* c) noexcept {
          const int64_t row = first + group * kTileRows;
          add_rows<N>(c, row, maximum(row, begin), minimum(row + kTileRows, end), add);
        });
  }

  // The sums run on in the tiles. Rows beside [begin, end) count as far as whole tiles reach.
  template <int N>
  static void accumulate(const Pair* a, int64_t stride, const Pair* b, int64_t pairs, int64_t begin,
                         int64_t end, Prefetcher&, float* sums, int64_t width) {
    const int64_t first = begin / kTileRows * kTileRows;
    const int64_t groups = (end - first + kTileRows - 1) / kTileRows;
    a += first * stride;
    sums += first * width;
    for (int64_t i = 0; i < groups; ++i, a += kTileRows * stride, sums += kTileRows * width) {
      float* const previous = i ? sums - kTileRows * width : nullptr;
      i % 2 ? sum_tiles<Half, N, 1>(a, stride, b, pairs, sums, previous, width)
            : sum_tiles<Half, N, 0>(a, stride, b, pairs, sums, previous, width);
    }
    sums -= kTileRows * width;
    groups % 2 ? store_sums<N, 0>(sums, width) : store_sums<N, 1>(sums, width);
  }
};

}  // namespace
