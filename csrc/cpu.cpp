// Which kernels this machine runs: the first ISA of the list below whose instructions the processor
// has AND whose registers the operating system saves, decided once per process.
#include <cstdlib>
#include <cstring>
#include <string>

#include "attention.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace manyheads {

extern const Kernels kKernelsScalar;
#if defined(__x86_64__)
extern const Kernels kKernelsAvx2;
extern const Kernels kKernelsAvx512;
#if defined(MANYHEADS_BF16)
extern const Kernels kKernelsAvx512Bf16, kKernelsAmx, kKernelsAmxFp16;
#endif
#elif defined(__aarch64__)
extern const Kernels kKernelsNeon;
#endif

namespace {

enum Feature : unsigned {
  kAvx2 = 1u << 0,
  kFma = 1u << 1,
  kAvx512F = 1u << 2,
  kAvx512Dq = 1u << 3,
  kAvx512Bw = 1u << 4,
  kAvx512Vl = 1u << 5,
  kF16c = 1u << 6,
  kAmxBfloat16 = 1u << 7,
  kAmxFloat16 = 1u << 8,
  kAvx512Bf16 = 1u << 9,
  kFastPairs = 1u << 10,
  kAvx512Vbmi = 1u << 11,
};
constexpr unsigned kAvx512All = kAvx2 | kFma | kAvx512F | kAvx512Dq | kAvx512Bw | kAvx512Vl;
constexpr unsigned kAvx512Half = kAvx512All | kAvx512Bf16 | kAvx512Vbmi;

struct Isa {
  const Kernels& kernels;
  unsigned required;
  unsigned absent = 0;  // features with which the ISA has another place in the order
};

// In order of preference.
const Isa kIsas[] = {
#if defined(__x86_64__)
#if defined(MANYHEADS_BF16)
    {kKernelsAmxFp16, kAvx512Half | kAmxBfloat16 | kAmxFloat16},
    {kKernelsAmx, kAvx512Half | kAmxBfloat16},
    {kKernelsAvx512Bf16, kAvx512Half | kFastPairs},
#endif
    {kKernelsAvx512, kAvx512All},
#if defined(MANYHEADS_BF16)
    {kKernelsAvx512Bf16, kAvx512Half, kFastPairs},
#endif
    {kKernelsAvx2, kAvx2 | kFma | kF16c},
#elif defined(__aarch64__)
    {kKernelsNeon, 0},  // part of every such processor
#endif
    {kKernelsScalar, 0},
};

#if defined(__x86_64__)

uint64_t saved_register_state() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t(high) << 32) | low;
}

// Linux gives the tile registers to a process that asks for them, once and for all its threads.
bool may_use_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// Whether a product of bfloat16 pairs in vectors beats one in float32, counted in numbers: on AMD's
// processors it is twice as fast, on Intel's half.
bool has_fast_pairs() {
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid(0, &eax, &ebx, &ecx, &edx)) return false;
  const unsigned vendor[3] = {ebx, edx, ecx};
  return std::memcmp(vendor, "AuthenticAMD", sizeof vendor) == 0;
}

unsigned detect_features() {
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return 0;
  constexpr unsigned kOsXsave = 1u << 27, kAvx = 1u << 28, kFmaBit = 1u << 12, kF16cBit = 1u << 29;
  if (!(ecx & kOsXsave) || !(ecx & kAvx)) return 0;
  const uint64_t saved = saved_register_state();
  constexpr uint64_t kYmm = 0x06;  // SSE and upper halves of YMM
  constexpr uint64_t kZmm = 0xe6;  // those, mask registers, both parts of ZMM
  if ((saved & kYmm) != kYmm) return 0;
  unsigned found = 0;
  if (ecx & kFmaBit) found |= kFma;
  if (ecx & kF16cBit) found |= kF16c;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return found;
  if (ebx & (1u << 5)) found |= kAvx2;
  if ((saved & kZmm) == kZmm) {
    if (ebx & (1u << 16)) found |= kAvx512F;
    if (ebx & (1u << 17)) found |= kAvx512Dq;
    if (ebx & (1u << 30)) found |= kAvx512Bw;
    if (ebx & (1u << 31)) found |= kAvx512Vl;
    if (ecx & (1u << 1)) found |= kAvx512Vbmi;
  }
  const bool has_tiles = edx & (1u << 22);
  constexpr uint64_t kTiles = 0x60000;  // AMX's tile registers and their configuration
  const bool tiles = (saved & kTiles) == kTiles && has_tiles && may_use_tiles();
  if (tiles) found |= kAmxBfloat16;
  if (__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) {
    if ((found & kAvx512F) && (eax & (1u << 5))) found |= kAvx512Bf16;
    if (tiles && (eax & (1u << 21))) found |= kAmxFloat16;
  }
  if ((found & kAvx512Bf16) && has_fast_pairs()) found |= kFastPairs;
  return found;
}

#else

unsigned detect_features() { return 0; }

#endif

unsigned features() {
  static const unsigned found = detect_features();
  return found;
}

bool available(const Isa& isa) {
  return (features() & isa.required) == isa.required && !(features() & isa.absent);
}

std::string list_detected() {
  std::string names;
  for (const Isa& isa : kIsas) {
    if (!available(isa)) continue;
    if (!names.empty()) names += ' ';
    names += isa.kernels.name;
  }
  return names;
}

Choice decide() {
  const char* wanted = std::getenv("MANYHEADS_ISA");
  const bool forced = wanted != nullptr && wanted[0] != '\0';
  if (forced) {
    if (const Kernels* kernels = kernels_named(wanted)) return {kernels, nullptr};
  } else {
    for (const Isa& isa : kIsas)
      if (available(isa)) return {&isa.kernels, nullptr};
  }
  static const std::string error = "MANYHEADS_ISA is '" + std::string(wanted ? wanted : "") +
                                   "', expected one that this machine has: " + list_detected() +
                                   "; unset it to let manyheads choose";
  return {nullptr, error.c_str()};
}

}  // namespace

const Kernels* kernels_named(const char* name) {
  for (const Isa& isa : kIsas)
    if (available(isa) && std::strcmp(name, isa.kernels.name) == 0) return &isa.kernels;
  return nullptr;
}

Choice choose_kernels() {
  static const Choice choice = decide();
  return choice;
}

const char* detected_isas() {
  static const std::string names = list_detected();
  return names.c_str();
}

const char* matrix_unit_types() {
  const Kernels* const chosen = choose_kernels().kernels;
  const auto is = [&](const char* name) { return chosen && !std::strcmp(chosen->name, name); };
  if (is("amx_fp16")) return "";
  const bool bfloat16 = (features() & kAmxBfloat16) && !is("amx");
  if (features() & kAmxFloat16) return bfloat16 ? "bfloat16 float16" : "float16";
  return bfloat16 ? "bfloat16" : "";
}

}  // namespace manyheads
