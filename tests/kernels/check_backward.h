// The backward kernel of one instruction set against plain loops.
#pragma once

#include <string>
#include <vector>

#include "case.h"
#include "plain_gradients.h"

namespace manyheads {

// What the kernels are held to; the same for each of them.
struct ExpectedGradients {
  Gradients<double> oracle;
  std::vector<Gradients<float>> plain;         // in several orders of summation
  Gradients<double> narrow_oracle;             // of the inputs rounded to bfloat16
  std::vector<Gradients<float>> plain_narrow;  // in bfloat16, and in float32
};
ExpectedGradients expect_gradients_of(const Case& made);

// Runs the forward pass, then the items of each stage of the backward pass in a random order, then
// the stages on several threads, with keys split among them in one of the two runs. Says what is
// wrong with the results; empty if nothing is.
std::string check_backward(const Kernels& kernels, const Case& made,
                           const ExpectedGradients& expected, Random& random);

}  // namespace manyheads
