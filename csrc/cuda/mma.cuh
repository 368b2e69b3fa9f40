// "mma" and "mma_3xtf32": implicit GEMM on the tensor cores through mma.sync, sm_80 and
// newer.
//
// For one group and one phase (phase.h; i and t count positions and taps of the phase),
//
//   dX[m, c] = sum over t, k  dY[m - t, k] * W[t][k, c],      m = (n, i0, i1, i2)
//
// is a product of M x (taps*K) and (taps*K) x C. Neither matrix exists in memory: row m
// of A for tap t is the pixel p(i) - t*p_per_r of dY, whose channels are contiguous, and
// row (t, k) of B is a row of W, whose input channels are contiguous. All phases, all
// groups and all parts of the sum (split K) are blocks of one launch.
//
// Tiling. A block computes kM rows by kN channels and walks through the taps, and for
// each tap through K in slices of 64 bytes: 32 channels of bf16 or f16, 16 of f32. Slices
// go from global memory straight into a ring of kStages in shared memory (cp.async), so
// that kStages - 1 of them are under way while one is multiplied; one barrier a slice. A
// warp computes kWarpM x 32, in mma.sync tiles of 16 x 8 and 32 bytes of K. Chunks of 16
// bytes are permuted within a row of shared memory such that neither the copies nor the
// reads of fragments have bank conflicts.
//
//   A, rows of 4 chunks:    chunk ^ (row / 2 % 4)   ldmatrix, whatever the type
//   B, bf16 and f16:        chunk ^ (k % 8)         ldmatrix, transposing
//   B, f32:                 chunk ^ (k % 4 * 2)     a word at a time
//
// f32. "mma" rounds both operands to TF32, an error of up to 2^-11 each. "mma_3xtf32"
// splits each into hi + lo, both TF32, and adds lo*hi, hi*lo and hi*hi, which leaves
// about 2^-22. Adding to its accumulator a tensor core truncates, and over a long sum
// that would drift towards zero by more than this; so these three products are summed
// from zero and added to the sum by an ordinary, rounding addition.
//
// Split K. With few tiles the slices of each are dealt out to several blocks. These write
// f32 partial tiles to the workspace, and a second kernel adds them in a fixed order.
//
// Phases without taps, as three quarters of the pixels under a 1x1 filter of stride 2,
// are tiles that only store zeros; they lie between those that multiply and keep the
// memory busy meanwhile.
//
// Patches. Where windows neither overlap nor leave gaps (patch embeddings, downsampling
// by 2x2 of stride 2) every position has one tap, and the gradient is one product of all
// pixels of dY with the whole filter as its columns: the problem is launched as a
// pointwise one with R*S*C channels, which lie in runs of S*C, a row of dX apart.
//
// Epilogues (kernel.h) are applied to what is about to be stored, sums and zeros alike.
// Their operands lie as dX does and are loaded as it is stored: in vectors of 16 bytes
// (f32: 8) where alignment permits, a strip's all at once and before its sums are
// exchanged, else two or one at a time.
//
// Padding. Taps that see nothing but padding from every row of the tile are left out.
// Otherwise a pixel outside dY is a row of zeros in A, and so is what lies beyond the
// last channel. Multiplied by an Inf or a NaN a zero gives a NaN that is not in the
// definition; the same happens where splitting or rounding to TF32 overflows. So each
// result that is not finite is computed again by the definition (DirectSum), which is
// slow, exact and costs ordinary problems one test an output. Not if its operands have 16
// bits, which are not rounded, and its row lacks no tap: so that a step of loss scaling
// that overflows takes little longer than others.
//
// Limits: bf16, f16 and f32; the channels of dY and the input channels of W contiguous;
// an image that 32-bit indices can address (the host launches part after part of the
// batch). Worth it only where C fills a good part of kN, and K one of a slice. Copies are
// 16 bytes wide if all strides permit. Else, and if the channels end within 16 bytes, the
// kernel with kWide = false runs: for each operand 16, 8 or 4 bytes, or, for an odd
// number of 16-bit channels, single values that go through registers.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "direct.cuh"
#include "epilogue.cuh"
#include "fragments.cuh"
#include "geometry.cuh"
#include "platform.cuh"
#include "primitives.cuh"
#include "tiles.cuh"

