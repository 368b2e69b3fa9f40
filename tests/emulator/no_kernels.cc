// Stands for the kernels that the emulated AMX module lacks: all but gemm in bfloat16.

#include "cpu/job.h"

namespace convgrad {
namespace portable {

extern const CpuKernels kKernels;
const CpuKernels kKernels = {};

}  // namespace portable
}  // namespace convgrad
