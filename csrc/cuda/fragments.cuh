// What the kernels on tensor cores share: products of fragments, the splitting of f32,
// and the exchange that turns a quad's sums into whole stores.

#pragma once

#include <cstdint>
#include <cstring>

#include "platform.cuh"
#include "primitives.cuh"

namespace convgrad {

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

// v less its rounding to TF32, rounded itself: the two add up to v but for 2^-22 of it.
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
