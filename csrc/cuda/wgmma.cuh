// "wgmma": implicit GEMM on the tensor cores of sm_90a, fed by TMA (the tensor memory
// accelerator), or by threads where that cannot fetch.
//
// The product is that of mma.cuh. What differs is how it is done. A block has three
// warpgroups: the third, the producer, fetches slices of both operands into a ring of
// kStages in shared memory; the other two, the consumers, multiply them there by wgmma.
// The ring goes on from tile to tile, so that the next
// one's slices come while a tile's sums are stored. Blocks stay and take tile after tile.
//
// TMA is told by one thread (wgmma_producers.cuh). Operand A, kM rows by 128 bytes of
// channels of dY, is one copy in im2col mode. For one phase (phase.h), position i reads,
// at tap t, the pixel p0 + i*p_per_h - t*p_per_r of dY on each axis; p_per_h is 1 unless
// dX was dilated (lhs_dilation), whatever the stride. With T taps and H positions it is
//
//   (p0 - (T-1)*p_per_r) + i*p_per_h + (T-1-t)*p_per_r,   0 <= i < H
//
// where the first term is the lower corner of the map's bounding box, which holds H
// pixels p_per_h apart, and the last term the copy's offset. So each phase has a map of
// its own, which the host encodes, and TMA goes from row to row and from image to image
// in the order of the tile's rows. What lies outside dY becomes zero.
//
// Operand B, of 16-bit types: 128 bytes of input channels by 64 k, as they lie in W, in
// kN / 64 copies; wgmma takes it by rows. For TF32 wgmma wants K along the rows, so a
// kernel before this one writes W transposed to the workspace, [tap][C][K], rounded to
// nearest. dY is cut off by the tensor core, an error of up to 2^-10.
//
//   tile       consumers      a consumer's products of a slice      stages
//   128 x 256  two of rows    4 of 64 x 256                         4
//   128 x 128  two of rows    4 of 64 x 128                         6
//   256 x  64  two of rows    8 of 64 x  64                         5
//    64 x 128  two of columns 4 of 64 x  64                         6
//
// Threads put the same bytes into the same places by cp.async, 16, 8 or 4 at once: each
// warp its share of the rows, whose offsets in dY it works out once a tap. 16-bit values
// at odd places go through registers. What does not exist becomes zero there too.
//
// Sums leave from registers: the lanes of a quad exchange theirs, and each stores 16
// bytes (8 of f32), whole sectors of 32, or what dX is aligned to. Split K, phases
// without taps, patches, and results that are not finite are as in mma.cuh; tiles, live
// taps and parts are numbered as there.
//
// Block b takes, in round j, the tile at j*grid + (b + j*channel_tiles) % grid: were it
// always at b, blocks would keep to one phase of a strided gradient, and some phases have
// more taps than others.
//
// Limits: those of mma.cuh; several groups only if each has out channels that are whole
// slices and input channels that are whole vectors, of 16 bytes (8 of f32). TMA is used
// for whole vectors of input channels; rows of dY that are whole chunks of 16 bytes, as
// are W's of 16-bit types; groups side by side; at most kWgmmaPhases phases; taps,
// padding and lhs_dilation within its corners, offsets and steps (tensor_map.cuh).

#pragma once

#include <cstdint>

#include "hopper.cuh"
#include "mma.cuh"
#include "wgmma_producers.cuh"
#include "wgmma_work.cuh"

