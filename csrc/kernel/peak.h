// The machine's limit: fused multiply-adds on registers alone, as many in flight as the kernels
// keep.
#pragma once

#include <cstdint>

namespace {

constexpr int kChains = Vec::kRows3 * 3;
constexpr double kFlopsPerStep = 2.0 * kChains * Vec::kLanes;

// Returns something that depends on every step, so that none can be left out.
float multiply_add(int64_t steps) {
  Vec chains[kChains];
#pragma GCC unroll 32
  for (int i = 0; i < kChains; ++i) chains[i] = set(float(i));
  const Vec shrink = set(0.999f), grow = set(0.001f);
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 32
    for (int i = 0; i < kChains; ++i) chains[i] = fma(chains[i], shrink, grow);
  }
  Vec sum = zero();
#pragma GCC unroll 32
  for (int i = 0; i < kChains; ++i) sum = sum + chains[i];
  float last[Vec::kLanes];
  store(last, sum);
  return last[0];
}

}  // namespace
