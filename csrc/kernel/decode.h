// Decoding: few queries on a long cache, where reading K and V once is the whole cost. The lanes
// lie along D, not along queries: row_products.h has the two products. Between them stands the
// online softmax, a row's scores side by side on the lanes.
// The keys are cut into chunks at absolute multiples of kChunk, which any thread may take; whoever
// finishes a head's last chunk merges them, in order ("Flash-Decoding", Dao et al. 2023). The rules
// of attend.h hold here too: what a row gets does not depend on the rows it is computed with.
#pragma once

#include "row_products.h"

namespace {

// Flat queries (Lq * G) that take this path; measured.
constexpr int64_t kFewQueries = 8;
constexpr int64_t kChunk = 512;
// Not where a backward pass is to follow: it recomputes the scores in the tiles' order. Nor with
// dropout, which is training too.
inline bool decodes(const Forward& call) {
  return flat_queries(call) <= kFewQueries && !call.row_max && !call.dropout_threshold;
}
inline int64_t num_chunks(const Forward& call) { return (call.Lk + kChunk - 1) / kChunk; }

// Running result over some keys, row r of `out` being flat query r: unnormalised, relative to
// `max`.
struct FewRows {
  alignas(64) float max[kMaxLanes];  // of the raw scores or logits; -inf: no key yet
  alignas(64) float sum[kMaxLanes];
  float* out;  // [rows][Dv]
};

inline void clear(FewRows& rows, int64_t floats) {
  for (int64_t i = 0; i < floats; ++i) rows.out[i] = 0;
  for (int i = 0; i < kMaxLanes; ++i) {
    rows.max[i] = -kInfinity;
    rows.sum[i] = 0;
  }
}

// What the threads share: for each (b, hkv) the number of its chunks that are done, and where there
// are several chunks, their results.
struct Chunks {
  int32_t* done;   // [B * Hkv]
  float* results;  // [B * Hkv][chunks][rows][max, sum, Dv values]
  int64_t bytes;
};
inline int64_t floats_per_chunk(const Forward& call) { return flat_queries(call) * (call.Dv + 2); }
inline Chunks lay_out_chunks(const Forward& call, void* start) {
  Arena arena{static_cast<char*>(start)};
  Chunks chunks;
  chunks.done = arena.take<int32_t>(call.B * call.Hkv);
  const int64_t several = num_chunks(call) > 1 ? num_chunks(call) : 0;
  chunks.results = arena.take<float>(call.B * call.Hkv * several * floats_per_chunk(call));
  chunks.bytes = arena.used;
  return chunks;
}

struct DecodeScratch {
  Tile* tile;     // its lanes are the rows; only what names and masks them is used
  FewRows* rows;  // the chunk's
  FewRows* total;
  float* query;   // [rows][D]
  float* scores;  // [rows][kStep], then weights
  int64_t bytes;
};
inline DecodeScratch lay_out_decode(const Forward& call, void* start) {
  Arena arena{static_cast<char*>(start)};
  DecodeScratch scratch;
  const int64_t rows = flat_queries(call);
  scratch.tile = arena.take<Tile>(1);
  scratch.rows = arena.take<FewRows>(1);
  scratch.total = arena.take<FewRows>(1);
  scratch.query = arena.take<float>(rows * call.D);
  scratch.scores = arena.take<float>(rows * kStep);
  float* const out = arena.take<float>(rows * call.Dv);
  float* const total = arena.take<float>(rows * call.Dv);
  if (start) {
    scratch.rows->out = out;
    scratch.total->out = total;
  }
  scratch.bytes = arena.used;
  return scratch;
}

// As transform_scores, with keys key .. key + count - 1 on the lanes of one row.
inline Vec transform_row(const Forward& call, const Tile& tile, int r, int64_t key, int64_t count,
                         Vec s) {
  const Bias& bias = call.bias;
  const Vec scale = set(call.scale < 0 ? -call.scale : call.scale);
  if (call.softcap != 0) {
    const Vec cap = set(call.softcap);
    s = cap * tanh(s * (scale / cap));
  } else {
    s = s * scale;
  }
  const VecI ahead = count_up(int32_t(key)) - set_int(tile.position[r]);
  if (bias.slopes) s = fma(set(-tile.slope[r]), abs(to_float(ahead)), s);
  if (bias.distance_values) {
    const VecI index = max(min(ahead + set_int(int32_t(bias.distance_offset)),
                               set_int(int32_t(bias.num_distances - 1))),
                           set_int(0));
    s = s + gather(bias.distance_values, index + set_int(tile.distance_base[r]));
  }
  if (bias.dense && bias.dense_stride[3] == 0) s = s + set(*tile.bias_row[r]);
  if (bias.dense && bias.dense_stride[3] != 0)
    s = s + load_row(Type::float32, tile.bias_row[r], key, count);
  return s;
}

// Whether row r may attend to all of the keys [begin, end), or to none.
enum class Extent { none, some, all };
inline Extent extent_of(const Forward& call, const Tile& tile, int r, int64_t begin, int64_t end) {
  if (call.mask.kind == PlanKind::dense) return Extent::some;
  bool any = false;
  for (int i = 0; i < tile.num_ranges; ++i) {
    if (tile.begin[i][r] <= begin && end <= tile.end[i][r]) return Extent::all;
    any |= maximum(tile.begin[i][r], begin) < minimum(tile.end[i][r], end);
  }
  return any ? Extent::some : Extent::none;
}

inline Vec mask_row(const Forward& call, const Tile& tile, int r, int64_t key, int64_t count,
                    Vec s) {
  const VecI keys = count_up(int32_t(key));
  Lanes allowed = within(set_int(0), keys, set_int(int32_t(key + count)));
  if (call.mask.kind == PlanKind::dense) {
    const Vec bytes = load_bytes(tile.allowed_row[r] + key, count);
    return select(equal(bytes, zero()), set(-kInfinity), select(allowed, s, set(-kInfinity)));
  }
  Lanes in_range = within(set_int(tile.begin[0][r]), keys, set_int(tile.end[0][r]));
  for (int i = 1; i < tile.num_ranges; ++i)
    in_range = either(in_range, within(set_int(tile.begin[i][r]), keys, set_int(tile.end[i][r])));
  return select(both(allowed, in_range), s, set(-kInfinity));
}

// From the scores of row r and the keys [key, key + n) to weights, masked ones -0. `largest`
// becomes the maximum over these keys too; returns the sum of their weights.
inline float weigh_row(const Forward& call, const Tile& tile, int r, Extent extent, int64_t key,
                       int64_t n, float* scores, float& largest) {
  constexpr int W = Vec::kLanes;
  if (transforms(call)) {
    for (int64_t i = 0; i < n; i += W) {
      const int64_t count = minimum(W, n - i);
      store(scores + i, transform_row(call, tile, r, key + i, count, load(scores + i)));
    }
  }
  if (extent == Extent::some || n % W != 0) {
    for (int64_t i = 0; i < n; i += W) {
      const int64_t count = minimum(W, n - i);
      store(scores + i, mask_row(call, tile, r, key + i, count, load(scores + i)));
    }
  }
  Vec max_lanes = set(largest);
  for (int64_t i = 0; i < n; i += W) max_lanes = max(max_lanes, load(scores + i));
  largest = largest_lane(max_lanes);
  const Vec base = guarded(set(largest)), unit = set(score_unit(call));
  Vec sum = zero();
  for (int64_t i = 0; i < n; i += W) {
    const Vec s = load(scores + i);
    const Vec weight = select(equal(s, set(-kInfinity)), set(-0.0f), exp2((s - base) * unit));
    store(scores + i, weight);
    sum = sum + weight;
  }
  return sum_of_lanes(sum);
}

// The keys [key, key + n), n at most kStep, for all rows.
template <Type kType>
void decode_step(const Forward& call, const DecodeScratch& scratch, int64_t key, int64_t n) {
  constexpr int W = Vec::kLanes;
  const Tile& tile = *scratch.tile;
  FewRows& state = *scratch.rows;
  const Rows keys = rows_from(kType, call.key, call.key_stride, tile, key);
  const Rows values = rows_from(kType, call.value, call.value_stride, tile, key);
  alignas(64) float new_max[kMaxLanes], block_sum[kMaxLanes] = {}, factor[kMaxLanes];
  Extent extent[kMaxLanes];
  for (int i = 0; i < tile.lanes(); ++i) new_max[i] = state.max[i];
  for (int r = 0; r < tile.count; ++r) {
    extent[r] = extent_of(call, tile, r, key, key + n);
    if (call.bias.dense && extent[r] == Extent::all) extent[r] = Extent::some;  // may hold -inf
  }
  const auto extent_of_group = [&](int first, int rows) {
    for (int r = first + 1; r < first + rows; ++r)
      if (extent[r] != extent[first]) return Extent::some;
    return extent[first];
  };
  for (int64_t i = 0; i < n; i += kRun) {
    for_groups(tile.count, [&](auto group, int r) {
      constexpr int R = group.kRows;
      const int64_t ahead = r == 0 ? bytes_ahead(call, keys, call.D) : 0;
      if (extent_of_group(r, R) != Extent::none)
        score_keys<kType, R>(scratch.query + r * call.D, keys.from(i), minimum(kRun, n - i), call.D,
                             ahead, scratch.scores + r * kStep + i);
    });
  }
  for (int r = 0; r < tile.count; ++r) {
    float* const scores = scratch.scores + r * kStep;
    if (extent[r] == Extent::none)  // others of its group may attend
      for (int64_t i = 0; i < n; ++i) scores[i] = -0.0f;
    else
      block_sum[r] = weigh_row(call, tile, r, extent[r], key, n, scores, new_max[r]);
  }
  const Vec unit = set(score_unit(call));
  for (int i = 0; i < tile.lanes(); i += W) {
    const Vec f = correction(load(state.max + i), load(new_max + i), unit);
    store(factor + i, f);
    store(state.max + i, load(new_max + i));
    store(state.sum + i, fma(load(state.sum + i), f, load(block_sum + i)));
  }

  for_groups(tile.count, [&](auto group, int r) {
    constexpr int R = group.kRows;
    const float* const weights = scratch.scores + r * kStep;
    float* const out = state.out + r * call.Dv;
    const int64_t ahead = r == 0 ? bytes_ahead(call, values, call.Dv) : 0;
    const Extent common = extent_of_group(r, R);
    if (common == Extent::all)
      add_values<kType, R, false>(weights, values, n, call.Dv, ahead, factor + r, out);
    if (common == Extent::some)
      add_values<kType, R, true>(weights, values, n, call.Dv, ahead, factor + r, out);
  });
}

// into += from, both relative to their own maxima.
inline void merge(const Forward& call, const Tile& tile, const FewRows& from, FewRows& into) {
  constexpr int W = Vec::kLanes;
  const Vec unit = set(score_unit(call));
  alignas(64) float keep[kMaxLanes] = {}, add[kMaxLanes] = {};
  for (int i = 0; i < tile.lanes(); i += W) {
    const Vec from_max = load(from.max + i), into_max = load(into.max + i);
    const Vec both_max = max(from_max, into_max);
    const Vec a = correction(into_max, both_max, unit), b = correction(from_max, both_max, unit);
    store(into.max + i, both_max);
    store(into.sum + i, fma(load(from.sum + i), b, load(into.sum + i) * a));
    store(keep + i, a);
    store(add + i, b);
  }
  for (int r = 0; r < tile.count; ++r) {
    float* const p = into.out + r * call.Dv;
    const float* const q = from.out + r * call.Dv;
    for (int64_t d = 0; d < call.Dv; ++d) p[d] = p[d] * keep[r] + q[d] * add[r];
  }
}

inline void store_chunk(const Forward& call, const Tile& tile, const FewRows& state, float* to) {
  for (int r = 0; r < tile.count; ++r) {
    *to++ = state.max[r];
    *to++ = state.sum[r];
    for (int64_t d = 0; d < call.Dv; ++d) *to++ = state.out[r * call.Dv + d];
  }
}

inline void load_chunk(const Forward& call, const Tile& tile, const float* from, FewRows& state) {
  for (int r = 0; r < tile.count; ++r) {
    state.max[r] = *from++;
    state.sum[r] = *from++;
    for (int64_t d = 0; d < call.Dv; ++d) state.out[r * call.Dv + d] = *from++;
  }
}

// All chunks of one (b, hkv), in order, into scratch.total. One level will do: a chunk is long, and
// a million keys are but two thousand of them.
inline void merge_chunks(const Forward& call, const DecodeScratch& scratch, const float* results) {
  const Tile& tile = *scratch.tile;
  clear(*scratch.total, tile.count * call.Dv);
  for (int64_t i = 0; i < num_chunks(call); ++i) {
    load_chunk(call, tile, results + i * floats_per_chunk(call), *scratch.rows);
    merge(call, tile, *scratch.rows, *scratch.total);
  }
}

// Sinks, log-sum-exp, normalisation, and the rows of `out`.
inline void finish_rows(const Forward& call, const Tile& tile, FewRows& total) {
  constexpr int W = Vec::kLanes;
  const Vec unit = set(score_unit(call));
  alignas(64) float factors[kMaxLanes], sinks[kMaxLanes];
  for (int i = 0; i < tile.lanes(); ++i) sinks[i] = call.sinks ? call.sinks[tile.head[i]] : 0.0f;
  for (int i = 0; i < tile.lanes(); i += W) {
    const Vec old_max = load(total.max + i), none = set(-kInfinity);
    Vec factor = set(1.0f);
    if (call.sinks) {
      const Vec sink = load(sinks + i);
      const Vec new_max = select(equal(old_max, none), none, max(old_max, sink));
      const Vec extra = select(equal(old_max, none), zero(), correction(sink, new_max, unit));
      factor = correction(old_max, new_max, unit);
      store(total.max + i, new_max);
      store(total.sum + i, fma(load(total.sum + i), factor, extra));
    }
    store(factors + i, factor);
  }
  if (call.lse) store_lse(call, tile, total.max, total.sum);
  for (int r = 0; r < tile.count; ++r) {
    void* const row =
        row_at(call.out, call.type, call.out_stride, tile.b, tile.head[r], tile.row[r]);
    const float* const p = total.out + r * call.Dv;
    const Vec factor = set(factors[r]), sum = set(total.sum[r] == 0 ? 1.0f : total.sum[r]);
    for (int64_t d = 0; d < call.Dv; d += W) {
      const int64_t n = minimum(W, call.Dv - d);
      store_row(call.type, row, d, n, load_row(Type::float32, p, d, n) * factor / sum);
    }
  }
}

void decode(const Forward& call, int64_t index, void* memory, void* shared) {
  const DecodeScratch scratch = lay_out_decode(call, memory);
  const Chunks chunks = lay_out_chunks(call, shared);
  const int64_t per_head = num_chunks(call), bh = index / per_head, chunk = index % per_head;
  Tile& tile = *scratch.tile;
  tile.b = bh / call.Hkv;
  tile.hkv = bh % call.Hkv;
  tile.first = 0;
  tile.count = int(flat_queries(call));
  tile.vectors = (tile.count + Vec::kLanes - 1) / Vec::kLanes;
  place_tile(call, tile);
  // Whole runs, whatever the rows attend to: a row's bits do not depend on where others begin.
  const int64_t begin = maximum(chunk * kChunk, tile.keys.begin / kRun * kRun);
  const int64_t end =
      minimum(minimum((chunk + 1) * kChunk, call.Lk), (tile.keys.end + kRun - 1) / kRun * kRun);
  clear(*scratch.rows, tile.count * call.Dv);
  if (begin < end) {
    const Vec sign = set(call.scale < 0 ? -1.0f : 1.0f);
    for (int r = 0; r < tile.count; ++r) {
      const void* row =
          row_at(call.query, call.type, call.query_stride, tile.b, tile.head[r], tile.row[r]);
      for (int64_t d = 0; d < call.D; d += Vec::kLanes) {
        const int64_t n = minimum(Vec::kLanes, call.D - d);
        store_row(Type::float32, scratch.query + r * call.D, d, n,
                  load_row(call.type, row, d, n) * sign);
      }
    }
    const auto step = call.type == Type::float32    ? decode_step<Type::float32>
                      : call.type == Type::bfloat16 ? decode_step<Type::bfloat16>
                                                    : decode_step<Type::float16>;
    for (int64_t key = begin, n; key < end; key += n) {
      n = minimum(kStep - key % kStep, end - key);
      step(call, scratch, key, n);
    }
  }
  if (per_head == 1) return finish_rows(call, tile, *scratch.rows);
  float* const results = chunks.results + bh * per_head * floats_per_chunk(call);
  store_chunk(call, tile, *scratch.rows, results + chunk * floats_per_chunk(call));
  // Release what this thread wrote, acquire what the others did.
  if (__atomic_add_fetch(chunks.done + bh, 1, __ATOMIC_ACQ_REL) < per_head) return;
  merge_chunks(call, scratch, results);
  finish_rows(call, tile, *scratch.total);
}

}  // namespace
