// Arrays that end where their memory ends, so that reading or writing one element more is seen.
//
// With the address sanitizer they lie on the heap, which it watches. It does not see into the
// masked loads and stores of AVX, though, so without it every array is followed by a page that may
// not be touched.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <type_traits>

namespace manyheads {

// Memory of `bytes` bytes exactly; give_back is told the same number.
void* take_exactly(size_t bytes, size_t alignment);
void give_back(void* data, size_t bytes);

template <class T>
class Array {
 public:
  static_assert(std::is_trivial_v<T>);

  Array() = default;
  // Elements hold no value in particular.
  explicit Array(int64_t size, size_t alignment = alignof(T))
      : data_(static_cast<T*>(take_exactly(size_t(size) * sizeof(T), alignment)),
              Free{size_t(size) * sizeof(T)}),
        size_(size) {}

  T* data() const { return data_.get(); }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) const { return data()[i]; }
  T* begin() const { return data(); }
  T* end() const { return data() + size_; }

 private:
  struct Free {
    size_t bytes = 0;
    void operator()(T* data) const { give_back(data, bytes); }
  };
  std::unique_ptr<T, Free> data_;
  int64_t size_ = 0;
};

// What memory holds before a kernel writes there: a NaN, and a large index.
void wipe(void* data, int64_t bytes);
bool untouched(float x);

}  // namespace manyheads
