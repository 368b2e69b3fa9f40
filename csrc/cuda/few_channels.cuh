// "few_channels" and "few_channels_3xtf32": gradients with respect to few input channels
// (stems, first layers, patch embeddings) on the tensor cores, sm_80 and newer.
//
// A GEMM whose columns are a few channels C wastes most of a tensor core. Here the
// columns are all that one pixel of dY adds to: along the last axis every tap s, and
// along the axis before it (below: rows) every phase f with its taps t (phase.h). With
// r(f,t) = r0_f + t*r_step, and h = f + (u - p0_f)*h_step,
//
//   z[f,s,c][u,q] = sum over t, k  W[k, c, r(f,t), s] * dY[u - t*p_per_r, q, k]
//   dX[h,w,c]     = sum over s     z[f,s,c][u, q(w,s)]
//
// u counts rows of dY, and is the one that a row of dX reads with tap zero. The sum over
// t stays in the tensor cores' accumulators, the sum over s (the gather) goes through
// shared memory: for a 7x7 stem of stride 2 it has 3.5 terms an output, and not the 12.25
// that it would have if all taps were columns, which cost about the same arithmetic.
//
// Tiling. W is the left operand: 16 of the columns (f, s, c) and a part of K, for all t,
// belong to a warp, whose registers hold them for the block's life. dY is the right one:
// a block walks down a strip of some rows of u, all of whose pixels q for `positions`
// positions along the last axis are one step; cp.async brings them to a ring of
// kFewStages rows in shared memory. A row of dY is read from there once by each warp and
// added to kTaps rows of sums, after which the oldest is complete: it goes to shared
// memory, where the sums over parts of K and over s are formed, in a fixed order, while
// the next row is multiplied. One barrier a row. Half of the warps multiply first, the
// others gather first, so that both units are busy.
//
//   dY, a pixel's channels:  padded to an odd number of 16-byte chunks     ldmatrix
//   z:                       [part of K][column][pixel], pixels padded such that channels
//                            and phases of neighbouring outputs lie in different banks
//
// Strips of all images are dealt out to as many blocks as the GPU holds. Where a filter
// has too many columns for a block, each takes some of the phases f, and writes their
// rows.
//
// f32 as in mma.cuh: rounded to TF32, or split in two and multiplied thrice.
//
// Padding. Rows outside dY are not multiplied, and pixels outside it not gathered. But a
// filter tap that a phase does not have, and columns and channels beyond the last, are
// zeros, which make an Inf or a NaN in dY reach outputs that it is not connected to; so
// each result that is not finite is computed again by the definition (DirectSum).
//
// Limits: one group; bf16, f16 and f32; channels of dY contiguous; no dilation of dX; of
// three axes the first must be trivial; at most kFewMostTaps taps of a phase along the
// rows, K as the registers of a block's warps permit, and of the columns of one phase no
// more than these warps have rows (16 each): any C, but worth it only for few. Any
// alignment, any other strides.

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

