// Which weights dropout keeps: a pure function of a seed and of where the weight stands, so that
// the backward pass finds again what the forward pass did, nothing is stored, and neither threads
// nor tiles matter.
//
// Philox4x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") with 7 rounds, the
// fewest that pass every test there. The counter is (key / 8, row, b * Hq + head, 0), the key is
// the seed: 128 bits for 8 neighbouring weights, 16 for each, of which those below
// dropout_threshold are dropped. manyheads/dropout.py says the same in PyTorch.
#pragma once

#include "scores.h"

namespace {

inline void philox_round(VecI (&c)[4], uint32_t key0, uint32_t key1) {
  VecI high0, low0, high1, low1;
  multiply_wide(c[0], 0xD2511F53u, high0, low0);
  multiply_wide(c[2], 0xCD9E8D57u, high1, low1);
  c[0] = high1 ^ c[1] ^ set_int(int32_t(key0));
  c[1] = low1;
  c[2] = high0 ^ c[3] ^ set_int(int32_t(key1));
  c[3] = low0;
}

inline void philox(VecI (&c)[4], uint64_t seed) {
  constexpr int kRounds = 7;
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
#pragma GCC unroll 7
  for (int i = 0; i < kRounds; ++i) {
    philox_round(c, key0, key1);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

// Calls each(row, n, kept) for the block's rows.
template <int N, class Each>
[[gnu::always_inline]] inline void for_kept(const Forward& call, const Tile& tile,
                                            const Block& block, Each each) {
  constexpr int64_t kWeights = 8;  // to one counter
  const VecI threshold = set_int(call.dropout_threshold), all = set_int(1 << 16);
  const int32_t head = int32_t(tile.b * call.Hq);
  for (int64_t first = block.begin / kWeights * kWeights; first < block.end; first += kWeights) {
    for (int n = 0; n < N; ++n) {
      VecI c[4] = {set_int(int32_t((block.key + first) / kWeights)),
                   load_int(tile.row + n * Vec::kLanes),
                   load_int(tile.head + n * Vec::kLanes) + set_int(head), set_int(0)};
      philox(c, call.dropout_seed);
#pragma GCC unroll 8
      for (int64_t i = 0; i < kWeights; ++i) {
        const int64_t row = first + i;
        const VecI bits = i % 2 ? high_half(c[i / 2]) : low_half(c[i / 2]);
        if (row >= block.begin && row < block.end) each(row, n, within(threshold, bits, all));
      }
    }
  }
}

// Dropped weights become 0, with the sign that marks masked ones. The others are scaled at the end.
template <int N>
[[gnu::noinline]] void drop_weights(const Forward& call, const Tile& tile, const Block& block,
                                    const Workspace& work) {
  for_kept<N>(call, tile, block, [&](int64_t row, int n, Lanes kept) {
    float* p = work.scores + (row * N + n) * Vec::kLanes;
    const Vec weight = load(p);
    store(p, select(kept, weight, weight * zero()));
  });
}

// Backward: what a weight is multiplied by, 0 or keep_scale.
template <int N>
[[gnu::noinline]] void find_kept(const Forward& call, const Tile& tile, const Block& block,
                                 float* kept_factor) {
  const Vec scale = set(call.keep_scale);
  for_kept<N>(call, tile, block, [&](int64_t row, int n, Lanes kept) {
    store(kept_factor + (row * N + n) * Vec::kLanes, select(kept, scale, zero()));
  });
}

template <int N>
inline void multiply_block(const Block& block, const float* factor, float* values) {
  for (int64_t i = block.begin * N; i < block.end * N; ++i) {
    float* p = values + i * Vec::kLanes;
    store(p, load(p) * load(factor + i * Vec::kLanes));
  }
}

}  // namespace
