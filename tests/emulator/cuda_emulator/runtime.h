// The few calls of the CUDA runtime that kernel.cu makes, for a device of capability 9.0.

#pragma once

#include <mutex>
#include <set>
#include <string>

#include "environment.h"

struct CUstream_st;
using cudaStream_t = CUstream_st*;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNotSupported = 801,
  cudaErrorLaunchFailure = 719,
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};

namespace cuda_emulator {

// Why the last launch failed. The texts are kept for good: an error text is static.
class LastFailure {
 public:
  static void Set(const std::string& text) {
    const std::lock_guard<std::mutex> lock(mutex_);
    last_ = texts_.insert(text).first->c_str();
  }
  static const char* Get() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return last_;
  }

 private:
  static inline std::mutex mutex_;
  static inline std::set<std::string> texts_;
  static inline const char* last_ = "unspecified launch failure";
};

}  // namespace cuda_emulator

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t status) {
  switch (status) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInsufficientDriver:
      return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorNotSupported: return "operation not supported";
    case cudaErrorLaunchFailure: return cuda_emulator::LastFailure::Get();
  }
  return "unrecognized error code";
}
#define CUDART_VERSION 13000
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cuda_emulator::HasDriver() ? cudaSuccess : cudaErrorInsufficientDriver;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = cuda_emulator::Multiprocessors();
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = cuda_emulator::MostSharedBytes();
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}
