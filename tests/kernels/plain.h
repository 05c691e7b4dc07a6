// Attention as plain loops, from the formula that stands in tests/oracle.py. In double it is what
// the kernels are compared with, in float the plain implementation that the numerics rule allows.
#pragma once

#include <algorithm>
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

// scale q k, then softcap.
template <class T>
T plain_score(const Forward& call, int64_t b, int64_t head, int64_t row, int64_t key, Order order) {
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
  if (call.softcap == 0) return s;
  return T(call.softcap) * std::tanh(s / T(call.softcap));
}

// Where a pair's number stands in the table of biases by distance.
inline int64_t distance_index(const Forward& call, int64_t b, int64_t head, int64_t row,
                              int64_t key) {
  const Bias& bias = call.bias;
  const int64_t index = key - position_of(call, b, row) + bias.distance_offset;
  return head * bias.num_distances + std::clamp<int64_t>(index, 0, bias.num_distances - 1);
}

// The score and the biases.
template <class T>
T plain_logit(const Forward& call, int64_t b, int64_t head, int64_t row, int64_t key,
              Order order = Order::ascending) {
  T s = plain_score<T>(call, b, head, row, key, order);
  const Bias& bias = call.bias;
  const int64_t ahead = key - position_of(call, b, row);
  if (bias.slopes) s -= T(bias.slopes[head]) * T(ahead < 0 ? -ahead : ahead);
  if (bias.distance_values) s += T(bias.distance_values[distance_index(call, b, head, row, key)]);
  const int64_t (&stride)[4] = bias.dense_stride;
  if (bias.dense)
    s += T(bias.dense[b * stride[0] + head * stride[1] + row * stride[2] + key * stride[3]]);
  return s;
}

// What dropout multiplies a weight by: 0 or keep_scale. Philox4x32 with 7 rounds (Salmon et al.
// 2011), its counter (key / 8, row, b * Hq + head, 0): eight neighbouring keys get 16 bits each.
inline float kept_factor(const Forward& call, int64_t b, int64_t head, int64_t row, int64_t key) {
  if (call.dropout_threshold == 0) return 1;
  uint32_t c[4] = {uint32_t(key / 8), uint32_t(row), uint32_t(b * call.Hq + head), 0};
  uint32_t key0 = uint32_t(call.dropout_seed), key1 = uint32_t(call.dropout_seed >> 32);
  for (int round = 0; round < 7; ++round) {
    const uint64_t wide0 = uint64_t(c[0]) * 0xd2511f53u, wide1 = uint64_t(c[2]) * 0xcd9e8d57u;
    c[0] = uint32_t(wide1 >> 32) ^ c[1] ^ key0;
    c[1] = uint32_t(wide1);
    c[2] = uint32_t(wide0 >> 32) ^ c[3] ^ key1;
    c[3] = uint32_t(wide0);
    key0 += 0x9e3779b9u;
    key1 += 0xbb67ae85u;
  }
  const uint32_t bits = c[key % 8 / 2] >> (key % 2 * 16) & 0xffff;
  return int64_t(bits) >= call.dropout_threshold ? call.keep_scale : 0;
}

// One row's softmax. A logit of -inf masks as a mask does.
template <class T>
struct Softmax {
  static constexpr T kNone = -std::numeric_limits<T>::infinity();
  std::vector<T> logits;   // [Lk]; kNone where a key is not attended to
  std::vector<T> weights;  // [Lk], not yet divided by the sum
  T max = kNone, sum = 0;  // a sink among them
  bool nothing = true;     // is attended to

  bool attends(int64_t key) const { return logits[size_t(key)] != kNone; }
};

// `rounded` is what becomes of each step's results: themselves, unless a half type is meant.
template <class T, class Rounded>
Softmax<T> plain_softmax(const Forward& call, int64_t b, int64_t head, int64_t row, Order order,
                         const Rounded& rounded) {
  Softmax<T> found;
  found.logits.assign(size_t(call.Lk), found.kNone);
  found.weights.assign(size_t(call.Lk), 0);
  for (int64_t key = 0; key < call.Lk; ++key) {
    if (!allows(call, b, head, row, key)) continue;
    T& logit = found.logits[size_t(key)];
    logit = rounded(plain_logit<T>(call, b, head, row, key, order));
    found.max = std::fmax(found.max, logit);
    found.nothing &= !found.attends(key);
  }
  if (found.nothing) return found;
  if (call.sinks) {
    found.max = std::fmax(found.max, T(call.sinks[head]));
    found.sum = std::exp(T(call.sinks[head]) - found.max);
  }
  for (int64_t i = 0; i < call.Lk; ++i) {
    const int64_t key = nth(order, i, call.Lk);
    if (!found.attends(key)) continue;
    T& weight = found.weights[size_t(key)];
    weight = std::exp(found.logits[size_t(key)] - found.max);
    found.sum += weight;
  }
  return found;
}

// One row's output and lse.
template <class T, class Rounded>
T plain_row(const Forward& call, int64_t b, int64_t head, int64_t row, Order order, T* out,
            const Rounded& rounded) {
  const Softmax<T> softmax = plain_softmax<T>(call, b, head, row, order, rounded);
  for (int64_t d = 0; d < call.Dv; ++d) out[d] = 0;
  if (softmax.nothing) return softmax.kNone;
  const float* values = floats_of(call.value) + b * call.value_stride[0] +
                        head / (call.Hq / call.Hkv) * call.value_stride[1];
  for (int64_t i = 0; i < call.Lk; ++i) {
    const int64_t key = nth(order, i, call.Lk);
    if (!softmax.attends(key)) continue;
    const T kept = T(kept_factor(call, b, head, row, key));
    const T weight = rounded(softmax.weights[size_t(key)]) * kept;
    for (int64_t d = 0; d < call.Dv; ++d)
      out[d] += weight * T(values[key * call.value_stride[2] + d]);
  }
  for (int64_t d = 0; d < call.Dv; ++d) out[d] = rounded(out[d] / softmax.sum);
  return softmax.max + std::log(softmax.sum);
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
