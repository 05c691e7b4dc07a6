// Memory that will be wanted soon, fetched a cache line at a time between the steps of a product: a
// burst of prefetches would wait for memory as the reads themselves do.
#pragma once

#include <cstdint>

namespace {

class Prefetcher {
 public:
  void clear() { count_ = next_ = 0, offset_ = 0; }

  // `rows` rows of `bytes` bytes, `stride` bytes apart; forgotten when the list is full.
  void want(const void* first, int64_t stride, int64_t rows, int64_t bytes) {
    if (rows <= 0 || count_ == kCapacity) return;
    if (stride == bytes) {  // one long row
      bytes *= rows;
      rows = 1;
    }
    list_[count_++] = {static_cast<const char*>(first), stride, rows, bytes};
  }

  // The next `n` lines; `idle`, which is in cache anyway, where there are no more.
  [[gnu::noinline]] void take(const void** lines, int64_t n, const void* idle) {
    while (n > 0 && next_ < count_) {
      Rows& rows = list_[next_];
      const int64_t in_row = (rows.bytes - offset_ + kLine - 1) / kLine;
      const int64_t here = in_row < n ? in_row : n;
      const char* line = rows.at + offset_;
      for (int64_t i = 0; i < here; ++i) lines[i] = line + i * kLine;
      lines += here;
      n -= here;
      offset_ += here * kLine;
      if (here < in_row) continue;
      offset_ = 0;
      rows.at += rows.stride;
      if (--rows.rows == 0) ++next_;
    }
    for (int64_t i = 0; i < n; ++i) lines[i] = idle;
  }

 private:
  static constexpr int kCapacity = 64;
  static constexpr int64_t kLine = 64;
  struct Rows {
    const char* at;
    int64_t stride, rows, bytes;
  };
  Rows list_[kCapacity];
  int count_ = 0, next_ = 0;
  int64_t offset_ = 0;
};

}  // namespace
