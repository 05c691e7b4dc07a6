// The products of pairs.h on AMX: 16 keys, or 16 columns of V, by 16 queries to a tile.
#pragma once

#include "../tiles_amx.h"
#include "pairs.h"

namespace {

// Of the eight tiles, R * N are sums, N hold lanes and the last one rows.
template <int N>
constexpr int kTilesDown = N == 3 ? 1 : 2;

constexpr int kRowTile = 7;

// c[row][lane], `kTilesDown` tiles of rows by N of lanes, is the product over `pairs` pairs; a is
// [rows][a_pairs], b is [pairs][lanes].
template <int N>
[[gnu::always_inline]] inline void multiply_tile_rows(const Pair* a, int64_t a_pairs, const Pair* b,
                                                      int64_t pairs, float* c) {
  constexpr int L = N * Vec::kLanes, R = kTilesDown<N>;
  constexpr int64_t kLanesStride = L * 4;
  for_tiles<0, R * N>([](auto tile) { zero_tile<decltype(tile)::value>(); });
  for (int64_t p = 0; p < pairs; p += kLinePairs) {
    for_tiles<0, N>([&](auto n) {
      constexpr int i = decltype(n)::value;
      load_tile<R * N + i>(b + p * L + i * Vec::kLanes, kLanesStride);
    });
    for_tiles<0, R>([&](auto r) {
      constexpr int down = decltype(r)::value;
      load_tile<kRowTile>(a + down * kTileRows * a_pairs + p, a_pairs * 4);
      for_tiles<0, N>([](auto n) {
        constexpr int i = decltype(n)::value;
        multiply_tiles<down * N + i, kRowTile, R * N + i>();
      });
    });
  }
  for_tiles<0, R * N>([&](auto tile) {
    constexpr int i = decltype(tile)::value;
    store_tile<i>(c + i / N * kTileRows * L + i % N * Vec::kLanes, kLanesStride);
  });
}

struct TileUnit {
  static constexpr int64_t kTerms = 2 * kLinePairs;
  using Session = TileSession;

  template <int N>
  static void scores(const Forward& call, const Tile& tile, const Workspace& work,
                     const PairKeys& kv, const Block& block, float* running_max) {
    constexpr int W = Vec::kLanes, L = N * W, kStep = kTilesDown<N> * kTileRows;
    const int64_t pairs = key_pairs(call);
    const Pair* const query = reinterpret_cast<const Pair*>(tile.query);
    for (int64_t row = block.begin / kStep * kStep; row < block.end; row += kStep)
      multiply_tile_rows<N>(kv.key + row * pairs, pairs, query, pairs, work.scores + row * L);
    if (!running_max) return;
    Vec largest[N];
#pragma GCC unroll 3
    for (int n = 0; n < N; ++n) largest[n] = load(running_max + n * W);
    take_max<N>(work, block.begin, block.end, largest);
#pragma GCC unroll 3
    for (int n = 0; n < N; ++n) store(running_max + n * W, largest[n]);
  }

  template <int N>
  static void values(const Forward& call, const Workspace&, const PairKeys& kv, const Pair* weights,
                     int64_t begin, int64_t end, AddToOut<N> add) {
    constexpr int W = Vec::kLanes, L = N * W, kStep = kTilesDown<N> * kTileRows;
    alignas(64) float sums[kStep * L];
    for (int64_t d = 0; d < call.Dv; d += kStep) {
      multiply_tile_rows<N>(kv.value + d * kKeyPairs + begin / 2, kKeyPairs,
                            weights + begin / 2 * L, (end - begin) / 2, sums);
      const int64_t columns = minimum(kStep, call.Dv - d);
#pragma GCC unroll 3
      for (int n = 0; n < N; ++n) {
        const Vec factor = load(add.factor + n * W);
        for (int64_t i = 0; i < columns; ++i) {
          float* p = add.out + (d + i) * L + n * W;
          store(p, fma(load(p), factor, load(sums + i * L + n * W)));
        }
      }
    }
  }
};

}  // namespace
