#include "check_statistics.h"

#include <algorithm>
#include <cmath>

#include "check_queue.h"
#include "half_case.h"
#include "plain.h"
#include "queue.h"
#include "rule.h"
#include "run_forward.h"

namespace manyheads {
namespace {

constexpr int64_t kMapRows = 3, kMapColumns = 5;

// Of rows and keys alike the first is left out where there are several.
Pooling pooling_of(int64_t length, int64_t cells) {
  const int64_t begin = length > 1 ? 1 : 0;
  return {begin, length, std::min(cells, length - begin)};
}

// Everything asked at once, with memory for it that ends where it ends; `attends`: with the forward
// pass, which then leaves `stats`.
class StatisticsCall {
 public:
  StatisticsCall(const Forward& forward, const Array<float>& stats, bool attends) {
    call_.attends = attends;
    Forward& f = call_.forward;
    f = forward;
    const int64_t rows = f.B * f.Hq * f.Lq;
    f.row_max = stats.data();
    f.row_sum = stats.data() + rows;
    if (!attends) {
      f.Dv = 0;
      std::fill_n(f.value_stride, 3, 0);
    }
    call_.num_first = call_.num_offsets = 2;
    call_.first_keys[0] = 1, call_.first_keys[1] = f.Lk / 2 + 1;
    call_.offsets[0] = -1, call_.offsets[1] = 3;
    call_.top = std::min<int64_t>(4, f.Lk);
    call_.received_from = f.Lq / 3;
    call_.pooled_rows = pooling_of(f.Lq, kMapRows);
    call_.pooled_keys = pooling_of(f.Lk, kMapColumns);
    const int64_t cells = call_.pooled_rows.cells * call_.pooled_keys.cells;
    top_keys_ = Array<int64_t>(rows * call_.top);
    call_.top_keys = top_keys_.data();
    const auto make = [&](float*& data, int64_t size) {
      floats_.emplace_back(size);
      data = floats_.back().data();
    };
    make(call_.entropy, rows);
    make(call_.max_logit, rows);
    make(call_.mean_distance, rows);
    make(call_.first_mass, 2 * rows);
    make(call_.offset_mass, 2 * rows);
    make(call_.top_weights, rows * call_.top);
    make(call_.received, f.B * f.Hq * f.Lk);
    make(call_.heat_map, f.B * f.Hq * cells);
    wipe_results();
  }

  const Statistics& call() const { return call_; }

  void run_in_random_order(const StatisticsKernels& kernels, Random& random) {
    const Array<char> shared(kernels.shared_bytes(call_), 64);
    const Array<char> scratch(kernels.scratch_bytes(call_), 64);
    wipe(shared.data(), shared.size());
    wipe(scratch.data(), scratch.size());
    call_.shared = shared.data();
    kernels.begin(call_, scratch.data());
    for (const Stage stage : {Stage::rows, Stage::finish})
      for (const int64_t item : shuffled(kernels.num_items(call_, stage), random))
        kernels.run(call_, stage, item, scratch.data());
  }
  void run_on_threads(const StatisticsKernels& kernels, int64_t threads) {
    const size_t each = whole_lines(kernels.scratch_bytes(call_));
    const size_t shared = whole_lines(kernels.shared_bytes(call_));
    const Scratch memory(shared + each * size_t(threads));
    call_.shared = memory.data();
    const auto begin = [&](void* scratch) { kernels.begin(call_, scratch); };
    for (const Stage stage : {Stage::rows, Stage::finish}) {
      const auto work = [&](int64_t item, int64_t, void* scratch) {
        kernels.run(call_, stage, item, scratch);
      };
      share_out(kernels.num_items(call_, stage), memory.data() + shared, each, threads, begin, work,
                PlainThreads{});
    }
  }

  void wipe_results() {
    for (const Array<float>& results : floats_) wipe(results.data(), results.size() * 4);
    wipe(top_keys_.data(), top_keys_.size() * 8);
  }
  // All results, one after another; keys as numbers.
  std::vector<float> results() const {
    std::vector<float> all;
    for (const Array<float>& results : floats_)
      all.insert(all.end(), results.begin(), results.end());
    for (const int64_t key : top_keys_) all.push_back(float(key));
    return all;
  }

