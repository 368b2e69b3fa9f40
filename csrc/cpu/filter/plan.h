// The planner and entry points of the filter gradient on a CPU.

#pragma once

#include "../../kernel.h"

namespace convgrad {

const char* const* CpuFilterKernelNames();  // null-terminated

// As PlanCpu and RunCpu for the input gradient: `problem.dx` are the strides of x, and
// x and dY are read. All of dW is written.
bool PlanCpuFilterGrad(const Problem& problem, const char* kernel, Plan* plan);
void RunCpuFilterGrad(const Problem& problem, const Plan& plan, const void* x,
                      const void* dy, void* dw, void* workspace,
                      const ParallelFor& parallel_for);

}  // namespace convgrad