namespace convgrad {

// ---- the consumers ----------------------------------------------------------------

template <int kColumns>
__device__ __forceinline__ void Wgmma(float (&d)[kColumns / 2], uint64_t a, uint64_t b,
                                      __nv_bfloat16) {
  WgmmaBf16<kColumns, true>(d, a, b);
}
template <int kColumns>
__device__ __forceinline__ void Wgmma(float (&d)[kColumns / 2], uint64_t a, uint64_t b,
                                      __half) {
  WgmmaF16<kColumns, true>(d, a, b);
}
template <int kColumns>
__device__ __forceinline__ void Wgmma(float (&d)[kColumns / 2], uint64_t a, uint64_t b,
                                      float) {
  WgmmaTf32<kColumns>(d, a, b);
}

template <typename S>
using WgmmaSums = float[S::kProducts][S::kColumns / 2];

template <typename S>
__device__ __forceinline__ void PinSums(WgmmaSums<S>& sum) {
#pragma unroll
  for (int i = 0; i < S::kProducts; ++i) {
#pragma unroll
    for (int j = 0; j < S::kColumns / 2; ++j) PinSum(sum[i][j]);
  }
}

// Issues a slice's products as one group. `stage` is the slice's address.
template <typename T, typename S>
__device__ __forceinline__ void MultiplyStage(uint32_t stage, int group_m, int group_n,
                                              WgmmaSums<S>& sum) {
  const uint32_t a_at = stage + group_m * S::kRowsOfGroup * kSwizzleBytes;
  const uint32_t b_at = stage + S::kBytesA;
  PinSums<S>(sum);
  WgmmaFence();
#pragma unroll
  for (int step = 0; step < kSwizzleBytes / kWgmmaDepthBytes; ++step) {
    const uint32_t along_k = step * kWgmmaDepthBytes;
    uint64_t b;
    if constexpr (sizeof(T) == 2) {
      constexpr int kDepth = kWgmmaDepthBytes / static_cast<int>(sizeof(T));
      b = OperandByRows(b_at + group_n * (S::kColumns / S::kPanel) * S::kPanelBytes +
                            step * kDepth * kSwizzleBytes,
                        S::kPanelBytes);
    } else {
      b = OperandAlongK(b_at + group_n * S::kColumns * kSwizzleBytes + along_k);
    }
#pragma unroll
    for (int i = 0; i < S::kProducts; ++i) {
      const uint32_t rows = a_at + i * kWgmmaRows * kSwizzleBytes;
      Wgmma<S::kColumns>(sum[i], OperandAlongK(rows + along_k), b, T{});
    }
  }
  WgmmaCommit();
}

// The sums of strip s of a product, as StoreStrip takes them.
__device__ __forceinline__ void CopyStrip(const float* sum, int strip,
                                          float (&to)[kMmaStripTiles][4]) {
#pragma unroll
  for (int j = 0; j < kMmaStripTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) to[j][e] = sum[(strip * kMmaStripTiles + j) * 4 + e];
  }
}

// Stores a consumer's sums, or its part of them to the workspace. `row` and `column` are
// those of its first warp within the tile.
template <bool kVectorsOnly, typename T, typename S>
__device__ __forceinline__ void StoreSums(const MmaParams& params, unsigned item,
                                          unsigned tile, int row, int column, int lane,
                                          const WgmmaSums<S>& sum,
                                          const T* __restrict__ dy,
                                          const T* __restrict__ w, T* __restrict__ dx,
                                          float4* __restrict__ partial) {
  const Geometry<int32_t>& g = params.geometry;
  constexpr int kStripsAcross = S::kN / kMmaWarpN;
  if (params.parts > 1) {
#pragma unroll
    for (int i = 0; i < S::kProducts; ++i) {
#pragma unroll
      for (int s = 0; s < S::kStrips; ++s) {
        const int strip = (row + i * kWgmmaRows) / kMmaStripRows * kStripsAcross +
                          column / kMmaWarpN + s;
        float v[kMmaStripTiles][4];
        CopyStrip(sum[i], s, v);
#pragma unroll
        for (int j = 0; j < kMmaStripTiles; ++j) {
          partial[PartialAt(item, S::kM / kMmaStripRows * kStripsAcross, strip, j,
                            lane)] = {v[j][0], v[j][1], v[j][2], v[j][3]};
        }
      }
    }
    return;
  }
  const TilePlace<int32_t> at = PlaceTile(g, params.grid, tile);
  const int32_t c0 = at.c0 + column;
#pragma unroll
  for (int i = 0; i < S::kProducts; ++i) {
    const int32_t m = at.m0 + row + i * kWgmmaRows;
    int32_t row_at[2] = {};
    bool row_exists[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t of_lane = m + lane / 4 + half * 8;
      row_exists[half] = of_lane < at.row_count;
      if (row_exists[half]) row_at[half] = OffsetInDx(g, at, PlaceRow(g, at, of_lane));
    }
    constexpr int kWords = (S::kStrips + 3) / 4;  // of four strips' bits
    uint64_t special[kWords] = {};
#pragma unroll
    for (int s = 0; s < S::kStrips; ++s) {
      float v[kMmaStripTiles][4];
      CopyStrip(sum[i], s, v);
      const unsigned found = StoreStrip<kVectorsOnly>(params, v, row_at, row_exists,
                                                      c0 + s * kMmaWarpN, lane, dx);
      special[s / 4] |= static_cast<uint64_t>(found) << (16 * (s % 4));
    }
    // One copy of its code; an array must not be indexed by what only the run knows.
#pragma unroll 1
    for (int word = 0; word < kWords; ++word) {
      Repair<T, 0, kMmaWarpN>(params, at, word == 0 ? special[0] : special[kWords - 1], m,
                              c0 + word * 4 * kMmaWarpN, lane, dy, w, dx);
    }
  }
}

