// The products of the backward pass in float32, on K and V as they lie in memory where that can be.
//
// What such a policy says of the products, beside its sums' order: how K and V of a superblock, and
// Q and dO of a tile, are packed for them.
#pragma once

#include "backward_memory.h"

namespace {

struct WidenedBackward {
  using Keys = KeyValue;
  static constexpr bool kDifferentiates = false;  // whether add_products does
  static int64_t packed_floats(const Forward& call, int64_t keys) {
    return keys * ((packs_key(call) ? call.D : 0) + (packs_value(call) ? call.Dv : 0));
  }
  static constexpr int64_t kNarrowedFloats = 0;
  static int64_t column_floats(int64_t width) { return width * kMaxLanes; }
  static int64_t row_floats(int64_t width) { return padded(width) * kMaxLanes; }

  // `k`, `v`: the first of so many rows of a superblock.
  static Keys load(const Forward& call, const void* k, const void* v, int64_t rows, float* packed) {
    Keys kv{static_cast<const float*>(k), static_cast<const float*>(v), call.D, call.Dv};
    if (packs_key(call)) {
      pack_rows(call.type, k, call.key_stride[2], rows, call.D, packed);
      kv.key = packed;
      packed += superblock_keys(call) * call.D;
    }
    if (packs_value(call)) {
      pack_rows(call.type, v, call.value_stride[2], rows, call.Dv, packed);
      kv.value = packed;
    }
    return kv;
  }
  // Those of the block that begins at this row of the superblock.
  static Keys block_at(const Forward&, const Keys& kv, int64_t row) {
    return {kv.key + row * kv.key_stride, kv.value + row * kv.value_stride, kv.key_stride,
            kv.value_stride};
  }

  // Each lane's row of Q and of dO.
  static void pack(const Backward& back, BackwardTile& t, const void* const* queries,
                   const void* const* grads) {
    const Forward& call = back.forward;
    const auto query_of = [&](int lane) { return queries[lane]; };
    const auto grad_of = [&](int lane) { return grads[lane]; };
    pack_query(call, t.tile);
    pack_columns(call, t.tile, call.Dv, set(1.0f), t.grad_out, grad_of);
    if (back.grad_value) pack_panels(call, t.tile.count, call.Dv, t.grad_rows, grad_of);
    if (back.grad_key) pack_panels(call, t.tile.count, call.D, t.query_rows, query_of);
  }

  // One dot product of rows of Dv numbers to a lane, in the pieces and order of dP.
  static Vec dot_rows(const Forward& call, const void* const* left, const void* const* right,
                      Prefetcher&) {
    constexpr int W = Vec::kLanes;
    const int64_t piece = piece_of_columns(call);
    Vec total = zero(), sum = zero();
    for (int64_t d = 0; d < call.Dv; d += W) {
      const int64_t columns = minimum(W, call.Dv - d);
      Vec a[W], b[W];
      for (int i = 0; i < W; ++i) {
        a[i] = load_row(call.type, left[i], d, columns);
        b[i] = load_row(call.type, right[i], d, columns);
      }
      transpose(a);
      transpose(b);
      for (int64_t i = 0; i < columns; ++i) {
        sum = fma(a[i], b[i], sum);
        if ((d + i + 1) % piece != 0) continue;
        total = total + sum;
        sum = zero();
      }
    }
    return call.Dv % piece == 0 ? total : total + sum;
  }

  // Sᵀ = K Qᵀ
  template <int N>
  static void compute_scores(const Forward& call, const BackwardTile& t, const BackwardWork& work,
                             const Keys& kv, const Block& block) {
    multiply_columns<N>(call, kv.key, kv.key_stride, t.tile.query, call.D, block,
                        *work.forward.soon, work.forward.scores, nullptr);
  }
  // dPᵀ = V dOᵀ
  template <int N>
  static void compute_grads(const Forward& call, const BackwardTile& t, const BackwardWork& work,
                            const Keys& kv, const Block& block) {
    multiply_columns<N>(call, kv.value, kv.value_stride, t.grad_out, call.Dv, block,
                        *work.forward.soon, work.grad, nullptr);
  }
  // dV += Pᵀ dO, dK += dSᵀ Q, dQᵀ += Kᵀ dSᵀ. Under kDifferentiates and `final` it is given S and
  // dP.
  template <int N>
  static void add_products(const Backward& back, const BackwardTile& t, const BackwardWork& work,
                           const Keys& kv, const Block& block, bool, const KeySums& sums) {
    const Forward& call = back.forward;
    Prefetcher& soon = *work.forward.soon;
    if (back.grad_value)
      multiply_queries<N>(t, block, work.forward.scores, t.grad_rows, call.Dv, soon,
                          rows_of(sums.grad_value, sums, block, call.Dv));
    if (back.grad_key)
      multiply_queries<N>(t, block, work.grad, t.query_rows, call.D, soon,
                          rows_of(sums.grad_key, sums, block, call.D));
    if (back.grad_query) multiply_keys<N>(call, t, work, kv, block);
  }
};

}  // namespace
