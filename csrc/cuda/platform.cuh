// The few things that differ between nvcc and a host compiler. Built by a host
// compiler, kernel.cu runs on the CPU through cuda_emulator.h, which has to provide
// the CUDA names used here and its own CU_LAUNCH.

#pragma once

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace convgrad {

// cudaLaunchKernel rather than <<<>>>, because it returns the status of this very
// launch: cudaGetLastError would also report, and clear, an error that some earlier
// call of the process left behind.
template <typename Params, typename T>
cudaError_t LaunchKernel(void (*kernel)(Params, const T*, const T*, T*), dim3 grid,
                         dim3 block, cudaStream_t stream, Params params, const T* dy,
                         const T* w, T* dx) {
  void* arguments[] = {&params, &dy, &w, &dx};
  return cudaLaunchKernel(kernel, grid, block, arguments, 0, stream);
}

}  // namespace convgrad

// Launches kernel(params, dy, w, dx); the value is the launch's cudaError_t.
#define CU_LAUNCH(kernel, grid, block, stream, ...) \
  ::convgrad::LaunchKernel((kernel), (grid), (block), (stream), __VA_ARGS__)

#else

#include "cuda_emulator.h"

#endif

namespace convgrad {

// Products and sums are formed in the accumulator's type.
template <typename T>
struct AccumulatorOf {
  using Type = float;
};
template <>
struct AccumulatorOf<double> {
  using Type = double;
};
template <typename T>
using Accumulator = typename AccumulatorOf<T>::Type;

__device__ __forceinline__ double Widen(double v) { return v; }
__device__ __forceinline__ float Widen(float v) { return v; }
__device__ __forceinline__ float Widen(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float Widen(__half v) { return __half2float(v); }

// Rounds to nearest even. The second argument only names the type.
__device__ __forceinline__ double Narrow(double v, double) { return v; }
__device__ __forceinline__ float Narrow(float v, float) { return v; }
__device__ __forceinline__ __nv_bfloat16 Narrow(float v, __nv_bfloat16) {
  return __float2bfloat16(v);
}
__device__ __forceinline__ __half Narrow(float v, __half) { return __float2half(v); }

}  // namespace convgrad
