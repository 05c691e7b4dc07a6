// The two products in a half type, on instructions that multiply pairs of numbers and add them to a
// float32 sum. Numbers lie in pairs along whatever is summed: D for the scores, keys for the
// values. Q and K are such rows by nature; V is packed as its transpose, once per block, and the
// weights are rounded to the type. All else, the softmax and its sums above all, is that of
// attend.h in float32.
//
// A `Unit` multiplies, beside vec_*.h and the words of pairs_*.h:
//   Half                  the type, of pairs_*.h
//   kTerms                numbers that it sums in one step
//   begin_item, end_item  called around each work item
//   pairs_of              how many pairs it takes a sum of so many numbers for
//   scores<N>, multiply<N>, accumulate<N>  as below in VectorUnit
#pragma once

#include "forward.h"

namespace {

constexpr int64_t kLinePairs = 16;  // packed rows are zeros up to a multiple of this
constexpr int64_t kKeyPairs = kBlock / 2;

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
inline int64_t pairs_of_row(int64_t width) { return round_up(width, 2 * kLinePairs) / 2; }
inline int64_t key_pairs(const Forward& call) { return pairs_of_row(call.D); }

// K and V of one block, packed; and V as it lies.
struct PairKeys {
  const Pair *key, *value;  // [kBlock][key_pairs], [Dv][kKeyPairs]
  const uint16_t* value_rows;
  int64_t value_stride;
  bool finite;  // without inf and NaN in V, which are 0 in the packed copy
};

// Row after row, padded with zeros: `to` is [kBlock][width_pairs].
inline void pack_pairs(const uint16_t* from, int64_t stride, int64_t rows, int64_t width,
                       Pair* to) {
  constexpr int64_t kStep = 2 * kLinePairs;
  for (int64_t row = 0; row < rows; ++row, from += stride)
    for (int64_t d = 0; d < width; d += kStep, to += kLinePairs)
      store(to, load_some(from + d, minimum(kStep, width - d)));
}

// [Dv][kKeyPairs] of V's rows, with zeros for keys that there are not, and for inf and NaN. Whether
// there were none of those.
template <class Half>
inline bool pack_columns(const uint16_t* from, int64_t stride, int64_t rows, int64_t width,
                         Pair* to) {
  constexpr int64_t W = Vec::kLanes;
  bool finite = true;
  for (int64_t d = 0; d < width; d += W) {
    for (int64_t key = 0; key < rows; key += 2 * W) {
      VecPairs words[W];
      bool fine = true;
      for (int64_t i = 0; i < W; ++i) {
        const int64_t row = key + 2 * i;
        const uint16_t* p = from + row * stride + d;
        words[i] = row < rows ? zip(p, row + 1 < rows ? p + stride : nullptr, minimum(W, width - d))
                              : no_pairs();
        fine &= all_finite<Half>(words[i]);
      }
      if (!fine)
        for (VecPairs& word : words) word = only_finite<Half>(word);
      finite &= fine;
      transpose(words);
      for (int64_t i = 0; i < W; ++i) store(to + (d + i) * kKeyPairs + key / 2, words[i]);
    }
  }
  return finite;
}

// to[pair][lane] = row_of(lane)[pair], with zeros up to a whole row of pairs; `negative`: times -1.
template <class RowOf>
inline void pack_column_pairs(int vectors, int64_t width, bool negative, Pair* to, RowOf row_of) {
  constexpr int W = Vec::kLanes;
  const int64_t lanes = vectors * W;
  for (int v = 0; v < vectors; ++v) {
    const uint16_t* source[W];
    for (int i = 0; i < W; ++i) source[i] = static_cast<const uint16_t*>(row_of(v * W + i));
    for (int64_t d = 0; d < width; d += 2 * W) {
      VecPairs rows[W];
      for (int i = 0; i < W; ++i) rows[i] = load_some(source[i] + d, minimum(2 * W, width - d));
      transpose(rows);
      for (int64_t i = 0; i < W; ++i)
        store(to + (d / 2 + i) * lanes + v * W, negative ? -rows[i] : rows[i]);
    }
  }
}

// Qᵀ of the tile's lanes, [key_pairs][lanes] pairs; as pack_query in tile.h.
inline void pack_query_pairs(const Forward& call, Tile& tile) {
  pack_column_pairs(tile.vectors, call.D, call.scale < 0, reinterpret_cast<Pair*>(tile.query),
                    [&](int lane) {
                      return row_at(call.query, call.type, call.query_stride, tile.b,
                                    tile.head[lane], tile.row[lane]);
                    });
}

// weight(row, n) of the block's rows, times kWeightScale, as pairs of neighbouring keys,
// [kKeyPairs][lanes]; keys [begin, end) of the product, even numbers, may reach beyond the block's
// rows, where the weights are 0.
template <int N, class Half, class Weight>
inline void zip_weights(const Block& block, int64_t begin, int64_t end, Prefetcher& soon,
                        Pair* pairs, Weight weight) {
  constexpr int W = Vec::kLanes, L = N * W;
  // Lines fetched for each pair of rows: all that a block wants, since tile products fetch none.
  constexpr int kLines = 6;
  const void* lines[kLines * kKeyPairs];
  soon.take(lines, kLines * ((end - begin) / 2), pairs);
  const auto scaled = [&](int64_t row, int n) {
    const Vec x = weight(row, n);
    return Half::kWeightScale == 1 ? x : x * set(Half::kWeightScale);
  };
  const auto scaled_or_zero = [&](int64_t row, int n) {
    return row >= block.begin && row < block.end ? scaled(row, n) : zero();
  };
  const auto at_edge = [&](int64_t row) {
    for (int n = 0; n < N; ++n) {
      const Vec first = scaled_or_zero(row, n), second = scaled_or_zero(row + 1, n);
      store(pairs + row / 2 * L + n * W, zip<Half>(first, second));
    }
  };
  int64_t row = begin;
  for (; row < block.begin; row += 2) at_edge(row);
  for (const void** line = lines; row + 2 <= block.end; row += 2) {
#pragma GCC unroll 6
    for (int i = 0; i < kLines; ++i) __builtin_prefetch(*line++, 0, 2);
#pragma GCC unroll 3
    for (int n = 0; n < N; ++n) {
      const Vec first = scaled(row, n), second = scaled(row + 1, n);
      store(pairs + row / 2 * L + n * W, zip<Half>(first, second));
    }
  }
  for (; row < end; row += 2) at_edge(row);
}

// The weights in `scores` as such pairs, in place.
template <int N, class Half>
[[gnu::noinline]] void narrow_weights(const Block& block, int64_t begin, int64_t end,
                                      Prefetcher& soon, float* scores) {
  zip_weights<N, Half>(
      block, begin, end, soon, reinterpret_cast<Pair*>(scores),
      [&](int64_t row, int n) { return load(scores + (row * N + n) * Vec::kLanes); });
}

// As weigh_scores, and narrow_weights with what it makes.
template <int N, class Half, bool kMasked>
[[gnu::noinline]] void weigh_pairs(const Block& block, int64_t begin, int64_t end, Vec unit,
                                   const Vec (&base)[N], Prefetcher& soon, float* scores,
                                   Vec (&sum)[N]) {
  Vec largest[N], total[N];
#pragma GCC unroll 3
  for (int n = 0; n < N; ++n) {
    largest[n] = base[n];
    total[n] = sum[n];
  }
  zip_weights<N, Half>(block, begin, end, soon, reinterpret_cast<Pair*>(scores),
                       [&](int64_t row, int n) {
                         const Vec s = load(scores + (row * N + n) * Vec::kLanes);
                         Vec weight = short_exp2((s - largest[n]) * unit);
                         if constexpr (kMasked) weight = masked_weight(s, weight);
                         total[n] = total[n] + weight;
                         return weight;
                       });
#pragma GCC unroll 3
  for (int n = 0; n < N; ++n) sum[n] = total[n];
}

// What inf and NaN in these rows, which their packed columns lack, add to `out` [width][lanes].
// Rare and slow.
template <int N, class Half>
[[gnu::noinline]] void add_not_finite(const uint16_t* rows, int64_t stride, int64_t width,
                                      const Block& block, const Pair* weights, float* out) {
  constexpr int L = N * Vec::kLanes;
  constexpr uint16_t kExponent = Half::kExponent, kMasked = 0x8000;  // -0: see weigh_scores
  for (int64_t row = block.begin; row < block.end; ++row) {
    for (int64_t d = 0; d < width; ++d) {
      const uint16_t v = rows[row * stride + d];
      if ((v & kExponent) != kExponent) continue;
      for (int64_t lane = 0; lane < L; ++lane) {
        const Pair pair = weights[row / 2 * L + lane];
        const uint16_t weight = row % 2 ? pair.second : pair.first;
        if (weight != kMasked) out[d * L + lane] += Half::widen(v) * Half::widen(weight);
      }
    }
  }
}

// As AddToOut, of sums with weights times kWeightScale.
template <int N, class Half>
struct AddUnscaled {
  AddToOut<N> add;
  template <int R>
  void operator()(int64_t row, Vec (&c)[R][N]) const {
    if constexpr (Half::kWeightScale != 1)
      for (Vec(&sums)[N] : c)
        for (Vec& sum : sums) sum = sum * set(1 / Half::kWeightScale);
    add(row, c);
  }
};

template <class Unit>
struct Pairs {
  using Half = typename Unit::Half;
  using Keys = PairKeys;
  static int64_t query_floats(const Forward& call) { return key_pairs(call) * kMaxLanes; }
  static void pack(const Forward& call, Tile& tile) { pack_query_pairs(call, tile); }
  static int64_t packed_floats(const Forward& call) {
    return kBlock * key_pairs(call) + round_up(call.Dv, Vec::kLanes) * kKeyPairs;
  }
  static Keys load(const Forward& call, const void* k, const void* v, int64_t rows, Slot* slot,
                   bool held, float* packed) {
    Pair* const key = reinterpret_cast<Pair*>(packed);
    Pair* const value = key + kBlock * key_pairs(call);
    const uint16_t* const value_rows = static_cast<const uint16_t*>(v);
    const int64_t value_stride = call.value_stride[2];
    if (!held) {
      pack_pairs(static_cast<const uint16_t*>(k), call.key_stride[2], rows, call.D, key);
      slot->finite = pack_columns<Half>(value_rows, value_stride, rows, call.Dv, value);
    }
    return {key, value, value_rows, value_stride, slot->finite};
  }

