// clang-format off: the vectors come first, the kernels are written over them
#include "vec_avx2.h"
#include "kernel/forward.h"
#include "kernel/backward.h"
#include "kernel/peak.h"
// clang-format on

namespace manyheads {
extern const Kernels kKernelsAvx2;
const Kernels kKernelsAvx2{"avx2",          num_items,    scratch_bytes, begin,
                           forward,         shared_bytes, partial_bytes, backward_scratch_bytes,
                           num_stage_items, backward,     kFlopsPerStep, multiply_add};
}  // namespace manyheads
