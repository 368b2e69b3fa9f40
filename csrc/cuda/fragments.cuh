// What the tensor-core kernels share: chunks of 16 bytes on their way to shared memory,
// products of fragments by type, the splitting of f32, and the exchange that turns a
// quad's sums into whole stores.

#pragma once

#include <cstdint>
#include <cstring>

#include "platform.cuh"
#include "primitives.cuh"

namespace convgrad {

constexpr int kMmaChunkBytes = 16;

// Copies a chunk to shared memory. `valid` bytes of it exist (none if negative), and the
// rest become zeros. `base` is any address that may be named.
template <typename T, int kBytes>
__device__ __forceinline__ void CopyPieces(unsigned char* to, const T* base,
                                           int32_t offset, int valid) {
  constexpr int kElements = kBytes / static_cast<int>(sizeof(T));
#pragma unroll
  for (int piece = 0; piece < kMmaChunkBytes / kBytes; ++piece) {
    const int left = valid - piece * kBytes;
    const int bytes = left < 0 ? 0 : left < kBytes ? left : kBytes;
    CopyAsync<kBytes>(to + piece * kBytes,
                      bytes > 0 ? base + offset + piece * kElements : base, bytes);
  }
}

template <typename T, bool kWide>
__device__ __forceinline__ void CopyChunk(unsigned char* to, const T* base,
                                          int32_t offset, int valid, int width) {
  if constexpr (kWide) {
    CopyAsyncOrZero(to, base + offset, valid > 0);
  } else if (width == 16) {
    CopyPieces<T, 16>(to, base, offset, valid);
  } else if (width == 8) {
    CopyPieces<T, 8>(to, base, offset, valid);
  } else {
    CopyPieces<T, 4>(to, base, offset, valid);
  }
}

// The same by way of registers, for 16-bit values that lie at odd places.
struct alignas(kMmaChunkBytes) MmaChunk {
  uint32_t word[4];
};

template <typename T>
__device__ __forceinline__ MmaChunk LoadChunk(const T* __restrict__ base, int32_t offset,
                                              int valid) {
  constexpr int kElements = kMmaChunkBytes / static_cast<int>(sizeof(T));
  T element[kElements];
#pragma unroll
  for (int e = 0; e < kElements; ++e) {
    element[e] = e * static_cast<int>(sizeof(T)) < valid ? base[offset + e] : T{};
  }
  MmaChunk chunk;
  std::memcpy(&chunk, element, sizeof(chunk));
  return chunk;
}

__device__ __forceinline__ void Mma(float (&d)[4], const uint32_t (&a)[4],
                                    const uint32_t (&b)[2], __nv_bfloat16) {
  MmaBf16(d, a, b);
}
__device__ __forceinline__ void Mma(float (&d)[4], const uint32_t (&a)[4],
                                    const uint32_t (&b)[2], __half) {
  MmaF16(d, a, b);
}
__device__ __forceinline__ void Mma(float (&d)[4], const uint32_t (&a)[4],
                                    const uint32_t (&b)[2], float) {
  MmaTf32(d, a, b);
}

__device__ __forceinline__ float FromBits(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, sizeof(v));
  return v;
}

// v less its rounding to TF32, rounded itself: the two add up to v within 2^-22 of it.
__device__ __forceinline__ uint32_t RestOfTf32(float v, uint32_t rounded) {
  return RoundToTf32(v - FromBits(rounded));
}

// word[q] of lane t of a quad goes to word[t] of lane q.
__device__ __forceinline__ void TransposeQuad(uint32_t (&word)[4], int lane) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = (lane & bit) != 0;
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      if (q & bit) continue;
      const uint32_t got =
          __shfl_xor_sync(0xffffffffu, upper ? word[q] : word[q | bit], bit);
      word[q] = upper ? got : word[q];
      word[q | bit] = upper ? word[q | bit] : got;
    }
  }
}

}  // namespace convgrad
