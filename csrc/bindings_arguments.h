// Reads the operators' arguments into the kernels' structs.
//
// Python (functional.py) has already refused bad arguments with good messages. What is checked here
// again is what keeps memory safe: ranks, sizes, dtypes, strides.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention.h"

namespace manyheads {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline void check(bool fine, const char* what) {
  if (!fine) {
    throw std::runtime_error(std::string("manyheads operators: expected ") + what +
                             "; call manyheads.attention, which checks and converts arguments");
  }
}

// A tensor's header, read once.
struct View {
  const void* data;
  ScalarType dtype;
  int64_t dim;
  const int64_t* sizes;
  const int64_t* strides;

  explicit View(const Tensor& t)
      : data(t.const_data_ptr()),
        dtype(t.scalar_type()),
        dim(t.dim()),
        sizes(t.sizes().data()),
        strides(t.strides().data()) {
    check(t.is_cpu(), "every tensor on the CPU");
  }

  bool is(ScalarType type, int64_t rank) const { return dtype == type && dim == rank; }
  bool empty() const {
    return std::any_of(sizes, sizes + dim, [](int64_t n) { return n == 0; });
  }
  bool unit_stride(int64_t axis) const { return sizes[axis] <= 1 || strides[axis] == 1 || empty(); }
  // Size `full`, or 1 standing for it.
  bool broadcasts(int64_t axis, int64_t full) const {
    return sizes[axis] == full || sizes[axis] == 1;
  }
  int64_t broadcast_stride(int64_t axis) const { return sizes[axis] == 1 ? 0 : strides[axis]; }
  template <typename T>
  const T* as() const {
    return static_cast<const T*>(data);
  }
};

inline Type read_type(ScalarType dtype) {
  if (dtype == ScalarType::BFloat16) return Type::bfloat16;
  if (dtype == ScalarType::Half) return Type::float16;
  check(dtype == ScalarType::Float, "query float32, bfloat16 or float16");
  return Type::float32;
}

inline void read_inputs(Forward& f, const Tensor& query, const Tensor& key, const Tensor& value) {
  const View q(query), k(key), v(value);
  f.type = read_type(q.dtype);
  check(q.dim == 4, "query [B, Hq, Lq, D]");
  check(k.is(q.dtype, 4), "key [B, Hkv, Lk, D] of the query's dtype");
  check(v.is(q.dtype, 4), "value [B, Hkv, Lk, Dv] of the query's dtype");
  f.B = q.sizes[0], f.Hq = q.sizes[1], f.Lq = q.sizes[2], f.D = q.sizes[3];
  f.Hkv = k.sizes[1], f.Lk = k.sizes[2], f.Dv = v.sizes[3];
  check(k.sizes[0] == f.B && v.sizes[0] == f.B, "one batch size in query, key and value");
  check(v.sizes[1] == f.Hkv && v.sizes[2] == f.Lk, "one head count and length in key and value");
  check(k.sizes[3] == f.D, "one head size in query and key");
  check(f.D >= 1 && f.D <= kMaxHeadDim && f.Dv >= 1 && f.Dv <= kMaxHeadDim,
        "head sizes from 1 to 256");
  check(f.Hkv > 0 ? f.Hq % f.Hkv == 0 : f.Hq == 0, "query heads a multiple of key/value heads");
  check(f.Lq < kUnbounded && f.Lk < kUnbounded, "lengths below 2^29");
  check(q.unit_stride(3) && k.unit_stride(3) && v.unit_stride(3), "rows contiguous in memory");
  f.query = q.data, f.key = k.data, f.value = v.data;
  std::copy_n(q.strides, 3, f.query_stride);
  std::copy_n(k.strides, 3, f.key_stride);
  std::copy_n(v.strides, 3, f.value_stride);
}

// The band's numbers in the order of the schema's `band`, which ends in first_within_right and a
// bit set: bit i says that number i is per batch and is the next row of `rows` int32 [n, B].
inline void read_band(Forward& f, const std::vector<int64_t>& band, const OptionalTensor& rows) {
  PerBatch* const numbers[] = {&f.query_start,  &f.mask.left,      &f.mask.right,
                               &f.mask.first_n, &f.mask.key_start, &f.mask.key_end};
  constexpr int64_t kNumbers = 6;
  check(band.size() == kNumbers + 2, "8 numbers in band");
  const int64_t per_batch = band[kNumbers + 1];
  const int32_t* row = nullptr;
  int64_t num_rows = 0;
  if (rows) {
    const View r(*rows);
    check(r.is(ScalarType::Int, 2) && r.sizes[1] == f.B, "band_rows int32 [n, B]");
    check(rows->is_contiguous(), "band_rows contiguous");
    row = r.as<int32_t>(), num_rows = r.sizes[0];
  }
  for (int64_t i = 0; i < kNumbers; ++i) {
    *numbers[i] = {std::clamp(band[i], -kUnbounded, kUnbounded), nullptr};
    if (per_batch >> i & 1) {
      check(num_rows-- > 0, "a row of band_rows for each per-batch number");
      numbers[i]->values = row;
      row += f.B;
    }
  }
  check(num_rows == 0, "as many rows of band_rows as per-batch numbers");
  f.mask.first_within_right = band[kNumbers] != 0;
  const bool everything = per_batch == 0 && f.mask.left.value == kUnbounded &&
                          f.mask.right.value == kUnbounded && f.mask.key_start.value <= 0 &&
                          f.mask.key_end.value >= f.Lk;
  f.mask.kind = everything ? PlanKind::full : PlanKind::band;
}

inline void read_positions(Forward& f, const OptionalTensor& positions) {
  if (!positions) return;
  const View p(*positions);
  check(p.is(ScalarType::Int, 2) && p.broadcasts(0, f.B) && p.sizes[1] == f.Lq && p.unit_stride(1),
        "query_positions int32 [B or 1, Lq], rows contiguous");
  f.positions = p.as<int32_t>();
  f.positions_stride = p.broadcast_stride(0);
}

inline void read_intervals(Forward& f, const OptionalTensor& intervals) {
  if (!intervals) return;
  const View r(*intervals);
  check(r.is(ScalarType::Int, 5) && r.broadcasts(0, f.B) && r.broadcasts(1, f.Hq) &&
            r.sizes[2] == f.Lq && r.sizes[3] >= 1 && r.sizes[3] <= kMaxRanges && r.sizes[4] == 2,
        "intervals int32 [B or 1, Hq or 1, Lq, 1 to 4, 2]");
  check((r.sizes[3] == 1 || r.strides[3] == 2) && r.strides[4] == 1,
        "intervals contiguous in its last two axes");
  f.mask.kind = PlanKind::intervals;
  f.mask.ranges = r.as<int32_t>();
  f.mask.num_ranges = r.sizes[3];
  for (int i = 0; i < 3; ++i) f.mask.ranges_stride[i] = r.broadcast_stride(i);
}

inline void read_allowed(Forward& f, const OptionalTensor& allowed) {
  if (!allowed) return;
  check(f.mask.kind != PlanKind::intervals, "either intervals or allowed, not both");
  const View a(*allowed);
  check(a.is(ScalarType::Bool, 4) && a.broadcasts(0, f.B) && a.broadcasts(1, f.Hq) &&
            a.sizes[2] == f.Lq && a.sizes[3] == f.Lk && a.unit_stride(3),
        "allowed bool [B or 1, Hq or 1, Lq, Lk], rows contiguous");
  f.mask.kind = PlanKind::dense;
  f.mask.allowed = a.as<uint8_t>();
  for (int i = 0; i < 3; ++i) f.mask.allowed_stride[i] = a.broadcast_stride(i);
}

inline const float* read_per_head(const Forward& f, const OptionalTensor& values,
                                  const char* what) {
  if (!values) return nullptr;
  const View v(*values);
  check(v.is(ScalarType::Float, 1) && v.sizes[0] == f.Hq && v.unit_stride(0), what);
  return v.as<float>();
}

inline void read_bias(Forward& f, const OptionalTensor& slopes,
                      const OptionalTensor& distance_values, int64_t distance_offset,
                      const OptionalTensor& dense) {
  f.bias.slopes = read_per_head(f, slopes, "slopes float32 [Hq]");
  if (distance_values) {
    const View d(*distance_values);
    check(d.is(ScalarType::Float, 2) && d.sizes[0] == f.Hq && d.sizes[1] >= 1 &&
              distance_values->is_contiguous(),
          "distance_values float32 [Hq, N], contiguous, N at least 1");
    f.bias.distance_values = d.as<float>();
    f.bias.num_distances = d.sizes[1];
    f.bias.distance_offset = std::clamp(distance_offset, -kUnbounded, kUnbounded);
  }
  if (dense) {
    const View d(*dense);
    check(d.is(ScalarType::Float, 4) && d.broadcasts(0, f.B) && d.broadcasts(1, f.Hq) &&
              d.broadcasts(2, f.Lq) && d.broadcasts(3, f.Lk),
          "dense_bias float32 [B or 1, Hq or 1, Lq or 1, Lk or 1]");
    f.bias.dense = d.as<float>();
    for (int i = 0; i < 4; ++i) f.bias.dense_stride[i] = d.broadcast_stride(i);
    check(f.bias.dense_stride[3] == 0 || d.unit_stride(3),
          "dense_bias with a key stride of 0 or 1");
  }
}

// The share dropped is rounded to a multiple of 1 / 65,536; dropout.py does the same.
inline void read_dropout(Forward& f, const OptionalTensor& seed, double p) {
  constexpr double kSteps = 65536;
  f.keep_scale = 1;
  if (!seed) return;
  const View s(*seed);
  check(s.is(ScalarType::Long, 1) && s.sizes[0] == 1, "dropout_seed int64 [1]");
  check(p >= 0 && p < 1, "dropout_p in [0, 1)");
  f.dropout_threshold = int32_t(std::min(std::floor(p * kSteps + 0.5), kSteps - 1));
  f.keep_scale = float(kSteps / (kSteps - f.dropout_threshold));
  f.dropout_seed = uint64_t(*s.as<int64_t>());
}

inline Forward read_call(const Tensor& query, const Tensor& key, const Tensor& value, double scale,
                         double softcap, const OptionalTensor& sinks,
                         const std::vector<int64_t>& band, const OptionalTensor& band_rows,
                         const OptionalTensor& query_positions, const OptionalTensor& intervals,
                         const OptionalTensor& allowed, const OptionalTensor& slopes,
                         const OptionalTensor& distance_values, int64_t distance_offset,
                         const OptionalTensor& dense_bias, const OptionalTensor& dropout_seed,
                         double dropout_p) {
  Forward f{};
  read_inputs(f, query, key, value);
  read_band(f, band, band_rows);
  read_positions(f, query_positions);
  read_intervals(f, intervals);
  read_allowed(f, allowed);
  read_bias(f, slopes, distance_values, distance_offset, dense_bias);
  f.sinks = read_per_head(f, sinks, "sinks float32 [Hq]");
  f.scale = float(scale);
  f.softcap = float(softcap);
  read_dropout(f, dropout_seed, dropout_p);
  return f;
}

// [2, B, Hq, Lq], as the forward pass left them.
inline void read_stats(Forward& f, const Tensor& stats) {
  const View s(stats);
  const int64_t sizes[] = {2, f.B, f.Hq, f.Lq};
  check(
      s.is(ScalarType::Float, 4) && std::equal(sizes, sizes + 4, s.sizes) && stats.is_contiguous(),
      "stats float32 [2, B, Hq, Lq], contiguous");
  f.row_max = const_cast<float*>(s.as<float>());
  f.row_sum = f.row_max + f.B * f.Hq * f.Lq;
}

inline void read_gradients(Backward& b, const Tensor& grad_out, const OptionalTensor& grad_lse,
                           const Tensor& out, const Tensor& stats) {
  Forward& f = b.forward;
  const View g(grad_out), o(out);
  const int64_t sizes[] = {f.B, f.Hq, f.Lq, f.Dv};
  for (const View* v : {&g, &o})
    check(v->dim == 4 && read_type(v->dtype) == f.type && std::equal(sizes, sizes + 4, v->sizes) &&
              v->unit_stride(3),
          "out and grad_out [B, Hq, Lq, Dv] of the query's dtype, rows contiguous");
  read_stats(f, stats);
  b.grad_out = g.data;
  std::copy_n(g.strides, 3, b.grad_out_stride);
  f.out = const_cast<void*>(o.data);
  std::copy_n(o.strides, 3, f.out_stride);
  if (!grad_lse) return;
  const View l(*grad_lse);
  check(l.is(ScalarType::Float, 3) && std::equal(sizes, sizes + 3, l.sizes) &&
            grad_lse->is_contiguous(),
        "grad_lse float32 [B, Hq, Lq], contiguous");
  b.grad_lse = l.as<float>();
}

inline RowProduct read_row_product(const Tensor& x, const Tensor& weight,
                                   const OptionalTensor& bias) {
  const View v(x), w(weight);
  check(w.dim == 2 && w.sizes[1] > 0 && weight.is_contiguous(),
        "weight [outputs, inputs], contiguous, at least one input");
  check(v.is(w.dtype, 1) && v.sizes[0] == w.sizes[1] && v.unit_stride(0),
        "x [inputs] of the weight's dtype, contiguous");
  RowProduct p{};
  p.type = read_type(w.dtype);
  p.rows = w.sizes[0], p.width = w.sizes[1];
  p.weight = w.data, p.x = v.data;
  if (!bias) return p;
  const View b(*bias);
  check(b.is(w.dtype, 1) && b.sizes[0] == p.rows && b.unit_stride(0),
        "bias [outputs] of the weight's dtype, contiguous");
  p.bias = b.data;
  return p;
}

}  // namespace manyheads
