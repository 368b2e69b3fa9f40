// "wgmma": implicit GEMM on the tensor cores of sm_90a, fed by the copy engine.
//
// The product is that of mma.cuh. What differs is how it is done. A block has three
// warpgroups: one thread of the third, the producer, has the copy engine fetch slices of
// both operands into a ring of kStages in shared memory; the other two, the consumers,
// multiply them there by wgmma. The ring goes on from tile to tile, so that the next
// one's slices come while a tile's sums are stored. Blocks stay and take tile after tile.
//
// Operand A, kM rows by 128 bytes of channels of dY, is one copy in im2col mode. For one
// phase (phase.h), position i reads, at tap t, the pixel p0 + i*p_per_h - t*p_per_r of dY
// on each axis; p_per_h is 1 unless dX was dilated (lhs_dilation), whatever the stride.
// With T taps and H positions it is
//
//   (p0 - (T-1)*p_per_r) + i*p_per_h + (T-1-t)*p_per_r,   0 <= i < H
//
// where the first term is the lower corner of the map's bounding box, which holds H
// pixels p_per_h apart, and the last term the copy's offset. So each phase has a map of
// its own, which the host encodes, and the engine goes from row to row and from image to
// image in the order of the tile's rows. What lies outside dY becomes zero.
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
// Sums leave from registers: the lanes of a quad exchange theirs, and each stores 16
// bytes (8 of f32), whole sectors of 32. Split K, phases without taps, patches, and
// results that are not finite are as in mma.cuh; tiles, live taps and parts are numbered
// as there.
//
// Block b takes, in round j, the tile at j*grid + (b + j*channel_tiles) % grid: were it
// always at b, blocks would keep to one phase of a strided gradient, and some phases have
// more taps than others.
//
// Limits: those of mma.cuh, and one group; input channels that are whole vectors of 16
// bytes (8 of f32); rows of dY that are whole chunks of 16 bytes, as are W's of 16-bit
// types; at most kWgmmaPhases phases; taps, padding and lhs_dilation within the corners,
// offsets and steps of the copy engine (tensor_map.cuh). "mma" takes what this kernel
// does not.

#pragma once

#include <cstdint>
#include <type_traits>

#include "hopper.cuh"
#include "mma.cuh"
#include "tensor_map.cuh"

namespace convgrad {

constexpr int kWgmmaPhases = 16;  // as many maps as the parameters have room for
constexpr int kWgmmaConsumers = 2;
constexpr int kWgmmaThreads = (kWgmmaConsumers + 1) * kWarpgroupThreads;
constexpr int kWgmmaConsumerWarps = kWgmmaConsumers * kWarpgroupThreads / 32;
constexpr int kWgmmaRows = 64;        // of an instruction
constexpr int kWgmmaDepthBytes = 32;  // of its K
constexpr int kWgmmaMostStages = 6;
constexpr int kWgmmaSlack = 256;  // as kMmaSlack
// A block starts with 168 registers a thread, all that a multiprocessor has.
constexpr int kWgmmaProducerRegisters = 56, kWgmmaConsumerRegisters = 224;
static_assert(kWgmmaProducerRegisters + kWgmmaConsumers * kWgmmaConsumerRegisters <=
                  (kWgmmaConsumers + 1) * 168,
              "registers that are taken must have been given");

template <typename T, int kTileM, int kTileN, int kGroups>
struct WgmmaTile {
  static constexpr int kM = kTileM, kN = kTileN;
  static constexpr int kGroupsN = kGroups;  // consumers side by side
  static constexpr int kGroupsM = kWgmmaConsumers / kGroupsN;
  static constexpr int kK = kSwizzleBytes / static_cast<int>(sizeof(T));
  static constexpr int kRowsOfGroup = kM / kGroupsM;
  static constexpr int kProducts = kRowsOfGroup / kWgmmaRows;
  static constexpr int kColumns = kN / kGroupsN;  // of a product
  static constexpr int kStrips = kColumns / kMmaWarpN;

