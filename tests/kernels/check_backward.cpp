#include "check_backward.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "check_queue.h"
#include "half_case.h"
#include "queue.h"
#include "rule.h"
#include "run_forward.h"

namespace manyheads {
namespace {

constexpr const char* kNames[kGradients] = {
    "dQ", "dK", "dV", "d sinks", "d slopes", "d distance values", "d dense bias"};

// A backward call with memory for what it returns.
class BackwardCall {
 public:
  // forward: as it was run, with a case's grad_out of its type.
  BackwardCall(const Forward& forward, const Training& asked, const void* grad_out)
      : asked_(asked) {
    back_.forward = forward;
    back_.grad_out = grad_out;
    back_.grad_lse = asked.grad_lse;
    std::copy_n(asked.grad_out_stride, 3, back_.grad_out_stride);
    std::copy_n(asked.dense_stride, 4, back_.grad_dense_stride);
    int64_t (*const strides[])[3] = {&back_.grad_query_stride, &back_.grad_key_stride,
                                     &back_.grad_value_stride};
    for (int i = 0; i < 3; ++i) std::copy_n(asked.stride[i], 3, *strides[i]);
    float** const results[kGradients] = {&back_.grad_query,  &back_.grad_key,
                                         &back_.grad_value,  &back_.grad_sinks,
                                         &back_.grad_slopes, &back_.grad_distance_values,
                                         &back_.grad_dense};
    for (int i = 0; i < kGradients; ++i) {
      if (!asked.wanted[i]) continue;
      Array<float>& memory = memory_[size_t(i)] = Array<float>(asked.size[i]);
      wipe(memory.data(), memory.size() * 4);
      // The operator hands out zeros for what is no [B, H, L, D] tensor.
      if (i > kGradValue) std::fill(memory.begin(), memory.end(), 0.0f);
      *results[i] = memory.data();
    }
  }

  Backward& call() { return back_; }

  // In the order of plain_gradients.
  Gradients<float> results() {
    Gradients<float> found;
    const Forward& f = back_.forward;
    read_heads(kGradQuery, f.Hq, f.Lq, f.D, found);
    read_heads(kGradKey, f.Hkv, f.Lk, f.D, found);
    read_heads(kGradValue, f.Hkv, f.Lk, f.Dv, found);
    for (int i = kGradSinks; i < kGradients; ++i)
      if (asked_.wanted[i])
        found[size_t(i)].assign(memory_[size_t(i)].begin(), memory_[size_t(i)].end());
    return found;
  }
  // Nothing but the elements of results was written.
  bool kept_to_itself() const { return kept_to_itself_; }

 private:
  void read_heads(Gradient gradient, int64_t heads, int64_t rows, int64_t width,
                  Gradients<float>& found) {
    if (!asked_.wanted[gradient]) return;
    const Array<float>& memory = memory_[gradient];
    const int64_t (&stride)[3] = asked_.stride[gradient];
    std::vector<char> inside(size_t(memory.size()), false);
    for (int64_t i = 0; i < back_.forward.B * heads * rows; ++i) {
      const int64_t at =
          i / (heads * rows) * stride[0] + i / rows % heads * stride[1] + i % rows * stride[2];
      for (int64_t d = 0; d < width; ++d) {
        inside[size_t(at + d)] = true;
        found[gradient].push_back(memory[at + d]);
      }
    }
    for (int64_t i = 0; i < memory.size(); ++i)
      kept_to_itself_ &= inside[size_t(i)] || untouched(memory[i]);
  }

