// What kernel.h calls the epilogue: for kernels that apply it on their way out, and, for
// those that do not, one pass over a dX that is already stored.
//
// Limits: the pass takes a dX without gaps, as XLA's arrays are.

#pragma once

#include <algorithm>
#include <cstdint>

#include "../kernel.h"
#include "platform.cuh"

namespace convgrad {

constexpr int kEpilogueThreads = 256;
constexpr int64_t kEpilogueMaxBlocks = int64_t{1} << 16;

// The steps, each of which rounds.
template <typename T>
__device__ __forceinline__ T AddResidual(T value, T residual) {
  return Narrow(Widen(value) + Widen(residual), T{});
}
template <typename T>
__device__ __forceinline__ T UndoRelu(T value, T relu) {
  return Widen(relu) > 0 ? value : T{};
}

// Adjacent elements that are loaded or stored at once.
template <typename T, int kCount>
struct alignas(kCount * sizeof(T)) Adjacent {
  T element[kCount];
};

// Both, for those that dX has at `at`.
template <typename T, int kCount, typename Index>
__device__ __forceinline__ void ApplyEpilogue(const Epilogue& epilogue,
                                              Adjacent<T, kCount>& value, Index at) {
  const auto load = [at](const void* from) {
    return *reinterpret_cast<const Adjacent<T, kCount>*>(static_cast<const T*>(from) +
                                                         at);
  };
  if (epilogue.residual != nullptr) {
    const Adjacent<T, kCount> residual = load(epilogue.residual);
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      value.element[e] = AddResidual(value.element[e], residual.element[e]);
    }
  }
  if (epilogue.relu != nullptr) {
    const Adjacent<T, kCount> relu = load(epilogue.relu);
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      value.element[e] = UndoRelu(value.element[e], relu.element[e]);
    }
  }
}

template <typename T, typename Index>
__device__ __forceinline__ T ApplyEpilogue(const Epilogue& epilogue, T value, Index at) {
  if (epilogue.residual != nullptr) {
    value = AddResidual(value, static_cast<const T*>(epilogue.residual)[at]);
  }
  if (epilogue.relu != nullptr) {
    value = UndoRelu(value, static_cast<const T*>(epilogue.relu)[at]);
  }
  return value;
}

template <typename T>
__global__ void __launch_bounds__(kEpilogueThreads)
    EpilogueKernel(int64_t count, const Epilogue epilogue, T* __restrict__ dx) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kEpilogueThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kEpilogueThreads + threadIdx.x;
       i < count; i += step) {
    dx[i] = ApplyEpilogue(epilogue, dx[i], i);
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
                   dim3(kEpilogueThreads), 0, stream, count, epilogue, dx);
}

}  // namespace convgrad
