// What kernel.h calls the epilogue: for kernels that apply it on their way out, and, for
// the one that does not ("depthwise", which says why), a pass over a dX that is stored.
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

// The steps. Each rounds.
template <typename T>
__device__ __forceinline__ T AddResidual(T value, T residual) {
  return Narrow(Widen(value) + Widen(residual), T{});
}
template <typename T>
__device__ __forceinline__ T UndoRelu(T value, T relu) {
  return Widen(relu) > 0 ? value : T{};
}

// Whether there is any. The same for all threads, so that kernels branch on it once,
// around code that keeps no operands: made ready to be used or not, those cost more
// instructions than the stores.
__device__ __forceinline__ bool HasEpilogue(const Epilogue& epilogue) {
  return epilogue.residual != nullptr || epilogue.relu != nullptr;
}

// Adjacent elements that are loaded or stored at once.
template <typename T, int kCount>
struct alignas(kCount * sizeof(T)) Adjacent {
  T element[kCount];
};

// What both take for adjacent elements. A kernel loads it well before the sums are ready
// to be stored: it has little else to do meanwhile.
template <typename T, int kCount>
struct EpilogueOperands {
  Adjacent<T, kCount> residual, relu;
};

// Those of the elements that dX has at `at`, aligned as a vector.
template <typename T, int kCount, typename Index>
__device__ __forceinline__ void LoadOperands(const Epilogue& epilogue, Index at,
                                             EpilogueOperands<T, kCount>& to) {
  const auto load = [at](const void* from) {
    return *reinterpret_cast<const Adjacent<T, kCount>*>(static_cast<const T*>(from) +
                                                         at);
  };
  if (epilogue.residual != nullptr) to.residual = load(epilogue.residual);
  if (epilogue.relu != nullptr) to.relu = load(epilogue.relu);
}

template <typename T, int kCount>
__device__ __forceinline__ void ApplyOperands(const Epilogue& epilogue,
                                              const EpilogueOperands<T, kCount>& operands,
                                              T (&value)[kCount]) {
  if (epilogue.residual != nullptr) {
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      value[e] = AddResidual(value[e], operands.residual.element[e]);
    }
  }
  if (epilogue.relu != nullptr) {
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      value[e] = UndoRelu(value[e], operands.relu.element[e]);
    }
  }
}

// Loads and applies.
template <typename T, int kCount, typename Index>
__device__ __forceinline__ void ApplyEpilogue(const Epilogue& epilogue,
                                              T (&value)[kCount], Index at) {
  EpilogueOperands<T, kCount> operands = {};
  LoadOperands(epilogue, at, operands);
  ApplyOperands(epilogue, operands, value);
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
  // Unrolled, the loop would count its turns first, by a 64-bit division.
#pragma unroll 1
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