namespace convgrad {

constexpr int kMmaStages = 4;
constexpr int kMmaSliceBytes = 64;  // of a row of A
constexpr int kMmaWarpN = 32;
// What a warp's sums are cut into for the way out: 16 rows by kMmaWarpN channels, of
// which a lane holds 4 x 4.
constexpr int kMmaStripRows = 16;
constexpr int kMmaStripTiles = kMmaWarpN / 8;
constexpr int kMmaStripElements = kMmaStripRows * kMmaWarpN;
constexpr int kMmaReduceWarps = 4;
constexpr int kMmaReduceMinBlocks = 4;  // 128 registers; ptxas by itself takes too few
// Counts beyond a channel dimension that a block may form but never reads.
constexpr int kMmaSlack = 128;

template <typename T, bool kThreeProducts, int kTileM, int kTileN>
struct MmaTile {
  static constexpr int kM = kTileM, kN = kTileN;
  static constexpr int kK = kMmaSliceBytes / static_cast<int>(sizeof(T));
  static constexpr int kWarpM = kM == 64 ? 32 : 64;
  static constexpr int kWarpTilesM = kWarpM / kMmaStripRows;
  static constexpr int kWarpsN = kN / kMmaWarpN;
  static constexpr int kThreads = kM / kWarpM * kWarpsN * 32;
  // 128, 168 and 128 registers a thread, and with three products 255 and 168.
  static constexpr int kMinBlocks =
      kThreads == 256 ? 2 : (kM == 128 ? 3 : 4) - (kThreeProducts ? 1 : 0);

  static constexpr int kChunk = kMmaChunkBytes / static_cast<int>(sizeof(T));
  static constexpr int kChunksA = kMmaSliceBytes / kMmaChunkBytes;  // of a row
  static constexpr int kChunksB = kN / kChunk;
  // A thread copies chunks of one column of A and B, this many rows apart.
  static constexpr int kStepA = kThreads / kChunksA;
  static constexpr int kStepB = kThreads / kChunksB;
  static constexpr int kCopiesA = kM / kStepA;
  static constexpr int kCopiesB = kK / kStepB;

  static constexpr int kBytesA = kM * kMmaSliceBytes;
  static constexpr int kBytesB = kK * kN * static_cast<int>(sizeof(T));
  static constexpr int kStageBytes = kBytesA + kBytesB;
  static constexpr int kRowsAt = kMmaStages * kStageBytes;
  static constexpr int kSpansAt =
      kRowsAt + kM * static_cast<int>(sizeof(TileRow<int32_t>));
  static constexpr int kPlaceAt =
      kSpansAt + kAxes * static_cast<int>(sizeof(TapSpan<int32_t>));
  static constexpr int kSharedBytes =
      kPlaceAt + static_cast<int>(sizeof(TilePlace<int32_t>));

