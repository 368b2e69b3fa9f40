// Memory that kernels reach, for programs that run in the emulator or, compiled by nvcc,
// on a GPU: in the former it is the host's own, on the latter a copy of exactly its size.

#pragma once

#include <cstddef>
#include <cstdio>
#include <cstdlib>

#include "cuda/platform.cuh"

namespace convgrad {

class DeviceMemory {
 public:
  DeviceMemory(void* host, size_t bytes) : host_(host), bytes_(bytes) {
#ifdef __CUDACC__
    Check(cudaMalloc(&device_, bytes_));
    Check(cudaMemcpy(device_, host_, bytes_, cudaMemcpyHostToDevice));
#endif
  }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

#ifdef __CUDACC__
  ~DeviceMemory() { cudaFree(device_); }
  void* get() const { return device_; }
  // Waits for the kernels and brings back what they wrote.
  cudaError_t Fetch() {
    return cudaMemcpy(host_, device_, bytes_, cudaMemcpyDeviceToHost);
  }
#else
  void* get() const { return host_; }
  cudaError_t Fetch() { return cudaSuccess; }
#endif

 private:
#ifdef __CUDACC__
  static void Check(cudaError_t status) {
    if (status == cudaSuccess) return;
    std::fprintf(stderr, "device memory: %s\n", cudaGetErrorString(status));
    std::exit(3);
  }
  void* device_ = nullptr;
#endif
  void* host_;
  size_t bytes_;
};

}  // namespace convgrad
