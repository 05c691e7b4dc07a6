// clang-format off: the vectors come first, the kernels are written over them
#include "pairs_avx512.h"
#include "kernel/backward_pairs.h"
#include "kernel/pairs_amx.h"
// clang-format on

namespace manyheads {
extern const Kernels kKernelsAmx;
const Kernels kKernelsAmx{"amx",
                          num_items,
                          pair_scratch_bytes<TileUnit>,
                          shared_bytes,
                          prepare,
                          pair_begin<TileUnit>,
                          pair_forward<TileUnit>,
                          backward_shared_bytes,
                          partial_bytes,
                          pair_backward_scratch_bytes<TileUnit>,
                          num_stage_items,
                          pair_backward<TileUnit>,
                          kFlopsPerStep,
                          multiply_add};
}  // namespace manyheads