  static_assert(kM % kStepA == 0 && kK % kStepB == 0, "threads share the copies evenly");
  static_assert(kStepA % 8 == 0 && kStepB % 8 == 0,
                "all chunks of a thread are permuted alike");
  static_assert(kChunksB >= 8, "the permutation of B needs eight chunks");
  static_assert(kN <= kMmaSlack && kK <= kMmaSlack,
                "offsets are formed up to the end of a tile");
};

struct MmaParams {
  Geometry<int32_t> geometry;
  TileGrid grid;
  unsigned parts;         // of the sum; a block's number is (part, tile)
  int dy_width, w_width;  // bytes that a copy may have, of use if not kWide
  bool vector_store;      // dX takes aligned stores of 16 bytes, of f32: 8
  bool pair_store;        // or at least of 4 bytes
  // The channels of a row of dX are in runs, and several runs make a plane; the gaps are
  // what lies between the end of one and the start of the next.
  Divider<int32_t> run, plane;
  int32_t run_gap, plane_gap;
  Epilogue epilogue;
};

// ---- products ---------------------------------------------------------------------

// The fragments of B for step `step` of a slice, for the warp's four tiles: what a lane
// holds of 32 bytes of K by kMmaWarpN channels.
template <typename T, int kN>
__device__ __forceinline__ void LoadFragmentsB(uint32_t (&b)[kMmaStripTiles][2],
                                               const unsigned char* slice, int step,
                                               int warp_n, int lane) {
  constexpr int kRowBytes = kN * static_cast<int>(sizeof(T));
  if constexpr (sizeof(T) == 2) {
    const int k = step * 16 + lane % 16;
#pragma unroll
    for (int j = 0; j < kMmaStripTiles; j += 2) {
      const int chunk = warp_n / 8 + j + lane / 16;
      uint32_t r[4];
      LoadMatrixX4Transposed(r,
                             slice + k * kRowBytes + (chunk ^ lane % 8) * kMmaChunkBytes);
      b[j][0] = r[0];
      b[j][1] = r[1];
      b[j + 1][0] = r[2];
      b[j + 1][1] = r[3];
    }
  } else {
    const int k = step * 8 + lane % 4;
    const int column = lane / 4;
#pragma unroll
    for (int j = 0; j < kMmaStripTiles; ++j) {
      const int chunk = warp_n / 4 + 2 * j + column / 4;
      const unsigned char* const at = slice + k * kRowBytes +
                                      (chunk ^ lane % 4 * 2) * kMmaChunkBytes +
                                      column % 4 * 4;
      b[j][0] = *reinterpret_cast<const uint32_t*>(at);
      b[j][1] = *reinterpret_cast<const uint32_t*>(at + 4 * kRowBytes);
    }
  }
}

// Adds the product of two slices to a warp's sums.
template <typename T, bool kThreeProducts, typename S>
__device__ __forceinline__ void MultiplySlices(
    const unsigned char* slice_a, const unsigned char* slice_b, int warp_m, int warp_n,
    int lane, float (&sum)[S::kWarpTilesM][kMmaStripTiles][4]) {
#pragma unroll
  for (int step = 0; step < kMmaSliceBytes / 32; ++step) {
    uint32_t b[kMmaStripTiles][2], b_lo[kThreeProducts ? kMmaStripTiles : 1][2];
    LoadFragmentsB<T, S::kN>(b, slice_b, step, warp_n, lane);
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int j = 0; j < kMmaStripTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float v = FromBits(b[j][e]);
          b[j][e] = RoundToTf32(v);
          if constexpr (kThreeProducts) b_lo[j][e] = RestOfTf32(v, b[j][e]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < S::kWarpTilesM; ++i) {
      const int row = warp_m + i * kMmaStripRows + lane % 16;
      const int chunk = (step * 2 + lane / 16) ^ (lane / 2 % 4);
      uint32_t a[4], a_lo[4];
      LoadMatrixX4(a, slice_a + row * kMmaSliceBytes + chunk * kMmaChunkBytes);
      if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float v = FromBits(a[e]);
          a[e] = RoundToTf32(v);
          if constexpr (kThreeProducts) a_lo[e] = RestOfTf32(v, a[e]);
        }
      }
      if constexpr (kThreeProducts) {
        // Tile by tile the three would wait for each other.
        float part[kMmaStripTiles][4] = {};
#pragma unroll
        for (int j = 0; j < kMmaStripTiles; ++j) Mma(part[j], a_lo, b[j], T{});
#pragma unroll
        for (int j = 0; j < kMmaStripTiles; ++j) Mma(part[j], a, b_lo[j], T{});
#pragma unroll
        for (int j = 0; j < kMmaStripTiles; ++j) Mma(part[j], a, b[j], T{});
#pragma unroll
        for (int j = 0; j < kMmaStripTiles; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) sum[i][j][e] += part[j][e];
        }
      } else {
#pragma unroll
        for (int j = 0; j < kMmaStripTiles; ++j) Mma(sum[i][j], a, b[j], T{});
      }
    }
  }
}

// ---- the way out ------------------------------------------------------------------

__device__ __forceinline__ int32_t ChannelAt(const MmaParams& params, int32_t c) {
  return c * params.geometry.dx_channel + params.run.Quotient(c) * params.run_gap +
         params.plane.Quotient(c) * params.plane_gap;
}

// How many channels of dX a lane stores at once where alignment permits.
template <typename T>
constexpr int kMmaStoreCount = sizeof(T) == 2 ? 8 : 2;

// Whether the kCount channels from c on all exist and are stored as one vector. With
// kVectorsOnly all exist or none.
template <bool kVectorsOnly, int kCount>
__device__ __forceinline__ bool IsVector(const MmaParams& params, int32_t c) {
  return (kVectorsOnly || params.vector_store) &&
         c + kCount <= params.geometry.in_channels;
}

// Applies the epilogue to adjacent channels of a row, from channel c on, and stores those
// that exist: in pairs if the row permits, else one by one. A loop that shifts registers,
// which have no index: unrolled, this would be much code for few problems.
template <int kCount, typename T>
__device__ __forceinline__ void StoreNarrow(const MmaParams& params, T (&value)[kCount],
                                            int32_t row_at, int32_t c,
                                            T* __restrict__ dx) {
  const int32_t channels = params.geometry.in_channels;
#pragma unroll 1
  for (int e = 0; e < kCount && c + e < channels; e += 2) {
    if (sizeof(T) == 2 && params.pair_store && c + e + 2 <= channels) {
      Adjacent<T, 2> pair = {{value[0], value[1]}};
      const int32_t at = row_at + ChannelAt(params, c + e);
      ApplyEpilogue(params.epilogue, pair.element, at);
      *reinterpret_cast<Adjacent<T, 2>*>(dx + at) = pair;
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (c + e + i >= channels) continue;
        const int32_t at = row_at + ChannelAt(params, c + e + i);
        dx[at] = ApplyEpilogue(params.epilogue, value[i], at);
      }
    }
#pragma unroll
    for (int i = 0; i + 2 < kCount; ++i) value[i] = value[i + 2];
  }
}