namespace convgrad {

constexpr int kFewStages = 4;
constexpr int kFewSliceBytes = 64;  // of a pixel's channels: an ldmatrix for 8 pixels
constexpr int kFewColumns = 16;     // of a warp
constexpr int kFewTilePixels = 8;
constexpr int kFewRun = 128;  // adjacent outputs that a warp gathers at a time
constexpr int kFewRunPerLane = kFewRun / 32;
constexpr int kFewMostTaps = 7;
// Counts beyond a channel dimension that a block may form but never reads.
constexpr int kFewSlack = 64;

// What a warp holds: kSlices slices of K for each tap, sums of kTiles x 8 pixels.
struct FewShape {
  int taps, slices, tiles, warps;
};

// The best shape for so many taps along the rows and slices of K. Registers for W: taps *
// slices * 8, twice that for three products; for the sums: taps * tiles * 4. A thread has
// 168 of them, or 255. The fewer slices, the more pixels between two barriers.
constexpr FewShape FewShapeOf(bool three_products, int64_t taps, int64_t slices) {
  if (three_products) {
    return taps <= 1   ? FewShape{1, 8, 2, 8}
           : taps == 2 ? FewShape{2, 4, 2, 8}
           : taps == 3 ? FewShape{3, 3, 2, 8}
           : taps == 4 ? FewShape{4, 2, 2, 8}
                       : FewShape{kFewMostTaps, 1, 1, 8};
  }
  return taps <= 1                  ? FewShape{1, 4, 8, 12}
         : taps == 2                ? FewShape{2, 2, 6, 12}
         : taps == 3 && slices == 1 ? FewShape{3, 1, 5, 12}
         : taps == 3 && slices == 2 ? FewShape{3, 2, 4, 12}
         : taps == 3                ? FewShape{3, 3, 2, 12}
         : taps == 4                ? FewShape{4, 2, 2, 12}
                                    : FewShape{kFewMostTaps, 1, 1, 12};
}

struct FewParams {
  Geometry<int32_t> geometry;
  // A block takes the strips ((image, plane), class of rows, part of the rows, tile) that
  // are its number modulo the number of blocks of its group of phases.
  unsigned strips, strip_step, phase_groups, classes, row_parts, tiles;
  int rows;  // of u in a strip
  int u_first, u_count;
  int taps;         // along the rows, of the phase that has the most
  int phases;       // along the rows, of a group
  int phase_count;  // of all groups
  int columns_of_phase;
  int positions, positions_all;  // along the last axis: of a tile, of a row
  int q_low, q_high;             // position i reads pixels i + q_low to i + q_high
  int most_taps_last;
  Divider<int32_t> channels, chunks;     // of 16 bytes, in a pixel padded to whole slices
  Divider<int32_t> runs;                 // of a tile's row of dX
  int column_tiles, parts, pixel_warps;  // of a block's warps
  int slices, slices_of_part;            // of K
  int pixel_bytes, stage_bytes;
  int z_pitch, z_step, z_part, z_buffer;  // in floats; z_step: from a tap to the next
  int z_at, table_at, runs_at;            // in shared memory
  int dy_width;                           // bytes that a copy may have
  bool dy_wide;     // chunks are aligned and exist as a whole or not at all
  int store_bytes;  // as wide as stores to a row of dX may be, 0 if it has gaps
  Epilogue epilogue;
};

// Where a strip lies.
struct FewStrip {
  unsigned id;
  int32_t first_phase;        // the same for all strips of a block
  int32_t dy_at, dx_at;       // of the image and plane
  int32_t plane;              // position on the first axis
  int32_t u0, p0;             // row of the first result, row of dY of the first step
  int32_t steps;              // rows of dY that are gone through
  int32_t w0, outputs;        // first position, and outputs in a row of dX
  int32_t q0, pixels, tiles;  // in a row of dY
};

__device__ __forceinline__ void PlaceStrip(const FewParams& params, unsigned id,
                                           FewStrip& at) {
  const Geometry<int32_t>& g = params.geometry;
  at.id = id;
  const int32_t tile = static_cast<int32_t>(id % params.tiles);
  id /= params.tiles;
  const int32_t part = static_cast<int32_t>(id % params.row_parts);
  id /= params.row_parts;
  const int32_t of_class = static_cast<int32_t>(id % params.classes);
  id /= params.classes;
  const int32_t image = static_cast<int32_t>(id) / g.axis[0].in;
  at.plane = static_cast<int32_t>(id) - image * g.axis[0].in;
  at.dy_at = image * g.dy_batch + at.plane * g.axis[0].dy_stride;
  at.dx_at = image * g.dx_batch + at.plane * g.axis[0].dx_stride;

  const int32_t apart = g.axis[1].p_per_r.divisor;
  const int32_t first = part * params.rows;
  const int32_t left = (params.u_count - of_class - 1) / apart + 1 - first;
  at.u0 = params.u_first + of_class + first * apart;
  at.p0 = at.u0 - (params.taps - 1) * apart;
  at.steps = left <= 0 ? 0 : (left < params.rows ? left : params.rows) + params.taps - 1;

  const AxisGeometry<int32_t>& last = g.axis[2];
  const int32_t i0 = tile * params.positions;
  const int32_t i_end = i0 + params.positions < params.positions_all
                            ? i0 + params.positions
                            : params.positions_all;
  at.w0 = i0 * last.h_step.divisor;
  const int32_t w_end = i_end * last.h_step.divisor;
  at.outputs = ((w_end < last.in ? w_end : last.in) - at.w0) * g.in_channels;
  at.q0 = i0 + params.q_low > 0 ? i0 + params.q_low : 0;
  const int32_t q_end = i_end + params.q_high;
  at.pixels = (q_end < last.out ? q_end : last.out) - at.q0;
  if (at.pixels < 0) at.pixels = 0;
  at.tiles = (at.pixels + kFewTilePixels - 1) / kFewTilePixels;
}

// ---- the filter -------------------------------------------------------------------

// An operand of a product in three: the value rounded, and the rest.
template <typename T, bool kThreeProducts>
__device__ __forceinline__ void SplitTf32(uint32_t& bits, uint32_t& rest) {
  if constexpr (sizeof(T) == 4) {
    const float v = FromBits(bits);
    bits = RoundToTf32(v);
    if constexpr (kThreeProducts) rest = RestOfTf32(v, bits);
  }
}

// A lane's word of the left operand: channels k.. of a column's filter at tap t.
template <typename T>
__device__ __forceinline__ uint32_t LoadFilterWord(const Geometry<int32_t>& g,
                                                   const T* __restrict__ w,
                                                   int32_t column_at, int32_t k,
                                                   bool exists) {
  constexpr int kElements = 4 / static_cast<int>(sizeof(T));
  T element[kElements];
#pragma unroll
  for (int e = 0; e < kElements; ++e) {
    element[e] =
        exists && k + e < g.out_channels ? w[column_at + (k + e) * g.w_out_channel] : T{};
  }
  uint32_t word;
  std::memcpy(&word, element, sizeof(word));
  return word;
}

// ---- products ---------------------------------------------------------------------

// Adds the products of 16 columns and 8 pixels, 32 bytes of K, to rows of sums: tap t to
// row kOldest + t, which are numbered in a circle.
template <typename T, bool kThreeProducts, int kCount, int kOldest, int kSlices,
          int kTaps, int kTiles>
__device__ __forceinline__ void MultiplyStep(
    const uint32_t (&a)[kTaps][kSlices][2][4],
    const uint32_t (&a_lo)[kThreeProducts ? kTaps : 1][kSlices][2][4], int slice,
    int half, int tile, const uint32_t (&words)[2], float (&sum)[kTaps][kTiles][4]) {
  uint32_t b[2] = {words[0], words[1]}, b_lo[2] = {};
#pragma unroll
  for (int e = 0; e < 2; ++e) SplitTf32<T, kThreeProducts>(b[e], b_lo[e]);
  if constexpr (kThreeProducts) {
    float part[kCount][4] = {};
#pragma unroll
    for (int t = 0; t < kCount; ++t) Mma(part[t], a_lo[t][slice][half], b, T{});
#pragma unroll
    for (int t = 0; t < kCount; ++t) Mma(part[t], a[t][slice][half], b_lo, T{});
#pragma unroll
    for (int t = 0; t < kCount; ++t) Mma(part[t], a[t][slice][half], b, T{});
#pragma unroll
    for (int t = 0; t < kCount; ++t) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[(kOldest + t) % kTaps][tile][e] += part[t][e];
    }
  } else {
#pragma unroll
    for (int t = 0; t < kCount; ++t) {
      Mma(sum[(kOldest + t) % kTaps][tile], a[t][slice][half], b, T{});
    }
  }
}

