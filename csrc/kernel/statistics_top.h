// The heaviest keys of each row. A sorted list per lane takes far longer to sort into than a score
// to look at, so only scores above a floor are sorted in, some at a time: a random row of 2,048 has
// eight or nine for a list of eight. The floor is known where the forward pass has kept the largest
// score of every kPeakKeys keys, and rises with the list.
#pragma once

#include "statistics_memory.h"

namespace {

// Into each lane's sorted list, behind those equal to it. Keys come in ascending order, so that of
// equal ones the first is listed first. Upwards, so that no place waits for another.
[[gnu::noinline]] void insert_top(float* scores, int32_t* keys, int64_t top, Vec s, VecI key) {
  scores += (top - 1) * kMaxLanes;
  keys += (top - 1) * kMaxLanes;
  Vec here = load(scores);
  VecI key_here = load_int(keys);
  Lanes moves = less(here, s);
  for (int64_t i = 1; i < top; ++i) {
    const Vec above = load(scores - kMaxLanes);
    const VecI key_above = load_int(keys - kMaxLanes);
    const Lanes moves_above = less(above, s);
    store(scores, select(moves, select(moves_above, above, s), here));
    store_int(keys, select(moves, select(moves_above, key_above, key), key_here));
    here = above, key_here = key_above, moves = moves_above;
    scores -= kMaxLanes;
    keys -= kMaxLanes;
  }
  store(scores, select(moves, s, here));
  store_int(keys, select(moves, key, key_here));
}

inline void clear_top(MeasuredTile& t, int64_t top, int first) {  // one vector, from lane `first`
  for (int64_t place = 0; place < top; ++place) {
    store(t.top_scores + place * kMaxLanes + first, set(-kInfinity));
    store_int(t.top_keys + place * kMaxLanes + first, set_int(-1));
  }
}

inline void start_top(MeasuredTile& t, int64_t top) {
  const Tile& tile = *t.tile;
  const int64_t begin = tile.keys.begin / kPeakKeys, end = ceil_div(tile.keys.end, kPeakKeys);
  for (int i = 0; i < tile.lanes(); i += Vec::kLanes) {
    clear_top(t, top, i);
    store(t.floor + i, set(-kInfinity));
    store_int(t.num_waiting + i, set_int(0));
    for (int place = 0; place < kMaxWaiting; ++place)
      store(t.waiting_scores[place] + i, set(-kInfinity));
    if (!tile.kept || end - begin < top) continue;
    // At least `top` scores reach the top-th largest peak, so that no lower one is among the top.
    for (int64_t peak = begin; peak < end; ++peak)
      insert_top(t.top_scores + i, t.top_keys + i, top, load(tile.peaks + peak * tile.lanes() + i),
                 set_int(0));
    const Vec largest = set(0x1.fffffep+127f),
              least = load(t.top_scores + (top - 1) * kMaxLanes + i);
    const Vec finite = select(less(least, largest), least, largest);
    store(t.floor + i, fma(abs(finite), set(-0x1p-22f), finite) - set(0x1p-126f));  // just below
    clear_top(t, top, i);
  }
}

// Sorts in what waits in one vector, from lane `first`.
[[gnu::noinline]] void take_waiting(MeasuredTile& t, int64_t top, int first) {
  int32_t most = 0;
  for (int lane = first; lane < first + Vec::kLanes; ++lane) {
    if (t.num_waiting[lane] > most) most = t.num_waiting[lane];
    t.num_waiting[lane] = 0;
  }
  for (int32_t place = 0; place < most; ++place) {
    float* const scores = t.waiting_scores[place] + first;
    insert_top(t.top_scores + first, t.top_keys + first, top, load(scores),
               load_int(t.waiting_keys[place] + first));
    store(scores, set(-kInfinity));
  }
  const Vec last = load(t.top_scores + (top - 1) * kMaxLanes + first);
  store(t.floor + first, max(last, load(t.floor + first)));
}

// The lanes whose score in this row may be among the top; a masked one, -inf, is not.
struct Found {
  int64_t row;
  uint64_t lanes;
};

template <int N>
[[gnu::noinline]] void find_top(MeasuredTile& t, const Block& block, const float* scores,
                                int64_t top) {
  constexpr int W = Vec::kLanes, L = N * W;
  for (int64_t row = block.begin; row < block.end;) {
    Vec floor[N];
#pragma GCC unroll 3
    for (int n = 0; n < N; ++n) floor[n] = load(t.floor + n * W);
    // Few rows have any, but no branch could be foretold; then those that have.
    Found found[kPeakKeys];
    int num_found = 0;
    for (const int64_t end = minimum(row + kPeakKeys, block.end); row < end; ++row) {
      uint64_t lanes = 0;
#pragma GCC unroll 3
      for (int n = 0; n < N; ++n)
        lanes |= uint64_t(bits(less(floor[n], load(scores + row * L + n * W)))) << (n * W);
      found[num_found] = {row, lanes};
      num_found += lanes != 0;
    }
    for (int i = 0; i < num_found; ++i) {
      for (uint64_t lanes = found[i].lanes; lanes != 0; lanes &= lanes - 1) {
        const int lane = __builtin_ctzll(lanes), place = t.num_waiting[lane]++;
        t.waiting_scores[place][lane] = scores[found[i].row * L + lane];
        t.waiting_keys[place][lane] = int32_t(block.key + found[i].row);
        if (place + 1 == kMaxWaiting) take_waiting(t, top, lane / W * W);
      }
    }
  }
}

}  // namespace