template <typename T>
using MmaOperands = EpilogueOperands<T, kMmaStoreCount<T>>;

// Whether no tap reaches the phase of a tile, as with three quarters of the tiles of a
// 1x1 filter at stride 2.
__device__ __forceinline__ bool IsDead(const TilePlace<int32_t>& at) {
  return at.phase[0].r_count == 0 || at.phase[1].r_count == 0 || at.phase[2].r_count == 0;
}

// The tile of such a phase: stores along the channels, and nothing else unless there is
// an epilogue.
template <typename T, int kM, int kN, int kThreads>
__device__ __forceinline__ void StoreZeros(const MmaParams& params,
                                           const TilePlace<int32_t>& at, int thread,
                                           T* __restrict__ dx) {
  constexpr int kCount = kMmaStoreCount<T>;
  constexpr int kAcross = kN / kCount;
  const int32_t c = at.c0 + thread % kAcross * kCount;
  for (int r = thread / kAcross; r < kM; r += kThreads / kAcross) {
    if (at.m0 + r >= at.row_count) return;
    const RowPlace<int32_t> row = PlaceRow(params.geometry, at, at.m0 + r);
    const int32_t row_at = OffsetInDx(params.geometry, at, row);
    Adjacent<T, kCount> value = {};
    if (IsVector<false, kCount>(params, c)) {
      const int32_t at = row_at + ChannelAt(params, c);
      ApplyEpilogue(params.epilogue, value.element, at);
      *reinterpret_cast<Adjacent<T, kCount>*>(dx + at) = value;
    } else {
      StoreNarrow(params, value.element, row_at, c, dx);
    }
  }
}

// Which of a strip's sums are not finite: bit 4*j + e for sum[j][e]. Zero times a sum is
// zero, unless it is one of those: so one test tells whether there are any.
__device__ __forceinline__ unsigned NotFinite(const float (&sum)[kMmaStripTiles][4]) {
  float check[4] = {};
#pragma unroll
  for (int j = 0; j < kMmaStripTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) check[e] += sum[j][e] * 0.0f;
  }
  unsigned special = 0;
  if (check[0] + check[1] + check[2] + check[3] != 0.0f) {
#pragma unroll
    for (int j = 0; j < kMmaStripTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const bool finite = sum[j][e] - sum[j][e] == 0.0f;
        special |= static_cast<unsigned>(!finite) << (4 * j + e);
      }
    }
  }
  return special;
}

// StoreStrip with an epilogue or, if there is none, without.
template <bool kVectorsOnly, bool kFused, typename T>
__device__ __forceinline__ void StoreStripAs(const MmaParams& params,
                                             const float (&sum)[kMmaStripTiles][4],
                                             const int32_t (&row_at)[2],
                                             const bool (&row_exists)[2], int32_t c,
                                             int lane, T* __restrict__ dx) {
  // The channels that a lane stores: of each row, 8 or 4 times 2.
  constexpr int kCount = kMmaStoreCount<T>;
  constexpr int kStores = kMmaWarpN / 4 / kCount;
  const auto channel = [&](int j) {
    return sizeof(T) == 2 ? c + lane % 4 * 8 : c + j * 8 + lane % 4 * 2;
  };
  const auto is_vector = [&](int j) {
    return IsVector<kVectorsOnly, kCount>(params, channel(j));
  };
  // Of vectors, well before they are needed. Narrow stores load theirs themselves.
  MmaOperands<T> operands[2][kStores] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int j = 0; j < kStores; ++j) {
      if (kFused && row_exists[half] && is_vector(j)) {
        LoadOperands(params.epilogue, row_at[half] + ChannelAt(params, channel(j)),
                     operands[half][j]);
      }
    }
  }
  const auto store = [&](int half, int j, Adjacent<T, kCount> value) {
    if (!row_exists[half]) return;
    if (is_vector(j)) {
      if (kFused) ApplyOperands(params.epilogue, operands[half][j], value.element);
      *reinterpret_cast<Adjacent<T, kCount>*>(dx + row_at[half] +
                                              ChannelAt(params, channel(j))) = value;
    } else if (!kVectorsOnly) {
      StoreNarrow(params, value.element, row_at[half], channel(j), dx);
    }
  };
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if constexpr (sizeof(T) == 2) {
      // A lane has two channels of each of four tiles. Exchanged within the quad, these
      // are the eight of one tile, which are one store.
      uint32_t word[kMmaStripTiles];
#pragma unroll
      for (int j = 0; j < kMmaStripTiles; ++j) {
        const T pair[2] = {Narrow(sum[j][2 * half], T{}),
                           Narrow(sum[j][2 * half + 1], T{})};
        std::memcpy(&word[j], pair, sizeof(pair));
      }
      TransposeQuad(word, lane);
      Adjacent<T, kCount> value;
      std::memcpy(&value, word, sizeof(value));
      store(half, 0, value);
    } else {
#pragma unroll
      for (int j = 0; j < kMmaStripTiles; ++j) {
        store(half, j, {{sum[j][2 * half], sum[j][2 * half + 1]}});
      }
    }
  }
}

