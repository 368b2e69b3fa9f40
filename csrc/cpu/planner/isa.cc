// Which instruction set's kernels run (isa.h). Compiled for the baseline processor.

#include "isa.h"

#include <array>
#include <cstdlib>
#include <cstring>
#include <iterator>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace convgrad {

// What the build compiled (cmake/CpuInstructionSets.cmake).
namespace portable {
extern const CpuKernels kKernels;
}
#if defined(CONVGRAD_AVX2)
namespace avx2 {
extern const CpuKernels kKernels;
}
#endif
#if defined(CONVGRAD_AVX512)
namespace avx512 {
extern const CpuKernels kKernels;
}
#endif
#if defined(CONVGRAD_AVX512_BF16)
namespace avx512_bf16 {
void GemmBf16(const CpuArgs& args, CpuJob* job);
}
#endif
#if defined(CONVGRAD_AMX)
namespace amx {
void GemmBf16(const CpuArgs& args, CpuJob* job);
}
#endif

namespace {

bool Always() { return true; }

#if defined(__x86_64__)
bool HasAvx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

bool HasAvx512() {
  return HasAvx2() && __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq");
}

bool HasAvx512Bf16() { return HasAvx512() && __builtin_cpu_supports("avx512bf16"); }

// AMX needs the processor, the system's support, and leave for this process to use it:
// Linux grants the 8 KiB of state only to those who ask. There is no taking it back.
bool MayUseAmx() {
#if defined(__linux__)
  constexpr unsigned kTile = 1u << 24, kBf16 = 1u << 22;  // of leaf 7's edx
  unsigned a, b, c, d;
  if (!HasAvx512Bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kTile) == 0 ||
      (d & kBf16) == 0) {
    return false;
  }
  unsigned states, high;
  __asm__("xgetbv" : "=a"(states), "=d"(high) : "c"(0));
  constexpr unsigned kTileStates = 3u << 17;
  if ((states & kTileStates) != kTileStates) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // asm/prctl.h
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

struct Candidate {
  Isa isa;  // without kernels if the build left them out
  bool (*runs)();
};

// The best first.
const Candidate kCandidates[] = {
#if defined(CONVGRAD_EMULATE_AMX)
    // For tests, which ask for no other kernel than that one.
    {{"amx", &portable::kKernels, nullptr, amx::GemmBf16}, Always},
#else
#if defined(__x86_64__)
#if defined(CONVGRAD_AMX)
    {{"amx", &avx512::kKernels, avx512_bf16::GemmBf16, amx::GemmBf16}, MayUseAmx},
#else
    {{"amx", nullptr}, MayUseAmx},
#endif
#if defined(CONVGRAD_AVX512_BF16)
    {{"avx512_bf16", &avx512::kKernels, avx512_bf16::GemmBf16}, HasAvx512Bf16},
#else
    {{"avx512_bf16", nullptr}, HasAvx512Bf16},
#endif
#if defined(CONVGRAD_AVX512)
    {{"avx512", &avx512::kKernels}, HasAvx512},
#else
    {{"avx512", nullptr}, HasAvx512},
#endif
#if defined(CONVGRAD_AVX2)
    {{"avx2", &avx2::kKernels}, HasAvx2},
#else
    {{"avx2", nullptr}, HasAvx2},
#endif
#endif
#if defined(CONVGRAD_PORTABLE)
    {{"portable", &portable::kKernels}, Always},
#else
    {{"portable", nullptr}, Always},
#endif
#endif
};

// The best that is built and runs; of that name, if there is one given.
const Isa* BestIsa(const char* name) {
  for (const Candidate& one : kCandidates) {
    if (name != nullptr && std::strcmp(name, one.isa.name) != 0) continue;
    if (one.isa.kernels != nullptr && one.runs()) return &one.isa;
  }
  return nullptr;
}

}  // namespace

const Isa& ChosenIsa() {
  static const Isa none = {"", nullptr};
  // A wish that cannot be granted is ignored.
  static const Isa* const isa = [] {
    const Isa* best = BestIsa(std::getenv("JAX_CONVGRAD_CPU_ISA"));
    if (best == nullptr) best = BestIsa(nullptr);
    return best != nullptr ? best : &none;
  }();
  return *isa;
}

const char* const* BuiltIsaNames() {
  static const auto names = [] {
    std::array<const char*, std::size(kCandidates) + 1> found{};
    size_t count = 0;
    for (const Candidate& one : kCandidates) {
      if (one.isa.kernels != nullptr) found[count++] = one.isa.name;
    }
    return found;
  }();
  return names.data();
}

const char* BestIsaName() {
  const Candidate* best = std::begin(kCandidates);
  while (!best->runs()) ++best;  // the last one always does
  return best->isa.name;
}

PrepareJob GemmOf(const Isa& isa, const Problem& p) {
  if (p.dtype == DType::kBF16) {
    const bool fills = p.out_channels >= kLeastTileChannels || isa.gemm_bf16 == nullptr;
    if (isa.gemm_bf16_tiles != nullptr && fills) return isa.gemm_bf16_tiles;
    if (isa.gemm_bf16 != nullptr) return isa.gemm_bf16;
  }
  return isa.kernels->gemm;
}

}  // namespace convgrad
