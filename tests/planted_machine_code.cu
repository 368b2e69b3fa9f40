// Kernels that test_machine_code.py must complain about, each with what is wrong in its
// name, and some that are well.

#include <cstdint>

namespace planted {

// More sums than its registers hold.
__global__ void __launch_bounds__(1024, 2) Spills(const float* from, float* to) {
  float sum[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) sum[i] = from[i * 1024 + threadIdx.x];
  for (int round = 0; round < 100; ++round) {
#pragma unroll
    for (int i = 0; i < 64; ++i) sum[i] = sum[i] * sum[(i + 17) % 64] + from[round];
  }
#pragma unroll
  for (int i = 0; i < 64; ++i) to[i * 1024 + threadIdx.x] = sum[i];
}

// An array with an index that only the run knows.
__global__ void __launch_bounds__(128) HasLocalArray(const int* from, int* to) {
  int values[16];
  for (int i = 0; i < 16; ++i) values[i] = from[i];
  for (int i = 0; i < 16; ++i) values[from[i + 16] & 15] += i;
  to[threadIdx.x] = values[threadIdx.x & 15];
}

__global__ void __launch_bounds__(128) Divides(const int64_t* from, int64_t* to) {
  to[threadIdx.x] = from[0] / from[threadIdx.x];
}

__global__ void __launch_bounds__(256) OtherThreads(const int* from, int* to) {
  to[threadIdx.x] = from[threadIdx.x];
}

// 48 KiB: four blocks at most on a multiprocessor with 228.
__global__ void __launch_bounds__(128) MuchShared(const int* from, int* to) {
  __shared__ int values[48 * 256];
  for (int i = threadIdx.x; i < 48 * 256; i += 128) values[i] = from[i];
  __syncthreads();
  to[threadIdx.x] = values[from[threadIdx.x]];
}

template <typename T>
__global__ void __launch_bounds__(128) Copies(const T* from, T* to) {
  to[threadIdx.x] = from[threadIdx.x];
}
template __global__ void Copies<float>(const float*, float*);
template __global__ void Copies<float4>(const float4*, float4*);

}  // namespace planted
