// The forward kernel of one instruction set against plain loops.
#pragma once

#include <string>
#include <vector>

#include "case.h"
#include "plain.h"

namespace manyheads {

// The same for the inputs rounded to a half type.
struct Narrow {
  Result<double> oracle;
  std::vector<std::vector<float>> plain_out;  // in that type, and in float32
};

// What the kernels are held to; the same for each of them.
struct Expected {
  Result<double> oracle;
  std::vector<std::vector<float>> plain_out, plain_lse;  // in several orders of summation
  Narrow bfloat16, float16;
};
Expected expect_of(const Case& made);

// Runs the case's items one by one in a random order, then through the queue on several threads.
// Says what is wrong with the results; empty if nothing is.
std::string check_forward(const Kernels& kernels, const Case& made, const Expected& expected,
                          Random& random);

}  // namespace manyheads
