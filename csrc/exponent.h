// A constant that the exponentials of all vector types share.
#pragma once

namespace {

// exp2 is 0 below this. A weight of 2^-115 beside the row's largest, which is 1, counts only
// against values 2^91 times as large. Weights down to the smallest normal number, 2^-126, would
// make sums of denormals, at a hundred cycles each: docs/decisions/0004-smallest-weight.md.
constexpr float kNothing = -115.0f;

}  // namespace
