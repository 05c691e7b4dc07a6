// What a call's weights are like (attention.h: Statistics), from its queries and keys and each
// row's maximum m and sum l, in memory that grows with Lq + Lk: P = exp(S - m) / l tile by tile.
//
//  rows    for every span of query rows: walks the keys, writes what belongs to rows, and sums what
//          belongs to keys and cells of the heat map. Scores are the forward pass's bit for bit, so
//          that S - m is exact however large both are.
//  finish  for every head: adds up its spans' sums, in their order
//
// Sums over rows are vertical as long as they can be: a block's vectors first, for all tiles that
// walk the keys together, then lanes, in double precision, since a cell may hold the whole map.
#pragma once

#include "statistics_block.h"

namespace {

inline void name_stacked_lanes(const Forward& call, const RowSpan& span, int64_t first, int64_t end,
                               Tile& tile) {
  const int64_t heads = stacked_heads(call);
  tile.b = span.b;
  tile.hkv = span.head / (call.Hq / call.Hkv);
  tile.first = first;
  tile.count = int(end - first);
  tile.vectors = (tile.count + Vec::kLanes - 1) / Vec::kLanes;
  for (int lane = 0; lane < tile.lanes(); ++lane) {
    const int64_t query = minimum(first + lane, end - 1);
    tile.row[lane] = int32_t(query / heads);
    tile.head[lane] = int32_t(span.head + query % heads);
  }
}

// The runs of lanes that fall into one row of the heat map each.
inline void find_map_rows(const Statistics& stats, const RowSpan& span, double* sums,
                          MeasuredTile& t) {
  t.num_map_rows = 0;
  if (!stats.heat_map) return;
  const Tile& tile = *t.tile;
  const Pooling& rows = stats.pooled_rows;
  const int heads = int(stacked_heads(stats.forward));
  const int64_t above = first_cell(stats, span.index), cells = stats.pooled_keys.cells;
  for (int vector = 0; vector < tile.vectors; ++vector) {
    const int first = vector * Vec::kLanes;
    for (int head = 0; head < heads; ++head) {
      int64_t last = -1;
      for (int i = head; i < Vec::kLanes && first + i < tile.count; i += heads) {
        const int64_t row = tile.row[first + i];
        if (row < rows.begin || row >= rows.end) continue;
        const int64_t cell = cell_of(rows, row);
        if (cell != last) {
          double* const to = sums + (head * cells_per_span(stats) + cell - above) * cells;
          t.map_rows[t.num_map_rows++] = {vector, i, 0, to};
        }
        ++t.map_rows[t.num_map_rows - 1].count;
        last = cell;
      }
    }
  }
}

inline void start_measured_tile(const Statistics& stats, const RowSpan& span, double* map_sums,
                                MeasuredTile& t) {
  const Forward& call = stats.forward;
  const Tile& tile = *t.tile;
  t.low = t.high = tile.position[0];
  t.broken = false;
  for (int lane = 0; lane < tile.lanes(); ++lane) {
    const int64_t row = row_index(call, tile, lane);
    const float max = call.row_max[row], sum = call.row_sum[row];
    t.broken |= sum != sum;
    t.max[lane] = max == -kInfinity ? 0.0f : max;
    t.inverse_sum[lane] = sum == 0 || lane >= tile.count ? 0.0f : 1.0f / sum;
    t.received_by[lane] = tile.row[lane] >= stats.received_from ? t.inverse_sum[lane] : 0.0f;
    if (tile.position[lane] < t.low) t.low = tile.position[lane];
    if (tile.position[lane] > t.high) t.high = tile.position[lane];
  }
  const Vec minus_infinity = set(-kInfinity);
  for (int i = 0; i < kMaxLanes; i += Vec::kLanes) {
    store(t.largest + i, minus_infinity);
    for (int which = 0; which < kMaxRowSums; ++which) {
      store(t.inner[which] + i, zero());
      store(t.outer[which] + i, zero());
    }
    for (int which = 0; which < kMaxMasses; ++which) store(t.at_offset[which] + i, zero());
  }
  if (stats.top) start_top(t, stats.top);
  find_map_rows(stats, span, map_sums, t);
}

inline void fold_sums(MeasuredTile& t) {
  for (int which = 0; which < kMaxRowSums; ++which) {
    for (int i = 0; i < t.tile->lanes(); i += Vec::kLanes) {
      store(t.outer[which] + i, load(t.outer[which] + i) + load(t.inner[which] + i));
      store(t.inner[which] + i, zero());
    }
  }
}

// - sum of P log P, the sink's among them: log l - E[S - m], whose terms do not cancel as those of
// lse - E[S] would. `below` is the sum of w * (s - max), in the scores' own unit.
inline float entropy_of(const Forward& call, int64_t head, int64_t row, float below) {
  const double unit = transforms(call) ? 1.0 : __builtin_fabs(double(call.scale));
  const double sum = call.row_sum[row];
  if (sum == 0) return 0;
  double total = double(below) * unit;
  if (call.sinks) {
    const double sink = double(call.sinks[head]) - double(call.row_max[row]);
    total += __builtin_exp(sink) * sink;
  }
  return float(__builtin_log(sum) - total / sum);
}

inline void write_top(const Statistics& stats, MeasuredTile& t) {
  const Forward& call = stats.forward;
  const Tile& tile = *t.tile;
  const Vec unit = set(score_unit(call)), minus_infinity = set(-kInfinity);
  alignas(64) float weights[kMaxLanes];
  for (int i = 0; i < tile.lanes(); i += Vec::kLanes) take_waiting(t, stats.top, i);
  for (int64_t place = 0; place < stats.top; ++place) {
    const float* const scores = t.top_scores + place * kMaxLanes;
    for (int i = 0; i < tile.lanes(); i += Vec::kLanes) {
      const Vec s = load(scores + i), weight = exp2((s - load(t.max + i)) * unit);
      store(weights + i, select(equal(s, minus_infinity), zero(), weight));
    }
    for (int lane = 0; lane < tile.count; ++lane) {
      const int64_t row = row_index(call, tile, lane), at = row * stats.top + place;
      stats.top_keys[at] = t.top_keys[place * kMaxLanes + lane];
      stats.top_weights[at] = stats.top_keys[at] < 0 ? 0.0f : weights[lane] / call.row_sum[row];
    }
  }
}

// What belongs to the tile's rows.
inline void finish_measured_tile(const Statistics& stats, MeasuredTile& t) {
  const Forward& call = stats.forward;
  const Tile& tile = *t.tile;
  const int64_t rows = call.B * call.Hq * call.Lq;
  const float unit = transforms(call) ? 1.0f : __builtin_fabsf(call.scale);
  for (int lane = 0; lane < tile.count; ++lane) {
    const int64_t row = row_index(call, tile, lane);
    const float of_row = call.row_sum[row];
    const auto share = [&](float weight) { return of_row == 0 ? 0.0f : weight / of_row; };
    if (stats.entropy)
      stats.entropy[row] = entropy_of(call, tile.head[lane], row, t.outer[kEntropySum][lane]);
    if (stats.max_logit)
      stats.max_logit[row] = t.largest[lane] == -kInfinity ? -kInfinity : t.largest[lane] * unit;
    if (stats.mean_distance) stats.mean_distance[row] = share(t.outer[kDistanceSum][lane]);
    for (int64_t i = 0; i < stats.num_first; ++i)
      stats.first_mass[i * rows + row] = share(t.outer[kFirstSums + i][lane]);
    for (int64_t i = 0; i < stats.num_offsets; ++i)
      stats.offset_mass[i * rows + row] = share(t.at_offset[i][lane]);
  }
  if (stats.top) write_top(stats, t);
}

// received [rows of a block][lanes], summed over the lanes of each head.
inline void add_lanes(const Forward& call, const float* received, int64_t rows, double* sums) {
  constexpr int W = Vec::kLanes;
  const int64_t heads = stacked_heads(call);
  for (int64_t row = 0; row < rows; row += W) {
    Vec lanes[W];
    for (int i = 0; i < W; ++i) lanes[i] = load(received + (row + i) * W);
    transpose(lanes);
    const int64_t real = minimum(W, rows - row);
    for (int64_t head = 0; head < heads; ++head) {
      Vec sum = lanes[head];
      for (int64_t i = head + heads; i < W; i += heads) sum = sum + lanes[i];
      alignas(64) float by_key[W];
      store(by_key, sum);
      double* const to = sums + head * call.Lk + row;
      for (int64_t i = 0; i < real; ++i) to[i] += double(by_key[i]);
    }
  }
}

// The forward pass of a group's tiles, whose scores stay for what is measured.
template <class Products>
inline void attend_stacked(const Forward& call, const Workspace& work, const Item& stacked,
                           const StatisticsScratch& scratch, int num_tiles, Range keys) {
  const int64_t heads = stacked_heads(call), group = call.Hq / call.Hkv;
  for (int i = 0; i < num_tiles; ++i) {
    Tile& tile = *scratch.tiles[i].tile;
    clear_results(call, tile);
    const int64_t lanes = tile.lanes();
    for (int64_t at = tile.keys.begin / kPeakKeys * lanes;
         at < ceil_div(tile.keys.end, kPeakKeys) * lanes; at += Vec::kLanes)
      store(tile.peaks + at, set(-kInfinity));
  }
  const Item item{stacked.b, stacked.hkv, stacked.first / heads * group,
                  ceil_div(stacked.end, heads) * group};
  attend_tiles<Products>(call, work, item, scratch.forward.tiles, num_tiles, keys, -1);
}

// Stacked queries [first, end) of a span, tiles that walk the keys together.
template <class Products>
inline void measure_group(const Statistics& stats, const RowSpan& span, int64_t first, int64_t end,
                          const StatisticsScratch& scratch) {
  const Forward& call = stats.forward;
  const Workspace& work = scratch.forward.work;
  const int64_t heads = stacked_heads(call), lanes = tile_vectors(call) * Vec::kLanes;
  const int64_t hkv = span.head / (call.Hq / call.Hkv), group_first = first;
  int num_tiles = 0;
  Range keys{int32_t(call.Lk), 0};
  for (; first < end; first += lanes) {
    const int64_t tile_end = minimum(first + lanes, end);
    const bool wanted = any_wanted(stats, first / heads, (tile_end - 1) / heads + 1);
    if (!wanted && !stats.attends) continue;
    Tile& tile = *scratch.tiles[num_tiles++].tile;
    name_stacked_lanes(call, span, first, tile_end, tile);
    place_lanes(call, tile);
    Products::pack(call, tile);
    if (tile.keys.begin < keys.begin) keys.begin = tile.keys.begin;
    if (tile.keys.end > keys.end) keys.end = tile.keys.end;
  }
  if (num_tiles == 0) return;
  const Item item{span.b, hkv, group_first, end};
  if (stats.attends) attend_stacked<Products>(call, work, item, scratch, num_tiles, keys);
  for (int i = 0; i < num_tiles; ++i)
    start_measured_tile(stats, span, scratch.map_sums, scratch.tiles[i]);
  for (int64_t key = keys.begin / kBlock * kBlock; key < keys.end; key += kBlock) {
    const auto kv = load_block<Products>(call, work, span.b, hkv, key, keys);
    work.soon->clear();
    if (!stats.attends) want_block<Products>(call, work, item, key + kBlock, keys);
    for (int64_t i = 0; stats.received && i < kBlock * Vec::kLanes; i += Vec::kLanes)
      store(scratch.received + i, zero());
    const bool span_ends = (key + kBlock) % kSumSpan == 0 || key + kBlock >= keys.end;
    for (int i = 0; i < num_tiles; ++i) {
      MeasuredTile& t = scratch.tiles[i];
      const Tile& tile = *t.tile;
      if (key < tile.keys.end && key + kBlock > tile.keys.begin) {
        if (tile.vectors == 3)
          measure_block<3, Products>(stats, t, work, kv, key, scratch.received);
        if (tile.vectors == 2)
          measure_block<2, Products>(stats, t, work, kv, key, scratch.received);
        if (tile.vectors == 1)
          measure_block<1, Products>(stats, t, work, kv, key, scratch.received);
      }
      if (span_ends) fold_sums(t);
    }
    if (stats.received)
      add_lanes(call, scratch.received, minimum(kBlock, call.Lk - key),
                scratch.received_sums + key);
  }
  for (int i = 0; i < num_tiles; ++i) finish_measured_tile(stats, scratch.tiles[i]);
}

inline void narrow_sums(const double* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = float(from[i]);
}

template <class Products>
inline void measure_span(const Statistics& stats, int64_t item, void* memory) {
  const Forward& call = stats.forward;
  const StatisticsScratch scratch = lay_out<Products>(stats, memory);
  const RowSpan span = find_row_span(stats, item);
  const int64_t heads = stacked_heads(call), of_map = map_size(stats), lanes = group_lanes(stats);
  const int64_t of_keys = stats.received ? call.Lk : 0;
  for (int64_t i = 0; i < heads * of_keys; ++i) scratch.received_sums[i] = 0;
  for (int64_t i = 0; i < heads * of_map; ++i) scratch.map_sums[i] = 0;
  for (int64_t first = span.first; first < span.end; first += lanes)
    measure_group<Products>(stats, span, first, minimum(first + lanes, span.end), scratch);
  const SharedSums sums = lay_out_sums(stats);
  const int64_t at = (span.index * call.B + span.b) * call.Hq + span.head;
  narrow_sums(scratch.received_sums, heads * of_keys, sums.received + at * of_keys);
  narrow_sums(scratch.map_sums, heads * of_map, sums.heat_map + at * of_map);
}

// Adds up the spans of one head, [B, Hq].
inline void finish_head(const Statistics& stats, int64_t head) {
  const Forward& call = stats.forward;
  const SharedSums sums = lay_out_sums(stats);
  const int64_t spans = num_row_spans(stats), all = call.B * call.Hq;
  for (int64_t key = 0; stats.received && key < call.Lk; ++key) {
    const float* part = sums.received + head * call.Lk + key;
    double sum = 0;
    for (int64_t span = 0; span < spans; ++span, part += all * call.Lk) sum += double(*part);
    stats.received[head * call.Lk + key] = float(sum);
  }
  if (!stats.heat_map) return;
  const int64_t columns = stats.pooled_keys.cells, of_span = cells_per_span(stats);
  for (int64_t cell = 0; cell < stats.pooled_rows.cells; ++cell) {
    const float* parts[kMaxRowSpans];
    int count = 0;
    for (int64_t span = 0; span < spans; ++span) {
      const int64_t row = cell - first_cell(stats, span);
      if (row < 0 || row >= of_span) continue;
      parts[count++] = sums.heat_map + ((span * all + head) * of_span + row) * columns;
    }
    float* const to = stats.heat_map + (head * stats.pooled_rows.cells + cell) * columns;
    for (int64_t column = 0; column < columns; ++column) {
      double sum = 0;
      for (int i = 0; i < count; ++i) sum += double(parts[i][column]);
      to[column] = float(sum);
    }
  }
}

int64_t statistics_shared_bytes(const Statistics& stats) { return lay_out_sums(stats).bytes; }

int64_t statistics_scratch_bytes(const Statistics& stats) {
  return lay_out<Widened>(stats, nullptr).bytes;
}

int64_t num_statistics_items(const Statistics& stats, Stage stage) {
  const Forward& call = stats.forward;
  if (stage == Stage::rows) return num_stacks(call) * num_row_spans(stats);
  return stage == Stage::finish && (stats.received || stats.heat_map) ? call.B * call.Hq : 0;
}

void statistics_begin(const Statistics& stats, void* scratch) {
  forget_slots<Widened>(stats.forward, scratch);
}

template <class Products>
void run_statistics(const Statistics& stats, Stage stage, int64_t item, void* scratch) {
  stage == Stage::rows ? measure_span<Products>(stats, item, scratch) : finish_head(stats, item);
}

void statistics(const Statistics& stats, Stage stage, int64_t item, void* scratch) {
  run_statistics<Widened>(stats, stage, item, scratch);
}

constexpr StatisticsKernels kStatistics{statistics_shared_bytes,
                                        statistics_scratch_bytes,
                                        num_statistics_items,
                                        statistics_begin,
                                        statistics,
                                        keeps_scores};

}  // namespace