  // The block's rows up to whole steps of the product.
  static Range summed_keys(const Block& block) {
    return {int32_t(block.begin / Unit::kTerms * Unit::kTerms),
            int32_t(round_up(block.end, Unit::kTerms))};
  }
  template <int N>
  static void compute_scores(const Forward& call, const Tile& tile, const Workspace& work,
                             const Keys& kv, const Block& block, float* running_max) {
    Unit::template scores<N>(kv.key, call.D, reinterpret_cast<const Pair*>(tile.query), block,
                             *work.soon, work.scores, running_max);
  }
  // Dropout needs the weights as they are before they are rounded.
  template <int N>
  static void weigh(const Forward& call, const Workspace& work, const Block& block, Vec unit,
                    const Vec (&base)[N], Vec (&sum)[N]) {
    if (call.dropout_threshold) return weigh_block<N>(work, block, unit, base, sum);
    const auto [begin, end] = summed_keys(block);
    const bool masked = block.core_begin > block.begin || block.core_end < block.end;
    const auto weigh_rows = masked ? weigh_pairs<N, Half, true> : weigh_pairs<N, Half, false>;
    weigh_rows(block, begin, end, unit, base, *work.soon, work.scores, sum);
  }
  template <int N>
  static void add_values(const Forward& call, const Workspace& work, const Keys& kv,
                         const Block& block, AddToOut<N> add) {
    const auto [begin, end] = summed_keys(block);
    if (call.dropout_threshold) narrow_weights<N, Half>(block, begin, end, *work.soon, work.scores);
    const Pair* const weights = reinterpret_cast<const Pair*>(work.scores);
    Unit::template multiply<N>(kv.value + begin / 2, kKeyPairs,
                               weights + begin / 2 * (N * Vec::kLanes), (end - begin) / 2, 0,
                               call.Dv, *work.soon, AddUnscaled<N, Half>{add});
    if (!kv.finite)
      add_not_finite<N, Half>(kv.value_rows, kv.value_stride, call.Dv, block, weights, add.out);
  }
};

// The micro-kernel of product.h, on pairs.
struct VectorUnit {
  using Half = Bfloat16;
  static constexpr int64_t kTerms = 2;
  static void begin_item() {}
  static void end_item() {}