// Calls f with a number below kCount as a constant, because registers have no index.
template <int kCount, typename F>
__device__ __forceinline__ void Constant(int number, F f) {
  if constexpr (kCount > 1) {
    if (number < kCount - 1) return Constant<kCount - 1>(number, f);
  }
  f(std::integral_constant<int, kCount - 1>{});
}

// ---- the way out ------------------------------------------------------------------

// Copies adjacent outputs of a warp from shared memory to dX, where they lie at `at`.
template <int kBytes, typename T>
__device__ __forceinline__ void StoreRun(const Epilogue& epilogue, const T* from,
                                         T* __restrict__ dx, int32_t at, int count,
                                         int lane) {
  constexpr int kElements = kBytes / static_cast<int>(sizeof(T));
  using Packed = Adjacent<T, kElements>;
  const int whole = count / kElements;
#pragma unroll
  for (int i = lane; i < kFewRun / kElements; i += 32) {
    if (i < whole) {
      Packed packed = reinterpret_cast<const Packed*>(from)[i];
      const int32_t packed_at = at + i * kElements;
      ApplyEpilogue(epilogue, packed.element, packed_at);
      *reinterpret_cast<Packed*>(dx + packed_at) = packed;
    }
  }
  const int i = whole * kElements + lane;
  if (lane < kElements && i < count) {
    dx[at + i] = ApplyEpilogue(epilogue, from[i], at + i);
  }
}

