// clang-format off: the vectors come first, the kernels are written over them
#include "vec_avx2.h"
#include "kernel/entry.h"
// clang-format on

namespace manyheads {
extern const Kernels kKernelsAvx2;
const Kernels kKernelsAvx2{"avx2",          num_items,
                           scratch_bytes,   shared_bytes,
                           prepare,         begin,
                           forward,         backward_shared_bytes,
                           partial_bytes,   backward_scratch_bytes,
                           num_stage_items, backward,
                           kStatistics,     num_product_items,
                           widen_x,         multiply_rows,
                           kFlopsPerStep,   multiply_add};
}  // namespace manyheads
