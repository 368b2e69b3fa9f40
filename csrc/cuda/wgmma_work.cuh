// What the warpgroups of "wgmma" (wgmma.cuh) share: tiles, parameters, which slices a
// block's tiles need and in which order, and the ring that these go through.

#pragma once

#include <cstdint>

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
constexpr int kWarpsOfGroup = kWarpgroupThreads / 32;
// A block starts with 168 registers a thread, all that a multiprocessor has.
template <bool kCopies>
struct WgmmaRegisters {
  static constexpr int kProducer = kCopies ? 104 : 56, kConsumer = kCopies ? 200 : 224;
  static_assert(kProducer + kWgmmaConsumers * kConsumer <= (kWgmmaConsumers + 1) * 168,
                "registers that are taken must have been given");
};

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
  static constexpr int kRoom = 227 * 1024 - 2 * kWgmmaMostStages * 8 - kM * 4;
  static constexpr int kStages =
      kRoom / kStageBytes < kWgmmaMostStages ? kRoom / kStageBytes : kWgmmaMostStages;
  static constexpr int kBarriersAt = kStages * kStageBytes;
  // Threads that copy keep here where each row of A lies in dY.
  static constexpr int kRowsAt = kBarriersAt + 2 * kStages * 8;
  static constexpr int kSharedBytes = kRowsAt;
  static constexpr int kCopiesSharedBytes =
      kRowsAt + kM * static_cast<int>(sizeof(int32_t));

  static_assert(kM % (kGroupsM * kWgmmaRows) == 0 && kN % (kGroupsN * 64) == 0,
                "consumers share the tile evenly");
  static_assert(kStages >= 3, "copies need a head start");
  static_assert(kProducts * kColumns / 2 <= 128,
                "sums must leave registers for the rest");
};

struct WgmmaParams {
  MmaParams mma;
  unsigned items;  // parts of tiles
  Divider<int32_t> tiles;
  Divider<int32_t> blocks;  // of the launch
  int32_t turn;             // channel tiles, as a remainder of these
  int win[kAxes];           // taps of the filter
  const float* repacked;    // W for TF32: [group][tap][C][K], rows so far apart
  int32_t repacked_row;
  // For TMA.
  int axes;  // of dY's maps: the last ones, without leading axes of size one
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

// The slice of a part of a tile that is fetched next: live tap t, channels k0.. of dY.
struct SlicePlace {
  int32_t t[kAxes], k0;
};

template <typename S>
__device__ __forceinline__ SlicePlace FirstSlice(const WgmmaWork& work) {
  SlicePlace slice = {};
  if (work.first_slice == 0) return slice;  // as where a sum is not split
  int32_t tap = work.first_slice / work.slices_per_tap;
  slice.k0 = (work.first_slice - tap * work.slices_per_tap) * S::kK;
#pragma unroll
  for (int a = kAxes - 1; a >= 0; --a) {
    slice.t[a] = tap % work.spans[a].count;
    tap /= work.spans[a].count;
  }
  return slice;
}

// Returns whether the next one has another tap.
template <typename S>
__device__ __forceinline__ bool AdvanceSlice(const WgmmaWork& work, int32_t out_channels,
                                             SlicePlace& slice) {
  slice.k0 += S::kK;
  if (slice.k0 < out_channels) return false;
  slice.k0 = 0;
  ++slice.t[2];
  if (slice.t[2] == work.spans[2].count) {
    slice.t[2] = 0;
    ++slice.t[1];
  }
  if (slice.t[1] == work.spans[1].count) {
    slice.t[1] = 0;
    ++slice.t[0];
  }
  return true;
}

// How far back in dY a tap lies, and how far along the filter, on each axis.
__device__ __forceinline__ void PlaceTap(const Geometry<int32_t>& g,
                                         const WgmmaWork& work, const SlicePlace& slice,
                                         int32_t (&shift)[kAxes], int32_t (&r)[kAxes]) {
#pragma unroll
  for (int a = 0; a < kAxes; ++a) {
    shift[a] = work.spans[a].shift + slice.t[a] * g.axis[a].p_per_r.divisor;
    r[a] = work.spans[a].r + slice.t[a] * g.axis[a].r_step;
  }
}

// The number of a group's tap in the repacked W.
__device__ __forceinline__ int32_t RepackedTap(const WgmmaParams& params, int32_t group,
                                               const int32_t (&r)[kAxes]) {
  return ((group * params.win[0] + r[0]) * params.win[1] + r[1]) * params.win[2] + r[2];
}

// The tile that a block takes in a round, as a part's and a tile's number.
__device__ __forceinline__ unsigned ItemOfRound(const WgmmaParams& params,
                                                unsigned round) {
  int32_t rounds = static_cast<int32_t>(round);
  const int32_t turns = TakeDigit(params.blocks, &rounds) * params.turn;
  int32_t turn = static_cast<int32_t>(blockIdx.x) + turns;
  return round * gridDim.x + static_cast<unsigned>(TakeDigit(params.blocks, &turn));
}

__device__ __forceinline__ unsigned PartOfItem(const WgmmaParams& params, unsigned item) {
  return static_cast<unsigned>(params.tiles.Quotient(static_cast<int32_t>(item)));
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

// What a producer has to fetch in a round. Returns false if that is nothing.
template <typename S>
__device__ __forceinline__ bool PlanRound(const WgmmaParams& params, unsigned round,
                                          TilePlace<int32_t>& at, WgmmaWork& work) {
  const unsigned item = ItemOfRound(params, round);
  if (item >= params.items) return false;
  const unsigned part = PartOfItem(params, item);
  at = PlaceTile(params.mma.geometry, params.mma.grid,
                 item - part * params.mma.grid.total);
  if (at.m0 >= at.row_count || IsDead(at)) return false;
  work = PlanWork<S>(params.mma, at, part);
  return work.slices > 0;
}

}  // namespace convgrad