template <bool kVectorsOnly, typename T, typename S>
__device__ __forceinline__ void Consume(const WgmmaParams& params,
                                        const unsigned char* ring, uint64_t* full,
                                        uint64_t* empty, const T* __restrict__ dy,
                                        const T* __restrict__ w, T* __restrict__ dx,
                                        float4* __restrict__ partial) {
  const Geometry<int32_t>& g = params.mma.geometry;
  const TileGrid& grid = params.mma.grid;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int group_m = thread / kWarpgroupThreads / S::kGroupsN;
  const int group_n = thread / kWarpgroupThreads % S::kGroupsN;
  const uint32_t ring_at = SharedAddress(ring);
  RingPlace<S::kStages> place;
  for (unsigned round = 0; round < Rounds(params); ++round) {
    const unsigned item = ItemOfRound(params, round);
    if (item >= params.items) continue;
    const unsigned part = PartOfItem(params, item), tile = item - part * grid.total;
    int32_t slices = 0;
    {
      const TilePlace<int32_t> at = PlaceTile(g, grid, tile);
      if (at.m0 >= at.row_count) continue;
      if (IsDead(at)) {
        if (params.mma.parts == 1) {
          StoreZeros<T, S::kM, S::kN, kWgmmaConsumers * kWarpgroupThreads>(params.mma, at,
                                                                           thread, dx);
          continue;
        }
      } else {
        slices = PlanWork<S>(params.mma, at, part).slices;
      }
    }
    WgmmaSums<S> sum;
#pragma unroll
    for (int i = 0; i < S::kProducts; ++i) {
#pragma unroll
      for (int j = 0; j < S::kColumns / 2; ++j) sum[i][j] = 0;
    }
    int behind = 0;  // the stage of the products under way
#pragma unroll 1
    for (int32_t slice = 0; slice < slices; ++slice) {
      MbarrierWait(full + place.stage, place.parity);
      MultiplyStage<T, S>(ring_at + place.stage * S::kStageBytes, group_m, group_n, sum);
      // The slice before has been multiplied; its stage is free.
      WgmmaWait<1>();
      if (slice > 0 && lane == 0) MbarrierArrive(empty + behind);
      behind = place.stage;
      place.Advance();
    }
    WgmmaWait<0>();
    PinSums<S>(sum);
    if (slices > 0 && lane == 0) MbarrierArrive(empty + behind);
    const int warp = thread / 32 % 4;
    StoreSums<kVectorsOnly, T, S>(params.mma, item, tile,
                                  group_m * S::kRowsOfGroup + warp * kMmaStripRows,
                                  group_n * S::kColumns, lane, sum, dy, w, dx, partial);
  }
}

// ---- the kernels ------------------------------------------------------------------

