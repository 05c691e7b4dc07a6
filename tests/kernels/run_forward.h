// Runs a kernel's items outside a queue.
#pragma once

#include <cstdint>
#include <vector>

#include "attention.h"
#include "random.h"

namespace manyheads {

// The numbers [0, items) in a random order.
std::vector<int64_t> shuffled(int64_t items, Random& random);

// On memory of exactly the size asked for, which holds nothing useful before.
void run_in_random_order(const Kernels& kernels, const Forward& call, Random& random);

}  // namespace manyheads
