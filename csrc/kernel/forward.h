// The forward pass: how a call is cut into work items, what each fetches ahead, and the walk of its
// tiles over the keys.
#pragma once

#include "finish.h"

namespace {

// Rows that do not follow each other closely, as in memory laid out [B, L, H, D], fall on few cache
// sets when their distance is a power of two; half types have to be widened. Such blocks are
// copied, and as many copies kept for the next items of the same head as fit here.
constexpr int64_t kPackedFloats = int64_t(1) << 19;

inline bool packs_key(const Forward& call) {
  return call.key_stride[2] != call.D || call.type != Type::float32;
}
inline bool packs_value(const Forward& call) {
  return call.value_stride[2] != call.Dv || call.type != Type::float32;
}
// The two products and the weights in float32, on K and V as they lie in memory where that can be.
struct Widened {
  using Keys = KeyValue;
  static int64_t query_floats(const Forward& call) { return call.D * kMaxLanes; }
  static void pack(const Forward& call, Tile& tile) { pack_query(call, tile); }
  static int64_t packed_floats(const Forward& call) {
    return kBlock * ((packs_key(call) ? call.D : 0) + (packs_value(call) ? call.Dv : 0));
  }
  // `k`, `v`: the first of so many rows; `slot`: null where nothing is packed, as `packed` then is.
  static Keys load(const Forward& call, const void* k, const void* v, int64_t rows, Slot* slot,
                   bool held, float* packed) {
    Keys kv{static_cast<const float*>(k), static_cast<const float*>(v), call.D, call.Dv};
    if (!slot) return kv;
    if (packs_key(call)) {
      if (!held) pack_rows(call.type, k, call.key_stride[2], rows, call.D, packed);
      kv.key = packed;
      packed += kBlock * call.D;
    }
    if (packs_value(call)) {
      if (!held) pack_rows(call.type, v, call.value_stride[2], rows, call.Dv, packed);
      kv.value = packed;
    }
    return kv;
  }
  template <int N>
  static void compute_scores(const Forward& call, const Tile& tile, const Workspace& work,
                             const Keys& kv, const Block& block, float* running_max) {
    multiply_columns<N>(call, kv.key, kv.key_stride, tile.query, call.D, block, *work.soon,
                        work.scores, running_max);
  }
  template <int N>
  static void weigh(const Forward&, const Workspace& work, const Block& block, Vec unit,
                    const Vec (&base)[N], Vec (&sum)[N]) {
    weigh_block<N>(work, block, unit, base, sum);
  }
  template <int N>
  static void add_values(const Forward& call, const Workspace& work, const Keys& kv,
                         const Block& block, AddToOut<N> add) {
    ::add_values<N>(call, work, kv, block, add);
  }
};

template <class Products>
inline int64_t num_slots(const Forward& call) {
  const int64_t blocks = (call.Lk + kBlock - 1) / kBlock, floats = Products::packed_floats(call);
  return floats == 0 ? 0 : minimum(blocks, maximum(kPackedFloats / floats, 1));
}

// The slot of the block at `key`. Where the blocks outnumber the slots the first ones keep theirs:
// taking turns, each would be gone before it is wanted again.
template <class Products>
inline Slot& slot_of(const Forward& call, const Workspace& work, int64_t key, Range keys) {
  const int64_t slots = num_slots<Products>(call), index = key / kBlock,
                first = keys.begin / kBlock;
  const bool all_fit = (keys.end + kBlock - 1) / kBlock - first <= slots;
  return work.slots[all_fit ? index % slots : minimum(index - first, slots - 1)];
}

template <class Products>
inline float* packed_rows(const Forward& call, const Workspace& work, const Slot& slot) {
  return work.packed + (&slot - work.slots) * Products::packed_floats(call);
}

inline bool holds(const Slot& slot, int64_t head, int64_t key) {
  return slot.head == head && slot.key == key;
}

// The block of keys starting at `key`, where it lies or packed.
template <class Products>
inline typename Products::Keys load_block(const Forward& call, const Workspace& work, int64_t b,
                                          int64_t hkv, int64_t key, Range keys) {
  const void* k = row_at(call.key, call.type, call.key_stride, b, hkv, key);
  const void* v = row_at(call.value, call.type, call.value_stride, b, hkv, key);
  const int64_t rows = minimum(kBlock, call.Lk - key), head = b * call.Hkv + hkv;
  if (!work.slots) return Products::load(call, k, v, rows, nullptr, false, nullptr);
  Slot& slot = slot_of<Products>(call, work, key, keys);
  const bool held = holds(slot, head, key);
  slot.head = head, slot.key = key;
  float* packed = packed_rows<Products>(call, work, slot);
  return Products::load(call, k, v, rows, &slot, held, packed);
}

// How a call is cut: every (b, hkv) has Lq * G flat queries; a work item is up to kItemVectors
// vectors of them in tiles, which walk the keys together so that K and V are read from cache.
// No result depends on it.
constexpr int kItemVectors = 12;
constexpr int kMaxTiles = kItemVectors / 2;

// Three vectors are the fastest tile; two lose less where lanes differ in the few keys they see.
inline int tile_vectors(const Forward& call) {
  const Mask& mask = call.mask;
  constexpr int64_t kFewKeys = 256;
  if (mask.kind == PlanKind::intervals) return 2;
  if (mask.kind != PlanKind::band) return 3;
  const bool causal = mask.right.value < kUnbounded || mask.right.values;
  const int64_t window = mask.left.values ? kUnbounded : mask.left.value + mask.right.value + 1;
  const int64_t keys = minimum(window, causal ? call.Lk / 2 : call.Lk);
  return keys * (call.Hq / call.Hkv) <= kFewKeys ? 2 : 3;
}
// Smaller items where there would be too few to share among threads.
inline int64_t item_lanes(const Forward& call) {
  constexpr int64_t kEnough = 32;
  const int64_t tile = tile_vectors(call), all = call.B * call.Hkv * flat_queries(call);
  int64_t vectors = kItemVectors;
  while (vectors > tile && all < kEnough * vectors * Vec::kLanes)
    vectors = vectors / 2 / tile * tile;
  return vectors * Vec::kLanes;
}
inline int64_t items_per_head(const Forward& call) {
  const int64_t lanes = item_lanes(call);
  return (flat_queries(call) + lanes - 1) / lanes;
}
inline int64_t num_tile_items(const Forward& call) {
  return call.B * call.Hkv * items_per_head(call);
}

struct Scratch {
  Tile* tiles;
  Workspace work;
  int64_t bytes;
};
template <class Products = Widened>
inline Scratch lay_out(const Forward& call, void* start) {
  Arena arena{static_cast<char*>(start)};
  Scratch scratch;
  scratch.tiles = arena.take<Tile>(kMaxTiles);
  scratch.work.soon = arena.take<Prefetcher>(1);
  scratch.work.scores = arena.take<float>(kBlock * kMaxLanes);
  scratch.work.bias = call.bias.dense ? arena.take<float>(kBlock * kMaxLanes) : nullptr;
  const int64_t slots = num_slots<Products>(call);
  scratch.work.slots = slots ? arena.take<Slot>(slots) : nullptr;
  scratch.work.packed = slots ? arena.take<float>(slots * Products::packed_floats(call)) : nullptr;
  const bool dense = call.mask.kind == PlanKind::dense;
  scratch.work.allowed = dense ? arena.take<float>(kBlock * kMaxLanes) : nullptr;
  for (int i = 0; i < kMaxTiles; ++i) {
    float* query = arena.take<float>(Products::query_floats(call));
    float* inner = arena.take<float>(call.Dv * kMaxLanes);
    float* outer = call.Lk > kSpan ? arena.take<float>(call.Dv * kMaxLanes) : nullptr;
    if (!start) continue;
    scratch.tiles[i].query = query;
    scratch.tiles[i].inner.out = inner;
    scratch.tiles[i].outer.out = outer;
  }
  scratch.bytes = arena.used;
  return scratch;
}

// Flat queries [first, end) of one (b, hkv).
struct Item {
  int64_t b, hkv, first, end;
};
inline Item find_item(const Forward& call, int64_t index) {
  const int64_t per_head = items_per_head(call), bh = index / per_head, lanes = item_lanes(call);
  // Late queries first: under a causal mask they are the longest.
  const int64_t first = (per_head - 1 - index % per_head) * lanes;
  return {bh / call.Hkv, bh % call.Hkv, first, minimum(first + lanes, flat_queries(call))};
}

// Rows [begin, end) of one head of a [B, H, L, D] tensor.
inline void want_rows(Prefetcher& soon, const Forward& call, const void* data,
                      const int64_t (&stride)[3], int64_t b, int64_t head, int64_t begin,
                      int64_t end, int64_t width) {
  const int64_t size = size_of(call.type);
  soon.want(row_at(data, call.type, stride, b, head, begin), stride[2] * size, end - begin,
            width * size);
}
inline void want_query_rows(Prefetcher& soon, const Forward& call, const void* data,
                            const int64_t (&stride)[3], const Item& item, int64_t width) {
  const int64_t group = call.Hq / call.Hkv;
  for (int64_t g = 0; g < group; ++g)
    want_rows(soon, call, data, stride, item.b, item.hkv * group + g, item.first / group,
              (item.end + group - 1) / group, width);
}

// What load_block will read for the block at `key`, but for a V that lies as it should: the scores
// leave time to fetch that.
template <class Products>
inline void want_block(const Forward& call, const Workspace& work, const Item& item, int64_t key,
                       Range keys) {
  if (key >= keys.end) return;
  const int64_t end = minimum(key + kBlock, keys.end);
  bool held = false;
  if (work.slots) {
    const Slot& slot = slot_of<Products>(call, work, key, keys);
    held = holds(slot, item.b * call.Hkv + item.hkv, key);
    const int64_t bytes = Products::packed_floats(call) * int64_t(sizeof(float));
    if (held) work.soon->want(packed_rows<Products>(call, work, slot), bytes, 1, bytes);
  }
  if (!held || !packs_key(call))
    want_rows(*work.soon, call, call.key, call.key_stride, item.b, item.hkv, key, end, call.D);
  if (!held && packs_value(call))
    want_rows(*work.soon, call, call.value, call.value_stride, item.b, item.hkv, key, end, call.Dv);
}

// What to have in cache by the time the block at `key` is done: its V, the next block's K and, near
// the item's end, the rows it will write and the next item's queries and first keys.
template <class Products>
inline void fetch_ahead(const Forward& call, const Workspace& work, const Item& item, int64_t key,
                        Range keys, int64_t likely_next) {
  constexpr int64_t kNearEnd = 3 * kBlock;
  Prefetcher& soon = *work.soon;
  const int64_t block_end = minimum(key + kBlock, keys.end), left = keys.end - key;
  const bool first = key <= keys.begin, near_end = left <= kNearEnd;
  // Near the end the list runs on from block to block, so that the last lines have time to come.
  if (first || !near_end) soon.clear();
  if (!packs_value(call))
    want_rows(soon, call, call.value, call.value_stride, item.b, item.hkv, key, block_end, call.Dv);
  want_block<Products>(call, work, item, block_end, keys);
  if (!near_end || (left + kBlock <= kNearEnd && !first)) return;
  want_query_rows(soon, call, call.out, call.out_stride, item, call.Dv);
  if (likely_next < 0) return;
  const Item next = find_item(call, likely_next);
  want_query_rows(soon, call, call.query, call.query_stride, next, call.D);
  // Items of a head come last rows first: a window's keys then start that much earlier.
  const int64_t rows = (next.end - next.first) / (call.Hq / call.Hkv);
  const bool same_head = next.hkv == item.hkv && next.b == item.b;
  const int64_t next_key = same_head ? maximum(keys.begin - rows, 0) / kBlock * kBlock : 0;
  want_block<Products>(call, work, next, next_key, {int32_t(next_key), int32_t(call.Lk)});
}

// Before a thread's first item of a call: its memory may hold what another call left there.
template <class Products = Widened>
inline void forget_slots(const Forward& call, void* memory) {
  const Scratch scratch = lay_out<Products>(call, memory);
  for (int64_t i = 0; i < num_slots<Products>(call); ++i) scratch.work.slots[i].head = -1;
}

// An item's tiles, started and packed, walk `keys`, the hull of what they see, and are finished.
template <class Products>
inline void attend_tiles(const Forward& call, const Workspace& work, const Item& item, Tile* tiles,
                         int num_tiles, Range keys, int64_t likely_next) {
  for (int64_t key = keys.begin / kBlock * kBlock; key < keys.end; key += kBlock) {
    const auto kv = load_block<Products>(call, work, item.b, item.hkv, key, keys);
    fetch_ahead<Products>(call, work, item, key, keys, likely_next);
    const bool span_ends = (key + kBlock) % kSpan == 0 || key + kBlock >= keys.end;
    for (int i = 0; i < num_tiles; ++i) {
      Tile& tile = tiles[i];
      if (key < tile.keys.end && key + kBlock > tile.keys.begin) {
        if (tile.vectors == 3) attend_block<3, Products>(call, tile, work, kv, key);
        if (tile.vectors == 2) attend_block<2, Products>(call, tile, work, kv, key);
        if (tile.vectors == 1) attend_block<1, Products>(call, tile, work, kv, key);
      }
      if (call.Lk > kSpan && span_ends) merge(call, tile.lanes(), tile.inner, tile.outer);
    }
  }
  for (int i = 0; i < num_tiles; ++i) finish_tile(call, tiles[i]);
}

// `likely_next` is a guess at the item this thread will be given next; its queries are fetched
// ahead.
template <class Products = Widened>
inline void attend_item(const Forward& call, int64_t index, int64_t likely_next, void* memory) {
  const Scratch scratch = lay_out<Products>(call, memory);
  const Item item = find_item(call, index);
  int num_tiles = 0;
  Range keys{int32_t(call.Lk), 0};
  const int lanes = tile_vectors(call) * Vec::kLanes;
  for (int64_t first = item.first; first < item.end; first += lanes, ++num_tiles) {
    Tile& tile = scratch.tiles[num_tiles];
    tile.b = item.b;
    tile.hkv = item.hkv;
    tile.first = first;
    tile.count = int(minimum(lanes, item.end - first));
    tile.vectors = (tile.count + Vec::kLanes - 1) / Vec::kLanes;
    start_tile(call, tile);
    Products::pack(call, tile);
    if (tile.keys.begin < keys.begin) keys.begin = tile.keys.begin;
    if (tile.keys.end > keys.end) keys.end = tile.keys.end;
  }
  attend_tiles<Products>(call, scratch.work, item, scratch.tiles, num_tiles, keys, likely_next);
}

}  // namespace