template <typename T, int kTileM, int kTileN, int kGroupsN, bool kCopies>
__global__ void __launch_bounds__(kWgmmaThreads, 1)
    WgmmaKernel(const __grid_constant__ WgmmaParams params, const T* __restrict__ dy,
                const T* __restrict__ w, T* __restrict__ dx,
                float4* __restrict__ partial) {
#ifdef CONVGRAD_HOPPER
  using S = WgmmaTile<T, kTileM, kTileN, kGroupsN>;
  CU_DYNAMIC_SHARED_ALIGNED(ring, kSwizzleAtomBytes);
  uint64_t* const full = reinterpret_cast<uint64_t*>(ring + S::kBarriersAt);
  uint64_t* const empty = full + S::kStages;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < S::kStages; ++stage) {
      MbarrierInit(full + stage, kCopies ? kWarpsOfGroup : 1);
      MbarrierInit(empty + stage, kWgmmaConsumerWarps);
    }
    MbarrierFenceInit();
  }
  __syncthreads();
  using Registers = WgmmaRegisters<kCopies>;
  if (threadIdx.x >= kWgmmaConsumers * kWarpgroupThreads) {
    GiveRegisters<Registers::kProducer>();
    if constexpr (kCopies) {
      ProduceByCopies<T, S>(params, ring, full, empty, dy, w);
    } else if (__shfl_sync(0xffffffffu, threadIdx.x / 32, 0) == kWgmmaConsumerWarps) {
      // A shuffle, so that ptxas sees: for all lanes.
      if (ElectLane()) ProduceByTma<T, S>(params, ring, full, empty);
    }
  } else {
    TakeRegisters<Registers::kConsumer>();
    Consume<!kCopies, T, S>(params, ring, full, empty, dy, w, dx, partial);
  }
#endif
}

// ---- the filter for TF32 ----------------------------------------------------------

struct RepackParams {
  int32_t in_channels, out_channels;
  int32_t win[kAxes], w_axis[kAxes];
  int32_t w_group, w_out_channel, w_in_channel;
  int32_t row;  // how far apart rows of K are
};

constexpr int kRepackTile = 32, kRepackRows = 8;

// to[group][tap][c][k] = w[group, k, c, tap] to nearest TF32. A block does 32 x 32 of one
// group's tap.
__global__ void __launch_bounds__(kRepackTile* kRepackRows)
    WgmmaRepackKernel(const __grid_constant__ RepackParams params,
                      const float* __restrict__ w, float* __restrict__ to) {
  __shared__ float values[kRepackTile][kRepackTile + 1];
  const int x = static_cast<int>(threadIdx.x) % kRepackTile;
  const int y = static_cast<int>(threadIdx.x) / kRepackTile;
  const int32_t tap = static_cast<int32_t>(blockIdx.z);
  const int32_t k0 = static_cast<int32_t>(blockIdx.y) * kRepackTile;
  const int32_t c0 = static_cast<int32_t>(blockIdx.x) * kRepackTile;
  const int32_t r2 = tap % params.win[2], rest = tap / params.win[2];
  const int32_t r1 = rest % params.win[1], rest1 = rest / params.win[1];
  const int32_t r0 = rest1 % params.win[0], group = rest1 / params.win[0];
  const int32_t from = group * params.w_group + r0 * params.w_axis[0] +
                       r1 * params.w_axis[1] + r2 * params.w_axis[2];
  for (int row = y; row < kRepackTile; row += kRepackRows) {
    const int32_t k = k0 + row, c = c0 + x;
    if (k < params.out_channels && c < params.in_channels) {
      values[row][x] = w[from + k * params.w_out_channel + c * params.w_in_channel];
    }
  }
  __syncthreads();
  for (int row = y; row < kRepackTile; row += kRepackRows) {
    const int32_t k = k0 + x, c = c0 + row;
    if (k < params.out_channels && c < params.in_channels) {
      to[(tap * params.in_channels + c) * params.row + k] =
          FromBits(RoundToTf32(values[x][row]));
    }
  }
}

}  // namespace convgrad