// An entry of the table of the outputs in a tile's row: where in z their first term is,
// and how many there are.
constexpr int kFewCountBits = 8;

__device__ __forceinline__ uint32_t TermsOf(const FewParams& params, const FewStrip& at,
                                            int32_t output) {
  const Geometry<int32_t>& g = params.geometry;
  const AxisGeometry<int32_t>& axis = g.axis[2];
  const int32_t position = params.channels.Quotient(output);
  const int32_t c = output - position * g.in_channels;
  const int32_t w = at.w0 + position;
  const int32_t i = axis.h_step.Quotient(w);
  const PhaseTaps<int32_t> phase = TapsOfPhase(axis, w - i * axis.h_step.divisor);
  const int32_t p = phase.p0 + i;
  const TapRange<int32_t> live = LiveTaps(axis, p, p, phase.r_count);
  const int32_t s = phase.r0 + live.first * axis.r_step;
  const int32_t q = p - live.first * axis.p_per_r.divisor - at.q0;
  const int32_t first =
      live.count == 0 ? 0 : (s * g.in_channels + c) * params.z_pitch + q;
  return static_cast<uint32_t>(first) << kFewCountBits |
         static_cast<uint32_t>(live.count);
}

// Writes the rows of dX that are complete with row u: by the whole block, a run a warp.
template <typename T>
__device__ __forceinline__ void Gather(const FewParams& params, const FewStrip& at,
                                       int32_t u, const float* z, const uint32_t* table,
                                       T* run, int warp, int warps, int lane,
                                       const T* __restrict__ dy, const T* __restrict__ w,
                                       T* __restrict__ dx) {
  const Geometry<int32_t>& g = params.geometry;
  const int32_t jobs = params.phases * params.runs.divisor;
#pragma unroll 1
  for (int32_t job = warp; job < jobs; job += warps) {
    const int32_t f = params.runs.Quotient(job);
    const int32_t first = (job - f * params.runs.divisor) * kFewRun;
    const int32_t count = at.outputs - first < kFewRun ? at.outputs - first : kFewRun;
    const int32_t h0 = at.first_phase + f;
    if (count <= 0 || h0 >= params.phase_count) continue;
    const int32_t i = u - g.axis[1].tabled[h0].p0;
    const int32_t h = h0 + i * g.axis[1].h_step.divisor;
    if (i < 0 || h >= g.axis[1].in) continue;

    const float* const z_phase = z + f * params.columns_of_phase * params.z_pitch;
    uint32_t entry[kFewRunPerLane];
    float sum[kFewRunPerLane] = {};
#pragma unroll
    for (int e = 0; e < kFewRunPerLane; ++e) {
      const int32_t output = e * 32 + lane;
      entry[e] = output < count ? table[first + output] : 0;
    }
#pragma unroll 1
    for (int part = 0; part < params.parts; ++part) {
      const float* z_term = z_phase + part * params.z_part;
#pragma unroll 2
      for (int t = 0; t < params.most_taps_last; ++t, z_term += params.z_step) {
#pragma unroll
        for (int e = 0; e < kFewRunPerLane; ++e) {
          const int terms = static_cast<int>(entry[e] & ((1u << kFewCountBits) - 1));
          if (t < terms) sum[e] += z_term[entry[e] >> kFewCountBits];
        }
      }
    }

    const int32_t row_at = at.dx_at + h * g.axis[1].dx_stride;
    unsigned special = 0;
#pragma unroll
    for (int e = 0; e < kFewRunPerLane; ++e) {
      const int32_t output = e * 32 + lane;
      const bool finite = sum[e] - sum[e] == 0.0f;
      special |= static_cast<unsigned>(!finite) << e;
      const T value = Narrow(sum[e], T{});
      if (params.store_bytes > 0) {
        run[output] = value;
      } else if (output < count) {
        const int32_t position = params.channels.Quotient(first + output);
        const int32_t c = first + output - position * g.in_channels;
        const int32_t dx_at =
            row_at + (at.w0 + position) * g.axis[2].dx_stride + c * g.dx_channel;
        dx[dx_at] = ApplyEpilogue(params.epilogue, value, dx_at);
      }
    }
    __syncwarp();
    const int32_t run_at = row_at + at.w0 * g.in_channels + first;
    if (params.store_bytes == 16) {
      StoreRun<16>(params.epilogue, run, dx, run_at, count, lane);
    } else if (params.store_bytes == 8) {
      StoreRun<8>(params.epilogue, run, dx, run_at, count, lane);
    } else if (params.store_bytes > 0) {
      StoreRun<sizeof(T)>(params.epilogue, run, dx, run_at, count, lane);
    }
    __syncwarp();  // another lane may have stored what this one repairs
#pragma unroll 1
    for (int e = 0; special != 0; ++e, special >>= 1) {
      const int32_t output = first + e * 32 + lane;
      if ((special & 1) == 0 || output >= at.outputs) continue;
      const int32_t position = params.channels.Quotient(output);
      const int32_t c = output - position * g.in_channels;
      const int32_t at_h[kAxes] = {at.plane, h, at.w0 + position};
      const float exact = DirectSum<T, int32_t>(
          g, at_h, at.dy_at - at.plane * g.axis[0].dy_stride, c * g.w_in_channel, dy, w);
      const int32_t dx_at = row_at + at_h[2] * g.axis[2].dx_stride + c * g.dx_channel;
      dx[dx_at] = ApplyEpilogue(params.epilogue, Narrow(exact, T{}), dx_at);
    }
  }
}

