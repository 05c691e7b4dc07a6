// clang-format off: the vectors come first, the kernels are written over them
#include "pairs_avx512.h"
#include "kernel/backward_pairs.h"
#include "kernel/peak_pairs.h"
// clang-format on

namespace manyheads {
extern const Kernels kKernelsAvx512Bf16;
const Kernels kKernelsAvx512Bf16{"avx512_bf16",
                                 num_items,
                                 pair_scratch_bytes<VectorUnit>,
                                 shared_bytes,
                                 prepare,
                                 pair_begin<VectorUnit>,
                                 pair_forward<VectorUnit>,
                                 backward_shared_bytes,
                                 partial_bytes,
                                 pair_backward_scratch_bytes<VectorUnit>,
                                 num_stage_items,
                                 pair_backward<VectorUnit>,
                                 kPairStatistics<VectorUnit>,
                                 num_product_items,
                                 widen_x,
                                 multiply_rows,
                                 kFlopsPerStep,
                                 multiply_add,
                                 kPairFlopsPerStep,
                                 multiply_pairs};
}  // namespace manyheads
