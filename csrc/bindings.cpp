// The operators, on LibTorch's stable ABI: they read their arguments (bindings_arguments.h), make
// their results (bindings_results.h; both for statistics in bindings_statistics.h) and run the
// kernels on torch's threads. These four files are the only ones that include torch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "attention.h"
#include "bindings_arguments.h"
#include "bindings_results.h"
#include "bindings_statistics.h"
#include "queue.h"

namespace manyheads {
namespace {

constexpr auto parallel_for = [](int64_t first, int64_t last, int64_t grain, const auto& body) {
  torch::stable::parallel_for(first, last, grain, body);
};

// How many threads so many multiply-adds are worth. One more costs some microseconds to call in,
// and where other programs keep its core busy, thousands. Changes no bit.
int64_t threads_for(double multiply_adds) {
  constexpr double kWorthAThread = 1 << 16;
  const int64_t all = torch::stable::get_num_threads();
  return std::clamp<int64_t>(int64_t(multiply_adds / kWorthAThread), 1, all);
}

// As if the mask allowed all.
double multiply_adds(const Forward& f) {
  return double(f.B * f.Hq) * double(f.Lq) * double(f.Lk) * double(f.D + f.Dv);
}

void run_items(const Kernels& kernels, const Forward& f) {
  const auto prepare = [&](void* shared) { kernels.prepare(f, shared); };
  const auto begin = [&](void* scratch) { kernels.begin(f, scratch); };
  const auto work = [&](int64_t item, int64_t likely_next, void* scratch, void* shared) {
    kernels.forward(f, item, likely_next, scratch, shared);
  };
  run_queue(kernels.num_items(f), {kernels.scratch_bytes(f), kernels.shared_bytes(f)},
            threads_for(multiply_adds(f)), prepare, begin, work, parallel_for);
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

// Whether to share one head's keys among threads: where heads alone would leave threads idle for a
// fifth of the time or more, and the memory it takes is bearable. Changes no bit.
bool should_split_keys(const Kernels& kernels, const Backward& b) {
  constexpr int64_t kMostBytes = int64_t(1) << 30;
  const int64_t threads = threads_for(multiply_adds(b.forward));
  const int64_t units = kernels.num_stage_items(b, Stage::keys);
  const int64_t rounds = (units + threads - 1) / threads;
  return threads > 1 && units * 5 < rounds * threads * 4 && kernels.partial_bytes(b) <= kMostBytes;
}

void run_stages(const Kernels& kernels, Backward& b) {
  b.split_keys = should_split_keys(kernels, b);
  const size_t shared = whole_lines(kernels.backward_shared_bytes(b));
  const size_t each = whole_lines(kernels.backward_scratch_bytes(b));
  const int64_t threads = threads_for(multiply_adds(b.forward));
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

void run_statistics(const StatisticsKernels& kernels, Statistics& s) {
  const size_t shared = whole_lines(kernels.shared_bytes(s));
  const size_t each = whole_lines(kernels.scratch_bytes(s));
  const int64_t threads = threads_for(multiply_adds(s.forward));
  const Scratch memory(shared + each * size_t(threads));
  s.shared = memory.data();
  const auto begin = [&](void* scratch) { kernels.begin(s, scratch); };
  for (const Stage stage : {Stage::rows, Stage::finish}) {
    const auto work = [&](int64_t item, int64_t, void* scratch) {
      kernels.run(s, stage, item, scratch);
    };
    share_out(kernels.num_items(s, stage), memory.data() + shared, each, threads, begin, work,
              parallel_for);
  }
}

Measured attention_statistics(
    const Tensor& stats, const Tensor& query, const Tensor& key, double scale, double softcap,
    const OptionalTensor& sinks, const std::vector<int64_t>& band, const OptionalTensor& band_rows,
    const OptionalTensor& query_positions, const OptionalTensor& intervals,
    const OptionalTensor& allowed, const OptionalTensor& slopes,
    const OptionalTensor& distance_values, int64_t distance_offset,
    const OptionalTensor& dense_bias, bool entropy, bool max_logit, bool mean_distance,
    const std::vector<int64_t>& first_keys, const std::vector<int64_t>& offsets, int64_t top,
    const std::vector<int64_t>& received, const std::vector<int64_t>& heat_map) {
  const Choice choice = choose_kernels();
  if (choice.kernels == nullptr) throw std::runtime_error(choice.error);
  Statistics s{};
  s.forward =
      read_call(query, key, key, scale, softcap, sinks, band, band_rows, query_positions, intervals,
                allowed, slopes, distance_values, distance_offset, dense_bias, std::nullopt, 0);
  drop_values(s.forward);
  read_stats(s.forward, stats);
  Measured measured = make_measured(s, entropy, max_logit, mean_distance, first_keys, offsets, top,
                                    received, heat_map);
  const Forward& f = s.forward;
  if (f.B * f.Hq * f.Lq * f.Lk > 0) run_statistics(choice.kernels->statistics, s);
  return measured;
}

// attention_forward with stats, and the statistics of the same call: in one walk over its tiles
// where a tile's scores fit in a cache.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_measured(
    const Tensor& query, const Tensor& key, const Tensor& value, double scale, double softcap,
    const OptionalTensor& sinks, const std::vector<int64_t>& band, const OptionalTensor& band_rows,
    const OptionalTensor& query_positions, const OptionalTensor& intervals,
    const OptionalTensor& allowed, const OptionalTensor& slopes,
    const OptionalTensor& distance_values, int64_t distance_offset,
    const OptionalTensor& dense_bias, const OptionalTensor& dropout_seed, double dropout_p,
    bool need_lse, bool entropy, bool max_logit, bool mean_distance,
    const std::vector<int64_t>& first_keys, const std::vector<int64_t>& offsets, int64_t top,
    const std::vector<int64_t>& received, const std::vector<int64_t>& heat_map) {
  const Choice choice = choose_kernels();
  if (choice.kernels == nullptr) throw std::runtime_error(choice.error);
  Statistics s{};
  Forward& f = s.forward;
  f = read_call(query, key, value, scale, softcap, sinks, band, band_rows, query_positions,
                intervals, allowed, slopes, distance_values, distance_offset, dense_bias,
                dropout_seed, dropout_p);
  Tensor out = make_out(f);
  Tensor lse = make_lse(f, need_lse);
  Tensor stats = make_stats(f, true);
  auto [rows, top_weights, top_keys, by_key, map] = make_measured(
      s, entropy, max_logit, mean_distance, first_keys, offsets, top, received, heat_map);
  const StatisticsKernels& kernels = choice.kernels->statistics;
  if (f.B * f.Hq * f.Lq > 0) {
    if (f.Lk == 0) {
      fill_without_keys(f);
    } else {
      s.attends = kernels.keeps_scores(f);
      if (!s.attends) {
        run_items(*choice.kernels, f);
        drop_values(f);
      }
      run_statistics(kernels, s);
    }
  }
  return {out, lse, stats, rows, top_weights, top_keys, by_key, map};
}

// weight x + bias for one row x, in its dtype.
Tensor project_row(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  const Choice choice = choose_kernels();
  if (choice.kernels == nullptr) throw std::runtime_error(choice.error);
  const Kernels& kernels = *choice.kernels;
  RowProduct p = read_row_product(x, weight, bias);
  constexpr int64_t kStride = 1;
  Tensor out = empty(p.type, 1, &p.rows, &kStride);
  p.out = out.mutable_data_ptr();
  const auto begin = [&](void* scratch) { kernels.widen_x(p, static_cast<float*>(scratch)); };
  const auto work = [&](int64_t item, int64_t, void* scratch, void*) {
    kernels.multiply_rows(p, item, static_cast<const float*>(scratch));
  };
  run_queue(
      kernels.num_product_items(p), {p.width * int64_t(sizeof(float)), 0},
      threads_for(double(p.rows) * double(p.width)), [](void*) {}, begin, work, parallel_for);
  return out;
}

// GFLOP/s of multiply-adds on registers alone, on all of torch's threads, over about `seconds`: in
// float32 or, if the kernels in use have instructions for those, products of half-precision pairs.
double fma_peak(double seconds, bool of_pairs) {
  const Choice choice = choose_kernels();
  if (choice.kernels == nullptr) throw std::runtime_error(choice.error);
  const bool pairs = of_pairs && choice.kernels->multiply_pairs != nullptr;
  const auto multiply = pairs ? choice.kernels->multiply_pairs : choice.kernels->multiply_add;
  using Clock = std::chrono::steady_clock;
  const int64_t steps_at_once = pairs ? 2000 : 10000;  // so few microseconds between two looks
  const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  std::atomic<int64_t> steps{0};
  std::atomic<float> kept{0};
  const auto start = Clock::now();
  const auto end = start + std::chrono::duration<double>(seconds);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) noexcept {
    for (int64_t worker = first; worker < last; ++worker) {
      do {
        kept.store(multiply(steps_at_once), std::memory_order_relaxed);
        steps.fetch_add(steps_at_once, std::memory_order_relaxed);
      } while (Clock::now() < end);
    }
  });
  const double elapsed = std::chrono::duration<double>(Clock::now() - start).count();
  const double flops_per_step =
      pairs ? choice.kernels->pair_flops_per_step : choice.kernels->flops_per_step;
  return double(steps) * flops_per_step / elapsed * 1e-9;
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
  m.def(
      "attention_statistics(Tensor stats, Tensor query, Tensor key, float scale, float softcap, "
      "Tensor? sinks, SymInt[] band, Tensor? band_rows, Tensor? query_positions, "
      "Tensor? intervals, Tensor? allowed, Tensor? slopes, Tensor? distance_values, "
      "SymInt distance_offset, Tensor? dense_bias, bool entropy, bool max_logit, "
      "bool mean_distance, SymInt[] first_keys, SymInt[] offsets, SymInt top, "
      "SymInt[] received, SymInt[] heat_map) -> "
      "(Tensor rows, Tensor top_weights, Tensor top_keys, Tensor received, Tensor heat_map)");
  m.def(
      "attention_measured(Tensor query, Tensor key, Tensor value, float scale, float softcap, "
      "Tensor? sinks, SymInt[] band, Tensor? band_rows, Tensor? query_positions, "
      "Tensor? intervals, Tensor? allowed, Tensor? slopes, Tensor? distance_values, "
      "SymInt distance_offset, Tensor? dense_bias, Tensor? dropout_seed, float dropout_p, bool "
      "need_lse, bool entropy, bool max_logit, bool mean_distance, SymInt[] first_keys, "
      "SymInt[] offsets, SymInt top, SymInt[] received, SymInt[] heat_map) -> "
      "(Tensor out, Tensor lse, Tensor stats, Tensor rows, Tensor top_weights, Tensor top_keys, "
      "Tensor received, Tensor heat_map)");
  m.def("project_row(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("advise_large_pages(Tensor data) -> ()");
  m.def("fma_peak(float seconds, bool of_pairs=False) -> float");
  m.def("read_rate(Tensor data) -> float");
  m.def("cpu_kernels() -> (str name, str detected, str error, str matrix_types)");
}

STABLE_TORCH_LIBRARY_IMPL(manyheads, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&manyheads::attention_forward));
  m.impl("attention_backward", TORCH_BOX(&manyheads::attention_backward));
  m.impl("attention_statistics", TORCH_BOX(&manyheads::attention_statistics));
  m.impl("attention_measured", TORCH_BOX(&manyheads::attention_measured));
  m.impl("project_row", TORCH_BOX(&manyheads::project_row));
}

STABLE_TORCH_LIBRARY_IMPL(manyheads, CompositeExplicitAutograd, m) {
  m.impl("advise_large_pages", TORCH_BOX(&manyheads::advise_large_pages));
  m.impl("fma_peak", TORCH_BOX(&manyheads::fma_peak));
  m.impl("read_rate", TORCH_BOX(&manyheads::read_rate));
  m.impl("cpu_kernels", TORCH_BOX(&manyheads::cpu_kernels));
}
