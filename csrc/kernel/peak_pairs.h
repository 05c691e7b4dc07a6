// The machine's limit for pairs of bfloat16 in vectors: products on registers alone, as peak.h.
#pragma once

#include "peak.h"

namespace {

constexpr double kPairFlopsPerStep = 2 * kFlopsPerStep;

// Returns something that depends on every step, so that none can be left out.
float multiply_pairs(int64_t steps) {
  Vec chains[kChains];
#pragma GCC unroll 32
  for (int i = 0; i < kChains; ++i) chains[i] = set(float(i));
  constexpr uint16_t kSmall = 0x3a80;  // 2^-10
  VecPairs a = set(Pair{kSmall, kSmall}), b = a;
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 32
    for (int i = 0; i < kChains; ++i) chains[i] = fma(a, b, chains[i]);
  }
  Vec sum = zero();
#pragma GCC unroll 32
  for (int i = 0; i < kChains; ++i) sum = sum + chains[i];
  float last[Vec::kLanes];
  store(last, sum);
  return last[0];
}

}  // namespace
