// The one numerics rule (DESIGN.md, section 7; tests/tolerance.py), for the tests without torch:
//
//   error <= 2 * (error of plain float32 attention + eps * max|oracle|) + floor
//
// per head, over all rows of the batch; finite exactly where the oracle is.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace manyheads {

// All of shape [B, heads, size]. Says what is wrong with `actual`; empty if nothing is.
std::string breaks_rule(const std::vector<float>& actual, const std::vector<double>& oracle,
                        const std::vector<float>& plain, int64_t heads, int64_t size,
                        double floor = 0);

}  // namespace manyheads