// Stores a strip whose first channel is c. A lane has rows lane/4 and lane/4 + 8, which
// lie at row_at in dX if there is such a row. Returns which of its sums are not finite.
template <bool kVectorsOnly = false, typename T>
__device__ __forceinline__ unsigned StoreStrip(const MmaParams& params,
                                               const float (&sum)[kMmaStripTiles][4],
                                               const int32_t (&row_at)[2],
                                               const bool (&row_exists)[2], int32_t c,
                                               int lane, T* __restrict__ dx) {
  if (HasEpilogue(params.epilogue)) {
    StoreStripAs<kVectorsOnly, true>(params, sum, row_at, row_exists, c, lane, dx);
  } else {
    StoreStripAs<kVectorsOnly, false>(params, sum, row_at, row_exists, c, lane, dx);
  }
  return NotFinite(sum);
}

// Whether a row sees no padding: its sums are the definition's.
__device__ __forceinline__ bool HasAllTaps(const Geometry<int32_t>& g,
                                           const TilePlace<int32_t>& at,
                                           const RowPlace<int32_t>& row) {
  bool all = true;
#pragma unroll
  for (int a = 0; a < kAxes; ++a) {
    const int32_t taps = at.phase[a].r_count;
    all = all && LiveTaps(g.axis[a], row.p[a], row.p[a], taps).count == taps;
  }
  return all;
}

// Computes again, by the definition, the elements of `special`, except where no zero took
// part. Bit 16*i + 4*j + e stands for e of tile j of strip i of a warp, whose first row
// and channel are m and c; the next strip is so many rows or channels on. A lane's
// results may have been stored by another one, hence the barrier.
template <typename T, int kStripsApartM = kMmaStripRows, int kStripsApartN = 0>
__device__ __forceinline__ void Repair(const MmaParams& params,
                                       const TilePlace<int32_t>& at, uint64_t special,
                                       int32_t m, int32_t c, int lane,
                                       const T* __restrict__ dy, const T* __restrict__ w,
                                       T* __restrict__ dx) {
  const Geometry<int32_t>& g = params.geometry;
  __syncwarp();
#pragma unroll 1
  for (int bit = 0; special != 0; ++bit, special >>= 1) {
    if ((special & 1) == 0) continue;
    const int e = bit % 4;
    const int32_t row_m = m + bit / 16 * kStripsApartM + lane / 4 + e / 2 * 8;
    const int32_t row_c =
        c + bit / 16 * kStripsApartN + bit / 4 % 4 * 8 + lane % 4 * 2 + e % 2;
    if (row_m >= at.row_count || row_c >= g.in_channels) continue;
    const RowPlace<int32_t> row = PlaceRow(g, at, row_m);
    if (sizeof(T) == 2 && HasAllTaps(g, at, row)) continue;
    const float sum =
        DirectSum<T, int32_t>(g, row.h, row.n * g.dy_batch + at.group * g.dy_group,
                              at.group * g.w_group + row_c * g.w_in_channel, dy, w);
    const int32_t dx_at = OffsetInDx(g, at, row) + ChannelAt(params, row_c);
    dx[dx_at] = ApplyEpilogue(params.epilogue, Narrow(sum, T{}), dx_at);
  }
}

// Where a lane's part of tile j of a strip lies in the workspace, as an index of float4.
// Strips of a tile are numbered by rows.
__device__ __forceinline__ size_t PartialAt(size_t tile, int strips, int strip, int j,
                                            int lane) {
  return ((tile * strips + strip) * kMmaStripTiles + j) * 32 + lane;
}

// ---- parts of a sum ---------------------------------------------------------------

struct PartOfSlices {
  int32_t first, count;
};

// A part's share of a tile's slices. The first parts have one more if the slices do not
// divide evenly.
__device__ __forceinline__ PartOfSlices ShareSlices(int32_t slices, unsigned part,
                                                    unsigned parts) {
  if (parts == 1) return {0, slices};  // spares most problems a division
  const unsigned all = static_cast<unsigned>(slices);
  const unsigned even = all / parts;
  const unsigned left = all - even * parts;
  return {static_cast<int32_t>(even * part + (part < left ? part : left)),
          static_cast<int32_t>(even + (part < left ? 1 : 0))};
}

