// Tensor maps, which tell TMA, the tensor memory accelerator of sm_90, what to fetch:
// encoded on the host by the driver, and passed to a kernel as a __grid_constant__
// parameter. The driver's functions are looked up at run time: the module links no
// libcuda, and imports where there is none.

#pragma once

#include <atomic>
#include <cstdint>

#include "platform.cuh"

#ifdef __CUDACC__
#include <cuda.h>
#endif

namespace convgrad {

constexpr int kMostDimensions = 5;

// A tensor in global memory. Dimension 0 is the contiguous one; the others are `stride`
// bytes apart.
struct TensorShape {
  int rank;
  uint64_t size[kMostDimensions];
  uint64_t stride[kMostDimensions - 1];
};

template <typename T>
struct TensorMapType;
template <>
struct TensorMapType<float> {
  static constexpr CUtensorMapDataType kValue = CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
};
template <>
struct TensorMapType<__nv_bfloat16> {
  static constexpr CUtensorMapDataType kValue = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
};
template <>
struct TensorMapType<__half> {
  static constexpr CUtensorMapDataType kValue = CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
};

// A function of the driver by its name and type.
template <typename Function>
cudaError_t FindDriverFunction(const char* name, Function** function) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
#if defined(CUDART_VERSION) && CUDART_VERSION < 12050
  const cudaError_t status =
      cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &result);
#else
  constexpr unsigned kSince = 12000;  // CUDA 12.0 brought tensor maps
  const cudaError_t status =
      cudaGetDriverEntryPointByVersion(name, &found, kSince, cudaEnableDefault, &result);
#endif
  if (status != cudaSuccess) return status;
  if (result != cudaDriverEntryPointSuccess || found == nullptr) {
    return cudaErrorNotSupported;
  }
  *function = reinterpret_cast<Function*>(found);
  return cudaSuccess;
}

// Boxes of a tensor, each row of 128 bytes with its chunks permuted (hopper.cuh). Returns
// cudaErrorInvalidValue for what the driver does not encode: CUDA's documentation of
// cuTensorMapEncodeTiled has the limits.
template <typename T>
cudaError_t EncodeTiled(const void* base, const TensorShape& shape, const uint32_t* box,
                        CUtensorMap* map) {
  static std::atomic<decltype(&cuTensorMapEncodeTiled)> cached{nullptr};
  auto encode = cached.load();
  if (encode == nullptr) {
    const cudaError_t status = FindDriverFunction("cuTensorMapEncodeTiled", &encode);
    if (status != cudaSuccess) return status;
    cached.store(encode);
  }
  const uint32_t step[kMostDimensions] = {1, 1, 1, 1, 1};
  const CUresult result =
      encode(map, TensorMapType<T>::kValue, static_cast<uint32_t>(shape.rank),
             const_cast<void*>(base), shape.size, shape.stride, box, step,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Columns of pixels of an image (channels, axes from the innermost, images), permuted as
// above: `channels` of each of `pixels` pixels, which are `step` apart. The box that they
// are taken from begins `lower` beyond the image's first pixel and ends `upper` beyond
// its last. All three are for each axis.
template <typename T>
cudaError_t EncodeIm2col(const void* base, const TensorShape& shape, const int* lower,
                         const int* upper, const int* step, uint32_t channels,
                         uint32_t pixels, CUtensorMap* map) {
  static std::atomic<decltype(&cuTensorMapEncodeIm2col)> cached{nullptr};
  auto encode = cached.load();
  if (encode == nullptr) {
    const cudaError_t status = FindDriverFunction("cuTensorMapEncodeIm2col", &encode);
    if (status != cudaSuccess) return status;
    cached.store(encode);
  }
  uint32_t steps[kMostDimensions] = {1, 1, 1, 1, 1};
  for (int i = 1; i < shape.rank - 1; ++i) steps[i] = static_cast<uint32_t>(step[i - 1]);
  const CUresult result =
      encode(map, TensorMapType<T>::kValue, static_cast<uint32_t>(shape.rank),
             const_cast<void*>(base), shape.size, shape.stride, lower, upper, channels,
             pixels, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// How far beyond an image the box of an im2col map may begin or end, on each axis, and
// how far a copy's offset may reach, by the number of axes.
constexpr int CornerLimit(int axes) {
  return axes == 1 ? 1 << 15 : axes == 2 ? 1 << 7 : 1 << 4;
}
constexpr int kMostStep = 8;
constexpr int OffsetLimit(int axes) { return 2 * CornerLimit(axes); }

}  // namespace convgrad
