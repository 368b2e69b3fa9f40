// The CUDA side of kernel.h: which kernel takes a problem, and its launch. The kernels
// themselves, with their mathematics and limits, are in cuda/.

#include <cstdint>
#include <cstring>

#include "cuda/direct.cuh"
#include "cuda/geometry.cuh"
#include "cuda/platform.cuh"
#include "cuda/tiled.cuh"
#include "kernel.h"

namespace convgrad {
namespace {

constexpr char kDirect[] = "direct";
constexpr char kTiled[] = "tiled";
constexpr const char* kNames[] = {kDirect, kTiled, nullptr};

// A grid's first dimension; the other two end at 65535.
constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;

// When "auto" takes the tiled kernel. Per product, "direct" issues two loads where
// "tiled" issues next to none, and a multiprocessor starts four multiply-adds for one
// load: a tile may waste 4/5 of itself and still be ahead. With fewer tiles than this
// most multiprocessors would idle, while "direct" keeps a thread for each element.
constexpr int64_t kMaxWaste = 5;
constexpr int64_t kMinTiles = 32;

TileCounts CountTilesFor(const Problem& problem) {
  return problem.dtype == DType::kF64 ? CountTiles<double>(problem)
                                      : CountTiles<float>(problem);
}

bool TiledTakes(const Problem& problem) {
  return CountTilesFor(problem).total <= kMaxBlocks;
}

bool TiledIsFaster(const Problem& problem) {
  constexpr int64_t kN = Tile<float>::kN, kK = Tile<float>::kK;
  static_assert(kN == Tile<double>::kN && kK == Tile<double>::kK,
                "one rule for every type");
  const int64_t c = problem.in_channels, k = problem.out_channels;
  const int64_t tile_c = (c + kN - 1) / kN * kN, tile_k = (k + kK - 1) / kK * kK;
  return kMaxWaste * c * k >= tile_c * tile_k &&
         CountTilesFor(problem).total >= kMinTiles;
}

template <typename T>
cudaError_t Launch(cudaStream_t stream, const Problem& problem, bool tiled,
                   const void* dy, const void* w, void* dx) {
  const T* y = static_cast<const T*>(dy);
  const T* f = static_cast<const T*>(w);
  T* x = static_cast<T*>(dx);
  const bool small = FitsIn32Bits(problem, kTiledSlack);
  if (tiled) {
    return small ? LaunchTiled<T, int32_t>(stream, problem, y, f, x)
                 : LaunchTiled<T, int64_t>(stream, problem, y, f, x);
  }
  return small ? LaunchDirect<T, int32_t>(stream, problem, y, f, x)
               : LaunchDirect<T, int64_t>(stream, problem, y, f, x);
}

}  // namespace

const char* const* CudaKernelNames() { return kNames; }

bool PlanCuda(const Problem& problem, const char* kernel, Plan* plan) {
  const bool takes_tiled = TiledTakes(problem);
  if (std::strcmp(kernel, "auto") == 0) {
    *plan = {takes_tiled && TiledIsFaster(problem) ? kTiled : kDirect, 0};
    return true;
  }
  if (std::strcmp(kernel, kDirect) == 0) {
    *plan = {kDirect, 0};
    return true;
  }
  if (std::strcmp(kernel, kTiled) == 0 && takes_tiled) {
    *plan = {kTiled, 0};
    return true;
  }
  return false;
}

const char* LaunchCuda(CUstream_st* stream, const Problem& problem, const Plan& plan,
                       const void* dy, const void* w, void* dx, void* /*workspace*/) {
  const bool tiled = std::strcmp(plan.kernel, kTiled) == 0;
  if (!tiled && std::strcmp(plan.kernel, kDirect) != 0) return "no such CUDA kernel";
  cudaError_t status = cudaErrorInvalidValue;
  switch (problem.dtype) {
    case DType::kF64: status = Launch<double>(stream, problem, tiled, dy, w, dx); break;
    case DType::kF32: status = Launch<float>(stream, problem, tiled, dy, w, dx); break;
    case DType::kBF16:
      status = Launch<__nv_bfloat16>(stream, problem, tiled, dy, w, dx);
      break;
    case DType::kF16: status = Launch<__half>(stream, problem, tiled, dy, w, dx); break;
  }
  if (status == cudaSuccess) return nullptr;
  // A failed launch is also remembered as the thread's last error. The caller gets it
  // from here; left there, an unrelated call would report it a second time.
  (void)cudaGetLastError();
  return cudaGetErrorString(status);
}

}  // namespace convgrad
