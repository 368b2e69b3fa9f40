// Tensor maps: the driver's types and its two functions that encode them, which check
// what CUDA's documentation of each demands. Names and values are those of cuda.h.

#pragma once

#include <cstdint>
#include <cstring>

#include "runtime.h"

using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;

enum CUresult {
  CUDA_SUCCESS = 0,
  CUDA_ERROR_INVALID_VALUE = 1,
};
enum CUtensorMapDataType {
  CU_TENSOR_MAP_DATA_TYPE_FLOAT16 = 6,
  CU_TENSOR_MAP_DATA_TYPE_FLOAT32 = 7,
  CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9,
};
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE = 0 };
enum CUtensorMapSwizzle {
  CU_TENSOR_MAP_SWIZZLE_NONE = 0,
  CU_TENSOR_MAP_SWIZZLE_32B,
  CU_TENSOR_MAP_SWIZZLE_64B,
  CU_TENSOR_MAP_SWIZZLE_128B,
};
enum CUtensorMapL2promotion {
  CU_TENSOR_MAP_L2_PROMOTION_NONE = 0,
  CU_TENSOR_MAP_L2_PROMOTION_L2_64B,
  CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
  CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
};
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE = 0 };

struct alignas(128) CUtensorMap {
  cuuint64_t opaque[16];
};

namespace cuda_emulator {

constexpr uint32_t kMostDimensions = 5;

// What the emulator keeps in the 128 bytes. Dimension 0 is the contiguous one.
struct TensorMap {
  const unsigned char* base;
  uint64_t stride[kMostDimensions - 1];  // bytes
  uint32_t size[kMostDimensions];
  uint32_t magic;
  uint16_t box[kMostDimensions];  // as im2col: channels and pixels, the rest unused
  int16_t lower[kMostDimensions - 2], upper[kMostDimensions - 2];
  uint8_t step[kMostDimensions];
  uint8_t rank, element_bytes, swizzle, im2col;
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap), "a map has 128 bytes");
constexpr uint32_t kTensorMapMagic = 0x7e4504a9;

// What both kinds demand. Fills in all but the boxes.
inline bool EncodeTensor(TensorMap* map, CUtensorMapDataType type, uint32_t rank,
                         const void* base, const uint64_t* size, const uint64_t* stride,
                         const uint32_t* step, uint64_t inner_box,
                         CUtensorMapSwizzle swizzle) {
  map->magic = kTensorMapMagic;
  map->base = static_cast<const unsigned char*>(base);
  map->rank = static_cast<uint8_t>(rank);
  map->element_bytes = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4 : 2;
  map->swizzle = static_cast<uint8_t>(swizzle);
  bool valid = base != nullptr && reinterpret_cast<uintptr_t>(base) % 16 == 0;
  for (uint32_t i = 0; i < rank; ++i) {
    // A size of 2^32 is allowed too, and nobody needs it here.
    valid = valid && 1 <= size[i] && size[i] <= UINT32_MAX;
    map->size[i] = static_cast<uint32_t>(size[i]);
    valid = valid && 1 <= step[i] && step[i] <= 8;
    map->step[i] = static_cast<uint8_t>(i == 0 ? 1 : step[i]);
    if (i + 1 == rank) break;
    valid = valid && stride[i] % 16 == 0 && stride[i] < uint64_t{1} << 40;
    map->stride[i] = stride[i];
  }
  const uint64_t inner_bytes = inner_box * map->element_bytes;
  valid = valid && inner_bytes % 16 == 0;
  return valid && (swizzle == CU_TENSOR_MAP_SWIZZLE_NONE ||
                   inner_bytes <= uint64_t{16} << static_cast<int>(swizzle));
}

inline CUresult Store(const TensorMap& map, bool valid, CUtensorMap* to) {
  if (!valid || reinterpret_cast<uintptr_t>(to) % alignof(CUtensorMap) != 0) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  std::memcpy(static_cast<void*>(to), &map, sizeof(map));
  return CUDA_SUCCESS;
}

}  // namespace cuda_emulator

inline CUresult cuTensorMapEncodeTiled(CUtensorMap* to, CUtensorMapDataType type,
                                       cuuint32_t rank, void* base,
                                       const cuuint64_t* size, const cuuint64_t* stride,
                                       const cuuint32_t* box, const cuuint32_t* step,
                                       CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  cuda_emulator::TensorMap map{};
  if (rank < 1 || rank > cuda_emulator::kMostDimensions) return CUDA_ERROR_INVALID_VALUE;
  bool valid = cuda_emulator::EncodeTensor(&map, type, rank, base, size, stride, step,
                                           box[0], swizzle);
  for (cuuint32_t i = 0; i < rank; ++i) {
    valid = valid && 1 <= box[i] && box[i] <= 256;
    map.box[i] = static_cast<uint16_t>(box[i]);
  }
  return cuda_emulator::Store(map, valid, to);
}

inline CUresult cuTensorMapEncodeIm2col(
    CUtensorMap* to, CUtensorMapDataType type, cuuint32_t rank, void* base,
    const cuuint64_t* size, const cuuint64_t* stride, const int* lower, const int* upper,
    cuuint32_t channels, cuuint32_t pixels, const cuuint32_t* step, CUtensorMapInterleave,
    CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  cuda_emulator::TensorMap map{};
  if (rank < 3 || rank > cuda_emulator::kMostDimensions) return CUDA_ERROR_INVALID_VALUE;
  bool valid = cuda_emulator::EncodeTensor(&map, type, rank, base, size, stride, step,
                                           channels, swizzle);
  valid = valid && 1 <= channels && channels <= 256 && 1 <= pixels && pixels <= 1024;
  map.im2col = 1;
  map.box[0] = static_cast<uint16_t>(channels);
  map.box[1] = static_cast<uint16_t>(pixels);
  const int limit = rank == 3 ? 1 << 15 : rank == 4 ? 1 << 7 : 1 << 4;
  for (cuuint32_t i = 0; i < rank - 2; ++i) {
    for (int corner : {lower[i], upper[i]}) {
      valid = valid && -limit <= corner && corner < limit;
    }
    map.lower[i] = static_cast<int16_t>(lower[i]);
    map.upper[i] = static_cast<int16_t>(upper[i]);
    const int64_t last = static_cast<int64_t>(size[i + 1]) - 1 + upper[i];
    valid = valid && lower[i] <= last;
  }
  return cuda_emulator::Store(map, valid, to);
}

enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess = 0 };
constexpr unsigned long long cudaEnableDefault = 0;

inline cudaError_t cudaGetDriverEntryPointByVersion(
    const char* name, void** function, unsigned, unsigned long long,
    cudaDriverEntryPointQueryResult* found) {
  *found = cudaDriverEntryPointSuccess;
  *function = std::strcmp(name, "cuTensorMapEncodeIm2col") == 0
                  ? reinterpret_cast<void*>(&cuTensorMapEncodeIm2col)
                  : reinterpret_cast<void*>(&cuTensorMapEncodeTiled);
  return cudaSuccess;
}
