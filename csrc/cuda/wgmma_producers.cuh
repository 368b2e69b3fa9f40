// The producers of "wgmma" (wgmma.cuh): one thread and TMA, or a warpgroup whose threads
// copy by themselves.

#pragma once

#include <cstdint>
#include <cstring>

#include "hopper.cuh"
#include "mma.cuh"
#include "wgmma_work.cuh"

namespace convgrad {

// ---- TMA --------------------------------------------------------------------------

// One copy of dY: channels k0.. of the rows from `pixel` on, `offset` beyond each.
__device__ __forceinline__ void CopyRows(const WgmmaParams& params,
                                         const CUtensorMap* map, void* to,
                                         uint64_t* barrier, int k0, int image,
                                         const int (&pixel)[kAxes],
                                         const uint16_t (&offset)[kAxes]) {
  if (params.axes == 2) {
    const int at[4] = {k0, pixel[2], pixel[1], image};
    const uint16_t beyond[2] = {offset[2], offset[1]};
    TmaLoadIm2col<4>(to, map, barrier, at, beyond);
  } else if (params.axes == 1) {
    const int at[3] = {k0, pixel[2], image};
    const uint16_t beyond[1] = {offset[2]};
    TmaLoadIm2col<3>(to, map, barrier, at, beyond);
  } else {
    const int at[5] = {k0, pixel[2], pixel[1], pixel[0], image};
    const uint16_t beyond[3] = {offset[2], offset[1], offset[0]};
    TmaLoadIm2col<5>(to, map, barrier, at, beyond);
  }
}

// One thread has TMA fill stages with the slices of all of the block's tiles.
template <typename T, typename S>
__device__ __forceinline__ void ProduceByTma(const WgmmaParams& params,
                                             unsigned char* ring, uint64_t* full,
                                             uint64_t* empty) {
  const Geometry<int32_t>& g = params.mma.geometry;
  PrefetchTensorMap(&params.w);
  RingPlace<S::kStages> place;
  for (unsigned round = 0; round < Rounds(params); ++round) {
    TilePlace<int32_t> at;
    WgmmaWork work;
    if (!PlanRound<S>(params, round, at, work)) continue;
    unsigned phase = 0;
    int pixel[kAxes], furthest[kAxes];
#pragma unroll
    for (int a = 0; a < kAxes; ++a) {
      phase = phase * static_cast<unsigned>(params.mma.grid.phases[a].divisor) +
              static_cast<unsigned>(at.h0[a]);
      furthest[a] = (at.phase[a].r_count - 1) * g.axis[a].p_per_r.divisor;
      pixel[a] = work.first.p[a] - furthest[a];
    }
    SlicePlace next = FirstSlice<S>(work);
    for (int32_t slice = 0; slice < work.slices; ++slice) {
      MbarrierWait(empty + place.stage, place.parity ^ 1);
      uint64_t* const barrier = full + place.stage;
      unsigned char* const to = ring + place.stage * S::kStageBytes;
      MbarrierArriveExpect(barrier, S::kStageBytes);
      uint16_t offset[kAxes];
      int32_t shift[kAxes], r[kAxes];
      PlaceTap(g, work, next, shift, r);
#pragma unroll
      for (int a = 0; a < kAxes; ++a) {
        offset[a] = static_cast<uint16_t>(furthest[a] - shift[a]);
      }
      // A group's channels lie beside those of the next.
      const int32_t k = at.group * g.out_channels + next.k0;
      CopyRows(params, params.dy + phase, to, barrier, k, work.first.n, pixel, offset);
      if constexpr (sizeof(T) == 2) {
#pragma unroll 1
        for (int panel = 0; panel < S::kN / S::kPanel; ++panel) {
          const int from[5] = {at.c0 + panel * S::kPanel, k, r[2], r[1], r[0]};
          TmaLoad<5>(to + S::kBytesA + panel * S::kPanelBytes, &params.w, barrier, from);
        }
      } else {
        const int from[3] = {next.k0, at.c0, RepackedTap(params, at.group, r)};
        TmaLoad<3>(to + S::kBytesA, &params.w, barrier, from);
      }
      place.Advance();
      AdvanceSlice<S>(work, g.out_channels, next);
    }
  }
}

// ---- threads that copy ------------------------------------------------------------

// What a warp copies at once of rows of 128 bytes: pieces of kBytes, side by side.
template <int kBytes>
struct RowPieces {
  static constexpr int kAcross = kSwizzleBytes / kBytes, kRows = 32 / kAcross;
};

// Where byte `byte` of a row lies in an operand.
__device__ __forceinline__ int SwizzledByte(int row, int byte) {
  return row * kSwizzleBytes + ((byte / 16 ^ row % 8) * 16) + byte % 16;
}

// Starts a warp's copies of rows first.. of an operand at `to`. offset_of(row) is where
// such a row begins in `from`, or negative for a row of zeros; `left` bytes of it exist,
// and the rest are zeros.
template <int kBytes, int kRows, typename T, typename OffsetOf>
__device__ __forceinline__ void CopyRowsAsync(unsigned char* to, int first,
                                              const T* __restrict__ from, int left,
                                              int lane, OffsetOf offset_of) {
  using Pieces = RowPieces<kBytes>;
  static_assert(kRows % Pieces::kRows == 0, "whole turns of the warp");
  const int byte = lane % Pieces::kAcross * kBytes;
  const int rest = left - byte < kBytes ? left - byte : kBytes;
  const int element = byte / static_cast<int>(sizeof(T));
#pragma unroll 4
  for (int r = 0; r < kRows; r += Pieces::kRows) {
    const int row = first + r + lane / Pieces::kAcross;
    const int32_t offset = offset_of(row);
    const int bytes = offset < 0 || rest < 0 ? 0 : rest;
    CopyAsync<kBytes>(to + SwizzledByte(row, byte),
                      bytes > 0 ? from + offset + element : from, bytes);
  }
}

// The same by way of registers, for 16-bit values that lie at odd places.
template <int kRows, typename T, typename OffsetOf>
__device__ __forceinline__ void CopyRowsByValue(unsigned char* to, int first,
                                                const T* __restrict__ from, int left,
                                                int lane, OffsetOf offset_of) {
  constexpr int kAtOnce = 8;  // that many loads of each value are under way
  static_assert(sizeof(T) == 2 && kRows % kAtOnce == 0, "pairs of values, whole turns");
  const int element = lane * 2;
  const int count = left / 2 - element;
#pragma unroll 1
  for (int r = 0; r < kRows; r += kAtOnce) {
    T pair[kAtOnce][2];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int32_t offset = offset_of(first + r + i);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        pair[i][e] = offset >= 0 && e < count ? from[offset + element + e] : T{};
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      uint32_t word;
      std::memcpy(&word, pair[i], sizeof(word));
      StoreShared(to + SwizzledByte(first + r + i, lane * 4), word);
    }
  }
}

