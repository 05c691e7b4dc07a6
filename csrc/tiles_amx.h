// Intel AMX: eight tile registers of 16 rows of 16 words, and C += A B on them. Written as
// instructions, since the compiler's own functions for loads do not say that they read memory.
#pragma once

#include "pairs_avx512.h"

namespace {

constexpr int kTileRows = 16;

template <int T>
[[gnu::always_inline]] inline void zero_tile() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
[[gnu::always_inline]] inline void load_tile(const void* from, int64_t stride_bytes) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride_bytes), "i"(T)
                   : "memory");
}
// The same for memory that will not be wanted again soon, so that it displaces less.
template <int T>
[[gnu::always_inline]] inline void load_tile_once(const void* from, int64_t stride_bytes) {
  __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride_bytes), "i"(T)
                   : "memory");
}
template <int T>
[[gnu::always_inline]] inline void store_tile(void* to, int64_t stride_bytes) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride_bytes), "i"(T)
                   : "memory");
}
// C[row][lane] += sum over pairs p of A[row][p] . B[p][lane]
template <int C, int A, int B>
[[gnu::always_inline]] inline void multiply_tiles(Bfloat16) {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
// tdpfp16ps, in bytes: assemblers older than the instruction do not know it.
template <int C, int A, int B>
[[gnu::always_inline]] inline void multiply_tiles(Float16) {
  constexpr int kVex = 0x03 | (~B & 15) << 3, kModRm = 0xc0 | C << 3 | A;
  __asm__ volatile(".byte 0xc4, 0xe2, %c0, 0x5c, %c1" ::"i"(kVex), "i"(kModRm));
}

// Tiles belong to the thread, and other code on it may use them in its own shapes: they are set up
// for each work item and given back after it.
[[gnu::always_inline]] inline void set_up_tiles() {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } shapes;
  __asm__ volatile("ldtilecfg %0" ::"m"(shapes) : "memory");
}
[[gnu::always_inline]] inline void give_back_tiles() { __asm__ volatile("tilerelease"); }

// each(Number<first>{}) ... each(Number<last - 1>{}): registers are named by constants.
template <int I>
struct Number {
  static constexpr int value = I;
};
template <int kFirst, int kLast, class Each>
[[gnu::always_inline]] inline void for_tiles(const Each& each) {
  if constexpr (kFirst < kLast) {
    each(Number<kFirst>{});
    for_tiles<kFirst + 1, kLast>(each);
  }
}

}  // namespace