// ---- the kernel -------------------------------------------------------------------

template <typename T, bool kThreeProducts, int kTaps, int kSlices, int kTiles>
__global__ void __launch_bounds__(FewShapeOf(kThreeProducts, kTaps, kSlices).warps * 32,
                                  1)
    FewChannelsKernel(const __grid_constant__ FewParams params, const T* __restrict__ dy,
                      const T* __restrict__ w, T* __restrict__ dx) {
  constexpr int kSize = static_cast<int>(sizeof(T));
  CU_DYNAMIC_SHARED(shared);
  __shared__ FewStrip at;  // read from here, the registers are for W and the sums
  float* const z = reinterpret_cast<float*>(shared + params.z_at);
  uint32_t* const table = reinterpret_cast<uint32_t*>(shared + params.table_at);

  const Geometry<int32_t>& g = params.geometry;
  const int thread = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x);
  const int lane = thread % 32;
  const int warp = __shfl_sync(0xffffffffu, thread / 32, 0);  // ptxas sees: for all lanes
  T* const run = reinterpret_cast<T*>(shared + params.runs_at) + warp * kFewRun;

  // This warp's columns, part of K and pixels.
  const int column0 = warp % params.column_tiles * kFewColumns;
  const int part = warp / params.column_tiles % params.parts;
  const int pixel_warp = warp / params.column_tiles / params.parts;
  const int first_slice = part * params.slices_of_part;
  const int slices = params.slices - first_slice < params.slices_of_part
                         ? params.slices - first_slice
                         : params.slices_of_part;
  const unsigned phase_group = blockIdx.x % params.phase_groups;
  const int32_t first_phase = static_cast<int32_t>(phase_group) * params.phases;
  const int columns = params.phases * params.columns_of_phase;

  uint32_t a[kTaps][kSlices][2][4] = {};
  uint32_t a_lo[kThreeProducts ? kTaps : 1][kSlices][2][4] = {};
  int column_taps[2];
  int32_t column_at[2];