// Either, by the bytes to which rows of `from` are aligned.
template <int kRows, typename T, typename OffsetOf>
__device__ __forceinline__ void CopyRowsOfWarp(unsigned char* to, int first,
                                               const T* __restrict__ from, int width,
                                               int left, int lane, OffsetOf offset_of) {
  if (width == 16) {
    CopyRowsAsync<16, kRows>(to, first, from, left, lane, offset_of);
  } else if (width == 8) {
    CopyRowsAsync<8, kRows>(to, first, from, left, lane, offset_of);
  } else if (sizeof(T) == 4 || width == 4) {
    CopyRowsAsync<4, kRows>(to, first, from, left, lane, offset_of);
  } else if constexpr (sizeof(T) == 2) {
    CopyRowsByValue<kRows>(to, first, from, left, lane, offset_of);
  }
}

// The warps of a warpgroup fill stages with the slices of all of the block's tiles. Each
// copies some rows of every operand and knows nothing of the other warps.
//
// cp.async and ordinary stores write shared memory by the generic proxy, wgmma reads it
// by the async proxy: of what a thread has written, and waited for if that was
// asynchronous, wgmma sees what comes before that thread's fence.proxy.async (PTX ISA,
// "wgmma.mma_async", "Async proxy"). So a stage is not announced by
// cp.async.mbarrier.arrive, between which and the copy no thread could fence, but
// kLag slices later. In the other direction the ISA has the fence in the end of a wgmma.
template <typename T, typename S>
__device__ __forceinline__ void ProduceByCopies(const WgmmaParams& params,
                                                unsigned char* ring, uint64_t* full,
                                                uint64_t* empty, const T* __restrict__ dy,
                                                const T* __restrict__ w) {
  // A consumer gives a stage back when it has the next one.
  constexpr int kLag = S::kStages - 2;
  constexpr int kSize = static_cast<int>(sizeof(T));
  constexpr int kRowsOfWarp = S::kM / kWarpsOfGroup;
  constexpr int kRowsOfLane = (kRowsOfWarp + 31) / 32;
  const Geometry<int32_t>& g = params.mma.geometry;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32 % kWarpsOfGroup;
  int32_t* const dy_rows = reinterpret_cast<int32_t*>(ring + S::kRowsAt);
  RingPlace<S::kStages> place, announced;
  int behind = 0;
  const auto announce = [&] {
    FenceProxyAsync();
    __syncwarp();
    if (lane == 0) MbarrierArrive(full + announced.stage);
    announced.Advance();
  };
  for (unsigned round = 0; round < Rounds(params); ++round) {
    TilePlace<int32_t> at;
    WgmmaWork work;
    if (!PlanRound<S>(params, round, at, work)) continue;
    TileRow<int32_t> rows[kRowsOfLane];
#pragma unroll
    for (int i = 0; i < kRowsOfLane; ++i) {
      rows[i] = MakeTileRow(g, at, at.m0 + warp * kRowsOfWarp + i * 32 + lane);
    }
    SlicePlace next = FirstSlice<S>(work);
    bool other_tap = true;
    int32_t r[kAxes], w_tap = 0;
    for (int32_t slice = 0; slice < work.slices; ++slice) {
      if (other_tap) {
        int32_t shift[kAxes], dy_tap = 0;
        PlaceTap(g, work, next, shift, r);
        w_tap = at.group * g.w_group;
#pragma unroll
        for (int a = 0; a < kAxes; ++a) {
          dy_tap -= shift[a] * g.axis[a].dy_stride;
          w_tap += r[a] * g.axis[a].w_stride;
        }
        __syncwarp();  // nobody still reads about the tap before
#pragma unroll
        for (int i = 0; i < kRowsOfLane; ++i) {
          if (i * 32 + lane >= kRowsOfWarp) continue;
          dy_rows[warp * kRowsOfWarp + i * 32 + lane] =
              Reaches(g, rows[i], shift) ? rows[i].dy + dy_tap : -1;
        }
        __syncwarp();
      }
      MbarrierWait(empty + place.stage, place.parity ^ 1);
      unsigned char* const to = ring + place.stage * S::kStageBytes;
      const int32_t k0 = next.k0, k_left = g.out_channels - k0;
      CopyRowsOfWarp<kRowsOfWarp>(to, warp * kRowsOfWarp, dy, params.mma.dy_width,
                                  k_left * kSize, lane, [&](int row) {
                                    const int32_t from = dy_rows[row];
                                    return from < 0 ? from : from + k0;
                                  });
      unsigned char* const b_to = to + S::kBytesA;
      if constexpr (kSize == 2) {
        constexpr int kDepths = S::kK / kWarpsOfGroup;
#pragma unroll 1
        for (int panel = 0; panel < S::kN / S::kPanel; ++panel) {
          const int32_t c = at.c0 + panel * S::kPanel;
          CopyRowsOfWarp<kDepths>(
              b_to + panel * S::kPanelBytes, warp * kDepths, w, params.mma.w_width,
              (g.in_channels - c) * kSize, lane, [&](int row) {
                return row < k_left ? w_tap + (k0 + row) * g.w_out_channel + c : -1;
              });
        }
      } else {
        constexpr int kColumns = S::kN / kWarpsOfGroup;
        const int32_t first = RepackedTap(params, at.group, r) * g.in_channels + at.c0;
        CopyRowsAsync<16, kColumns>(
            b_to, warp * kColumns, params.repacked, k_left * kSize, lane, [&](int row) {
              return at.c0 + row < g.in_channels
                         ? (first + row) * params.repacked_row + k0
                         : -1;
            });
      }
      CopyAsyncCommit();
      place.Advance();
      other_tap = AdvanceSlice<S>(work, g.out_channels, next);
      if (behind < kLag) {
        ++behind;
      } else {
        CopyAsyncWait<kLag>();
        announce();
      }
    }
  }
  CopyAsyncWait<0>();
  for (; behind > 0; --behind) announce();
}

}  // namespace convgrad
