// What the statistics operator is asked, and the tensors that it answers with.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <tuple>
#include <vector>

#include "bindings_arguments.h"
#include "bindings_results.h"

namespace manyheads {

// Scores are all that the kernels are to compute: no column of any value.
inline void drop_values(Forward& f) {
  f.Dv = 0;
  std::fill_n(f.value_stride, 3, 0);
}

// A row that may attend to nothing measures 0; its largest logit is -inf.
inline Tensor make_rows(Statistics& s, bool entropy, bool max_logit, bool mean_distance) {
  const Forward& f = s.forward;
  const int64_t rows = f.B * f.Hq * f.Lq;
  const int64_t count = entropy + max_logit + mean_distance + s.num_first + s.num_offsets;
  float* data;
  Tensor tensor = make_contiguous({count, f.B, f.Hq, f.Lq}, data);
  std::fill_n(data, count * rows, 0.0f);
  const auto take = [&](bool wanted, int64_t n) -> float* {
    if (!wanted) return nullptr;
    float* const taken = data;
    data += n * rows;
    return taken;
  };
  s.entropy = take(entropy, 1);
  s.max_logit = take(max_logit, 1);
  s.mean_distance = take(mean_distance, 1);
  s.first_mass = take(s.num_first > 0, s.num_first);
  s.offset_mass = take(s.num_offsets > 0, s.num_offsets);
  if (max_logit) std::fill_n(s.max_logit, rows, -std::numeric_limits<float>::infinity());
  return tensor;
}

inline std::tuple<Tensor, Tensor> make_top(Statistics& s, int64_t top) {
  const Forward& f = s.forward;
  check(top >= 0 && top <= f.Lk, "top from 0 to Lk");
  if (top == 0) return {make_none(), make_none()};
  s.top = top;
  const int64_t sizes[] = {f.B, f.Hq, f.Lq, top};
  const int64_t rows = std::max<int64_t>(f.Lq, 1), heads = std::max<int64_t>(f.Hq, 1);
  const int64_t strides[] = {heads * rows * top, rows * top, top, 1};
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(4, sizes, strides, aoti_torch_dtype_int64(),
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  Tensor keys(handle), weights = make_contiguous({f.B, f.Hq, f.Lq, top}, s.top_weights);
  s.top_keys = static_cast<int64_t*>(keys.mutable_data_ptr());
  return {weights, keys};
}

inline Pooling read_pooling(const std::vector<int64_t>& numbers, size_t first, int64_t length) {
  const Pooling pooling{numbers[first], numbers[first + 1], numbers[first + 2]};
  check(0 <= pooling.begin && pooling.begin <= pooling.end && pooling.end <= length,
        "heat_map's ranges inside the rows and keys");
  check(0 <= pooling.cells && pooling.cells <= pooling.end - pooling.begin,
        "heat_map's cells no more than what falls into them");
  return pooling;
}

inline Tensor make_heat_map(Statistics& s, const std::vector<int64_t>& numbers) {
  const Forward& f = s.forward;
  if (numbers.empty()) return make_none();
  check(numbers.size() == 6, "6 numbers in heat_map, or none");
  s.pooled_rows = read_pooling(numbers, 0, f.Lq);
  s.pooled_keys = read_pooling(numbers, 3, f.Lk);
  float* data;
  Tensor map = make_contiguous({f.B, f.Hq, s.pooled_rows.cells, s.pooled_keys.cells}, data);
  std::fill_n(data, map.numel(), 0.0f);
  s.heat_map = map.numel() ? data : nullptr;
  return map;
}

inline Tensor make_received(Statistics& s, const std::vector<int64_t>& from) {
  const Forward& f = s.forward;
  if (from.empty()) return make_none();
  check(from.size() == 1, "1 number in received, or none");
  s.received_from = from[0];
  Tensor sums = make_contiguous({f.B, f.Hq, f.Lk}, s.received);
  std::fill_n(s.received, sums.numel(), 0.0f);
  return sums;
}

// (rows, top_weights, top_keys, received, heat_map): empty where nothing was asked.
using Measured = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

inline Measured make_measured(Statistics& s, bool entropy, bool max_logit, bool mean_distance,
                              const std::vector<int64_t>& first_keys,
                              const std::vector<int64_t>& offsets, int64_t top,
                              const std::vector<int64_t>& received,
                              const std::vector<int64_t>& heat_map) {
  check(first_keys.size() <= kMaxMasses && offsets.size() <= kMaxMasses,
        "no more than 8 first_keys and offsets each");
  s.num_first = int64_t(first_keys.size());
  s.num_offsets = int64_t(offsets.size());
  std::copy(first_keys.begin(), first_keys.end(), s.first_keys);
  std::transform(offsets.begin(), offsets.end(), s.offsets,
                 [](int64_t n) { return std::clamp(n, -4 * kUnbounded, 4 * kUnbounded); });
  Tensor rows = make_rows(s, entropy, max_logit, mean_distance);
  auto [weights, keys] = make_top(s, top);
  return {rows, weights, keys, make_received(s, received), make_heat_map(s, heat_map)};
}

}  // namespace manyheads
