// The machine's limit for pairs in AMX's tiles: products on registers alone, with enough sums in
// flight that none waits for the one before. float16's take as long as bfloat16's.
#pragma once

#include "../tiles_amx.h"

namespace {

constexpr int kSumTiles = 6, kTileA = 6, kTileB = 7;
constexpr double kTileFlopsPerStep = 2.0 * kSumTiles * kTileRows * kTileRows * 32;

// Returns something that depends on the last step; the instructions are left as written anyway.
float multiply_tile_pairs(int64_t steps) {
  alignas(64) Pair pairs[kTileRows * kTileRows];
  alignas(64) float sums[kTileRows * kTileRows];
  constexpr uint16_t kSmall = 0x3a80;  // 2^-10
  for (Pair& pair : pairs) pair = {kSmall, kSmall};
  set_up_tiles();
  for_tiles<0, kSumTiles>([](auto n) noexcept { zero_tile<decltype(n)::value>(); });
  load_tile<kTileA>(pairs, 64);
  load_tile<kTileB>(pairs, 64);
  for (int64_t step = 0; step < steps; ++step)
    for_tiles<0, kSumTiles>(
        [](auto n) noexcept { multiply_tiles<decltype(n)::value, kTileA, kTileB>(Bfloat16{}); });
  store_tile<0>(sums, 64);
  give_back_tiles();
  return sums[0];
}

}  // namespace