#pragma unroll
  for (int upper = 0; upper < 2; ++upper) {
    const int column = column0 + lane / 4 + upper * 8;
    const int f = column / params.columns_of_phase;
    const int of_phase = column - f * params.columns_of_phase;
    const int s = params.channels.Quotient(of_phase);
    const bool exists = column < columns && first_phase + f < params.phase_count;
    const PhaseTaps<int32_t> phase = g.axis[1].tabled[exists ? first_phase + f : 0];
    column_taps[upper] = exists ? phase.r_count : 0;
    column_at[upper] = (of_phase - s * g.in_channels) * g.w_in_channel +
                       s * g.axis[2].w_stride + phase.r0 * g.axis[1].w_stride;
  }
  // A loop that shifts registers, because ptxas starts all the loads of an unrolled one
  // at once and has no registers for them.
#pragma unroll 1
  for (int t = kTaps - 1; t >= 0; --t) {
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
#pragma unroll
      for (int word = 0; word < 8; ++word) {
        const int half = word / 4, upper = word % 2;
#pragma unroll
        for (int to = kTaps - 1; to > 0; --to) {
          a[to][slice][half][word % 4] = a[to - 1][slice][half][word % 4];
          if constexpr (kThreeProducts) {
            a_lo[to][slice][half][word % 4] = a_lo[to - 1][slice][half][word % 4];
          }
        }
        const int32_t k =
            ((first_slice + slice) * 4 + word / 2) * (kMmaChunkBytes / kSize) +
            lane % 4 * (4 / kSize);
        uint32_t& bits = a[0][slice][half][word % 4];
        bits = LoadFilterWord(
            g, w, column_at[upper] + t * g.axis[1].r_step * g.axis[1].w_stride, k,
            t < column_taps[upper] && slice < slices);
        SplitTf32<T, kThreeProducts>(bits, a_lo[0][slice][half][word % 4]);
      }
    }
  }
  // Whether some column of the warp has a tap kTaps - 1: the same for all lanes.
  bool all_taps = false;
  const int last_column =
      column0 + kFewColumns < columns ? column0 + kFewColumns : columns;
  for (int f = column0 / params.columns_of_phase;
       f * params.columns_of_phase < last_column; ++f) {
    all_taps = all_taps || (first_phase + f < params.phase_count &&
                            g.axis[1].tabled[first_phase + f].r_count == kTaps);
  }

  // Numbers that are needed once a strip stay in shared memory too.
  if (thread == 0) {
    at.id = blockIdx.x / params.phase_groups - params.strip_step;
    at.first_phase = first_phase;
  }