// ---- the kernels ------------------------------------------------------------------

template <typename T, bool kThreeProducts, int kTileM, int kTileN, bool kWide>
__global__ void __launch_bounds__(
    (MmaTile<T, kThreeProducts, kTileM, kTileN>::kThreads),
    (MmaTile<T, kThreeProducts, kTileM, kTileN>::kMinBlocks))
    MmaKernel(const __grid_constant__ MmaParams params, const T* __restrict__ dy,
              const T* __restrict__ w, T* __restrict__ dx, float4* __restrict__ partial) {
  using S = MmaTile<T, kThreeProducts, kTileM, kTileN>;
  constexpr int kSize = static_cast<int>(sizeof(T));
  CU_DYNAMIC_SHARED(shared);
  TileRow<int32_t>* const rows = reinterpret_cast<TileRow<int32_t>*>(shared + S::kRowsAt);
  using Spans = TapSpan<int32_t>[kAxes];
  Spans& spans = *reinterpret_cast<Spans*>(shared + S::kSpansAt);

  const Geometry<int32_t>& g = params.geometry;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int warp_m = thread / 32 / S::kWarpsN * S::kWarpM;
  const int warp_n = thread / 32 % S::kWarpsN * kMmaWarpN;
  const unsigned part = blockIdx.x / params.grid.total;
  const TilePlace<int32_t> at =
      PlaceTile(g, params.grid, blockIdx.x - part * params.grid.total);
  if (at.m0 >= at.row_count) return;
  if (params.parts == 1 && IsDead(at)) {
    StoreZeros<T, S::kM, S::kN, S::kThreads>(params, at, thread, dx);
    return;
  }
  // Read again from here after the products, which leave no registers for it.
  TilePlace<int32_t>& kept = *reinterpret_cast<TilePlace<int32_t>*>(shared + S::kPlaceAt);
  if (thread == 0) kept = at;

  for (int r = thread; r < S::kM; r += S::kThreads) {
    rows[r] = MakeTileRow(g, at, at.m0 + r);
  }
  __syncthreads();
  const int32_t taps = FindLiveTaps(g, at, rows, S::kM, thread == 0, spans);
  __syncthreads();

  const int32_t slices_per_tap = (g.out_channels + S::kK - 1) / S::kK;
  const PartOfSlices share = ShareSlices(taps * slices_per_tap, part, params.parts);
  const int32_t first_slice = share.first, slices = share.count;

  // What this thread copies: its chunks' places in a slice and in global memory.
  const int a_row = thread / S::kChunksA, a_k = thread % S::kChunksA * S::kChunk;
  const int b_row = thread / S::kChunksB;
  const int a_to =
      a_row * kMmaSliceBytes + (thread % S::kChunksA ^ a_row / 2 % 4) * kMmaChunkBytes;
  const int b_to =
      b_row * S::kN * kSize +
      (thread % S::kChunksB ^ (kSize == 2 ? b_row % 8 : b_row % 4 * 2)) * kMmaChunkBytes;
  int32_t a_from[S::kCopiesA];
#pragma unroll
  for (int j = 0; j < S::kCopiesA; ++j) a_from[j] = rows[a_row + j * S::kStepA].dy + a_k;
  const int32_t b_c = at.c0 + thread % S::kChunksB * S::kChunk;
  const int32_t b_from = at.group * g.w_group + b_row * g.w_out_channel + b_c;
  const int b_valid = (g.in_channels - b_c) * kSize < kMmaChunkBytes
                          ? static_cast<int>(g.in_channels - b_c) * kSize
                          : kMmaChunkBytes;

  // The slice that is copied next: live tap t, channels k0.. of dY.
  int32_t t[kAxes] = {}, k0 = 0, dy_tap = 0, w_tap = 0;
  unsigned inside = 0;  // bit j: copy j of A is inside dY for this tap
  const auto locate_tap = [&] {
    int32_t shift[kAxes];
    dy_tap = 0;
    w_tap = 0;
#pragma unroll
    for (int a = 0; a < kAxes; ++a) {
      const AxisGeometry<int32_t>& axis = g.axis[a];
      shift[a] = spans[a].shift + t[a] * axis.p_per_r.divisor;
      dy_tap -= shift[a] * axis.dy_stride;
      w_tap += (spans[a].r + t[a] * axis.r_step) * axis.w_stride;
    }
    inside = 0;
#pragma unroll
    for (int j = 0; j < S::kCopiesA; ++j) {
      inside |= static_cast<unsigned>(Reaches(g, rows[a_row + j * S::kStepA], shift))
                << j;
    }
  };
  if (slices > 0) {
    int32_t tap = first_slice / slices_per_tap;
    k0 = (first_slice - tap * slices_per_tap) * S::kK;
#pragma unroll
    for (int a = kAxes - 1; a >= 0; --a) {
      t[a] = tap % spans[a].count;
      tap /= spans[a].count;
    }
    locate_tap();
  }

  // Copies that go through registers end after the slice before has been multiplied.
  constexpr bool kStaged = !kWide && kSize == 2;
  MmaChunk a_staged[kStaged ? S::kCopiesA : 1], b_staged[kStaged ? S::kCopiesB : 1];
  const auto begin_copies = [&](int stage) {
    unsigned char* const slice = shared + stage * S::kStageBytes;
    const int a_left = (g.out_channels - k0 - a_k) * kSize;
    const int a_valid = a_left < kMmaChunkBytes ? a_left : kMmaChunkBytes;
#pragma unroll
    for (int j = 0; j < S::kCopiesA; ++j) {
      const int valid = inside >> j & 1 ? a_valid : 0;
      const int32_t from = a_from[j] + dy_tap + k0;
      if (kStaged && params.dy_width < 4) {
        a_staged[kStaged ? j : 0] = LoadChunk(dy, from, valid);
      } else {
        CopyChunk<T, kWide>(slice + a_to + j * S::kStepA * kMmaSliceBytes, dy, from,
                            valid, params.dy_width);
      }
    }
#pragma unroll
    for (int j = 0; j < S::kCopiesB; ++j) {
      const int32_t k = k0 + j * S::kStepB;
      const int valid = b_row + k < g.out_channels ? b_valid : 0;
      const int32_t from = b_from + w_tap + k * g.w_out_channel;
      if (kStaged && params.w_width < 4) {
        b_staged[kStaged ? j : 0] = LoadChunk(w, from, valid);
      } else {
        CopyChunk<T, kWide>(slice + S::kBytesA + b_to + j * S::kStepB * S::kN * kSize, w,
                            from, valid, params.w_width);
      }
    }
    k0 += S::kK;
    if (k0 >= g.out_channels) {
      k0 = 0;
      ++t[2];
      if (t[2] == spans[2].count) {
        t[2] = 0;
        ++t[1];
      }
      if (t[1] == spans[1].count) {
        t[1] = 0;
        ++t[0];
      }
      locate_tap();
    }
  };
  const auto end_copies = [&](int stage) {
    if constexpr (kStaged) {
      unsigned char* const slice = shared + stage * S::kStageBytes;
      if (params.dy_width < 4) {
#pragma unroll
        for (int j = 0; j < S::kCopiesA; ++j) {
          *reinterpret_cast<MmaChunk*>(slice + a_to + j * S::kStepA * kMmaSliceBytes) =
              a_staged[j];
        }
      }
      if (params.w_width < 4) {
#pragma unroll
        for (int j = 0; j < S::kCopiesB; ++j) {
          *reinterpret_cast<MmaChunk*>(slice + S::kBytesA + b_to +
                                       j * S::kStepB * S::kN * kSize) = b_staged[j];
        }
      }
    }
  };

  float sum[S::kWarpTilesM][kMmaStripTiles][4] = {};
#pragma unroll 1
  for (int stage = 0; stage < kMmaStages - 1; ++stage) {
    if (stage < slices) {
      begin_copies(stage);
      end_copies(stage);
    }
    CopyAsyncCommit();
  }
  int stage = 0;
#pragma unroll 1
  for (int32_t slice = 0; slice < slices; ++slice) {
    // The barrier publishes this slice. It also means that nobody still reads the one
    // before, whose stage is filled next.
    CopyAsyncWait<kMmaStages - 2>();
    __syncthreads();
    const bool more = slice + kMmaStages - 1 < slices;
    const int free_stage = stage == 0 ? kMmaStages - 1 : stage - 1;
    if (more) begin_copies(free_stage);
    CopyAsyncCommit();
    const unsigned char* const slice_a = shared + stage * S::kStageBytes;
    MultiplySlices<T, kThreeProducts, S>(slice_a, slice_a + S::kBytesA, warp_m, warp_n,
                                         lane, sum);
    if (more) end_copies(free_stage);
    stage = stage == kMmaStages - 1 ? 0 : stage + 1;
  }

  if (params.parts > 1) {
    constexpr int kStrips = S::kM / kMmaStripRows * S::kWarpsN;
#pragma unroll
    for (int i = 0; i < S::kWarpTilesM; ++i) {
      const int strip = (warp_m / kMmaStripRows + i) * S::kWarpsN + warp_n / kMmaWarpN;
#pragma unroll
      for (int j = 0; j < kMmaStripTiles; ++j) {
        const float (&v)[4] = sum[i][j];
        partial[PartialAt(blockIdx.x, kStrips, strip, j, lane)] = {v[0], v[1], v[2],
                                                                   v[3]};
      }
    }
    return;
  }
  const int32_t m0 = kept.m0 + warp_m, c0 = kept.c0 + warp_n;
  const int32_t row_count = kept.row_count;
  uint64_t special = 0;
#pragma unroll
  for (int i = 0; i < S::kWarpTilesM; ++i) {
    const int row = i * kMmaStripRows + lane / 4;
    const int32_t row_at[2] = {rows[warp_m + row].dx, rows[warp_m + row + 8].dx};
    const bool row_exists[2] = {m0 + row < row_count, m0 + row + 8 < row_count};
    const unsigned found = StoreStrip(params, sum[i], row_at, row_exists, c0, lane, dx);
    special |= static_cast<uint64_t>(found) << (16 * i);
  }
  Repair(params, kept, special, m0, c0, lane, dy, w, dx);
}

