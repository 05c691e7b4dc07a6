// A constant that the exponentials of all vector types share.
#pragma once

namespace {

// exp2 is 0 below this. A weight of 2^-100 beside the row's largest, which is 1, counts only
// against values 2^76 times as large; smaller ones would make sums of denormals, at a hundred
// cycles an FMA.
constexpr float kNothing = -100.0f;

}  // namespace
