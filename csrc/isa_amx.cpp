// clang-format off: the vectors come first, the kernels are written over them
#include "pairs_avx512.h"
#include "kernel/backward_pairs.h"
#include "kernel/pairs_amx.h"
#include "kernel/peak_amx.h"
// clang-format on

namespace manyheads {
extern const Kernels kKernelsAmx;
const Kernels kKernelsAmx{"amx",
                          num_items,
                          pair_scratch_bytes<TileUnit<Bfloat16>>,
                          shared_bytes,
                          prepare,
                          pair_begin<TileUnit<Bfloat16>>,
                          pair_forward<TileUnit<Bfloat16>>,
                          backward_shared_bytes,
                          partial_bytes,
                          pair_backward_scratch_bytes<TileUnit<Bfloat16>>,
                          num_stage_items,
                          pair_backward<TileUnit<Bfloat16>>,
                          kPairStatistics<TileUnit<Bfloat16>>,
                          num_product_items,
                          widen_x,
                          multiply_rows,
                          kFlopsPerStep,
                          multiply_add,
                          kTileFlopsPerStep,
                          multiply_tile_pairs};
}  // namespace manyheads
