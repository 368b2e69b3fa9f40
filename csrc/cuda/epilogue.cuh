// What kernel.h calls the epilogue, for the kernels that do not apply it on their way
// out: one pass over a dX that is already stored.
//
// Limits: dX without gaps, as XLA's arrays are.

#pragma once

#include <algorithm>
#include <cstdint>

#include "../kernel.h"
#include "platform.cuh"

namespace convgrad {

constexpr int kEpilogueThreads = 256;
constexpr int64_t kEpilogueMaxBlocks = int64_t{1} << 16;

// Applies the epilogue to one value: each step rounds. The second argument only names the
// type.
template <typename T>
__device__ __forceinline__ T ApplyEpilogue(T value, const T* residual, const T* relu,
                                           size_t at) {
  if (residual != nullptr) value = Narrow(Widen(value) + Widen(residual[at]), T{});
  if (relu != nullptr && !(Widen(relu[at]) > 0)) value = T{};
  return value;
}

template <typename T>
__global__ void __launch_bounds__(kEpilogueThreads)
    EpilogueKernel(int64_t count, const T* __restrict__ residual,
                   const T* __restrict__ relu, T* __restrict__ dx) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kEpilogueThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kEpilogueThreads + threadIdx.x;
       i < count; i += step) {
    dx[i] = ApplyEpilogue(dx[i], residual, relu, static_cast<size_t>(i));
  }
}

template <typename T>
cudaError_t EnqueueEpilogue(cudaStream_t stream, const Problem& problem,
                            const Epilogue& epilogue, T* dx) {
  int64_t count = problem.batch * problem.groups * problem.in_channels;
  for (const Axis& a : problem.axis) count *= a.in;
  const int64_t blocks =
      std::min((count + kEpilogueThreads - 1) / kEpilogueThreads, kEpilogueMaxBlocks);
  return CU_LAUNCH((EpilogueKernel<T>), dim3(static_cast<unsigned>(blocks)),
                   dim3(kEpilogueThreads), 0, stream, count,
                   static_cast<const T*>(epilogue.residual),
                   static_cast<const T*>(epilogue.relu), dx);
}

}  // namespace convgrad
