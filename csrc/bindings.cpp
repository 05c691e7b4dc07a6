// The torch side of the kernels, on LibTorch's stable ABI: the only file that includes torch.
//
// Python (functional.py) has already refused bad arguments with good messages. What is checked here
// again is what keeps memory safe: ranks, sizes, dtypes, strides.
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "attention.h"
#include "queue.h"

namespace manyheads {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

void check(bool fine, const char* what) {
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

Type read_type(ScalarType dtype) {
  if (dtype == ScalarType::BFloat16) return Type::bfloat16;
  if (dtype == ScalarType::Half) return Type::float16;
  check(dtype == ScalarType::Float, "query float32, bfloat16 or float16");
  return Type::float32;
}

void read_inputs(Forward& f, const Tensor& query, const Tensor& key, const Tensor& value) {
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
void read_band(Forward& f, const std::vector<int64_t>& band, const OptionalTensor& rows) {
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

void read_positions(Forward& f, const OptionalTensor& positions) {
  if (!positions) return;
  const View p(*positions);
  check(p.is(ScalarType::Int, 2) && p.broadcasts(0, f.B) && p.sizes[1] == f.Lq && p.unit_stride(1),
        "query_positions int32 [B or 1, Lq], rows contiguous");
  f.positions = p.as<int32_t>();
  f.positions_stride = p.broadcast_stride(0);
}

void read_intervals(Forward& f, const OptionalTensor& intervals) {
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

void read_allowed(Forward& f, const OptionalTensor& allowed) {
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

const float* read_per_head(const Forward& f, const OptionalTensor& values, const char* what) {
  if (!values) return nullptr;
  const View v(*values);
  check(v.is(ScalarType::Float, 1) && v.sizes[0] == f.Hq && v.unit_stride(0), what);
  return v.as<float>();
}

void read_bias(Forward& f, const OptionalTensor& slopes, const OptionalTensor& distance_values,
               int64_t distance_offset, const OptionalTensor& dense) {
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

Tensor empty(Type type, int64_t rank, const int64_t* sizes, const int64_t* strides) {
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
void prefer_large_pages(void* data, int64_t bytes) {
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
Tensor make_out(Forward& f) {
  return make_heads(f.type, f.B, f.Hq, f.Lq, f.Dv, f.query_stride, f.out, f.out_stride);
}

// Contiguous; with sizes {0}, what stands for a result that nobody wants.
Tensor make_contiguous(const std::vector<int64_t>& sizes, float*& data) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size() - 1; i > 0; --i)
    strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  Tensor tensor = empty(Type::float32, int64_t(sizes.size()), sizes.data(), strides.data());
  data = static_cast<float*>(tensor.mutable_data_ptr());
  return tensor;
}
Tensor make_none() {
  float* unused;
  return make_contiguous({0}, unused);
}

Tensor make_lse(Forward& f, bool need_lse) {
  return need_lse ? make_contiguous({f.B, f.Hq, f.Lq}, f.lse) : make_none();
}

// [2, B, Hq, Lq]: every row's maximum, then its sum.
Tensor make_stats(Forward& f, bool need_stats) {
  if (!need_stats) return make_none();
  Tensor stats = make_contiguous({2, f.B, f.Hq, f.Lq}, f.row_max);
  f.row_sum = f.row_max + f.B * f.Hq * f.Lq;
  return stats;
}

// No keys: no query may attend to anything, sinks or not.
void fill_without_keys(const Forward& f) {
  std::memset(f.out, 0, size_t(f.B * f.Hq * f.Lq * f.Dv * size_of(f.type)));  // dense either way
  const int64_t rows = f.B * f.Hq * f.Lq;
  if (f.lse) std::fill_n(f.lse, rows, -std::numeric_limits<float>::infinity());
  if (!f.row_max) return;
  std::fill_n(f.row_max, rows, -std::numeric_limits<float>::infinity());
  std::fill_n(f.row_sum, rows, 0.0f);
}

constexpr auto parallel_for = [](int64_t first, int64_t last, int64_t grain, const auto& body) {
  torch::stable::parallel_for(first, last, grain, body);
};

void run_items(const Kernels& kernels, const Forward& f) {
  const auto prepare = [&](void* shared) { kernels.prepare(f, shared); };
  const auto begin = [&](void* scratch) { kernels.begin(f, scratch); };
  const auto work = [&](int64_t item, int64_t likely_next, void* scratch, void* shared) {
    kernels.forward(f, item, likely_next, scratch, shared);
  };
  run_queue(kernels.num_items(f), {kernels.scratch_bytes(f), kernels.shared_bytes(f)},
            torch::stable::get_num_threads(), prepare, begin, work, parallel_for);
}

// The share dropped is rounded to a multiple of 1 / 65,536; dropout.py does the same.
void read_dropout(Forward& f, const OptionalTensor& seed, double p) {
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

Forward read_call(const Tensor& query, const Tensor& key, const Tensor& value, double scale,
                  double softcap, const OptionalTensor& sinks, const std::vector<int64_t>& band,
                  const OptionalTensor& band_rows, const OptionalTensor& query_positions,
                  const OptionalTensor& intervals, const OptionalTensor& allowed,
                  const OptionalTensor& slopes, const OptionalTensor& distance_values,
                  int64_t distance_offset, const OptionalTensor& dense_bias,
                  const OptionalTensor& dropout_seed, double dropout_p) {
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

std::tuple<Tensor, Tensor, Tensor> attention_forward(
    const Tensor& query, const Tensor& key, const Tensor& value, double scale, double softcap,
    const OptionalTensor& sinks, const std::vector<int64_t>& band, const OptionalTensor& band_rows,
    const OptionalTensor& query_positions, const OptionalTensor& intervals,
    const OptionalTensor& allowed, const OptionalTensor& slopes,
    const OptionalTensor& distance_values, int64_t distance_offset,
    const OptionalTensor& dense_bias, const OptionalTensor& dropout_seed, double dropout_p,
    bool need_lse, bool need_stats) {
  const Choice choice = choose_kernels();
  if (choice.kernels == nullptr) throw std::runtime_error(choice.error);
  Forward f = read_call(query, key, value, scale, softcap, sinks, band, band_rows, query_positions,
                        intervals, allowed, slopes, distance_values, distance_offset, dense_bias,
                        dropout_seed, dropout_p);
  Tensor out = make_out(f);
  Tensor lse = make_lse(f, need_lse);
  Tensor stats = make_stats(f, need_stats);
  if (f.B * f.Hq * f.Lq > 0) {
    if (f.Lk == 0) {
      fill_without_keys(f);
    } else {
      run_items(*choice.kernels, f);
    }
  }
  return {out, lse, stats};
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

void read_gradients(Backward& b, const Tensor& grad_out, const OptionalTensor& grad_lse,
                    const Tensor& out, const Tensor& stats) {
  Forward& f = b.forward;
  const View g(grad_out), o(out), s(stats);
  const int64_t sizes[] = {f.B, f.Hq, f.Lq, f.Dv};
  for (const View* v : {&g, &o})
    check(v->dim == 4 && read_type(v->dtype) == f.type && std::equal(sizes, sizes + 4, v->sizes) &&
              v->unit_stride(3),
          "out and grad_out [B, Hq, Lq, Dv] of the query's dtype, rows contiguous");
  check(s.is(ScalarType::Float, 4) && s.sizes[0] == 2 &&
            std::equal(sizes, sizes + 3, s.sizes + 1) && stats.is_contiguous(),
        "stats float32 [2, B, Hq, Lq], contiguous");
  b.grad_out = g.data;
  std::copy_n(g.strides, 3, b.grad_out_stride);
  f.out = const_cast<void*>(o.data);
  std::copy_n(o.strides, 3, f.out_stride);
  f.row_max = const_cast<float*>(s.as<float>());
  f.row_sum = f.row_max + f.B * f.Hq * f.Lq;
  if (!grad_lse) return;
  const View l(*grad_lse);
  check(l.is(ScalarType::Float, 3) && std::equal(sizes, sizes + 3, l.sizes) &&
            grad_lse->is_contiguous(),
        "grad_lse float32 [B, Hq, Lq], contiguous");
  b.grad_lse = l.as<float>();
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Results for the bits of `needs`; zeros where they are added to, or not written for want of rows.
Gradients make_gradients(Backward& b, int64_t needs, const OptionalTensor& sinks,
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
    std::fill_n(data, tensor.numel(), 0.0f);
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

// Whether to share one head's keys among threads: where heads alone would leave threads idle for a
// fifth of the time or more, and the memory it takes is bearable. Changes no bit.
bool should_split_keys(const Kernels& kernels, const Backward& b) {
  constexpr int64_t kMostBytes = int64_t(1) << 30;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t units = kernels.num_stage_items(b, Stage::keys);
  const int64_t rounds = (units + threads - 1) / threads;
  return threads > 1 && units * 5 < rounds * threads * 4 && kernels.partial_bytes(b) <= kMostBytes;
}

void run_stages(const Kernels& kernels, Backward& b) {
  b.split_keys = should_split_keys(kernels, b);
  const size_t shared = whole_lines(kernels.backward_shared_bytes(b));
  const size_t each = whole_lines(kernels.backward_scratch_bytes(b));
  const int64_t threads = torch::stable::get_num_threads();
  const Scratch memory(shared + each * size_t(threads));
  b.shared = memory.data();
  for (const Stage stage : {Stage::start, Stage::rows, Stage::keys, Stage::finish}) {
    const auto work = [&](int64_t item, int64_t, void* scratch) {
      kernels.backward(b, stage, item, scratch);
    };
    share_out(
        kernels.num_stage_items(b, stage), memory.data() + shared, each, threads, [](void*) {},
        work, parallel_for);
  }
}

Gradients attention_backward(const Tensor& grad_out, const OptionalTensor& grad_lse,
                             const Tensor& out, const Tensor& stats, const Tensor& query,
                             const Tensor& key, const Tensor& value, double scale, double softcap,
                             const OptionalTensor& sinks, const std::vector<int64_t>& band,
                             const OptionalTensor& band_rows, const OptionalTensor& query_positions,
                             const OptionalTensor& intervals, const OptionalTensor& allowed,
                             const OptionalTensor& slopes, const OptionalTensor& distance_values,
                             int64_t distance_offset, const OptionalTensor& dense_bias,
                             const OptionalTensor& dropout_seed, double dropout_p, int64_t needs) {
  const Choice choice = choose_kernels();
  if (choice.kernels == nullptr) throw std::runtime_error(choice.error);
  Backward b{};
  b.forward = read_call(query, key, value, scale, softcap, sinks, band, band_rows, query_positions,
                        intervals, allowed, slopes, distance_values, distance_offset, dense_bias,
                        dropout_seed, dropout_p);
  read_gradients(b, grad_out, grad_lse, out, stats);
  Gradients gradients = make_gradients(b, needs, sinks, slopes, distance_values, dense_bias);
  const Forward& f = b.forward;
  if (f.B * f.Hq * f.Lq * f.Lk > 0) run_stages(*choice.kernels, b);
  return gradients;
}

// GFLOP/s of fused multiply-adds on all of torch's threads, over about `seconds`.
double fma_peak(double seconds) {
  const Choice choice = choose_kernels();
  if (choice.kernels == nullptr) throw std::runtime_error(choice.error);
  using Clock = std::chrono::steady_clock;
  constexpr int64_t kSteps = 10000;
  const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  std::atomic<int64_t> steps{0};
  std::atomic<float> kept{0};
  const auto start = Clock::now();
  const auto end = start + std::chrono::duration<double>(seconds);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) noexcept {
    for (int64_t worker = first; worker < last; ++worker) {
      do {
        kept.store(choice.kernels->multiply_add(kSteps), std::memory_order_relaxed);
        steps.fetch_add(kSteps, std::memory_order_relaxed);
      } while (Clock::now() < end);
    }
  });
  const double elapsed = std::chrono::duration<double>(Clock::now() - start).count();
  return double(steps) * choice.kernels->flops_per_step / elapsed * 1e-9;
}

// Bytes a second at which all of torch's threads together read this memory once.
double read_rate(const Tensor& data) {
  const View view(data);
  check(data.is_contiguous() && data.element_size() == 4, "contiguous elements of 4 bytes");
  const auto* const words = view.as<uint32_t>();
  const int64_t size = data.numel(), threads = torch::stable::get_num_threads();
  std::atomic<uint32_t> kept{0};
  const auto start = std::chrono::steady_clock::now();
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) noexcept {
    for (int64_t worker = first; worker < last; ++worker) {
      uint32_t bits = 0;
      for (int64_t i = size * worker / threads; i < size * (worker + 1) / threads; ++i)
        bits ^= words[i];
      kept.fetch_xor(bits, std::memory_order_relaxed);
    }
  });
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  return double(size) * 4 / elapsed.count();
}

// For memory that torch allocated, before it is written to.
void advise_large_pages(const Tensor& data) {
  const View view(data);
  prefer_large_pages(const_cast<void*>(view.data), data.numel() * int64_t(data.element_size()));
}

// (ISA in use, every ISA this machine has, why none is in use, matrix_unit_types()): one of the
// first and third is "".
std::tuple<std::string, std::string, std::string, std::string> cpu_kernels() {
  const Choice choice = choose_kernels();
  return {choice.kernels ? choice.kernels->name : "", detected_isas(),
          choice.error ? choice.error : "", matrix_unit_types()};
}

}  // namespace
}  // namespace manyheads

STABLE_TORCH_LIBRARY(manyheads, m) {
  m.def(
      "attention_forward(Tensor query, Tensor key, Tensor value, float scale, float softcap, "
      "Tensor? sinks, SymInt[] band, Tensor? band_rows, Tensor? query_positions, "
      "Tensor? intervals, Tensor? allowed, Tensor? slopes, Tensor? distance_values, "
      "SymInt distance_offset, Tensor? dense_bias, Tensor? dropout_seed, float dropout_p, bool "
      "need_lse, bool need_stats) -> "
      "(Tensor out, Tensor lse, Tensor stats)");
  m.def(
      "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor stats, "
      "Tensor query, Tensor key, Tensor value, float scale, float softcap, "
      "Tensor? sinks, SymInt[] band, Tensor? band_rows, Tensor? query_positions, "
      "Tensor? intervals, Tensor? allowed, Tensor? slopes, Tensor? distance_values, "
      "SymInt distance_offset, Tensor? dense_bias, Tensor? dropout_seed, float dropout_p, int "
      "needs) -> "
      "(Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_sinks, "
      "Tensor grad_slopes, Tensor grad_distance_values, Tensor grad_dense_bias)");
  m.def("advise_large_pages(Tensor data) -> ()");
  m.def("fma_peak(float seconds) -> float");
  m.def("read_rate(Tensor data) -> float");
  m.def("cpu_kernels() -> (str name, str detected, str error, str matrix_types)");
}

STABLE_TORCH_LIBRARY_IMPL(manyheads, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&manyheads::attention_forward));
  m.impl("attention_backward", TORCH_BOX(&manyheads::attention_backward));
}

STABLE_TORCH_LIBRARY_IMPL(manyheads, CompositeExplicitAutograd, m) {
  m.impl("advise_large_pages", TORCH_BOX(&manyheads::advise_large_pages));
  m.impl("fma_peak", TORCH_BOX(&manyheads::fma_peak));
  m.impl("read_rate", TORCH_BOX(&manyheads::read_rate));
  m.impl("cpu_kernels", TORCH_BOX(&manyheads::cpu_kernels));
}
