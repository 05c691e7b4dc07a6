#include "run_forward.h"

#include <numeric>
#include <utility>

#include "memory.h"

namespace manyheads {

std::vector<int64_t> shuffled(int64_t items, Random& random) {
  std::vector<int64_t> order(static_cast<size_t>(items));
  std::iota(order.begin(), order.end(), 0);
  for (int64_t i = items - 1; i > 0; --i)
    std::swap(order[size_t(i)], order[size_t(random.integer(0, i))]);
  return order;
}

void run_in_random_order(const Kernels& kernels, const Forward& call, Random& random) {
  const int64_t items = kernels.num_items(call);
  const std::vector<int64_t> order = shuffled(items, random);
  const Array<char> scratch(kernels.scratch_bytes(call), 64);
  wipe(scratch.data(), scratch.size());
  const Array<char> shared(kernels.shared_bytes(call), 64);
  wipe(shared.data(), shared.size());
  kernels.prepare(call, shared.data());
  kernels.begin(call, scratch.data());
  for (const int64_t item : order)
    kernels.forward(call, item, random.integer(-1, items - 1), scratch.data(), shared.data());
}

}  // namespace manyheads
