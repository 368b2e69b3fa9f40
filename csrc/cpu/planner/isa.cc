// Which instruction set's kernels run (isa.h). Compiled for the baseline processor.

#include "isa.h"

#include <cstdlib>
#include <cstring>

#if defined(CONVGRAD_AMX)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace convgrad {

#if defined(__x86_64__)
namespace avx512 {
extern const CpuKernels kKernels;
}
namespace avx2 {
extern const CpuKernels kKernels;
}
#endif
namespace portable {
extern const CpuKernels kKernels;
}
// bf16 kernels, present if the compiler knows the instruction set (cpu/gemm_bf16.cc).
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

#if defined(CONVGRAD_EMULATE_AMX)
// For tests, which ask for no other kernel than that one.
Isa ChooseIsa() { return {"amx", &portable::kKernels, nullptr, amx::GemmBf16}; }
#else
#if defined(CONVGRAD_AMX)
// AMX needs the processor, the system's support, and leave for this process to use it:
// Linux grants the 8 KiB of state only to those who ask. There is no taking it back.
bool MayUseAmx() {
#if defined(__linux__)
  constexpr unsigned kTile = 1u << 24, kBf16 = 1u << 22;  // of leaf 7's edx
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kTile) == 0 || (d & kBf16) == 0) {
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

Isa ChooseIsa() {
  const char* wish = std::getenv("JAX_CONVGRAD_CPU_ISA");
  const auto allowed = [wish](const char* name) {
    return wish == nullptr || std::strcmp(wish, name) == 0;
  };
  const Isa portable = {"portable", &portable::kKernels};
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") &&
                          __builtin_cpu_supports("avx512dq");
  const Isa avx2 = {"avx2", &avx2::kKernels}, avx512 = {"avx512", &avx512::kKernels};
  Isa best = has_avx512 ? avx512 : has_avx2 ? avx2 : portable;
#if defined(CONVGRAD_AVX512_BF16)
  if (has_avx512 && __builtin_cpu_supports("avx512bf16")) {
    const Isa avx512_bf16 = {"avx512_bf16", &avx512::kKernels, avx512_bf16::GemmBf16};
    best = avx512_bf16;
#if defined(CONVGRAD_AMX)
    if (allowed("amx") && MayUseAmx()) {
      return {"amx", &avx512::kKernels, avx512_bf16::GemmBf16, amx::GemmBf16};
    }
#endif
    if (allowed("avx512_bf16")) return avx512_bf16;
  }
#endif
  if (has_avx512 && allowed("avx512")) return avx512;
  if (has_avx2 && allowed("avx2")) return avx2;
  if (wish != nullptr && allowed("portable")) return portable;
  return best;  // a wish that cannot be granted is ignored
#else
  (void)allowed;
  return portable;
#endif
}
#endif  // CONVGRAD_EMULATE_AMX

}  // namespace

const Isa& ChosenIsa() {
  static const Isa isa = ChooseIsa();
  return isa;
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
