// How a call's work items are shared among threads. No torch here: bindings.cpp runs it on torch's
// threads, tests/kernels on plain ones, where a thread sanitizer can watch.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace manyheads {

// Memory for the tiles, kept by the calling thread from one call to the next: fresh pages for every
// call would cost more than a decoding step. Above kKeptBytes it is given back.
class Scratch {
 public:
  explicit Scratch(size_t bytes) : kept_(bytes <= kKeptBytes) {
    Buffer& buffer = kept_ ? kept() : own_;
    if (buffer.bytes < bytes) {
      buffer.memory.reset();
      buffer.bytes = 0;
      buffer.memory.reset(static_cast<std::byte*>(::operator new(bytes, kAlignment)));
      buffer.bytes = bytes;
    }
    data_ = buffer.memory.get();
  }
  std::byte* data() const { return data_; }

 private:
  static constexpr size_t kKeptBytes = size_t(64) << 20;
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(std::byte* memory) const { ::operator delete(memory, kAlignment); }
  };
  struct Buffer {
    std::unique_ptr<std::byte, Free> memory;
    size_t bytes = 0;
  };
  static Buffer& kept() {
    thread_local Buffer buffer;
    return buffer;
  }
  bool kept_;
  Buffer own_;
  std::byte* data_;
};

// Threads take runs of items from one counter, in the order the kernel wants them handed out.
//   prepare(shared): once, before any thread starts
//   begin(scratch): before a thread's first item
//   work(item, likely_next, scratch, shared): attention.h says what these are
//   parallel_for(first, last, grain, body): calls body(first, last) on up to `threads` threads
// `begin` and `work` must not throw: an exception must not cross torch's callback.
struct Bytes {
  int64_t each, shared;  // memory for each thread, and for all of them
};

// A piece of memory that the next one may follow on a cache line of its own.
inline size_t whole_lines(int64_t bytes) { return (size_t(bytes) + 63) / 64 * 64; }

// With memory for every thread, `each` bytes apart; `work` gets no shared one here.
template <class Begin, class Work, class ParallelFor>
void share_out(int64_t items, std::byte* memory, size_t each, int64_t threads, const Begin& begin,
               const Work& work, const ParallelFor& parallel_for) {
  if (items <= 0) return;
  threads = std::min(threads, items);
  // Neighbours share or follow each other's memory, and what a thread fetches ahead is the next
  // item's. Towards the end runs get shorter, so that no thread waits long for the last one.
  const auto run_from = [&](int64_t start) {
    return std::clamp<int64_t>((items - start) / (threads * 8), 1, 4);
  };
  std::atomic<int64_t> next{0};
  const auto body = [&](int64_t first, int64_t last) noexcept {
    for (int64_t worker = first; worker < last; ++worker) {
      void* const mine = memory + size_t(worker) * each;
      begin(mine);
      int64_t start = next.load(std::memory_order_relaxed);
      while (start < items) {
        const int64_t run = run_from(start), end = std::min(start + run, items);
        if (!next.compare_exchange_weak(start, end, std::memory_order_relaxed)) continue;
        for (int64_t item = start; item < end; ++item) {
          const int64_t later = item + 1 < end ? item + 1 : item + 1 + (threads - 1) * run;
          work(item, later < items ? later : -1, mine);
        }
        start = next.load(std::memory_order_relaxed);
      }
    }
  };
  if (threads == 1) {
    body(0, 1);
  } else {
    parallel_for(0, threads, 1, body);
  }
}

// One call's items, on memory of its own.
template <class Prepare, class Begin, class Work, class ParallelFor>
void run_queue(int64_t items, Bytes bytes, int64_t threads, const Prepare& prepare,
               const Begin& begin, const Work& work, const ParallelFor& parallel_for) {
  if (items <= 0) return;
  threads = std::min(threads, items);
  const size_t each = whole_lines(bytes.each);
  const Scratch scratch(each * size_t(threads) + size_t(bytes.shared));
  std::byte* const shared = scratch.data() + each * size_t(threads);
  prepare(shared);
  const auto with_shared = [&](int64_t item, int64_t likely_next, void* mine) {
    work(item, likely_next, mine, shared);
  };
  share_out(items, scratch.data(), each, threads, begin, with_shared, parallel_for);
}

}  // namespace manyheads
