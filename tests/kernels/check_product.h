// The product of a matrix and one row of one instruction set against plain loops.
#pragma once

#include <string>

#include "attention.h"
#include "random.h"

namespace manyheads {

// Runs a random product in every type, its items one by one in a random order, then through the
// queue on several threads. Says what is wrong with the results; empty if nothing is.
std::string check_product(const Kernels& kernels, Random& random);

}  // namespace manyheads
