// From a tile's running result to rows of the output: sinks, log-sum-exp, normalisation.
#pragma once

#include "attend.h"

namespace {

// A sink is an extra logit that takes part in the softmax and carries no value. A lane that
// attended to no key is left alone.
inline void add_sinks(const Forward& call, const Tile& tile, Partial& total) {
  constexpr int W = Vec::kLanes;
  const int64_t lanes = tile.lanes();
  const Vec unit = set(score_unit(call)), minus_infinity = set(-kInfinity);
  alignas(64) float sinks[kMaxLanes];
  for (int64_t i = 0; i < lanes; ++i) sinks[i] = call.sinks[tile.head[i]];
  for (int64_t i = 0; i < lanes; i += W) {
    const Vec old_max = load(total.max + i), sink = load(sinks + i);
    const Vec new_max = select(equal(old_max, minus_infinity), old_max, max(old_max, sink));
    const Vec factor = correction(old_max, new_max, unit);
    const Vec extra =
        select(equal(old_max, minus_infinity), zero(), correction(sink, new_max, unit));
    store(total.max + i, new_max);
    store(total.sum + i, fma(load(total.sum + i), factor, extra));
    for (int64_t d = 0; d < call.Dv; ++d)
      store(total.out + d * lanes + i, load(total.out + d * lanes + i) * factor);
  }
}

// log-sum-exp per lane, in natural units.
inline void store_lse(const Forward& call, const Tile& tile, const float* maxima,
                      const float* sums) {
  const double scale = transforms(call) ? 1.0 : __builtin_fabs(double(call.scale));
  for (int lane = 0; lane < tile.count; ++lane) {
    const float max = maxima[lane], sum = sums[lane];
    const double base = max == -kInfinity ? 0.0 : double(max) * scale;
    call.lse[(tile.b * call.Hq + tile.head[lane]) * call.Lq + tile.row[lane]] =
        sum == 0 ? -kInfinity : float(base + __builtin_log(double(sum)));
  }
}

// What the backward pass recomputes weights from: the row's maximum, in the scores' own units, and
// the sum relative to it.
inline void store_stats(const Forward& call, const Tile& tile, const Partial& total) {
  for (int lane = 0; lane < tile.count; ++lane) {
    const int64_t row = (tile.b * call.Hq + tile.head[lane]) * call.Lq + tile.row[lane];
    call.row_max[row] = total.max[lane];
    call.row_sum[row] = total.sum[lane];
  }
}

// a / b given 1 / b: one Newton step makes it as exact as a division, at a fraction of the time.
inline Vec divide(Vec a, Vec b, Vec inverse) {
  const Vec quotient = a * inverse;
  const Vec rest = fma(zero() - quotient, b, a);  // NaN where the quotient is not finite
  return select(is_nan(rest), quotient, fma(rest, inverse, quotient));
}

// Normalises the result and writes it as rows of `out`; a lane that attended to nothing gives
// zeros.
inline void finish_tile(const Forward& call, Tile& tile) {
  constexpr int W = Vec::kLanes;
  const int64_t lanes = tile.lanes();
  Partial& total = total_of(call, tile);
  if (call.sinks) add_sinks(call, tile, total);
  if (call.lse) store_lse(call, tile, total.max, total.sum);
  if (call.row_max) store_stats(call, tile, total);
  for (int64_t v = 0; v < lanes; v += W) {
    const Vec sum = load(total.sum + v);
    const Vec inverse = select(equal(sum, zero()), zero(), set(1.0f) / sum);
    const Vec scale = set(call.keep_scale);
    void* rows_out[W];
    const int64_t real = minimum(W, tile.count - v);
    for (int64_t i = 0; i < real; ++i)
      rows_out[i] =
          row_at(call.out, call.type, call.out_stride, tile.b, tile.head[v + i], tile.row[v + i]);
    for (int64_t d = 0; d < call.Dv; d += W) {
      const int64_t columns = minimum(W, call.Dv - d);
      Vec rows[W];
      for (int64_t i = 0; i < W; ++i)
        rows[i] = i < columns ? divide(load(total.out + (d + i) * lanes + v), sum, inverse) * scale
                              : zero();
      transpose(rows);
      for (int64_t i = 0; i < real; ++i) store_row(call.type, rows_out[i], d, columns, rows[i]);
    }
  }
}

}  // namespace
