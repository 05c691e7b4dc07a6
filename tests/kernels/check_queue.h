// The queue alone: every item once, on a thread's own memory, after `begin`.
#pragma once

#include <cstdint>
#include <string>
#include <thread>
#include <vector>

namespace manyheads {

// A parallel_for for run_queue, with a thread of its own for each number.
struct PlainThreads {
  template <class Body>
  void operator()(int64_t first, int64_t last, int64_t, const Body& body) const {
    std::vector<std::thread> pool;
    for (int64_t i = first; i < last; ++i) pool.emplace_back([&body, i] { body(i, i + 1); });
    for (std::thread& thread : pool) thread.join();
  }
};

// Says what is wrong; empty if nothing is.
std::string check_queue(int64_t items, int64_t threads);

}  // namespace manyheads
