// The few things that differ between nvcc and a host compiler. Built by a host
// compiler, kernel.cu runs on the CPU through cuda_emulator.h, which has to provide
// the CUDA names used here and its own CU_LAUNCH.

#pragma once

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <mutex>
#include <set>
#include <utility>

namespace convgrad {

// Lets a kernel have all the shared memory that a block may have on the current device.
// Once for each: the calls may wait for copies that are under way. The limit is the
// kernel's, not the launch's: threads that each set what they need would undo each
// other's.
inline cudaError_t AllowSharedMemory(const void* kernel) {
  static std::mutex mutex;
  // Never destroyed: threads of XLA's may still launch while the process ends.
  static auto& allowed = *new std::set<std::pair<const void*, int>>;
  int device = 0, most = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel, device}) > 0) return cudaSuccess;
  cudaFuncAttributes attributes{};
  status = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (status == cudaSuccess) status = cudaFuncGetAttributes(&attributes, kernel);
  if (status == cudaSuccess) {
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  most - static_cast<int>(attributes.sharedSizeBytes));
  }
  if (status == cudaSuccess) allowed.insert({kernel, device});
  return status;
}

// cudaLaunchKernel rather than <<<>>>, because it returns the status of this very
// launch: cudaGetLastError would also report, and clear, an error that some earlier
// call of the process left behind.
template <typename... Parameters>
cudaError_t LaunchKernel(void (*kernel)(Parameters...), dim3 grid, dim3 block,
                         int shared_bytes, cudaStream_t stream, Parameters... arguments) {
  constexpr int kWithoutOptIn = 48 * 1024;
  const void* const function = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > kWithoutOptIn) {
    const cudaError_t status = AllowSharedMemory(function);
    if (status != cudaSuccess) return status;
  }
  void* pointers[] = {&arguments...};
  return cudaLaunchKernel(function, grid, block, pointers,
                          static_cast<size_t>(shared_bytes), stream);
}

}  // namespace convgrad

// Launches kernel(...) with dynamic shared memory; the value is the launch's cudaError_t.
#define CU_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)               \
  ::convgrad::LaunchKernel((kernel), (grid), (block), (shared_bytes), (stream), \
                           __VA_ARGS__)

// Declares `name`, the block's dynamic shared memory as bytes, aligned to 128 or more.
// The kernels of a source need another name for another alignment.
#define CU_DYNAMIC_SHARED(name) CU_DYNAMIC_SHARED_ALIGNED(name, 128)
#define CU_DYNAMIC_SHARED_ALIGNED(name, bytes) \
  extern __shared__ __align__(bytes)           \
  unsigned char name[]

#else

#include "cuda_emulator.h"

#endif

namespace convgrad {

// Null, or what went wrong. A failed launch is also remembered as the thread's last
// error; the caller has it from here, and an unrelated call should not report it again.
inline const char* ErrorText(cudaError_t status) {
  if (status == cudaSuccess) return nullptr;
  (void)cudaGetLastError();
  return cudaGetErrorString(status);
}

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