  static constexpr int kBytesA = kM * kSwizzleBytes;
  static constexpr int kBytesB = kN * kSwizzleBytes;
  static constexpr int kStageBytes = kBytesA + kBytesB;
  // Operand B of 16-bit types is in panels of 64 columns.
  static constexpr int kPanel = 64, kPanelBytes = kK * kSwizzleBytes;
  static constexpr int kRoom = 227 * 1024 - 2 * kWgmmaMostStages * 8;
  static constexpr int kStages =
      kRoom / kStageBytes < kWgmmaMostStages ? kRoom / kStageBytes : kWgmmaMostStages;
  static constexpr int kBarriersAt = kStages * kStageBytes;
  static constexpr int kSharedBytes = kBarriersAt + 2 * kStages * 8;

  static_assert(kM % (kGroupsM * kWgmmaRows) == 0 && kN % (kGroupsN * 64) == 0,
                "consumers share the tile evenly");
  static_assert(kStages >= 3, "copies need a head start");
  static_assert(kProducts * kColumns / 2 <= 128,
                "sums must leave registers for the rest");
};

struct WgmmaParams {
  MmaParams mma;
  unsigned items;  // parts of tiles
  int axes;        // of dY's maps: the last ones, without leading axes of size one
  int win[kAxes];  // taps of the filter
  CUtensorMap w;
  CUtensorMap dy[kWgmmaPhases];  // by the number of the phase
};

// ---- what a tile needs ------------------------------------------------------------

// Taps and slices of one part of one tile.
struct WgmmaWork {
  RowPlace<int32_t> first;  // its first row
  TapSpan<int32_t> spans[kAxes];
  int32_t first_slice, slices, slices_per_tap;
};

template <typename S>
__device__ __forceinline__ WgmmaWork PlanWork(const MmaParams& params,
                                              const TilePlace<int32_t>& at,
                                              unsigned part) {
  const Geometry<int32_t>& g = params.geometry;
  const int32_t m_end = at.m0 + S::kM < at.row_count ? at.m0 + S::kM : at.row_count;
  WgmmaWork work;
  work.first = PlaceRow(g, at, at.m0);
  const RowPlace<int32_t> last = PlaceRow(g, at, m_end - 1);
  const int32_t taps = LiveTapsBetween(g, at, work.first.n == last.n, work.first.p,
                                       last.p, true, work.spans);
  work.slices_per_tap = (g.out_channels + S::kK - 1) / S::kK;
  const PartOfSlices share = ShareSlices(taps * work.slices_per_tap, part, params.parts);
  work.first_slice = share.first;
  work.slices = share.count;
  return work;
}

// The tile that a block takes in a round, as a part's and a tile's number.
__device__ __forceinline__ unsigned ItemOfRound(const WgmmaParams& params,
                                                unsigned round) {
  const unsigned turn = blockIdx.x + round * params.mma.grid.channel_tiles;
  return round * gridDim.x + turn % gridDim.x;
}

__device__ __forceinline__ unsigned Rounds(const WgmmaParams& params) {
  return (params.items + gridDim.x - 1) / gridDim.x;
}

// A stage of the ring, and the parity of the phase that its barriers are in.
template <int kStages>
struct RingPlace {
  int stage = 0;
  unsigned parity = 0;

