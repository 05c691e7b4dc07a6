#include "check_queue.h"

#include <algorithm>

#include "queue.h"

namespace manyheads {

std::string check_queue(int64_t items, int64_t threads) {
  // Not atomic: were an item handed out twice, a thread sanitizer would see it too.
  std::vector<int> times(static_cast<size_t>(items), 0);
  std::vector<int64_t> guesses(static_cast<size_t>(items), 0);
  struct Memory {
    int64_t begun, done;
    char more[41];  // no multiple of a cache line
  };
  std::atomic<int64_t> counted{0};
  const auto prepare = [](void* shared) { *static_cast<int64_t*>(shared) = 7; };
  const auto begin = [](void* scratch) { *static_cast<Memory*>(scratch) = {1, 0, {}}; };
  std::atomic<bool> prepared{true};
  const auto work = [&](int64_t item, int64_t likely_next, void* scratch, void* shared) {
    if (*static_cast<int64_t*>(shared) != 7) prepared = false;
    Memory& mine = *static_cast<Memory*>(scratch);
    counted.fetch_add(mine.begun, std::memory_order_relaxed);
    ++mine.done;
    ++times[size_t(item)];
    guesses[size_t(item)] = likely_next;
    if (mine.done % 3 == 0) std::this_thread::yield();
  };
  run_queue(items, {sizeof(Memory), sizeof(int64_t)}, threads, prepare, begin, work,
            PlainThreads{});
  if (!prepared) return "an item ran before `prepare`";
  if (std::any_of(times.begin(), times.end(), [](int n) { return n != 1; }))
    return "an item was not handed out exactly once";
  if (counted.load() != items) return "an item ran before `begin`";
  for (int64_t item = 0; item < items; ++item) {
    const int64_t guess = guesses[size_t(item)];
    if (guess != -1 && (guess <= item || guess >= items)) return "a guess that cannot come";
    if (threads == 1 && guess != (item + 1 < items ? item + 1 : -1))
      return "one thread did not know its next item";
  }
  return "";
}

}  // namespace manyheads
