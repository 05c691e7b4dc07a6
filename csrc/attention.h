// The plain argument structs and the table of kernels: everything the torch side and the kernels
// agree on. No torch here, and no std templates in what the kernels include: each ISA's file is
// compiled with its own flags, and an inline template compiled there could be the copy the linker
// keeps for every machine.
#pragma once

#include <cstddef>
#include <cstdint>

namespace manyheads {

// A number for the whole call, or one per batch element. `at` is always inlined, so that no ISA's
// file can emit the one copy of it that the linker keeps.
struct PerBatch {
  int64_t value;
  const int32_t* values;  // [B] or null
  [[gnu::always_inline]] int64_t at(int64_t b) const { return values ? values[b] : value; }
};

// Key bounds this far out mean "unbounded"; positions stay well inside int32.
constexpr int64_t kUnbounded = int64_t(1) << 29;

constexpr int kMaxRanges = 4;

enum class PlanKind : int { full, band, intervals, dense };

// Which keys a query may attend to; the meanings are those of manyheads/spec.py.
struct Mask {
  PlanKind kind;
  // band
  PerBatch left, right, first_n, key_start, key_end;  // left, right: kUnbounded for none
  bool first_within_right;
  // intervals: int32 [B|1, Hq|1, Lq, R, 2], contiguous in the last two axes
  const int32_t* ranges;
  int64_t ranges_stride[3];  // elements, over b, h, row; 0 where broadcast
  int64_t num_ranges;
  // dense: bool [B|1, Hq|1, Lq, Lk], keys contiguous
  const uint8_t* allowed;
  int64_t allowed_stride[3];  // over b, h, row
};

// What is added to scale * s after softcap; null pointers are absent parts.
struct Bias {
  const float* slopes;           // [Hq]: adds -slope * |p - j|
  const float* distance_values;  // [Hq, N]: adds values[h, clamp(j - p + offset, 0, N - 1)]
  int64_t num_distances, distance_offset;
  const float* dense;       // [B|1, Hq|1, Lq|1, Lk|1]
  int64_t dense_stride[4];  // over b, h, row, key; the last is 1 or 0
};

enum class Type : int { float32, bfloat16, float16 };
[[gnu::always_inline]] constexpr int64_t size_of(Type type) {
  return type == Type::float32 ? 4 : 2;
}

struct Forward {
  int64_t B, Hq, Hkv, Lq, Lk, D, Dv;
  Type type;          // of the four
  const void* query;  // [B, Hq, Lq, D]; rows contiguous (last stride 1), as in all four
  const void* key;    // [B, Hkv, Lk, D]
  const void* value;  // [B, Hkv, Lk, Dv]
  void* out;          // [B, Hq, Lq, Dv]
  int64_t query_stride[3], key_stride[3], value_stride[3], out_stride[3];  // over b, h, row
  float* lse;                // [B, Hq, Lq] contiguous, or null
  float *row_max, *row_sum;  // likewise: what the backward pass recomputes weights from
  const float* sinks;        // [Hq] or null
  float scale;
  float softcap;             // 0: none (Python has checked that a given one is positive)
  PerBatch query_start;      // p = query_start + row, unless
  const int32_t* positions;  // [B|1, Lq] is given: p = positions[b, row]
  int64_t positions_stride;  // over b
  Mask mask;
  Bias bias;
  int32_t dropout_threshold;  // of 65,536 weights so many are dropped; 0: no dropout
  float keep_scale = 1;       // and the others multiplied by this
  uint64_t dropout_seed;
};

constexpr int kMaxHeadDim = 256;

// The gradients of one forward call, float32 whatever its type. What is null is not wanted.
struct Backward {
  Forward forward;        // out, row_max and row_sum are what the forward pass left
  const void* grad_out;   // [B, Hq, Lq, Dv], rows contiguous, of the inputs' type
  const float* grad_lse;  // [B, Hq, Lq] contiguous, or null
  float* grad_query;      // [B, Hq, Lq, D]; rows contiguous, as in all three
  float* grad_key;        // [B, Hkv, Lk, D]
  float* grad_value;      // [B, Hkv, Lk, Dv]
  int64_t grad_out_stride[3], grad_query_stride[3], grad_key_stride[3], grad_value_stride[3];
  float* grad_sinks;             // [Hq]
  float* grad_slopes;            // [Hq]
  float* grad_distance_values;   // [Hq, N]
  float* grad_dense;             // contiguous, the sizes of the bias
  int64_t grad_dense_stride[4];  // over b, h, row, key; 0 where broadcast
  bool split_keys;               // parallel over keys as well: takes more memory, changes no bit
  void* shared;                  // `shared_bytes`, for all threads
};

// A matrix times one vector: out[i] = weight[i] . x + bias[i], one rounding; each item is a run of
// rows.
struct RowProduct {
  Type type;  // of the four
  int64_t rows, width;
  const void* weight;  // [rows][width], contiguous
  const void* x;       // [width]
  const void* bias;    // [rows] or null
  void* out;           // [rows]
};

// The backward pass runs in these stages, one after the other; each has items that any thread may
// run in any order.
enum class Stage : int { start, rows, keys, finish };

// Indices [begin, end) of an axis by cells: index i falls into (i - begin) * cells / (end - begin).
struct Pooling {
  int64_t begin, end, cells;
};

constexpr int kMaxMasses = 8;

// What is measured of one call's weights P, float32 whatever its type. What is null is not wanted.
// A row that may attend to nothing measures 0.
struct Statistics {
  Forward forward;  // row_max and row_sum are what the forward pass left; it has no value, Dv is 0,
                    // and no out
  // Or the forward pass has yet to be run, tile by tile with the statistics, and `forward` is all
  // that takes. Only where `keeps_scores`.
  bool attends;
  float* entropy;        // [B, Hq, Lq]
  float* max_logit;      // [B, Hq, Lq], -inf for a row that may attend to nothing
  float* mean_distance;  // [B, Hq, Lq]
  int64_t num_first, num_offsets;
  int64_t first_keys[kMaxMasses], offsets[kMaxMasses];
  float* first_mass;   // [num_first, B, Hq, Lq]: the mass on so many first keys
  float* offset_mass;  // [num_offsets, B, Hq, Lq]: the mass so far behind the query's position
  int64_t top;         // so many keys of each row, heaviest first, of equal ones the first
  float* top_weights;  // [B, Hq, Lq, top]
  int64_t* top_keys;   // [B, Hq, Lq, top], -1 (weight 0) where a row has fewer keys
  float* received;     // [B, Hq, Lk]: sums over rows from `received_from` on
  int64_t received_from;
  float* heat_map;  // [B, Hq, pooled_rows.cells, pooled_keys.cells]: sums
  Pooling pooled_rows, pooled_keys;
  void* shared;  // `shared_bytes`, for all threads
};

// The statistics are found in two stages, `rows` and then `finish`, as those of Backward are; a
// thread calls `begin` on its scratch memory before its first item.
struct StatisticsKernels {
  int64_t (*shared_bytes)(const Statistics&);
  int64_t (*scratch_bytes)(const Statistics&);
  int64_t (*num_items)(const Statistics&, Stage);
  void (*begin)(const Statistics&, void* scratch);
  void (*run)(const Statistics&, Stage, int64_t item, void* scratch);
  // Whether a tile's scores fit in a cache, so that `attends` may be set.
  bool (*keeps_scores)(const Forward&);
};

// One ISA's kernels. A call is cut into `num_items` independent items, in the order they should be
// handed out; any thread may run any item, with `scratch_bytes` of 64-byte-aligned memory of its
// own on which it has called `begin`, and with `shared_bytes` for all threads, on which one of them
// has called `prepare` before. Neighbours share keys, so that runs of them are fastest.
// `likely_next` is a guess at the item the same thread will run next (-1: none), to fetch its data
// ahead.
struct Kernels {
  const char* name;
  int64_t (*num_items)(const Forward&);
  int64_t (*scratch_bytes)(const Forward&);
  int64_t (*shared_bytes)(const Forward&);
  void (*prepare)(const Forward&, void* shared);
  void (*begin)(const Forward&, void* scratch);
  void (*forward)(const Forward&, int64_t item, int64_t likely_next, void* scratch, void* shared);
  int64_t (*backward_shared_bytes)(const Backward&);
  int64_t (*partial_bytes)(const Backward&);  // of these, what split_keys would add
  int64_t (*backward_scratch_bytes)(const Backward&);
  int64_t (*num_stage_items)(const Backward&, Stage);
  void (*backward)(const Backward&, Stage, int64_t item, void* scratch);
  StatisticsKernels statistics;
  int64_t (*num_product_items)(const RowProduct&);
  void (*widen_x)(const RowProduct&, float* x);  // [width], once for each thread
  void (*multiply_rows)(const RowProduct&, int64_t item, const float* x);
  double flops_per_step;  // of multiply_add, which measures what this ISA can do at best
  float (*multiply_add)(int64_t steps);
  double pair_flops_per_step = 0;  // the same for products of half-precision pairs, where the
  float (*multiply_pairs)(int64_t steps) = nullptr;  // kernels use some; elsewhere 0 and null
};

// cpu.cpp: the kernels for this machine, chosen once; MANYHEADS_ISA overrides. Null with `error`
// set when the override names an ISA that is unknown or that this machine lacks.
struct Choice {
  const Kernels* kernels;
  const char* error;
};
Choice choose_kernels();
const Kernels* kernels_named(const char* isa);  // null unless this machine has it
const char* detected_isas();                    // e.g. "avx512 avx2 scalar"
// The half types whose matrix products this machine has a unit for (Intel's AMX), which PyTorch's
// attention uses and the chosen kernels do not: of "bfloat16 float16", or "".
const char* matrix_unit_types();

}  // namespace manyheads