  __device__ __forceinline__ void Advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// ---- the producer -----------------------------------------------------------------

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

// Fills stages with the slices of all of the block's tiles.
template <typename T, typename S>
__device__ __forceinline__ void Produce(const WgmmaParams& params, unsigned char* ring,
                                        uint64_t* full, uint64_t* empty) {
  const Geometry<int32_t>& g = params.mma.geometry;
  const TileGrid& grid = params.mma.grid;
  RingPlace<S::kStages> place;
  for (unsigned round = 0; round < Rounds(params); ++round) {
    const unsigned item = ItemOfRound(params, round);
    if (item >= params.items) continue;
    const unsigned part = item / grid.total, tile = item - part * grid.total;
    const TilePlace<int32_t> at = PlaceTile(g, grid, tile);
    if (at.m0 >= at.row_count || IsDead(at)) continue;
    const WgmmaWork work = PlanWork<S>(params.mma, at, part);
    if (work.slices == 0) continue;
    unsigned phase = 0;
    int pixel[kAxes], furthest[kAxes];
    int32_t t[kAxes], tap = work.first_slice / work.slices_per_tap;
    int32_t k0 = (work.first_slice - tap * work.slices_per_tap) * S::kK;
#pragma unroll
    for (int a = 0; a < kAxes; ++a) {
      phase = phase * grid.phases[a] + static_cast<unsigned>(at.h0[a]);
      furthest[a] = (at.phase[a].r_count - 1) * g.axis[a].p_per_r.divisor;
      pixel[a] = work.first.p[a] - furthest[a];
    }
#pragma unroll
    for (int a = kAxes - 1; a >= 0; --a) {
      t[a] = tap % work.spans[a].count;
      tap /= work.spans[a].count;
    }
    for (int32_t slice = 0; slice < work.slices; ++slice) {
      MbarrierWait(empty + place.stage, place.parity ^ 1);
      uint64_t* const barrier = full + place.stage;
      unsigned char* const to = ring + place.stage * S::kStageBytes;
      MbarrierArriveExpect(barrier, S::kStageBytes);
      uint16_t offset[kAxes];
      int r[kAxes];
#pragma unroll
      for (int a = 0; a < kAxes; ++a) {
        const int32_t shift = work.spans[a].shift + t[a] * g.axis[a].p_per_r.divisor;
        offset[a] = static_cast<uint16_t>(furthest[a] - shift);
        r[a] = work.spans[a].r + t[a] * g.axis[a].r_step;
      }
      CopyRows(params, params.dy + phase, to, barrier, k0, work.first.n, pixel, offset);
      if constexpr (sizeof(T) == 2) {
#pragma unroll 1
        for (int panel = 0; panel < S::kN / S::kPanel; ++panel) {
          const int from[5] = {at.c0 + panel * S::kPanel, k0, r[2], r[1], r[0]};
          TmaLoad<5>(to + S::kBytesA + panel * S::kPanelBytes, &params.w, barrier, from);
        }
      } else {
        const int filter_tap = (r[0] * params.win[1] + r[1]) * params.win[2] + r[2];
        const int from[3] = {k0, at.c0, filter_tap};
        TmaLoad<3>(to + S::kBytesA, &params.w, barrier, from);
      }
      place.Advance();
      k0 += S::kK;
      if (k0 < g.out_channels) continue;
      k0 = 0;
      ++t[2];
      if (t[2] == work.spans[2].count) {
        t[2] = 0;
        ++t[1];
      }
      if (t[1] == work.spans[1].count) {
        t[1] = 0;
        ++t[0];
      }
    }
  }
}

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
template <typename T, typename S>
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
      const unsigned found =
          StoreStrip<true>(params, v, row_at, row_exists, c0 + s * kMmaWarpN, lane, dx);
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

template <typename T, typename S>
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
    const unsigned part = item / grid.total, tile = item - part * grid.total;
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
    StoreSums<T, S>(params.mma, item, tile,
                    group_m * S::kRowsOfGroup + warp * kMmaStripRows,
                    group_n * S::kColumns, lane, sum, dy, w, dx, partial);
  }
}

// ---- the kernels ------------------------------------------------------------------

template <typename T, int kTileM, int kTileN, int kGroupsN>
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
      MbarrierInit(full + stage, 1);
      MbarrierInit(empty + stage, kWgmmaConsumerWarps);
    }
    MbarrierFenceInit();
  }
  __syncthreads();
  if (threadIdx.x >= kWgmmaConsumers * kWarpgroupThreads) {
    GiveRegisters<kWgmmaProducerRegisters>();
    if (threadIdx.x == kWgmmaConsumers * kWarpgroupThreads) {
      Produce<T, S>(params, ring, full, empty);
    }
  } else {
    TakeRegisters<kWgmmaConsumerRegisters>();
    Consume<T, S>(params, ring, full, empty, dy, w, dx, partial);
  }
#endif
}

// ---- the filter for TF32 ----------------------------------------------------------

struct RepackParams {
  int32_t in_channels, out_channels;
  int32_t win[kAxes], w_axis[kAxes];
  int32_t w_out_channel, w_in_channel;
};

constexpr int kRepackTile = 32, kRepackRows = 8;

// to[tap][c][k] = w[k, c, tap] to nearest TF32. A block does 32 x 32 of one tap.
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
  const int32_t r1 = rest % params.win[1], r0 = rest / params.win[1];
  const int32_t from =
      r0 * params.w_axis[0] + r1 * params.w_axis[1] + r2 * params.w_axis[2];
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
      to[(tap * params.in_channels + c) * params.out_channels + k] =
          FromBits(RoundToTf32(values[x][row]));
    }
  }
}

}  // namespace convgrad
