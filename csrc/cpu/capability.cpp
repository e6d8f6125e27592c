// Which instruction sets this CPU and this operating system offer, and which table is used.
#include <cstdlib>
#include <cstring>

#include "cpu/kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pyfast_dpo::cpu {
namespace {

#if defined(__x86_64__)
// The operating system must save the wide registers, which cpuid alone does not tell.
unsigned long long enabled_register_state() {
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & bit_OSXSAVE)) return 0;
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<unsigned long long>(high) << 32) | low;
}

// Linux hands the tile registers to processes that ask for them, once, for all of their threads.
bool permit_tile_data() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE
  static const bool permitted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return permitted;
#else
  return false;
#endif
}

int detect_level() {
  constexpr unsigned long long kYmmState = 0x6, kZmmState = 0xe6, kTileState = 0x60000;
  unsigned eax, ebx, ecx, edx;
  const unsigned long long state = enabled_register_state();
  if ((state & kYmmState) != kYmmState || !__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return 0;
  if (!(ecx & bit_FMA) || !(ecx & bit_F16C)) return 0;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !(ebx & bit_AVX2)) return 0;
  const unsigned avx512 = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
  if ((state & kZmmState) != kZmmState || (ebx & avx512) != avx512) return 1;
  constexpr unsigned kAmx = 1u << 22 | 1u << 24;  // bf16 and tile, of edx in leaf 7
  const bool amx = (edx & kAmx) == kAmx;
  constexpr unsigned kAvx512Bf16 = 1u << 5;  // of eax in leaf 7, sub-leaf 1
  if (!__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) || !(eax & kAvx512Bf16)) return 2;
  return amx && (state & kTileState) == kTileState && permit_tile_data() ? 4 : 3;
}

const Kernels* const kTables[] = {&kGenericKernels, &kAvx2Kernels, &kAvx512Kernels,
                                  &kAvx512Bf16Kernels, &kAmxKernels};
#else
int detect_level() { return 0; }

const Kernels* const kTables[] = {&kGenericKernels};
#endif

const Kernels* choose() {
  const int best = detect_level();
  const char* wanted = std::getenv("PYFAST_DPO_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0') return kTables[best];
  for (int level = 0; level <= best; ++level) {
    if (std::strcmp(wanted, kTables[level]->name) == 0) return kTables[level];
  }
  return nullptr;
}

}  // namespace

std::string vendor() {
#if defined(__x86_64__)
  unsigned eax, name[3];  // ebx, edx, ecx spell it
  if (__get_cpuid(0, &eax, &name[0], &name[2], &name[1])) {
    return std::string(reinterpret_cast<const char*>(name), sizeof(name));
  }
#endif
  return "";
}

const char* best_capability() { return kTables[detect_level()]->name; }

const Kernels* kernels() {
  static const Kernels* const chosen = choose();
  return chosen;
}

}  // namespace pyfast_dpo::cpu
