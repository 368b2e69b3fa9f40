// The table of one instruction set's kernels, from which kernel_cpu.cc picks at run time.

#include "entries.h"

namespace convgrad {
namespace CONVGRAD_ISA {

extern const CpuKernels kKernels;
const CpuKernels kKernels = {Direct,         Gemm,   Depthwise,  FewChannels,
                             FewChannelsDot, Filter, MaxPoolGrad};

}  // namespace CONVGRAD_ISA
}  // namespace convgrad