// Adds up the parts of the sums of a problem, a warp for each strip.
template <typename T>
__global__ void __launch_bounds__(kMmaReduceWarps * 32, kMmaReduceMinBlocks)
    MmaReduceKernel(const __grid_constant__ MmaParams params, const T* __restrict__ dy,
                    const T* __restrict__ w, T* __restrict__ dx,
                    const float4* __restrict__ partial) {
  const Geometry<int32_t>& g = params.geometry;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const unsigned warp = blockIdx.x * kMmaReduceWarps + threadIdx.x / 32;
  const int strips_n = params.grid.tile_n / kMmaWarpN;
  const int strips = params.grid.tile_m / kMmaStripRows * strips_n;
  const unsigned tile = warp / strips;
  const int strip = static_cast<int>(warp - tile * strips);
  if (tile >= params.grid.total) return;
  const TilePlace<int32_t> at = PlaceTile(g, params.grid, tile);
  const int32_t m = at.m0 + strip / strips_n * kMmaStripRows;
  const int32_t c = at.c0 + strip % strips_n * kMmaWarpN;
  if (m >= at.row_count || c >= g.in_channels) return;

  float sum[kMmaStripTiles][4] = {};
#pragma unroll 2
  for (unsigned part = 0; part < params.parts; ++part) {
    const size_t block = static_cast<size_t>(part) * params.grid.total + tile;
#pragma unroll
    for (int j = 0; j < kMmaStripTiles; ++j) {
      const float4 v = partial[PartialAt(block, strips, strip, j, lane)];
      sum[j][0] += v.x;
      sum[j][1] += v.y;
      sum[j][2] += v.z;
      sum[j][3] += v.w;
    }
  }
  int32_t row_at[2] = {};
  bool row_exists[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int32_t row = m + lane / 4 + half * 8;
    row_exists[half] = row < at.row_count;
    if (row_exists[half]) row_at[half] = OffsetInDx(g, at, PlaceRow(g, at, row));
  }
  const unsigned special = StoreStrip(params, sum, row_at, row_exists, c, lane, dx);
  Repair(params, at, special, m, c, lane, dy, w, dx);
}

