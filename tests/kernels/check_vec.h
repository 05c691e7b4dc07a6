// Every vec_*.h must mean the same by its names. One check per instruction set, each compiled with
// that set's flags; MANYHEADS_VECS lists them as X(scalar) X(avx2) and so on.
#pragma once

namespace manyheads {

using Expect = void (*)(bool fine, const char* what);

#define X(isa) void check_vec_##isa(Expect expect);
MANYHEADS_VECS
#undef X

}  // namespace manyheads
