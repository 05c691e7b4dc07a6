// Memory that will be wanted soon, fetched a few cache lines at a time between register tiles: a burst
// would wait for memory as the reads themselves do.
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

  void fetch_some() {
    for (int line = 0; line < kLinesAtATime && next_ < count_; ++line) {
      Rows& rows = list_[next_];
      __builtin_prefetch(rows.at + offset_, 0, 2);
      offset_ += kLine;
      if (offset_ < rows.bytes) continue;
      offset_ = 0;
      rows.at += rows.stride;
      if (--rows.rows == 0) ++next_;
    }
  }

 private:
  static constexpr int kCapacity = 16, kLinesAtATime = 32;
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