  const Training& asked_;
  Backward back_{};
  std::array<Array<float>, kGradients> memory_;
  bool kept_to_itself_ = true;
};

constexpr Stage kStages[] = {Stage::start, Stage::rows, Stage::keys, Stage::finish};

// On memory of exactly the size asked for, which holds nothing useful before.
void run_in_random_order(const Kernels& kernels, Backward& back, Random& random) {
  const Array<char> shared(kernels.backward_shared_bytes(back), 64);
  wipe(shared.data(), shared.size());
  back.shared = shared.data();
  const Array<char> scratch(kernels.backward_scratch_bytes(back), 64);
  for (const Stage stage : kStages) {
    wipe(scratch.data(), scratch.size());
    for (const int64_t item : shuffled(kernels.num_stage_items(back, stage), random))
      kernels.backward(back, stage, item, scratch.data());
  }
}

// As the operator does.
void run_on_threads(const Kernels& kernels, Backward& back, int64_t threads) {
  const size_t shared = whole_lines(kernels.backward_shared_bytes(back));
  const size_t each = whole_lines(kernels.backward_scratch_bytes(back));
  const Scratch memory(shared + each * size_t(threads));
  back.shared = memory.data();
  for (const Stage stage : kStages) {
    const auto work = [&](int64_t item, int64_t, void* scratch) {
      kernels.backward(back, stage, item, scratch);
    };
    share_out(
        kernels.num_stage_items(back, stage), memory.data() + shared, each, threads, [](void*) {},
        work, PlainThreads{});
  }
}

// The forward pass of a call, with what the backward pass needs of it.
struct Forwarded {
  Forwarded(const Kernels& kernels, const Forward& forward, Random& random)
      : stats(2 * forward.B * forward.Hq * forward.Lq), call(forward) {
    call.lse = nullptr;
    call.row_max = stats.data();
    call.row_sum = stats.data() + stats.size() / 2;
    run_in_random_order(kernels, call, random);
  }
  Array<float> stats;
  Forward call;
};

double largest_of(const Case& made, const void* data) {
  double largest = 0;
  for (const float x : owner_of(made, data))
    if (std::isfinite(x)) largest = std::max(largest, std::abs(double(x)));
  return largest;
}

// The farthest key that a query attends to.
double farthest(const Forward& call) {
  int64_t distance = 0;
  for (int64_t i = 0; i < call.B * call.Hq * call.Lq; ++i) {
    const int64_t b = i / (call.Hq * call.Lq), head = i / call.Lq % call.Hq, row = i % call.Lq;
    for (int64_t key = 0; key < call.Lk; ++key)
      if (allows(call, b, head, row, key))
        distance = std::max(distance, std::abs(key - position_of(call, b, row)));
  }
  return double(distance);
}

// What exact cancellation leaves in the gradient of a logit, P * (dP - sum of P * dP), times what
// dropout multiplies dP by, and times what the logit's own derivative is: the floors of
// docs/decisions/0005-gradients.md. A slope is multiplied by distances, which may all be large and
// nearly the same, and sums over all rows, each with a rounding of its own.
std::array<double, kGradients> floors(const Case& made, double eps) {
  const Forward& call = made.call;
  const double logit = eps * largest_of(made, made.back.grad_out) * largest_of(made, call.value) *
                       std::sqrt(double(call.Dv)) * double(call.keep_scale);
  const double width = logit * std::abs(double(call.scale)) * std::sqrt(double(call.D));
  const double rows = std::sqrt(double(call.B * call.Lq));
  const double slope =
      made.back.wanted[kGradSlopes] ? logit * std::max(farthest(call), 1.0) * rows : 0;
  return {width * largest_of(made, call.key),
          width * largest_of(made, call.query),
          0,
          logit,
          slope,
          logit,
          logit};
}

std::string what_breaks_rule(const Case& made, const Gradients<float>& actual,
                             const Gradients<double>& oracle,
                             const std::vector<Gradients<float>>& plain, double eps) {
  const std::array<double, kGradients> floor = floors(made, eps);
  for (int i = 0; i < kGradients; ++i) {
    if (!made.back.wanted[i]) continue;
    std::vector<std::vector<float>> each;
    for (const Gradients<float>& one : plain) each.push_back(one[size_t(i)]);
    const std::string wrong =
        breaks_rule(actual[size_t(i)], oracle[size_t(i)], each, floor[size_t(i)], eps);
    if (!wrong.empty()) return std::string(kNames[i]) + ": " + wrong;
  }
  return "";
}

std::string differs(const Gradients<float>& a, const Gradients<float>& b) {
  for (int i = 0; i < kGradients; ++i)
    if (!same_bits(a[size_t(i)], b[size_t(i)])) return kNames[i];
  return "";
}

// The gradients with keys split among threads or not, as drawn, and on threads with the other: the
// same bits. Says what is wrong, empty if nothing is.
std::string find_gradients(const Kernels& kernels, const Forward& forward, const Training& asked,
                           const void* grad_out, Random& random, Gradients<float>& found) {
  BackwardCall alone(forward, asked, grad_out);
  alone.call().split_keys = random.chance(0.5);
  run_in_random_order(kernels, alone.call(), random);
  found = alone.results();
  BackwardCall queued(forward, asked, grad_out);
  queued.call().split_keys = !alone.call().split_keys;
  const int64_t threads = random.integer(1, 4);
  run_on_threads(kernels, queued.call(), threads);
  const std::string other = differs(found, queued.results());
  if (!alone.kept_to_itself() || !queued.kept_to_itself()) return "wrote beside a gradient";
  if (other.empty()) return "";
  return "other bits in " + other + " from " + std::to_string(threads) + " threads, keys " +
         (queued.call().split_keys ? "split" : "not split");
}

// Kernels that widen, and all do float16, find the gradients of the widened inputs, given the same
// output of the forward pass; others are held to the rule.
std::string check_half(const Kernels& kernels, const Case& made, Type type,
                       const ExpectedGradients& expected, Random& random) {
  HalfCase pair(made, type);
  const Forwarded half(kernels, pair.half, random);
  Gradients<float> found;
  const std::string wrong =
      find_gradients(kernels, half.call, made.back, pair.half_grad_out, random, found);
  if (!wrong.empty()) return wrong;
  if (type == Type::bfloat16 && rounds_weights(kernels, type))
    return what_breaks_rule(made, found, expected.narrow_oracle, expected.plain_narrow, 0x1p-7);
  Forward wide = half.call;
  wide.type = Type::float32;
  wide.query = pair.wide.query, wide.key = pair.wide.key, wide.value = pair.wide.value;
  wide.out = pair.wide.out;
  const Array<uint16_t>& out = pair.halves.back();
  for (int64_t i = 0; i < out.size(); ++i) pair.floats.back()[i] = widened(type, out[i]);
  BackwardCall call(wide, made.back, pair.wide_grad_out);
  run_in_random_order(kernels, call.call(), random);
  const std::string other = differs(found, call.results());
  return other.empty() ? "" : other + " is not that of the widened inputs";
}

}  // namespace

ExpectedGradients expect_gradients_of(const Case& made) {
  const Training& back = made.back;
  const HalfCase pair(made, Type::bfloat16);
  const auto* const narrow = static_cast<const float*>(pair.wide_grad_out);
  const auto round = [](float x) { return widened(Type::bfloat16, narrowed(Type::bfloat16, x)); };
  ExpectedGradients expected{plain_gradients<double>(made.call, back, back.grad_out),
                             {},
                             plain_gradients<double>(pair.wide, back, narrow),
                             {}};
  for (const Order order : {Order::ascending, Order::descending, Order::odd_first})
    expected.plain.push_back(plain_gradients<float>(made.call, back, back.grad_out, order));
  for (const Order order : {Order::ascending, Order::descending}) {
    expected.plain_narrow.push_back(plain_gradients<float>(pair.wide, back, narrow, order, round));
    expected.plain_narrow.push_back(plain_gradients<float>(pair.wide, back, narrow, order));
  }
  return expected;
}

std::string check_backward(const Kernels& kernels, const Case& made,
                           const ExpectedGradients& expected, Random& random) {
  const Forwarded forward(kernels, made.call, random);
  Gradients<float> found;
  std::string wrong =
      find_gradients(kernels, forward.call, made.back, made.back.grad_out, random, found);
  if (!wrong.empty()) return wrong;
  wrong = what_breaks_rule(made, found, expected.oracle, expected.plain, 0x1p-23);
  if (!wrong.empty()) return wrong;
  for (const Type type : {Type::bfloat16, Type::float16}) {
    wrong = check_half(kernels, made, type, expected, random);
    if (!wrong.empty()) return (type == Type::bfloat16 ? "bfloat16: " : "float16: ") + wrong;
  }
  return "";
}

}  // namespace manyheads
