// The two products of decoding, on rows of K and V where they lie: a register holds neighbouring
// numbers of one row, and what is read serves up to four query rows. Half types are widened in
// registers. All the while, rows some way ahead are fetched.
#pragma once

#include "forward.h"

namespace {

// Keys that all query rows meet before the next ones are read: so many rows stay in the first
// cache.
constexpr int64_t kRun = 64;
// Keys whose scores are weighed together: of a row, the scores lie side by side.
constexpr int64_t kStep = 128;
// How far ahead rows are fetched, into the second cache; measured. The processor by itself has too
// few reads under way while it computes.
constexpr int64_t kBytesAhead = 8192;
// Not where K and V are so few bytes that this cache may hold them: fetching from it costs time.
constexpr int64_t kFewBytes = 3 << 19;

// Rows of K or V where they lie.
struct Rows {
  const char* data;
  int64_t stride;  // bytes
  Rows from(int64_t row) const { return {data + row * stride, stride}; }
};
inline Rows rows_from(Type type, const void* data, const int64_t (&stride)[3], const Tile& tile,
                      int64_t key) {
  return {static_cast<const char*>(row_at(data, type, stride, tile.b, tile.hkv, key)),
          stride[2] * size_of(type)};
}
// From a row that is read to the one that is fetched meanwhile; 0: none is.
inline int64_t bytes_ahead(const Forward& call, Rows rows, int64_t width) {
  const int64_t bytes = size_of(call.type);
  if (call.B * call.Hkv * call.Lk * (call.D + call.Dv) * bytes <= kFewBytes) return 0;
  return maximum(kBytesAhead / (width * bytes), 1) * rows.stride;
}

// Query rows share what is read of K and V: they are taken in groups of four, the last of fewer.
constexpr int kGroup = 4;
template <int R>
struct Group {
  static constexpr int kRows = R;
};
template <class Use>
inline void for_groups(int rows, Use use) {
  for (int r = 0; r < rows; r += kGroup) {
    if (rows - r >= 4) use(Group<4>{}, r);
    if (rows - r == 3) use(Group<3>{}, r);
    if (rows - r == 2) use(Group<2>{}, r);
    if (rows - r == 1) use(Group<1>{}, r);
  }
}

// As many dot products are summed side by side as there are registers for: of so many keys.
constexpr int kDots = Vec::kRows1;
constexpr int keys_at_once(int rows) { return rows == 3 ? kDots / 4 : kDots / rows; }

// Neighbouring vectors of a row from column d on, of `columns` numbers each. After every line that
// is read, the one that lies `ahead` of it is fetched.
template <Type kType, int N>
[[gnu::always_inline]] inline void load_vectors(const char* row, int64_t d, int64_t columns,
                                                int64_t ahead, Vec (&v)[N]) {
  constexpr int W = Vec::kLanes, kSize = int(size_of(kType));
  if (N == 1) {
    v[0] = load_row(kType, row, d, columns);
    if (ahead && d * kSize % 64 == 0) __builtin_prefetch(row + ahead + d * kSize, 0, 2);
  }
#pragma GCC unroll 4
  for (int i = 0; i + 1 < N; i += 2) {
    load_two(kType, row, d + i * W, v[i], v[i + 1]);
#pragma GCC unroll 2
    for (int byte = 0; byte < 2 * W * kSize; byte += 64)
      if (ahead) __builtin_prefetch(row + ahead + (d + i * W) * kSize + byte, 0, 2);
  }
}

// scores[r][key] for R query rows and the first keys_at_once(R) keys, of which `count` are there.
template <Type kType, int R>
[[gnu::always_inline]] inline void dot_products(const float* query, Rows keys, int64_t count,
                                                int64_t D, int64_t ahead, float* scores) {
  constexpr int W = Vec::kLanes, kKeys = keys_at_once(R);
  constexpr int kLine = 64 / int(size_of(kType));
  const char* row[kKeys] = {keys.data};
  for (int i = 1; i < kKeys; ++i) row[i] = row[i - 1] + (i < count ? keys.stride : 0);
  Vec sums[kDots / W][W];
#pragma GCC unroll 16
  for (int i = 0; i < kDots; ++i) sums[i / W][i % W] = zero();
  // Inlined or else the compiler keeps the sums in memory.
  const auto add = [&](int64_t d, int64_t columns) __attribute__((always_inline)) {
    Vec q[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) q[r] = load_row(Type::float32, query + r * D, d, columns);
#pragma GCC unroll 16
    for (int i = 0; i < kKeys; ++i) {
      const Vec k = load_row(kType, row[i], d, columns);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        Vec& sum = sums[(r * kKeys + i) / W][(r * kKeys + i) % W];
        sum = fma(k, q[r], sum);
      }
    }
  };
  int64_t d = 0;
  for (; d + W <= D; d += W) {
    if (ahead && d % kLine == 0) {
#pragma GCC unroll 16
      for (int i = 0; i < kKeys; ++i) __builtin_prefetch(row[i] + ahead + d * size_of(kType), 0, 2);
    }
    add(d, W);
  }
  if (d < D) add(d, D - d);
  alignas(64) float dots[kDots];
#pragma GCC unroll 4
  for (int i = 0; i < kDots / W; ++i) store(dots + i * W, sum_lanes(sums[i]));
  for (int r = 0; r < R; ++r)
    __builtin_memcpy(scores + r * kStep, dots + r * kKeys, kKeys * sizeof(float));
}