  static int64_t pairs_of(int64_t numbers) { return (numbers + 1) / 2; }

  // scores[row][lane] = rows[row] . columns[lane], sums of `width` numbers, for the block's rows
  // and at least these: Sᵀ = K Qᵀ. `rows` is [kBlock][pairs_of_row], `columns` [pairs][lanes].
  template <int N>
  static void scores(const Pair* rows, int64_t width, const Pair* columns, const Block& block,
                     Prefetcher& soon, float* scores, float* running_max) {
    multiply_rows<N, false>(rows, pairs_of_row(width), columns, pairs_of(width), block.begin,
                            block.end, soon, StoreScores<N, false>{scores, running_max});
  }
  // add(row, c) for rows [begin, end) of c = a [rows][stride] . b [pairs][lanes]
  template <int N, class Add>
  static void multiply(const Pair* a, int64_t stride, const Pair* b, int64_t pairs, int64_t begin,
                       int64_t end, Prefetcher& soon, Add add) {
    multiply_rows<N, false>(a, stride, b, pairs, begin, end, soon, add);
  }
  // sums[row] += a[row] . b for rows [begin, end), and at least these; `sums` is [rows][width].
  template <int N>
  static void accumulate(const Pair* a, int64_t stride, const Pair* b, int64_t pairs, int64_t begin,
                         int64_t end, Prefetcher& soon, float* sums, int64_t width) {
    multiply_rows<N, false>(a, stride, b, pairs, begin, end, soon, AddToRows<N>{sums, width});
  }
};

}  // namespace
