#include "check_forward.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "check_queue.h"
#include "half_case.h"
#include "queue.h"
#include "rule.h"
#include "run_forward.h"

namespace manyheads {
namespace {

void wipe_results(const Case& made) {
  for (const void* data :
       {static_cast<const void*>(made.call.out), static_cast<const void*>(made.call.lse)})
    if (data) wipe(owner_of(made, data).data(), owner_of(made, data).size() * 4);
}

struct Output {
  std::vector<float> out, lse;
  bool kept_to_itself;  // nothing but the output's elements was written
};

Output read_results(const Case& made) {
  const Forward& call = made.call;
  Output output;
  const float* const out = floats_of(call.out);
  const Array<float>& all = owner_of(made, out);
  std::vector<char> inside(size_t(all.size()), false);
  for (int64_t b = 0; b < call.B; ++b)
    for (int64_t h = 0; h < call.Hq; ++h)
      for (int64_t row = 0; row < call.Lq; ++row)
        for (int64_t d = 0; d < call.Dv; ++d) {
          const int64_t at =
              b * call.out_stride[0] + h * call.out_stride[1] + row * call.out_stride[2] + d;
          inside[size_t(at)] = true;
          output.out.push_back(out[at]);
        }
  output.kept_to_itself = true;
  for (int64_t i = 0; i < all.size(); ++i)
    output.kept_to_itself &= inside[size_t(i)] || untouched(all[i]);
  if (call.lse) output.lse.assign(call.lse, call.lse + call.B * call.Hq * call.Lq);
  return output;
}

// Each query row of each head group by itself, where decoding takes them together. False where it
// does not (kernel/decode.h: kFewQueries), and then runs nothing.
bool run_rows_alone(const Kernels& kernels, const Forward& call, Random& random) {
  if (call.Lq * (call.Hq / call.Hkv) > 8 || call.dropout_threshold || call.row_max) return false;
  for (int64_t row = 0; row < call.Lq; ++row) {
    Forward one = call;
    one.Lq = 1;
    one.lse = nullptr;  // whose rows lie apart by Lq
    const auto skip = [&](auto*& data, int64_t stride, int64_t size) {
      if (data)
        data = reinterpret_cast<decltype(+data)>(uintptr_t(data) + uintptr_t(row * stride * size));
    };
    skip(one.query, call.query_stride[2], size_of(call.type));
    skip(one.out, call.out_stride[2], size_of(call.type));
    skip(one.mask.ranges, call.mask.ranges_stride[2], sizeof(int32_t));
    skip(one.mask.allowed, call.mask.allowed_stride[2], 1);
    skip(one.bias.dense, call.bias.dense_stride[2], sizeof(float));
    std::vector<int32_t> positions;
    for (int64_t b = 0; b < call.B; ++b) positions.push_back(int32_t(position_of(call, b, row)));
    one.positions = positions.data();
    one.positions_stride = 1;
    run_in_random_order(kernels, one, random);
  }
  return true;
}

void run_on_threads(const Kernels& kernels, const Forward& call, int64_t threads) {
  const auto prepare = [&](void* shared) { kernels.prepare(call, shared); };
  const auto begin = [&](void* scratch) { kernels.begin(call, scratch); };
  const auto work = [&](int64_t item, int64_t likely_next, void* scratch, void* shared) {
    kernels.forward(call, item, likely_next, scratch, shared);
  };
  run_queue(kernels.num_items(call), {kernels.scratch_bytes(call), kernels.shared_bytes(call)},
            threads, prepare, begin, work, PlainThreads{});
}

// lse is a difference of numbers of these sizes: docs/decisions/0001-numerics-rule-details.md.
double lse_floor(const Forward& call) {
  const auto longest = [&](const void* data, const int64_t (&stride)[3], int64_t heads,
                           int64_t rows) {
    double largest = 0;
    for (int64_t i = 0; i < call.B * heads * rows; ++i) {
      const float* row = floats_of(data) + i / (heads * rows) * stride[0] +
                         i / rows % heads * stride[1] + i % rows * stride[2];
      double square = 0;
      for (int64_t d = 0; d < call.D; ++d) square += double(row[d]) * double(row[d]);
      if (std::isfinite(square)) largest = std::max(largest, std::sqrt(square));
    }
    return largest;
  };
  double size = std::abs(double(call.scale)) *
                longest(call.query, call.query_stride, call.Hq, call.Lq) *
                longest(call.key, call.key_stride, call.Hkv, call.Lk);
  size += std::log(double(call.Lk + 1));
  Forward biases_only = call;
  biases_only.scale = 0;
  double largest_bias = 0;
  for (int64_t i = 0; i < call.B * call.Hq * call.Lq * call.Lk; ++i) {
    const double bias =
        plain_logit<double>(biases_only, i / (call.Hq * call.Lq * call.Lk),
                            i / (call.Lq * call.Lk) % call.Hq, i / call.Lk % call.Lq, i % call.Lk);
    if (std::isfinite(bias)) largest_bias = std::max(largest_bias, std::abs(bias));
  }
  return double(std::numeric_limits<float>::epsilon()) * (size + largest_bias);
}

}  // namespace

Expected expect_of(const Case& made) {
  const Forward& call = made.call;
  Expected expected;
  expected.oracle = plain_attention<double>(call);
  constexpr Order kOrders[] = {Order::ascending, Order::descending, Order::odd_first};
  for (const Order order : kOrders) {
    Result<float> plain = plain_attention<float>(call, order);
    expected.plain_out.push_back(std::move(plain.out));
    expected.plain_lse.push_back(std::move(plain.lse));
  }
  for (const Type type : {Type::bfloat16, Type::float16}) {
    const HalfCase pair(made, type);
    const auto round = [&](float x) { return widened(type, narrowed(type, x)); };
    Narrow& narrow = type == Type::bfloat16 ? expected.bfloat16 : expected.float16;
    narrow.oracle = plain_attention<double>(pair.wide);
    // Logits of 10^8 (ALiBi, unbounded positions) are beyond float32, however they are rounded.
    for (const Order order : kOrders) {
      narrow.plain_out.push_back(plain_attention<float>(pair.wide, order, round).out);
      narrow.plain_out.push_back(plain_attention<float>(pair.wide, order).out);
    }
  }
  return expected;
}

namespace {

// Kernels that widen compute in float32 and round once; others are held to the rule.
std::string check_half(const Kernels& kernels, const Case& made, Type type,
                       const Expected& expected, Random& random) {
  const HalfCase pair(made, type);
  const Array<uint16_t>& out = pair.halves.back();
  run_in_random_order(kernels, pair.half, random);
  const std::vector<uint16_t> together(out.begin(), out.end());
  const std::vector<float> rows_together = pair.results();
  if (run_rows_alone(kernels, pair.half, random) && !same_numbers(pair.results(), rows_together))
    return "a half type: other bits for a row alone";
  if (rounds_weights(kernels, type)) {
    const bool brain = type == Type::bfloat16;
    const Narrow& narrow = brain ? expected.bfloat16 : expected.float16;
    const std::string name = brain ? "bfloat16: " : "float16: ";
    const std::string wrong = breaks_rule(rows_together, narrow.oracle.out, narrow.plain_out, 0,
                                          brain ? 0x1p-7 : 0x1p-10);
    if (!wrong.empty()) return name + wrong;
    run_on_threads(kernels, pair.half, random.integer(1, 4));
    return std::equal(out.begin(), out.end(), together.begin()) ? ""
                                                                : name + "other bits on threads";
  }
  run_in_random_order(kernels, pair.wide, random);
  for (int64_t i = 0; i < pair.floats.back().size(); ++i) {
    const float ours = widened(type, out[i]);
    const float rounded = widened(type, narrowed(type, pair.floats.back()[i]));
    if (ours != rounded && !(std::isnan(ours) && std::isnan(rounded)))
      return "a half type is not float32 rounded once";
  }
  return "";
}

}  // namespace

std::string check_forward(const Kernels& kernels, const Case& made, const Expected& expected,
                          Random& random) {
  const Forward& call = made.call;
  wipe_results(made);
  run_in_random_order(kernels, call, random);
  const Output alone = read_results(made);
  if (!alone.kept_to_itself) return "wrote beside the output";
  std::string wrong = breaks_rule(alone.out, expected.oracle.out, expected.plain_out);
  if (!wrong.empty()) return "out: " + wrong;
  if (call.lse) {
    wrong = breaks_rule(alone.lse, expected.oracle.lse, expected.plain_lse, lse_floor(call));
    if (!wrong.empty()) return "lse: " + wrong;
  }
  for (const Type type : {Type::bfloat16, Type::float16}) {
    wrong = check_half(kernels, made, type, expected, random);
    if (!wrong.empty()) return wrong;
  }
  wipe_results(made);
  if (run_rows_alone(kernels, call, random) && !same_numbers(read_results(made).out, alone.out))
    return "other bits for a row alone";
  const int64_t threads = random.integer(1, 4);
  wipe_results(made);
  run_on_threads(kernels, call, threads);
  const Output queued = read_results(made);
  if (!queued.kept_to_itself || !same_bits(queued.out, alone.out) ||
      !same_bits(queued.lse, alone.lse))
    return "other bits from the queue on " + std::to_string(threads) + " threads";
  return "";
}

}  // namespace manyheads
