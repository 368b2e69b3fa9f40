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

#if defined(__x86_64__) && !defined(CONVGRAD_EMULATE_AMX)
// The four registers of a leaf of cpuid, zeros if the processor has no such leaf. Not by
// __builtin_cpu_supports, which wants a run-time library that not every linker brings.
struct Leaf {
  unsigned a = 0, b = 0, c = 0, d = 0;

  explicit Leaf(unsigned leaf, unsigned subleaf = 0) {
    if (!__get_cpuid_count(leaf, subleaf, &a, &b, &c, &d)) a = b = c = d = 0;
  }
};

constexpr bool Has(unsigned bits, unsigned wanted) { return (bits & wanted) == wanted; }

// Whether the system saves these registers (Intel SDM 1, 13.1: bits of XCR0).
bool SystemSaves(unsigned states) {
  constexpr unsigned kOsxsave = 1u << 27;
  if (!Has(Leaf(1).c, kOsxsave)) return false;
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return Has(low, states);
}

// Bits by Intel SDM 2, CPUID.
bool HasAvx2() {
  constexpr unsigned kFma = 1u << 12, kAvx = 1u << 28, kF16c = 1u << 29;  // of leaf 1
  constexpr unsigned kAvx2 = 1u << 5, kXmmYmm = 3u << 1;
  return SystemSaves(kXmmYmm) && Has(Leaf(1).c, kFma | kAvx | kF16c) &&
         Has(Leaf(7).b, kAvx2);
}

bool HasAvx512() {
  constexpr unsigned kF = 1u << 16, kDq = 1u << 17, kBw = 1u << 30, kVl = 1u << 31;
  constexpr unsigned kMasksZmm = 7u << 5;
  return HasAvx2() && SystemSaves(kMasksZmm) && Has(Leaf(7).b, kF | kDq | kBw | kVl);
}

bool HasAvx512Bf16() {
  constexpr unsigned kBf16 = 1u << 5;
  return HasAvx512() && Has(Leaf(7, 1).a, kBf16);
}

bool HasAmx() {
  constexpr unsigned kTile = 1u << 24, kBf16 = 1u << 22, kTileStates = 3u << 17;
  return HasAvx512Bf16() && Has(Leaf(7).d, kTile | kBf16) && SystemSaves(kTileStates);
}

// Beside the processor and the system, AMX needs leave for this process to use it: Linux
// grants the 8 KiB of state only to those who ask. There is no taking it back.
[[maybe_unused]] bool AskForAmx() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // asm/prctl.h
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

struct Candidate {
  Isa isa;                 // without kernels if the build left them out
  bool (*has)();           // whether the processor has it
  bool (*ask)() = Always;  // and this process may use it
};

// The best first.
const Candidate kCandidates[] = {
#if defined(CONVGRAD_EMULATE_AMX)
    // For tests, which ask for no other kernel than that one.
    {{"amx", &portable::kKernels, nullptr, amx::GemmBf16}, Always},
#else
#if defined(__x86_64__)
#if defined(CONVGRAD_AMX)
    {{"amx", &avx512::kKernels, avx512_bf16::GemmBf16, amx::GemmBf16}, HasAmx, AskForAmx},
#else
    {{"amx", nullptr}, HasAmx},
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
    if (one.isa.kernels != nullptr && one.has() && one.ask()) return &one.isa;
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
  while (!best->has()) ++best;  // the last one always does
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
