// The instruction sets that the kernels are compiled for, and the one that this process
// uses: chosen once, by the processor and by the variable JAX_CONVGRAD_CPU_ISA.

#pragma once

#include "../job.h"

namespace convgrad {

using PrepareJob = void (*)(const CpuArgs& args, CpuJob* job);

struct Isa {
  const char* name;
  const CpuKernels* kernels;
  PrepareJob gemm_bf16 = nullptr;        // in place of kernels->gemm, if it has one,
  PrepareJob gemm_bf16_tiles = nullptr;  // and if there are channels to fill its tiles
};

// Without a name and kernels if the build has none for this processor.
const Isa& ChosenIsa();

// The names of the instruction sets that the build holds, and null.
const char* const* BuiltIsaNames();

// The best instruction set of this processor, built or not.
const char* BestIsaName();

// With fewer out channels than that most of a tile is idle, and vectors are as fast.
constexpr int64_t kLeastTileChannels = kTileChannels / 2;

#if defined(CONVGRAD_EMULATE_AMX)
constexpr bool kEmulatesTiles = true;
#else
constexpr bool kEmulatesTiles = false;
#endif

// Its kernel for a matrix product.
PrepareJob GemmOf(const Isa& isa, const Problem& p);

}  // namespace convgrad