// ---- the host's side, which wgmma.cu shares ---------------------------------------

// A problem as it is launched: itself, or as patches a pointwise one.
struct Rewritten {
  Problem problem;
  int64_t run = INT32_MAX, plane = INT32_MAX;  // channels
  int64_t run_gap = 0, plane_gap = 0;          // elements of dX
};
Rewritten AsPatches(const Problem& problem);

// The taps of the phase that has the most, and of a phase on average.
struct TapCounts {
  double most, average;
};
TapCounts CountTaps(const Problem& problem);

// To how many bytes runs of channels of dX and of an epilogue's arrays are aligned, 0 if
// these are not contiguous; and how many are needed to store vectors.
int WidthOfRuns(const Rewritten& rewritten, const void* dx, const Epilogue& epilogue);
constexpr int VectorBytes(DType dtype) { return dtype == DType::kF32 ? 8 : 16; }

MmaParams MakeMmaParams(const Rewritten& rewritten, int64_t tile_m, int64_t tile_n,
                        int64_t parts, const void* dy, const void* w, const void* dx,
                        const Epilogue& epilogue);

// Enqueues the kernel that adds up parts, for bfloat16, float16 and float32.
template <typename T>
cudaError_t EnqueueMmaReduce(cudaStream_t stream, const MmaParams& params, const T* dy,
                             const T* w, T* dx, const float4* partial);

}  // namespace convgrad
