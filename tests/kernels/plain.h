// Attention as plain loops, from the formula that stands in tests/oracle.py. In double it is what
// the kernels are compared with, in float the plain implementation that the numerics rule allows.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "attention.h"
#include "case.h"

namespace manyheads {

template <class T>
struct Result {
  std::vector<T> out;  // [B, Hq, Lq, Dv]
  std::vector<T> lse;  // [B, Hq, Lq]
};

// The order in which numbers are added up.
enum class Order { ascending, descending, odd_first };

// Random calls are float32; check_forward.cpp makes the others of them.
inline const float* floats_of(const void* data) { return static_cast<const float*>(data); }

inline int64_t nth(Order order, int64_t i, int64_t n) {
  if (order == Order::ascending) return i;
  if (order == Order::descending) return n - 1 - i;
  return i < n / 2 ? 2 * i + 1 : 2 * (i - n / 2);
}

// scale q k, then softcap, then the biases.
template <class T>
T plain_logit(const Forward& call, int64_t b, int64_t head, int64_t row, int64_t key,
              Order order = Order::ascending) {
  const int64_t hkv = head / (call.Hq / call.Hkv);
  const float* q = floats_of(call.query) + b * call.query_stride[0] + head * call.query_stride[1] +
                   row * call.query_stride[2];
  const float* k = floats_of(call.key) + b * call.key_stride[0] + hkv * call.key_stride[1] +
                   key * call.key_stride[2];
  T s = 0;
  for (int64_t i = 0; i < call.D; ++i) {
    const int64_t d = nth(order, i, call.D);
    s += T(q[d]) * T(k[d]);
  }
  s *= T(call.scale);
  if (call.softcap != 0) s = T(call.softcap) * std::tanh(s / T(call.softcap));
  const Bias& bias = call.bias;
  const int64_t ahead = key - position_of(call, b, row);
  if (bias.slopes) s -= T(bias.slopes[head]) * T(ahead < 0 ? -ahead : ahead);
  if (bias.distance_values) {
    const int64_t index = ahead + bias.distance_offset, last = bias.num_distances - 1;
    s += T(bias.distance_values[head * bias.num_distances + (index < 0      ? 0
                                                             : index > last ? last
                                                                            : index)]);
  }
  const int64_t (&stride)[4] = bias.dense_stride;
  if (bias.dense)
    s += T(bias.dense[b * stride[0] + head * stride[1] + row * stride[2] + key * stride[3]]);
  return s;
}

// One row's output and lse. A logit of -inf masks as a mask does. `rounded` is what becomes of each
// step's results: themselves, unless a half type is meant.
template <class T, class Rounded>
T plain_row(const Forward& call, int64_t b, int64_t head, int64_t row, Order order, T* out,
            const Rounded& rounded) {
  constexpr T kNone = -std::numeric_limits<T>::infinity();
  std::vector<T> logits(size_t(call.Lk), kNone);
  T max = kNone;
  bool nothing = true;
  for (int64_t key = 0; key < call.Lk; ++key) {
    if (!allows(call, b, head, row, key)) continue;
    logits[size_t(key)] = rounded(plain_logit<T>(call, b, head, row, key, order));
    max = std::fmax(max, logits[size_t(key)]);
    nothing &= logits[size_t(key)] == kNone;
  }
  for (int64_t d = 0; d < call.Dv; ++d) out[d] = 0;
  if (nothing) return kNone;
  T sum = 0;
  if (call.sinks) {
    max = std::fmax(max, T(call.sinks[head]));
    sum = std::exp(T(call.sinks[head]) - max);
  }
  const float* values = floats_of(call.value) + b * call.value_stride[0] +
                        head / (call.Hq / call.Hkv) * call.value_stride[1];
  for (int64_t i = 0; i < call.Lk; ++i) {
    const int64_t key = nth(order, i, call.Lk);
    if (logits[size_t(key)] == kNone) continue;
    const T weight = std::exp(logits[size_t(key)] - max);
    sum += weight;
    for (int64_t d = 0; d < call.Dv; ++d)
      out[d] += rounded(weight) * T(values[key * call.value_stride[2] + d]);
  }
  for (int64_t d = 0; d < call.Dv; ++d) out[d] = rounded(out[d] / sum);
  return max + std::log(sum);
}

template <class T, class Rounded>
Result<T> plain_attention(const Forward& call, Order order, const Rounded& rounded) {
  Result<T> result;
  const int64_t rows = call.B * call.Hq * call.Lq;
  result.out.resize(size_t(rows * call.Dv));
  result.lse.resize(size_t(rows));
  for (int64_t i = 0; i < rows; ++i)
    result.lse[size_t(i)] =
        plain_row<T>(call, i / (call.Hq * call.Lq), i / call.Lq % call.Hq, i % call.Lq, order,
                     &result.out[size_t(i * call.Dv)], rounded);
  return result;
}
template <class T>
Result<T> plain_attention(const Forward& call, Order order = Order::ascending) {
  return plain_attention<T>(call, order, [](T x) { return x; });
}

}  // namespace manyheads