 private:
  Statistics call_{};
  std::vector<Array<float>> floats_;
  Array<int64_t> top_keys_;
};

template <class T>
Measures<T> plain_measures(const Forward& f, Order order) {
  const Pooling rows = pooling_of(f.Lq, kMapRows), keys = pooling_of(f.Lk, kMapColumns);
  const auto cell = [](const Pooling& pooled, int64_t i) {
    return (i - pooled.begin) * pooled.cells / (pooled.end - pooled.begin);
  };
  Measures<T> found;
  found.received.assign(size_t(f.B * f.Hq * f.Lk), 0);
  found.heat_map.assign(size_t(f.B * f.Hq * rows.cells * keys.cells), 0);
  for (int64_t i = 0; i < f.B * f.Hq * f.Lq; ++i) {
    const int64_t head = i / f.Lq, row = nth(order, i % f.Lq, f.Lq);
    const Softmax<T> softmax =
        plain_softmax<T>(f, head / f.Hq, head % f.Hq, row, order, [](T x) { return x; });
    T entropy = softmax.nothing ? T(0) : std::log(softmax.sum);
    const auto add_to_entropy = [&](T weight, T below) {
      if (weight > 0) entropy -= weight / softmax.sum * below;
    };
    if (f.sinks && !softmax.nothing) {
      const T below = T(f.sinks[head % f.Hq]) - softmax.max;
      add_to_entropy(std::exp(below), below);
    }
    for (int64_t j = 0; j < f.Lk && !softmax.nothing; ++j) {
      const int64_t key = nth(order, j, f.Lk);
      const T weight = softmax.weights[size_t(key)];
      add_to_entropy(weight, softmax.logits[size_t(key)] - softmax.max);
      if (row >= f.Lq / 3) found.received[size_t(head * f.Lk + key)] += weight / softmax.sum;
      if (row < rows.begin || key < keys.begin) continue;
      const int64_t at = (head * rows.cells + cell(rows, row)) * keys.cells + cell(keys, key);
      found.heat_map[size_t(at)] += weight / softmax.sum;
    }
    found.entropy.push_back(entropy);
  }
  if (order == Order::ascending) return found;
  // Rows were walked in this order; they are listed in theirs.
  Measures<T> sorted = found;
  for (int64_t i = 0; i < f.B * f.Hq * f.Lq; ++i)
    sorted.entropy[size_t(i / f.Lq * f.Lq + nth(order, i % f.Lq, f.Lq))] = found.entropy[size_t(i)];
  return sorted;
}

void* row_of_out(const Forward& f, int64_t i) {
  const int64_t at = i / (f.Hq * f.Lq) * f.out_stride[0] + i / f.Lq % f.Hq * f.out_stride[1] +
                     i % f.Lq * f.out_stride[2];
  return static_cast<char*>(f.out) + at * size_of(f.type);
}
std::vector<char> bytes_of_out(const Forward& f) {
  std::vector<char> bytes;
  for (int64_t i = 0; i < f.B * f.Hq * f.Lq; ++i) {
    const char* row = static_cast<const char*>(row_of_out(f, i));
    bytes.insert(bytes.end(), row, row + f.Dv * size_of(f.type));
  }
  return bytes;
}

// The same bits where the forward pass is run with the statistics.
std::string run_together(const Kernels& kernels, const Forward& call, Random& random,
                         const std::vector<float>& results) {
  const int64_t rows = call.B * call.Hq * call.Lq;
  const std::vector<char> out = bytes_of_out(call);
  for (int64_t i = 0; i < rows; ++i) wipe(row_of_out(call, i), call.Dv * size_of(call.type));
  const Array<float> stats(2 * rows);
  wipe(stats.data(), stats.size() * 4);
  StatisticsCall together(call, stats, true);
  together.run_in_random_order(kernels.statistics, random);
  if (!same_bits(together.results(), results)) return "other bits with the forward pass";
  if (bytes_of_out(call) != out) return "another output with the statistics";
  const std::vector<float> found(stats.begin(), stats.end());
  const std::vector<float> expected(call.row_max, call.row_max + 2 * rows);
  if (!same_bits(found, expected)) return "other maxima and sums with the statistics";
  together.wipe_results();
  together.run_on_threads(kernels.statistics, random.integer(1, 4));
  return same_bits(together.results(), results) ? "" : "other bits on threads, together";
}

// Maxima and sums of the forward pass, and the same bits from any order and threads.
std::string run(const Kernels& kernels, const Forward& given, Random& random,
                std::vector<float>& results, Measures<float>* measures) {
  const int64_t rows = given.B * given.Hq * given.Lq;
  const Array<float> stats(2 * rows);
  Forward call = given;
  call.row_max = stats.data();
  call.row_sum = stats.data() + rows;
  run_in_random_order(kernels, call, random);
  StatisticsCall asked(call, stats, false);
  asked.run_in_random_order(kernels.statistics, random);
  results = asked.results();
  if (measures) {
    const Statistics& s = asked.call();
    const auto copy = [](const float* data, int64_t n) {
      return std::vector<float>(data, data + n);
    };
    measures->entropy = copy(s.entropy, rows);
    measures->received = copy(s.received, call.B * call.Hq * call.Lk);
    measures->heat_map =
        copy(s.heat_map, call.B * call.Hq * s.pooled_rows.cells * s.pooled_keys.cells);
  }
  asked.wipe_results();
  asked.run_on_threads(kernels.statistics, random.integer(1, 4));
  if (!same_bits(asked.results(), results)) return "other bits on threads";
  return kernels.statistics.keeps_scores(call) ? run_together(kernels, call, random, results) : "";
}

}  // namespace

ExpectedMeasures expect_measures_of(const Case& made) {
  ExpectedMeasures expected;
  expected.oracle = plain_measures<double>(made.call, Order::ascending);
  for (const Order order : {Order::ascending, Order::descending, Order::odd_first})
    expected.plain.push_back(plain_measures<float>(made.call, order));
  return expected;
}

std::string check_statistics(const Kernels& kernels, const Case& made,
                             const ExpectedMeasures& expected, Random& random) {
  std::vector<float> results;
  Measures<float> found;
  std::string wrong = run(kernels, made.call, random, results, &found);
  if (!wrong.empty()) return wrong;
  const auto check = [&](const char* name, auto member, double floor) {
    // A row whose sum is NaN: it is not said which of its keys, masked ones among them, get a NaN.
    for (size_t i = 0; i < (found.*(member.second)).size(); ++i)
      if (std::isnan((expected.oracle.*(member.first))[i]))
        (found.*(member.second))[i] = std::nanf("");
    std::vector<std::vector<float>> plain;
    for (const Measures<float>& one : expected.plain) plain.push_back(one.*(member.second));
    const std::string broken =
        breaks_rule(found.*(member.second), expected.oracle.*(member.first), plain, floor);
    return broken.empty() ? broken : name + (": " + broken);
  };
  using Wide = Measures<double>;
  using Narrow = Measures<float>;
  // log l less a mean: both are at most log(Lk + 1), and may cancel.
  const double of_entropy = 0x1p-23 * std::log(double(made.call.Lk + 1));
  wrong = check("entropy", std::pair(&Wide::entropy, &Narrow::entropy), of_entropy);
  if (wrong.empty()) wrong = check("received", std::pair(&Wide::received, &Narrow::received), 0);
  if (wrong.empty()) wrong = check("heat map", std::pair(&Wide::heat_map, &Narrow::heat_map), 0);
  for (const Type type : {Type::bfloat16, Type::float16}) {
    if (!wrong.empty()) return wrong;
    const HalfCase pair(made, type);
    wrong = run(kernels, pair.half, random, results, nullptr);
    if (!wrong.empty()) return "a half type: " + wrong;
    if (rounds_weights(kernels, type)) continue;
    std::vector<float> wide;
    wrong = run(kernels, pair.wide, random, wide, nullptr);
    if (wrong.empty() && !same_numbers(results, wide)) wrong = "a half type is not float32 widened";
  }
  return wrong;
}

}  // namespace manyheads
