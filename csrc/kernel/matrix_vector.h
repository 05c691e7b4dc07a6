// A projection of one row, as in a step of decoding: reading the weight once is the whole cost, and
// the dot products are those of one query with a cache of keys.
#pragma once

#include "row_products.h"

namespace {

inline int64_t num_product_items(const RowProduct& call) { return (call.rows + kRun - 1) / kRun; }

inline void widen_x(const RowProduct& call, float* x) {
  constexpr int W = Vec::kLanes;
  for (int64_t i = 0; i < call.width; i += W) {
    const int64_t n = minimum(W, call.width - i);
    store_row(Type::float32, x, i, n, load_row(call.type, call.x, i, n));
  }
}

void multiply_rows(const RowProduct& call, int64_t item, const float* x) {
  constexpr int W = Vec::kLanes;
  const int64_t first = item * kRun, n = minimum(kRun, call.rows - first);
  const int64_t stride = call.width * size_of(call.type);
  const Rows rows{static_cast<const char*>(call.weight) + first * stride, stride};
  // Further than in decoding, where another product's rows come between.
  const int64_t ahead = maximum(2 * kBytesAhead / stride, 1) * stride;
  const auto multiply = call.type == Type::float32    ? score_keys<Type::float32, 1>
                        : call.type == Type::bfloat16 ? score_keys<Type::bfloat16, 1>
                                                      : score_keys<Type::float16, 1>;
  alignas(64) float sums[kRun];
  multiply(x, rows, n, call.width, ahead, sums);
  for (int64_t i = 0; i < n; i += W) {
    const int64_t count = minimum(W, n - i);
    const Vec bias = call.bias ? load_row(call.type, call.bias, first + i, count) : zero();
    store_row(call.type, call.out, first + i, count, load(sums + i) + bias);
  }
}

}  // namespace
