// Models of mma.sync and ldmatrix, with the operand layouts that primitives.cuh states:
// g = lane / 4 and t = lane % 4.

#pragma once

#include <cstdint>

#include "numbers.h"
#include "warp.h"

namespace cuda_emulator {

struct MmaOperands {
  const uint32_t *a, *b;
};

constexpr int kMmaRows = 16, kMmaColumns = 8;

// d[16][8] += a[16][kDepth] * b[kDepth][8]. `a_at` and `b_at` read an element from the
// lanes' registers. Sums are formed in f32; the tensor core's own order and rounding are
// not documented.
template <int kDepth, typename ReadA, typename ReadB>
CUDA_EMULATOR_UNWATCHED void MultiplyMatrices(const Warp& warp, ReadA a_at, ReadB b_at) {
  const auto operands = [&warp](int lane) CUDA_EMULATOR_UNWATCHED {
    return static_cast<const MmaOperands*>(warp.in[lane]);
  };
  float a[kMmaRows][kDepth], b[kMmaColumns][kDepth];
  for (int k = 0; k < kDepth; ++k) {
    for (int row = 0; row < kMmaRows; ++row) a[row][k] = a_at(operands, row, k);
    for (int column = 0; column < kMmaColumns; ++column) {
      b[column][k] = b_at(operands, k, column);
    }
  }
  for (int lane = 0; lane < static_cast<int>(kWarpSize); ++lane) {
    float* const d = static_cast<float*>(warp.out[lane]);
    for (int r = 0; r < 4; ++r) {
      const int row = lane / 4 + 8 * (r / 2), column = 2 * (lane % 4) + r % 2;
      float sum = 0;
      for (int k = 0; k < kDepth; ++k) sum += a[row][k] * b[column][k];
      d[r] += sum;
    }
  }
}

inline float HalfOfPair(uint32_t pair, int which, __nv_bfloat16) {
  return __bfloat162float({static_cast<uint16_t>(pair >> (16 * which))});
}
inline float HalfOfPair(uint32_t pair, int which, __half) {
  return __half2float({static_cast<uint16_t>(pair >> (16 * which))});
}

template <typename T>
CUDA_EMULATOR_UNWATCHED void CombineMma16(Block&, const Warp& warp) {
  MultiplyMatrices<16>(
      warp,
      [](auto operands, int row, int k) CUDA_EMULATOR_UNWATCHED {
        const int lane = row % 8 * 4 + k % 8 / 2;
        return HalfOfPair(operands(lane)->a[row / 8 + k / 8 * 2], k % 2, T{});
      },
      [](auto operands, int k, int column) CUDA_EMULATOR_UNWATCHED {
        const int lane = column * 4 + k % 8 / 2;
        return HalfOfPair(operands(lane)->b[k / 8], k % 2, T{});
      });
}

CUDA_EMULATOR_UNWATCHED inline void CombineMmaTf32(Block&, const Warp& warp) {
  constexpr uint32_t kUpper19Bits = 0xffffe000;
  MultiplyMatrices<8>(
      warp,
      [](auto operands, int row, int k) CUDA_EMULATOR_UNWATCHED {
        const uint32_t bits = operands(row % 8 * 4 + k % 4)->a[row / 8 + k / 4 * 2];
        return __uint_as_float(bits & kUpper19Bits);
      },
      [](auto operands, int k, int column) CUDA_EMULATOR_UNWATCHED {
        return __uint_as_float(operands(column * 4 + k % 4)->b[k / 4] & kUpper19Bits);
      });
}

inline void MmaBf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                    Place place = Place::Here()) {
  const MmaOperands in{a, b};
  Collective("MmaBf16", kWholeWarp, &in, d, CombineMma16<__nv_bfloat16>, false, place);
}
inline void MmaF16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                   Place place = Place::Here()) {
  const MmaOperands in{a, b};
  Collective("MmaF16", kWholeWarp, &in, d, CombineMma16<__half>, false, place);
}
inline void MmaTf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                    Place place = Place::Here()) {
  const MmaOperands in{a, b};
  Collective("MmaTf32", kWholeWarp, &in, d, CombineMmaTf32, false, place);
}

// in: a lane's own row of 8 values, already read. out: r[4].
template <bool kTransposed>
CUDA_EMULATOR_UNWATCHED void CombineLoadMatrix(Block&, const Warp& warp) {
  const auto at = [&warp](int matrix, int row, int column) CUDA_EMULATOR_UNWATCHED {
    return uint32_t{static_cast<const uint16_t*>(warp.in[8 * matrix + row])[column]};
  };
  for (int lane = 0; lane < static_cast<int>(kWarpSize); ++lane) {
    uint32_t* const r = static_cast<uint32_t*>(warp.out[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int matrix = 0; matrix < 4; ++matrix) {
      r[matrix] = kTransposed ? at(matrix, 2 * t, g) | at(matrix, 2 * t + 1, g) << 16
                              : at(matrix, g, 2 * t) | at(matrix, g, 2 * t + 1) << 16;
    }
  }
}

template <bool kTransposed>
void LoadMatrix(const char* call, uint32_t (&r)[4], const void* row, const Place& place) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) {
    current_block->Fail("%s at %s:%d: the row is not aligned to 16 bytes", call,
                        place.file, place.line);
  }
  // By the lane itself and in watched code, so that a sanitizer sees who reads what.
  uint16_t values[8];
  for (int i = 0; i < 8; ++i) values[i] = static_cast<const uint16_t*>(row)[i];
  Collective(call, kWholeWarp, values, r, CombineLoadMatrix<kTransposed>, false, place);
}

inline void LoadMatrixX4(uint32_t (&r)[4], const void* row, Place place = Place::Here()) {
  LoadMatrix<false>("LoadMatrixX4", r, row, place);
}
inline void LoadMatrixX4Transposed(uint32_t (&r)[4], const void* row,
                                   Place place = Place::Here()) {
  LoadMatrix<true>("LoadMatrixX4Transposed", r, row, place);
}

}  // namespace cuda_emulator
