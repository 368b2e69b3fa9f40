// Matrix products by cuBLAS, as a ceiling for the kernels: looked up at run time, so that
// the program builds and runs without it.

#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "cuda/platform.cuh"
#include "kernel.h"

#ifdef __CUDACC__
#include <dlfcn.h>
#include <library_types.h>
#endif

namespace convgrad {

class Blas {
 public:
  // From the library that CONVGRAD_CUBLAS names, or one that the loader finds.
  Blas() {
#ifdef __CUDACC__
    const char* const named = std::getenv("CONVGRAD_CUBLAS");
    for (const char* name :
         {named, "libcublas.so.13", "libcublas.so.12", "libcublas.so"}) {
      if (library_ == nullptr && name != nullptr && *name != '\0') {
        library_ = dlopen(name, RTLD_NOW | RTLD_LOCAL);
      }
    }
    if (library_ == nullptr) return;
    int (*create)(void**) = nullptr;
    int (*set_workspace)(void*, void*, size_t) = nullptr;
    Find("cublasCreate_v2", &create);
    Find("cublasSetWorkspace_v2", &set_workspace);
    Find("cublasSetStream_v2", &set_stream_);
    Find("cublasGemmEx", &gemm_);
    if (create == nullptr || set_workspace == nullptr || set_stream_ == nullptr ||
        gemm_ == nullptr || create(&handle_) != 0) {
      handle_ = nullptr;
      return;
    }
    set_workspace_ = set_workspace;
    (void)cudaMalloc(&workspace_, kWorkspaceBytes);
#endif
  }
  Blas(const Blas&) = delete;
  Blas& operator=(const Blas&) = delete;

  bool IsThere() const { return handle_ != nullptr; }

  // c[m][n] = a[m][k] * b[k][n], by rows. Returns null, or what went wrong.
  const char* Enqueue(cudaStream_t stream, DType dtype, bool allow_tf32, int64_t m,
                      int64_t n, int64_t k, const void* a, const void* b, void* c) const {
#ifdef __CUDACC__
    // CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_32F_FAST_TF32, CUBLAS_COMPUTE_64F
    constexpr int kCompute32 = 68, kComputeTf32 = 77, kCompute64 = 70;
    const cudaDataType_t type = dtype == DType::kF64    ? CUDA_R_64F
                                : dtype == DType::kF32  ? CUDA_R_32F
                                : dtype == DType::kBF16 ? CUDA_R_16BF
                                                        : CUDA_R_16F;
    const int compute = dtype == DType::kF64                 ? kCompute64
                        : dtype == DType::kF32 && allow_tf32 ? kComputeTf32
                                                             : kCompute32;
    const float one = 1, zero = 0;
    const double one64 = 1, zero64 = 0;
    const bool wide = dtype == DType::kF64;
    // A new stream brings back the library's own workspace, which a graph cannot keep.
    if (set_stream_(handle_, stream) != 0 ||
        set_workspace_(handle_, workspace_, kWorkspaceBytes) != 0) {
      return "cuBLAS takes no stream";
    }
    // By columns it is the product of the transposed matrices, in the other order.
    const int status = gemm_(
        handle_, 0, 0, static_cast<int>(n), static_cast<int>(m), static_cast<int>(k),
        wide ? static_cast<const void*>(&one64) : &one, b, type, static_cast<int>(n), a,
        type, static_cast<int>(k), wide ? static_cast<const void*>(&zero64) : &zero, c,
        type, static_cast<int>(n), compute, -1);
    return status == 0 ? nullptr : "cuBLAS refuses the product";
#else
    (void)stream, (void)dtype, (void)allow_tf32, (void)m, (void)n, (void)k;
    (void)a, (void)b, (void)c;
    return "no cuBLAS";
#endif
  }

 private:
  void* handle_ = nullptr;
#ifdef __CUDACC__
  template <typename Function>
  void Find(const char* name, Function* function) {
    *function = reinterpret_cast<Function>(dlsym(library_, name));
  }

  static constexpr size_t kWorkspaceBytes = size_t{32} << 20;
  void* library_ = nullptr;
  void* workspace_ = nullptr;
  int (*set_stream_)(void*, cudaStream_t) = nullptr;
  int (*set_workspace_)(void*, void*, size_t) = nullptr;
  int (*gemm_)(void*, int, int, int, int, int, const void*, const void*, cudaDataType_t,
               int, const void*, cudaDataType_t, int, const void*, void*, cudaDataType_t,
               int, int, int) = nullptr;
#endif
};

}  // namespace convgrad