#pragma unroll 1
  while (true) {
    __syncthreads();  // nobody still reads about the strip before
    if (thread == 0) PlaceStrip(params, at.id + params.strip_step, at);
    __syncthreads();
    if (at.id >= params.strips) break;
    const int32_t apart = g.axis[1].p_per_r.divisor;

    const auto row_exists = [&](int32_t x) {
      return static_cast<uint32_t>(at.p0 + x * apart) <
                 static_cast<uint32_t>(g.axis[1].out) &&
             at.pixels > 0;
    };
    const auto copy_row = [&](int32_t x) {
      if (x >= at.steps || !row_exists(x)) return;
      unsigned char* const to = shared + x % kFewStages * params.stage_bytes;
      const int32_t row_at = at.dy_at + (at.p0 + x * apart) * g.axis[1].dy_stride +
                             at.q0 * g.axis[2].dy_stride;
      const int32_t copies = at.pixels * params.chunks.divisor;
#pragma unroll 2
      for (int32_t copy = thread; copy < copies; copy += threads) {
        const int32_t pixel = params.chunks.Quotient(copy);
        const int32_t chunk = copy - pixel * params.chunks.divisor;
        unsigned char* const chunk_to =
            to + pixel * params.pixel_bytes + chunk * kMmaChunkBytes;
        const int32_t from =
            row_at + pixel * g.axis[2].dy_stride + chunk * (kMmaChunkBytes / kSize);
        const int32_t left = g.out_channels * kSize - chunk * kMmaChunkBytes;
        const int valid = left < kMmaChunkBytes ? left : kMmaChunkBytes;
        if (params.dy_wide) {
          CopyChunk<T, true>(chunk_to, dy, from, valid, kMmaChunkBytes);
        } else if (params.dy_width >= 4) {
          CopyChunk<T, false>(chunk_to, dy, from, valid, params.dy_width);
        } else {
          *reinterpret_cast<MmaChunk*>(chunk_to) = LoadChunk(dy, from, valid);
        }
      }
    };

    float sum[kTaps][kTiles][4] = {};
    int oldest = 0;  // of the rows of sums: the one that is complete with the next step
    const auto multiply_row = [&](int32_t x, auto oldest) {
      constexpr int kOldest = decltype(oldest)::value;
      if (row_exists(x)) {
        const unsigned char* const row = shared + x % kFewStages * params.stage_bytes;
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          const int tile = pixel_warp + j * params.pixel_warps;
          if (tile >= at.tiles) continue;
          const unsigned char* const from =
              row + (tile * kFewTilePixels + lane % 8) * params.pixel_bytes +
              first_slice * kFewSliceBytes + lane / 8 * kMmaChunkBytes;
#pragma unroll
          for (int slice = 0; slice < kSlices; ++slice) {
            if (slice >= slices) continue;
            uint32_t words[4];
            LoadMatrixX4(words, from + slice * kFewSliceBytes);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const uint32_t b[2] = {words[2 * half], words[2 * half + 1]};
              if (kTaps == 1 || all_taps) {
                MultiplyStep<T, kThreeProducts, kTaps, kOldest>(a, a_lo, slice, half, j,
                                                                b, sum);
              } else {
                MultiplyStep<T, kThreeProducts, kTaps == 1 ? 1 : kTaps - 1, kOldest>(
                    a, a_lo, slice, half, j, b, sum);
              }
            }
          }
        }
      }
      if (x >= params.taps - 1) {
        float* const to = z + (x & 1) * params.z_buffer + part * params.z_part;
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          const int tile = pixel_warp + j * params.pixel_warps;
          if (tile >= at.tiles) continue;
#pragma unroll
          for (int upper = 0; upper < 2; ++upper) {
            const int column = column0 + lane / 4 + upper * 8;
            if (column >= columns) continue;
            *reinterpret_cast<float2*>(to + column * params.z_pitch +
                                       tile * kFewTilePixels + lane % 4 * 2) =
                make_float2(sum[kOldest][j][2 * upper], sum[kOldest][j][2 * upper + 1]);
          }
        }
      }
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[kOldest][j][e] = 0.0f;
      }
    };

    // The rounds before the first only fill the ring; the one after the last step only
    // gathers.
#pragma unroll 1
    for (int32_t x = 1 - kFewStages; x <= at.steps; ++x) {
      // The barrier publishes row x and the sums of step x - 1. It also means that nobody
      // still reads the row before, whose stage is filled next, or the sums of step
      // x - 2, which are overwritten.
      if (x >= 0) {
        CopyAsyncWait<kFewStages - 2>();
        __syncthreads();
      }
      copy_row(x + kFewStages - 1);
      CopyAsyncCommit();
      if (x < 0) continue;
      if (x == 0) {
        for (int32_t output = thread; output < at.outputs; output += threads) {
          table[output] = TermsOf(params, at, output);
        }
      }
      // In a multiprocessor's quarter there is every fourth warp.
      const int gathers = warp / 4 % 2;
#pragma unroll 1
      for (int turn = 0; turn < 2; ++turn) {
        if (turn == gathers) {
          if (x < at.steps) {
            Constant<kTaps>(oldest, [&](auto constant) { multiply_row(x, constant); });
            oldest = oldest + 1 < kTaps ? oldest + 1 : 0;
          }
        } else if (x >= params.taps) {
          Gather(params, at, at.u0 + (x - params.taps) * apart,
                 z + ((x - 1) & 1) * params.z_buffer, table, run, warp, threads / 32,
                 lane, dy, w, dx);
        }
      }
    }
  }
}

}  // namespace convgrad
