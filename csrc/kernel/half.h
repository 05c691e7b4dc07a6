// Rows of bfloat16 and float16 read and written as float32: half types are widened where their data
// is packed anyway, and every sum is float32.
#pragma once

#include "../attention.h"

namespace {

using manyheads::size_of;
using manyheads::Type;

// Values i .. i + n of a row, n at most kLanes; the other lanes are zero and not read.
inline Vec load_row(Type type, const void* row, int64_t i, int64_t n) {
  constexpr int W = Vec::kLanes;
  if (type == Type::float32) {
    const float* p = static_cast<const float*>(row) + i;
    return n == W ? load(p) : load_some(p, n);
  }
  const uint16_t* p = static_cast<const uint16_t*>(row) + i;
  if (type == Type::bfloat16) return n == W ? load_bfloat16(p) : load_some_bfloat16(p, n);
  return n == W ? load_float16(p) : load_some_float16(p, n);
}

// Values i .. i + 2 kLanes of a row.
inline void load_two(Type type, const void* row, int64_t i, Vec& first, Vec& second) {
  constexpr int W = Vec::kLanes;
  if (type == Type::bfloat16)
    return load_two_bfloat16(static_cast<const uint16_t*>(row) + i, first, second);
  first = load_row(type, row, i, W);
  second = load_row(type, row, i + W, W);
}

inline void store_row(Type type, void* row, int64_t i, int64_t n, Vec x) {
  constexpr int W = Vec::kLanes;
  if (type == Type::float32) {
    float* p = static_cast<float*>(row) + i;
    n == W ? store(p, x) : store_some(p, x, n);
    return;
  }
  uint16_t* p = static_cast<uint16_t*>(row) + i;
  uint16_t some[W];
  uint16_t* to = n < W ? some : p;
  type == Type::bfloat16 ? store_bfloat16(to, x) : store_float16(to, x);
  if (n < W) __builtin_memcpy(p, some, n * sizeof(uint16_t));
}

// The first `rows` rows of `from`, `stride` elements apart, packed into float32.
inline void pack_rows(Type type, const void* from, int64_t stride, int64_t rows, int64_t width,
                      float* to) {
  constexpr int W = Vec::kLanes;
  for (int64_t row = 0; row < rows; ++row, to += width) {
    const void* p = static_cast<const char*>(from) + row * stride * size_of(type);
    int64_t d = 0;
    for (; d + W <= width; d += W) store(to + d, load_row(type, p, d, W));
    if (d < width) store_some(to + d, load_row(type, p, d, width - d), width - d);
  }
}

}  // namespace
