// The CPU kernels of one instruction set, CONVGRAD_ISA. Compiled once for each, with its
// flags; job.h says what that asks of the code. kernel_cpu.cc picks one at run time.

#include "job.h"

#ifndef CONVGRAD_ISA
#error "define CONVGRAD_ISA as avx512, avx2 or portable"
#endif

#include "channels.h"
#include "direct.h"
#include "gemm.h"
#include "planes.h"
#include "vec.h"

namespace convgrad {
namespace CONVGRAD_ISA {
namespace {

// Prepare<T> of a kernel, for the T of the problem.
#define CONVGRAD_BY_DTYPE(Name)                      \
  void Name##Any(const CpuArgs& args, CpuJob* job) { \
    switch (args.problem.dtype) {                    \
      case DType::kF64:                              \
        return Prepare##Name<double>(args, job);     \
      case DType::kF32:                              \
        return Prepare##Name<float>(args, job);      \
      case DType::kBF16:                             \
        return Prepare##Name<BF16>(args, job);       \
      case DType::kF16:                              \
        return Prepare##Name<F16>(args, job);        \
    }                                                \
  }
CONVGRAD_BY_DTYPE(Direct)
CONVGRAD_BY_DTYPE(Gemm)
CONVGRAD_BY_DTYPE(Channels)
CONVGRAD_BY_DTYPE(Planes)
#undef CONVGRAD_BY_DTYPE

}  // namespace

extern const CpuKernels kKernels;
const CpuKernels kKernels = {DirectAny, GemmAny, ChannelsAny, PlanesAny};

}  // namespace CONVGRAD_ISA
}  // namespace convgrad
