// Makes the tensors that the operators return, in the memory layouts that _ops.py's fakes promise.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

#include "bindings_arguments.h"

namespace manyheads {

inline Tensor empty(Type type, int64_t rank, const int64_t* sizes, const int64_t* strides) {
  const int32_t dtype = type == Type::bfloat16  ? aoti_torch_dtype_bfloat16()
                        : type == Type::float16 ? aoti_torch_dtype_float16()
                                                : aoti_torch_dtype_float32();
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(rank, sizes, strides, dtype,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// Fresh memory comes from the system one small page at a time, at a fault each; asking for large
// pages saves most of them. From this size on the C library usually gives freed memory back, so
// that the next call's is fresh again.
inline void prefer_large_pages(void* data, int64_t bytes) {
#ifdef __linux__
  constexpr int64_t kFresh = int64_t(4) << 20;
  constexpr uintptr_t kPage = 4096;
  if (bytes < kFresh) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: may be refused
#endif
}

// [B, H, L, width] in the memory layout of another such tensor, its strides being `like`.
template <class T>
Tensor make_heads(Type type, int64_t B, int64_t H, int64_t L, int64_t width,
                  const int64_t (&like)[3], T*& data, int64_t (&stride)[3]) {
  const bool heads_inside_rows = like[1] < like[2];
  const int64_t sizes[] = {B, H, L, width};
  // As torch does for empty tensors, strides count an axis of size 0 as 1.
  const int64_t heads = std::max<int64_t>(H, 1), rows = std::max<int64_t>(L, 1);
  const int64_t strides[] = {heads * rows * width, heads_inside_rows ? width : rows * width,
                             heads_inside_rows ? heads * width : width, 1};
  Tensor tensor = empty(type, 4, sizes, strides);
  std::copy_n(strides, 3, stride);
  data = static_cast<T*>(tensor.mutable_data_ptr());
  prefer_large_pages(data, B * H * L * width * size_of(type));
  return tensor;
}

// [B, Hq, Lq, Dv] in the query's layout: where a position's heads lie side by side in the query
// (a transposed [B, L, H, D]) they do in the output, so that merging them for the output
// projection copies nothing. _ops.py's fake says the same.
inline Tensor make_out(Forward& f) {
  return make_heads(f.type, f.B, f.Hq, f.Lq, f.Dv, f.query_stride, f.out, f.out_stride);
}

// Contiguous; with sizes {0}, what stands for a result that nobody wants.
inline Tensor make_contiguous(const std::vector<int64_t>& sizes, float*& data) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size() - 1; i > 0; --i)
    strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  Tensor tensor = empty(Type::float32, int64_t(sizes.size()), sizes.data(), strides.data());
  data = static_cast<float*>(tensor.mutable_data_ptr());
  return tensor;
}
inline Tensor make_none() {
  float* unused;
  return make_contiguous({0}, unused);
}

inline Tensor make_lse(Forward& f, bool need_lse) {
  return need_lse ? make_contiguous({f.B, f.Hq, f.Lq}, f.lse) : make_none();
}

// [2, B, Hq, Lq]: every row's maximum, then its sum.
inline Tensor make_stats(Forward& f, bool need_stats) {
  if (!need_stats) return make_none();
  Tensor stats = make_contiguous({2, f.B, f.Hq, f.Lq}, f.row_max);
  f.row_sum = f.row_max + f.B * f.Hq * f.Lq;
  return stats;
}

// No keys: no query may attend to anything, sinks or not.
inline void fill_without_keys(const Forward& f) {
  std::memset(f.out, 0, size_t(f.B * f.Hq * f.Lq * f.Dv * size_of(f.type)));  // dense either way
  const int64_t rows = f.B * f.Hq * f.Lq;
  if (f.lse) std::fill_n(f.lse, rows, -std::numeric_limits<float>::infinity());
  if (!f.row_max) return;
  std::fill_n(f.row_max, rows, -std::numeric_limits<float>::infinity());
  std::fill_n(f.row_sum, rows, 0.0f);
}

// Which gradients the backward pass is to find, as bits of `needs`, in the order of its results.
enum Need : int64_t {
  kNeedQuery = 1,
  kNeedKey = 2,
  kNeedValue = 4,
  kNeedSinks = 8,
  kNeedSlopes = 16,
  kNeedDistanceValues = 32,
  kNeedDense = 64,
};

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Results for the bits of `needs`; zeros where they are added to, or not written for want of rows.
inline Gradients make_gradients(Backward& b, int64_t needs, const OptionalTensor& sinks,
                                const OptionalTensor& slopes, const OptionalTensor& distance_values,
                                const OptionalTensor& dense_bias) {
  const Forward& f = b.forward;
  const bool empty = f.B * f.Hq * f.Lq * f.Lk == 0;
  const auto heads = [&](Need need, int64_t H, int64_t L, int64_t width, const int64_t (&like)[3],
                         float*& data, int64_t (&stride)[3]) {
    if (!(needs & need)) return make_none();
    Tensor tensor = make_heads(Type::float32, f.B, H, L, width, like, data, stride);
    if (empty) std::fill_n(data, f.B * H * L * width, 0.0f);
    return tensor;
  };
  const auto zeros = [&](Need need, const std::vector<int64_t>& sizes, float*& data) {
    if (!(needs & need)) return make_none();
    Tensor tensor = make_contiguous(sizes, data);
    prefer_large_pages(data, tensor.numel() * int64_t(sizeof(float)));
    torch::stable::zero_(tensor);  // by all threads
    return tensor;
  };
  check(!(needs & kNeedSinks) || sinks, "sinks where their gradient is wanted");
  check(!(needs & kNeedSlopes) || slopes, "slopes where their gradient is wanted");
  check(!(needs & kNeedDistanceValues) || distance_values,
        "distance_values where their gradient is wanted");
  check(!(needs & kNeedDense) || dense_bias, "dense_bias where its gradient is wanted");
  std::vector<int64_t> dense_sizes(4, 1);
  if (dense_bias) {
    std::copy_n(dense_bias->sizes().data(), 4, dense_sizes.data());
    for (int64_t i = 3, stride = 1; i >= 0; stride *= dense_sizes[i--])
      b.grad_dense_stride[i] = dense_sizes[i] == 1 ? 0 : stride;
  }
  return {heads(kNeedQuery, f.Hq, f.Lq, f.D, f.query_stride, b.grad_query, b.grad_query_stride),
          heads(kNeedKey, f.Hkv, f.Lk, f.D, f.key_stride, b.grad_key, b.grad_key_stride),
          heads(kNeedValue, f.Hkv, f.Lk, f.Dv, f.value_stride, b.grad_value, b.grad_value_stride),
          zeros(kNeedSinks, {f.Hq}, b.grad_sinks),
          zeros(kNeedSlopes, {f.Hq}, b.grad_slopes),
          zeros(kNeedDistanceValues, {f.Hq, f.bias.num_distances}, b.grad_distance_values),
          zeros(kNeedDense, dense_sizes, b.grad_dense)};
}

}  // namespace manyheads
