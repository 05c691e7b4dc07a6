// The backward pass: how it is cut, and the walk of each part.
//
//  start   clears memory
//  rows    for every tile of queries: which keys it sees, and delta of each row
//  keys    one pass over keys. A unit is one key/value head, or with split_keys one superblock of
//          it, a run of key blocks cut at absolute multiples. It walks the queries that see the
//          superblock, keeps the sums dK and dV in scratch, and flushes them after every span of
//          queries. Each superblock's dQ is added to dQ in the order of superblocks: at once by
//          whoever has the whole head, in the next stage where superblocks ran side by side. So
//          the bits are the same either way, and for any number of threads.
//  finish  that next stage, and sums over the batch for what is shared by it
#pragma once

#include "backward_keys.h"
#include "backward_widened.h"

namespace {

// Stage `rows`.

// delta = sum over columns of dO * O, in the order in which dP is summed, less dlse.
template <class Products>
inline void find_delta(const Backward& back, const Tile& tile, const BackwardWork& work,
                       const Shared& shared) {
  constexpr int W = Vec::kLanes;
  const Forward& call = back.forward;
  for (int first = 0; first < tile.count; first += W) {
    const void *rows[W], *grad_rows[W];
    for (int i = 0; i < W; ++i) {
      rows[i] = attending_row(call, tile, call.out, call.out_stride, work.zeros, first + i);
      grad_rows[i] =
          attending_row(call, tile, back.grad_out, back.grad_out_stride, work.zeros, first + i);
    }
    float delta[W];
    store(delta, Products::dot_rows(call, rows, grad_rows, *work.forward.soon));
    for (int i = 0; i < W && first + i < tile.count; ++i) {
      const int64_t row = row_index(call, tile, first + i);
      const bool nothing = call.row_sum[row] == 0;
      if (back.grad_lse && !nothing) delta[i] -= back.grad_lse[row];
      shared.delta[row] = delta[i];
      if (!back.grad_sinks) continue;
      float sink[W], weight[W];
      store(sink, set(call.sinks[tile.head[first + i]] - call.row_max[row]));
      store(weight, exp2(load(sink) * set(kLog2e)));
      shared.sink_terms[row] = nothing ? 0.0f : -weight[0] / call.row_sum[row] * delta[i];
    }
  }
}

template <class Products>
inline void run_rows(const Backward& back, int64_t item, const BackwardScratch& scratch) {
  const Forward& call = back.forward;
  const Shared shared = lay_out_shared(back);
  const int64_t per_head = tiles_per_head(call), tiles = call.B * call.Hkv * per_head;
  for (int64_t i = item * kItemTiles; i < minimum((item + 1) * kItemTiles, tiles); ++i) {
    Tile& tile = scratch.tiles[0].tile;
    name_tile(call, i / per_head, i % per_head, tile);
    place_tile(call, tile);
    shared.keys[i] = tile.keys;
    find_delta<Products>(back, tile, scratch.work, shared);
  }
}

// Stage `finish`.

// Adds up the slots' dQ of one tile, in order, into the first's; zeros where nothing was attended
// to.
inline void finish_query(const Backward& back, const Shared& shared, Tile& tile, int64_t index) {
  constexpr int W = Vec::kLanes;
  const Forward& call = back.forward;
  const int64_t tiles = call.B * call.Hkv * tiles_per_head(call), slots = num_slots(back);
  const bool written = shared.touched[index];
  if (written && slots == 1) return;
  name_lanes(call, tile);
  const QueryRows to = query_rows_of(back, shared, 0);
  for (int lane = 0; lane < tile.count; ++lane) {
    float* p = at_lane(to.data, to.stride, tile, lane);
    for (int64_t d = 0; d < call.D; d += W) {
      const int64_t columns = minimum(W, call.D - d);
      Vec sum = written ? load_some(p + d, columns) : zero();
      for (int64_t slot = 1; slot < slots; ++slot) {
        if (!shared.touched[slot * tiles + index]) continue;
        const QueryRows from = query_rows_of(back, shared, slot);
        sum = sum + load_some(at_lane(from.data, from.stride, tile, lane) + d, columns);
      }
      store_some(p + d, sum, columns);
    }
  }
}

// values[0] += values[1..n), each of `size` numbers.
inline void fold(double* values, int64_t n, int64_t size) {
  for (int64_t i = 1; i < n; ++i)
    for (int64_t j = 0; j < size; ++j) values[j] += values[i * size + j];
}

// Gradients shared by the batch, or by heads: small sums, in one fixed order.
inline void finish_parameters(const Backward& back, const Shared& shared) {
  const Forward& call = back.forward;
  const int64_t slots = num_slots(back), heads = call.B * call.Hq;
  if (back.grad_sinks) {
    for (int64_t h = 0; h < call.Hq; ++h) {
      double sum = 0;
      for (int64_t b = 0; b < call.B; ++b)
        for (int64_t row = 0; row < call.Lq; ++row)
          sum += double(shared.sink_terms[(b * call.Hq + h) * call.Lq + row]);
      back.grad_sinks[h] = float(sum);
    }
  }
  if (back.grad_slopes) {
    fold(shared.slopes, slots * call.B, call.Hq);
    for (int64_t h = 0; h < call.Hq; ++h) back.grad_slopes[h] = float(shared.slopes[h]);
  }
  if (back.grad_distance_values) {
    const int64_t size = call.Hq * call.bias.num_distances;
    fold(shared.distance_values, slots * call.B, size);
    for (int64_t i = 0; i < size; ++i)
      back.grad_distance_values[i] = float(shared.distance_values[i]);
  }
  if (!dense_by_row(back) && !dense_by_key(back)) return;
  double* values = dense_by_row(back) ? shared.dense_rows : shared.dense_keys;
  const int64_t count = dense_by_row(back) ? dense_row_count(back) : call.Lk;
  if (dense_by_row(back)) fold(values, slots, heads * count);
  const int64_t* stride = back.grad_dense_stride;
  const int64_t batches = stride[0] ? call.B : 1, members = stride[1] ? call.Hq : 1;
  if (batches == 1) fold(values, call.B, call.Hq * count);
  for (int64_t b = 0; b < batches; ++b) {
    double* of_batch = values + b * call.Hq * count;
    if (members == 1) fold(of_batch, call.Hq, count);
    for (int64_t i = 0; i < members * count; ++i)
      back.grad_dense[b * members * count + i] = float(of_batch[i]);
  }
}

inline int64_t query_items(const Forward& call) {
  return ceil_div(call.B * call.Hkv * tiles_per_head(call), kItemTiles);
}

inline void run_finish(const Backward& back, int64_t item, const BackwardScratch& scratch) {
  const Forward& call = back.forward;
  const Shared shared = lay_out_shared(back);
  if (item == 0) return finish_parameters(back, shared);
  if (!back.grad_query) return;
  const int64_t per_head = tiles_per_head(call), tiles = call.B * call.Hkv * per_head;
  for (int64_t i = (item - 1) * kItemTiles; i < minimum(item * kItemTiles, tiles); ++i) {
    Tile& tile = scratch.tiles[0].tile;
    name_tile(call, i / per_head, i % per_head, tile);
    finish_query(back, shared, tile, i);
  }
}

int64_t num_stage_items(const Backward& back, Stage stage) {
  const Forward& call = back.forward;
  if (stage == Stage::start) return 1;
  if (stage == Stage::rows) return query_items(call);
  if (stage == Stage::finish) return 1 + query_items(call);
  const HeadGroups groups = head_groups(back);
  return groups.b * groups.hkv * (back.split_keys ? num_superblocks(call) : 1);
}

template <class Products>
void run_stage(const Backward& back, Stage stage, int64_t item, void* memory) {
  if (stage == Stage::start) {
    __builtin_memset(back.shared, 0, size_t(lay_out_shared(back).zeroed));
    return;
  }
  BackwardScratch scratch = lay_out<Products>(back, memory);
  clear_sums(const_cast<float*>(scratch.work.zeros), maximum(back.forward.D, back.forward.Dv));
  scratch.work.forward.soon->clear();
  if (stage == Stage::rows) run_rows<Products>(back, item, scratch);
  if (stage == Stage::keys) {
    clear_sums(scratch.work.narrowed, Products::kNarrowedFloats);
    run_keys<Products>(back, item, scratch);
  }
  if (stage == Stage::finish) run_finish(back, item, scratch);
}

int64_t backward_scratch_bytes(const Backward& back) {
  return lay_out<WidenedBackward>(back, nullptr).bytes;
}

void backward(const Backward& back, Stage stage, int64_t item, void* scratch) {
  run_stage<WidenedBackward>(back, stage, item, scratch);
}

}  // namespace