// sums[key][lane] of the products of kDots keys with one query row, over kWide columns from `d` on;
// added to what is there, unless these are the first.
constexpr int kWide = kDots / kGroup * Vec::kLanes;
template <Type kType, bool kFirst>
inline void add_wide_columns(const float* query, Rows keys, int64_t d, int64_t ahead,
                             float (&sums)[kDots][Vec::kLanes]) {
  constexpr int W = Vec::kLanes, N = kWide / W;
  Vec q[N], k[N];
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) q[i] = load(query + d + i * W);
  const char* row = keys.data + d * size_of(kType);
#pragma GCC unroll 1  // or else the compiler keeps sixteen addresses, in memory
  for (int key = 0; key < kDots; ++key, row += keys.stride) {
    Vec sum = kFirst ? zero() : load(sums[key]);
    load_vectors<kType>(row, 0, W, ahead, k);
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) sum = fma(k[i], q[i], sum);
    store(sums[key], sum);
  }
}

// As dot_products, for one query row, kDots keys and a multiple of kWide columns: one key after
// another, as they lie in memory.
template <Type kType>
inline void dot_products_of_row(const float* query, Rows keys, int64_t D, int64_t ahead,
                                float* scores) {
  constexpr int W = Vec::kLanes;
  alignas(64) float sums[kDots][W];
  add_wide_columns<kType, true>(query, keys, 0, ahead, sums);
  for (int64_t d = kWide; d < D; d += kWide)
    add_wide_columns<kType, false>(query, keys, d, ahead, sums);
#pragma GCC unroll 4
  for (int i = 0; i < kDots; i += W) {
    Vec rows[W];
#pragma GCC unroll 16
    for (int j = 0; j < W; ++j) rows[j] = load(sums[i + j]);
    store(scores + i, sum_lanes(rows));
  }
}

// scores[r][key] for R query rows and `n` keys.
template <Type kType, int R>
[[gnu::noinline, gnu::flatten]] void score_keys(const float* query, Rows keys, int64_t n, int64_t D,
                                                int64_t ahead, float* scores) {
  constexpr int kKeys = keys_at_once(R);
  int64_t i = 0;
  if (R == 1 && kType != Type::float32 && D % kWide == 0)
    for (; i + kDots <= n; i += kDots)
      dot_products_of_row<kType>(query, keys.from(i), D, ahead, scores + i);
  for (; i < n; i += kKeys)
    dot_products<kType, R>(query, keys.from(i), minimum(kKeys, n - i), D, ahead, scores + i);
}

// Row r of out [R][Dv], times factor[r], plus weights[r] times `n` rows of V: the columns [d, d +
// N * kLanes), or, where N is 0, the last ones. A weight of -0 marks a pair that does not attend:
// its value takes no part.
template <Type kType, int R, int N, bool kMasked>
inline void add_columns(const float* weights, Rows values, int64_t n, int64_t Dv, int64_t d,
                        int64_t ahead, const float* factor, float* out) {
  constexpr int W = Vec::kLanes, kVecs = N == 0 ? 1 : N;
  const int64_t columns = N == 0 ? Dv - d : W;
  Vec sum[R][kVecs];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kVecs; ++i) sum[r][i] = zero();
  }
  const char* row = values.data;
  for (int64_t key = 0; key < n; ++key, row += values.stride) {
    Vec v[kVecs];
    load_vectors<kType>(row, d, columns, ahead, v);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const float weight = weights[r * kStep + key];
      if (kMasked && weight == 0 && __builtin_signbit(weight)) continue;
#pragma GCC unroll 4
      for (int i = 0; i < kVecs; ++i) sum[r][i] = fma(v[i], set(weight), sum[r][i]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kVecs; ++i) {
      float* const to = out + r * Dv;
      const Vec before = load_row(Type::float32, to, d + i * W, columns);
      store_row(Type::float32, to, d + i * W, columns, fma(before, set(factor[r]), sum[r][i]));
    }
  }
}

template <Type kType, int R, bool kMasked>
inline void add_values(const float* weights, Rows values, int64_t n, int64_t Dv, int64_t ahead,
                       const float* factor, float* out) {
  constexpr int W = Vec::kLanes, N = kDots / kGroup;
  int64_t d = 0;
  for (; d + N * W <= Dv; d += N * W)
    add_columns<kType, R, N, kMasked>(weights, values, n, Dv, d, ahead, factor, out);
  for (; d + W <= Dv; d += W)
    add_columns<kType, R, 1, kMasked>(weights, values, n, Dv, d, ahead, factor, out);
  if (d < Dv) add_columns<kType, R, 0, kMasked>(weights, values, n, Dv, d, ahead, factor, out);
}
}  // namespace
