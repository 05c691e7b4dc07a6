// The statistics kernel of one instruction set against plain loops.
#pragma once

#include <string>
#include <vector>

#include "case.h"

namespace manyheads {

// What is compared with plain loops: sums over keys, over rows and over both.
template <class T>
struct Measures {
  std::vector<T> entropy, received, heat_map;
};

struct ExpectedMeasures {
  Measures<double> oracle;
  std::vector<Measures<float>> plain;  // in several orders of summation
};
ExpectedMeasures expect_measures_of(const Case& made);

// Runs the forward pass for its maxima and sums, then the items of each stage in a random order,
// then on several threads; in half types for what sanitizers see. Says what is wrong with the
// results; empty if nothing is.
std::string check_statistics(const Kernels& kernels, const Case& made,
                             const ExpectedMeasures& expected, Random& random);

}  // namespace manyheads
