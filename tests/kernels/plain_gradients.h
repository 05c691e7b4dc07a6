// The gradients of attention as plain loops, from its derivatives: with P the weights, f what
// dropout multiplies them by, dO and dlse what flows back,
//
//   dP = f * (V dO)    dS = P * (dP - sum over keys of P * dP + dlse)    dV = f * P dO
//
// and dS flows through the biases and softcap to dQ and dK. In double it is what the kernels are
// compared with, in float the plain implementation that the numerics rule allows.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "plain.h"

namespace manyheads {

// Each contiguous; empty where not wanted.
template <class T>
using Gradients = std::array<std::vector<T>, kGradients>;

template <class T, class Rounded>
class PlainGradients {
 public:
  // grad_out: the case's own, or the same rounded.
  PlainGradients(const Forward& call, const Training& back, const float* grad_out, Order order,
                 const Rounded& rounded)
      : call_(call), back_(back), grad_out_(grad_out), order_(order), rounded_(rounded) {}

  Gradients<T> find() {
    const int64_t queries = call_.B * call_.Hq * call_.Lq, keys = call_.B * call_.Hkv * call_.Lk;
    const int64_t sizes[kGradients] = {queries * call_.D,       keys * call_.D,
                                       keys * call_.Dv,         back_.size[kGradSinks],
                                       back_.size[kGradSlopes], back_.size[kGradDistanceValues],
                                       back_.size[kGradDense]};
    for (int i = 0; i < kGradients; ++i)
      if (back_.wanted[i]) found_[size_t(i)].assign(size_t(sizes[i]), 0);
    for (int64_t i = 0; i < queries; ++i) {
      const int64_t nth_row = nth(order_, i, queries);
      add_row(nth_row / (call_.Hq * call_.Lq), nth_row / call_.Lq % call_.Hq, nth_row % call_.Lq);
    }
    for (std::vector<T>& values : found_)
      for (T& x : values) x = rounded_(x);
    return std::move(found_);
  }

 private:
  // Where in found_[gradient] rows of `width` begin; null where not wanted.
  T* row_of(Gradient gradient, int64_t row, int64_t width) {
    return back_.wanted[gradient] ? &found_[gradient][size_t(row * width)] : nullptr;
  }
  void add(Gradient gradient, int64_t at, T x) {
    if (back_.wanted[gradient]) found_[gradient][size_t(at)] += x;
  }

  void add_row(int64_t b, int64_t head, int64_t row) {
    const Softmax<T> softmax = plain_softmax<T>(call_, b, head, row, order_, rounded_);
    if (softmax.nothing) return;
    const int64_t hkv = head / (call_.Hq / call_.Hkv),
                  flat = (b * call_.Hq + head) * call_.Lq + row;
    const float* grad_out = grad_out_ + b * back_.grad_out_stride[0] +
                            head * back_.grad_out_stride[1] + row * back_.grad_out_stride[2];
    const float* values =
        floats_of(call_.value) + b * call_.value_stride[0] + hkv * call_.value_stride[1];
    std::vector<T> weights(softmax.weights.size()), grads(weights.size());
    T delta = 0;
    for (int64_t i = 0; i < call_.Lk; ++i) {
      const int64_t key = nth(order_, i, call_.Lk);
      if (!softmax.attends(key)) continue;
      const T weight = weights[size_t(key)] = rounded_(softmax.weights[size_t(key)] / softmax.sum);
      const T kept = T(kept_factor(call_, b, head, row, key));
      T* grad_value = row_of(kGradValue, (b * call_.Hkv + hkv) * call_.Lk + key, call_.Dv);
      T grad = 0;
      for (int64_t d = 0; d < call_.Dv; ++d) {
        grad += T(values[key * call_.value_stride[2] + d]) * T(grad_out[d]);
        if (grad_value) grad_value[d] += rounded_(weight * kept) * T(grad_out[d]);
      }
      grads[size_t(key)] = rounded_(grad * kept);
      delta += weight * grads[size_t(key)];
    }
    if (back_.grad_lse) delta -= T(back_.grad_lse[flat]);
    if (call_.sinks)
      add(kGradSinks, head, -std::exp(T(call_.sinks[head]) - softmax.max) / softmax.sum * delta);
    for (int64_t i = 0; i < call_.Lk; ++i) {
      const int64_t key = nth(order_, i, call_.Lk);
      if (softmax.attends(key))
        add_pair(b, head, row, key, rounded_(weights[size_t(key)] * (grads[size_t(key)] - delta)));
    }
  }

  // dS of one pair into all that its logit came from.
  void add_pair(int64_t b, int64_t head, int64_t row, int64_t key, T grad) {
    const int64_t hkv = head / (call_.Hq / call_.Hkv);
    const int64_t distance = std::abs(key - position_of(call_, b, row));
    add(kGradSlopes, head, -grad * T(distance));
    if (back_.wanted[kGradDistanceValues])
      add(kGradDistanceValues, distance_index(call_, b, head, row, key), grad);
    const int64_t (&to)[4] = back_.dense_stride;
    add(kGradDense, b * to[0] + head * to[1] + row * to[2] + key * to[3], grad);
    if (call_.softcap != 0) {
      const T capped = plain_score<T>(call_, b, head, row, key, order_) / T(call_.softcap);
      grad *= 1 - capped * capped;
    }
    grad *= T(call_.scale);
    const float* q = floats_of(call_.query) + b * call_.query_stride[0] +
                     head * call_.query_stride[1] + row * call_.query_stride[2];
    const float* k = floats_of(call_.key) + b * call_.key_stride[0] + hkv * call_.key_stride[1] +
                     key * call_.key_stride[2];
    T* grad_query = row_of(kGradQuery, (b * call_.Hq + head) * call_.Lq + row, call_.D);
    T* grad_key = row_of(kGradKey, (b * call_.Hkv + hkv) * call_.Lk + key, call_.D);
    for (int64_t d = 0; d < call_.D; ++d) {
      if (grad_query) grad_query[d] += grad * T(k[d]);
      if (grad_key) grad_key[d] += grad * T(q[d]);
    }
  }

  const Forward& call_;
  const Training& back_;
  const float* grad_out_;
  Order order_;
  const Rounded& rounded_;
  Gradients<T> found_;
};

template <class T, class Rounded>
Gradients<T> plain_gradients(const Forward& call, const Training& back, const float* grad_out,
                             Order order, const Rounded& rounded) {
  return PlainGradients<T, Rounded>(call, back, grad_out, order, rounded).find();
}
template <class T>
Gradients<T> plain_gradients(const Forward& call, const Training& back, const float* grad_out,
                             Order order = Order::ascending) {
  return plain_gradients<T>(call, back, grad_out, order, [](T x) { return x; });
}

}  // namespace manyheads
