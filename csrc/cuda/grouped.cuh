// "grouped": many groups of few channels on the tensor cores, sm_80 and newer.
//
// With channels last, adjacent groups are adjacent channels. Over all groups at once the
// filter of a tap is a block-diagonal matrix, and for one phase (phase.h; i and t count
// positions and taps of the phase)
//
//   dX[m, c] = sum over t, k  dY[m - t, k] * B[t][k, c],      m = (n, i0, i1, i2)
//
// where c and k are channels of the whole pixel and B[t][k, c] is W if k and c are in the
// same group, else zero. Eight adjacent c touch few groups, hence a short range of k, and
// only that is multiplied: a row of an ldmatrix is a chunk of 16 bytes, 8 (f32: 4)
// adjacent k of one pixel. One mma.sync takes two chunks, each any chunk of any tap, so
// that it multiplies
//
//   16 pixels x [chunk of tap t | chunk of tap t'] x 8 channels of dX.
//
// Of the products in it those are wasted that lie outside a group: none in bf16 if C and
// K are multiples of 8, half for groups of 4 channels, 7/8 for depthwise ones.
//
// Tiling. A block has a slab of channels. It puts all fragments of B for these into
// shared memory once, and walks over tiles of positions: a box of images and of positions
// in every phase. All pixels of dY that a tile reads, the halo included, are copied to
// shared memory (cp.async; zeros outside dY) while the tile before is multiplied, so that
// dY is read about once. All phases of a tile are computed from it, and dX leaves in
// whole pixels of the slab. A slab is made of strips of kTiles tiles of 8 channels. A
// warp computes units: a strip of one phase for kUnitRows rows. In a strip kShare
// adjacent tiles form a bundle that multiplies the same fragments of A: those of 32
// channels of one group are loaded once for four tiles.
//
// Shared memory. Fragments of A come by ldmatrix from wherever the pixel of the row and
// tap lies: row and pair of chunks have each an offset, and their sum is the address. For
// this, chunks are not permuted; instead pixels are an odd number of chunks apart, and
// rows and planes such that consecutive m lie in different banks across their ends too.
// Fragments of B lie in the order of lanes. Per mma.sync this reads 4/kShare +
// 2/kWarpTilesM times 128 bytes, which is what limits groups of few channels.
//
// f32. If the precision allows it, operands are rounded to TF32; else each is split into
// hi + lo and lo*hi, hi*lo and hi*hi are added, as "mma_3xtf32" does (mma.cuh).
//
// Zeros. Those of B, and those for padding, give NaN with an Inf or a NaN. So a result
// that is not finite is computed again by the definition (DirectSum).
//
// Limits: bf16, f16 and f32; channels contiguous, groups too, pixels aligned to 16 bytes
// (dX in f32: 8); B and a tile or two of dY in shared memory, so C and K of a group up to
// kGroupedMaxChannels and not too many taps; indices of 32 bits (the host launches part
// after part of the batch). One group is a group too: narrow dense layers are welcome.

#pragma once

#include <cstdint>
#include <cstring>

#include "direct.cuh"
#include "epilogue.cuh"
#include "fragments.cuh"
#include "geometry.cuh"
#include "platform.cuh"
#include "primitives.cuh"

namespace convgrad {

constexpr int kGroupedWarps = 8;
constexpr int kGroupedThreads = kGroupedWarps * 32;
constexpr int kGroupedMinBlocks = 2;  // 128 registers a thread
constexpr int kGroupedChunkBytes = 16;
constexpr int kGroupedMaxChannels = 128;  // C and K of a group
constexpr int kGroupedMaxRows = 512;      // positions of a tile, of one phase
constexpr int kGroupedMaxPhases = 64;

template <typename T, bool kThreeProducts, int kTilesOfStrip, int kTilesOfBundle>
struct GroupedShape {
  static constexpr int kTiles = kTilesOfStrip, kShare = kTilesOfBundle;
  static constexpr int kBundles = kTiles / kShare;  // of a strip
  static constexpr int kStrip = kTiles * 8;         // channels
  static constexpr int kWarpTilesM = kThreeProducts ? 2 : 4;
  static constexpr int kUnitRows = kWarpTilesM * 16;
  static constexpr int kChunk = kGroupedChunkBytes / static_cast<int>(sizeof(T));
  static_assert(kTiles <= 4 && kTiles % kShare == 0, "a quad stores a strip");
};

// A tile of B in the order of lanes: 8 bytes each.
constexpr int kGroupedFragmentBytes = 32 * 8;

// A row of a tile: where its pixel lies in shared memory (bytes) and in dX, for tap zero
// of phase zero and relative to the tile, and which position of the box it is. Rows
// beyond the box have an image that never exists.
struct alignas(16) GroupedRow {
  int32_t dy, dx;
  uint32_t image_i0, i1_i2;  // 16 bits each
};

// A chunk of a tap, half of a pair: how far from a row's pixel it lies (bytes), where the
// tap lies in W, and the number of the chunk within the bundle's range. An odd last one
// does not exist: it reads what its neighbour reads, and its B is zero.
struct alignas(16) GroupedTerm {
  int32_t dy, w, chunk, exists;
};

struct GroupedPhase {
  int32_t first_pair, pairs;
  int32_t h0[kAxes], positions[kAxes];
  int32_t dx;  // offset of position h0
};

struct GroupedParams {
  Geometry<int32_t> geometry;
  Divider<int32_t> in_channels, out_channels;  // of a group
  int32_t dx_channels, dy_chunks;              // of a pixel
  int32_t phases[kAxes], phase_count;

  // A tile: a box of images and of positions of each phase, and what it reads of dY.
  int32_t images, size[kAxes], rows;
  Divider<int32_t> tiles[kAxes];  // how many there are
  int32_t tile_count;
  int32_t dy_low[kAxes];  // the first position of dY that tile zero reads
  Divider<int32_t> dy_size[kAxes];
  int32_t copy_rows;                  // (image, p0, p1)
  Divider<int32_t> chunks;            // of a pixel, that a slab reads
  int32_t pitch[kAxes], image_pitch;  // bytes

  // A block is (part, slab) and computes every parts-th tile.
  Divider<int32_t> slabs;
  int32_t parts;
  Divider<int32_t> strips;      // of a slab
  Divider<int32_t> row_groups;  // of kUnitRows, in a tile
  int32_t bundle_chunks;        // of dY, that a bundle reads for a tap
  int32_t pairs;                // of all phases
  int32_t stage_bytes;
  int32_t low_at;  // of fragments: the lower halves, with three products
  int32_t fragments_at, terms_at, rows_at, phases_at, bundles_at;
  Epilogue epilogue;
};

// A tile's first image and position.
struct GroupedPlace {
  int32_t n, i[kAxes];
};

__device__ __forceinline__ GroupedPlace PlaceOfTile(const GroupedParams& params,
                                                    int32_t tile) {
  GroupedPlace at;
#pragma unroll
  for (int a = kAxes - 1; a >= 0; --a) {
    at.i[a] = TakeDigit(params.tiles[a], &tile) * params.size[a];
  }
  at.n = tile * params.images;
  return at;
}

// The first chunk of dY that the group of dX's channel c reads.
template <int kChunk>
__device__ __forceinline__ int32_t FirstChunk(const GroupedParams& params, int32_t c) {
  const int32_t last = params.dx_channels - 1;
  const int32_t group = params.in_channels.Quotient(c < last ? c : last);
  return group * params.out_channels.divisor / kChunk;
}

// ---- once a block -----------------------------------------------------------------

__device__ __forceinline__ GroupedPhase PhaseOf(const GroupedParams& params, int id) {
  const Geometry<int32_t>& g = params.geometry;
  GroupedPhase phase{};
  int32_t chunks = params.bundle_chunks;
#pragma unroll
  for (int a = kAxes - 1; a >= 0; --a) {
    const AxisGeometry<int32_t>& axis = g.axis[a];
    phase.h0[a] = id % params.phases[a];
    id /= params.phases[a];
    phase.positions[a] = PositionsOf(axis, phase.h0[a]).divisor;
    phase.dx += phase.h0[a] * axis.dx_stride;
    chunks *= TapsOfPhase(axis, phase.h0[a]).r_count;
  }
  phase.pairs = (chunks + 1) / 2;
  return phase;
}

__device__ __forceinline__ GroupedRow RowOfTile(const GroupedParams& params, int32_t r) {
  const Geometry<int32_t>& g = params.geometry;
  if (r >= params.rows) return {0, 0, 0xffffffffu, 0xffffffffu};
  GroupedRow row{};
  uint32_t position[kAxes];
#pragma unroll
  for (int a = kAxes - 1; a >= 0; --a) {
    const int32_t i = r % params.size[a];
    r /= params.size[a];
    row.dy += i * g.axis[a].p_per_h * params.pitch[a];
    row.dx += i * g.axis[a].h_step.divisor * g.axis[a].dx_stride;
    position[a] = static_cast<uint32_t>(i);
  }
  row.dy += r * params.image_pitch;
  row.dx += r * g.dx_batch;
  row.image_i0 = static_cast<uint32_t>(r) << 16 | position[0];
  row.i1_i2 = position[1] << 16 | position[2];
  return row;
}

// Term `index` of all. A pair has two.
__device__ __forceinline__ GroupedTerm TermOf(const GroupedParams& params,
                                              const GroupedPhase* phases, int index) {
  const Geometry<int32_t>& g = params.geometry;
  int id = 0;
  while (id + 1 < params.phase_count && phases[id + 1].first_pair <= index / 2) ++id;
  PhaseTaps<int32_t> taps[kAxes];
  int32_t count = params.bundle_chunks;
#pragma unroll
  for (int a = 0; a < kAxes; ++a) {
    taps[a] = TapsOfPhase(g.axis[a], phases[id].h0[a]);
    count *= taps[a].r_count;
  }
  int32_t rest = index - 2 * phases[id].first_pair;
  GroupedTerm term{};
  term.exists = rest < count;
  if (rest >= count) rest = count - 1;
  term.chunk = rest % params.bundle_chunks;
  rest /= params.bundle_chunks;
  term.dy = term.chunk * kGroupedChunkBytes;
#pragma unroll
  for (int a = kAxes - 1; a >= 0; --a) {
    const AxisGeometry<int32_t>& axis = g.axis[a];
    const int32_t t = rest % taps[a].r_count;
    rest /= taps[a].r_count;
    term.dy +=
        (taps[a].p0 - t * axis.p_per_r.divisor - params.dy_low[a]) * params.pitch[a];
    term.w += (taps[a].r0 + t * axis.r_step) * axis.w_stride;
  }
  return term;
}

// Fills in the fragments of B, a row of eight channels at a time. Element (k, column) of
// the first chunk of a pair is with lane (column, k / 2) of 16-bit types, in its first
// word, and with lane (column, k) of f32; that of the second chunk in the second word.
template <typename T, bool kThreeProducts, typename S>
__device__ __forceinline__ void FillFragments(const GroupedParams& params,
                                              const GroupedTerm* terms,
                                              int32_t slab_channel,
                                              const T* __restrict__ w,
                                              unsigned char* fragments) {
  const Geometry<int32_t>& g = params.geometry;
  const int tiles = params.strips.divisor * S::kTiles;
  const int count = params.pairs * tiles * 2 * S::kChunk;
  for (int index = static_cast<int>(threadIdx.x); index < count;
       index += kGroupedThreads) {
    const int k = index % S::kChunk;
    const int half = index / S::kChunk % 2;
    const int fragment = index / (2 * S::kChunk);
    const int pair = fragment / tiles;
    const int tile = fragment - pair * tiles;
    const GroupedTerm term = terms[2 * pair + half];
    const int32_t first =
        FirstChunk<S::kChunk>(params, slab_channel + tile / S::kShare * S::kShare * 8);
    const int32_t channel = (first + term.chunk) * S::kChunk + k;  // of dY
    const bool exists = term.exists != 0 && first + term.chunk < params.dy_chunks;
    const int32_t group = exists ? params.out_channels.Quotient(channel) : 0;
    const int32_t from =
        group * g.w_group + term.w +
        (channel - group * params.out_channels.divisor) * (exists ? g.w_out_channel : 0);
    const int32_t c = slab_channel + tile * 8 - group * g.in_channels;
    unsigned char* const to = fragments + fragment * kGroupedFragmentBytes + half * 4 +
                              (sizeof(T) == 2 ? k / 2 * 8 + k % 2 * 2 : k * 8);
#pragma unroll
    for (int column = 0; column < 8; ++column) {
      const bool same_group =
          static_cast<uint32_t>(c + column) < static_cast<uint32_t>(g.in_channels);
      const T value =
          exists && same_group ? w[from + (c + column) * g.w_in_channel] : T{};
      unsigned char* const element = to + column * 32;
      if constexpr (sizeof(T) == 2) {
        *reinterpret_cast<T*>(element) = value;
      } else {
        const uint32_t rounded = RoundToTf32(value);
        *reinterpret_cast<uint32_t*>(element) = rounded;
        if constexpr (kThreeProducts) {
          *reinterpret_cast<uint32_t*>(element + params.low_at) =
              RestOfTf32(value, rounded);
        }
      }
    }
  }
}

// ---- a tile -----------------------------------------------------------------------

// Starts copying what a tile reads of dY, a warp for each row of pixels.
template <typename T, int kChunk>
__device__ __forceinline__ void CopyTile(const GroupedParams& params,
                                         const GroupedPlace& at, int32_t first_chunk,
                                         unsigned char* stage, const T* __restrict__ dy) {
  const Geometry<int32_t>& g = params.geometry;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  int32_t low[kAxes];
#pragma unroll
  for (int a = 0; a < kAxes; ++a) {
    low[a] = params.dy_low[a] + at.i[a] * g.axis[a].p_per_h;
  }
  const int row_chunks = params.dy_size[2].divisor * params.chunks.divisor;
#pragma unroll 1
  for (int32_t row = static_cast<int32_t>(threadIdx.x) / 32; row < params.copy_rows;
       row += kGroupedWarps) {
    const int32_t plane = params.dy_size[1].Quotient(row);
    const int32_t image = params.dy_size[0].Quotient(plane);
    const int32_t i1 = row - plane * params.dy_size[1].divisor;
    const int32_t i0 = plane - image * params.dy_size[0].divisor;
    const int32_t n = at.n + image, p0 = low[0] + i0, p1 = low[1] + i1;
    const bool row_exists =
        n < g.batch && static_cast<uint32_t>(p0) < static_cast<uint32_t>(g.axis[0].out) &&
        static_cast<uint32_t>(p1) < static_cast<uint32_t>(g.axis[1].out);
    const int32_t from =
        row_exists ? n * g.dy_batch + p0 * g.axis[0].dy_stride + p1 * g.axis[1].dy_stride
                   : 0;
    unsigned char* const to =
        stage + image * params.image_pitch + i0 * params.pitch[0] + i1 * params.pitch[1];
#pragma unroll 2
    for (int e = lane; e < row_chunks; e += 32) {
      const int32_t pixel = params.chunks.Quotient(e);
      const int32_t chunk = e - pixel * params.chunks.divisor;
      const int32_t p2 = low[2] + pixel;
      const bool exists =
          row_exists && first_chunk + chunk < params.dy_chunks &&
          static_cast<uint32_t>(p2) < static_cast<uint32_t>(g.axis[2].out);
      const int32_t offset =
          from + p2 * g.axis[2].dy_stride + (first_chunk + chunk) * kChunk;
      CopyAsyncOrZero(to + pixel * params.pitch[2] + chunk * kGroupedChunkBytes,
                      dy + (exists ? offset : 0), exists);
    }
  }
}

// Whether a row of a tile is a position of dX in this phase.
__device__ __forceinline__ bool RowExists(const GroupedParams& params,
                                          const GroupedPlace& at,
                                          const GroupedPhase& phase,
                                          const GroupedRow& row) {
  return at.n + static_cast<int32_t>(row.image_i0 >> 16) < params.geometry.batch &&
         at.i[0] + static_cast<int32_t>(row.image_i0 & 0xffff) < phase.positions[0] &&
         at.i[1] + static_cast<int32_t>(row.i1_i2 >> 16) < phase.positions[1] &&
         at.i[2] + static_cast<int32_t>(row.i1_i2 & 0xffff) < phase.positions[2];
}

// The offset in dX of the first position of a tile.
__device__ __forceinline__ int32_t TileInDx(const GroupedParams& params,
                                            const GroupedPlace& at) {
  const Geometry<int32_t>& g = params.geometry;
  int32_t offset = at.n * g.dx_batch;
#pragma unroll
  for (int a = 0; a < kAxes; ++a) {
    offset += at.i[a] * g.axis[a].h_step.divisor * g.axis[a].dx_stride;
  }
  return offset;
}

// Adds all products of a unit. `rows` are its rows, `terms` and `fragments` those of its
// phase, the latter also of its strip; bundle_at[b] is where the chunks of bundle b
// begin.
template <typename T, bool kThreeProducts, typename S>
__device__ __forceinline__ void MultiplyUnit(
    const unsigned char* stage, const GroupedRow* rows, const GroupedTerm* terms,
    const unsigned char* fragments, int32_t pairs, int32_t pair_bytes, int32_t low_at,
    const int32_t (&bundle_at)[S::kBundles], int lane,
    float (&sum)[S::kWarpTilesM][S::kTiles][4]) {
  const unsigned char* row_at[S::kWarpTilesM];
#pragma unroll
  for (int i = 0; i < S::kWarpTilesM; ++i)
    row_at[i] = stage + rows[i * 16 + lane % 16].dy;
  const GroupedTerm* term = terms + lane / 16;
  const unsigned char* fragment = fragments + lane * 8;
  int32_t next_at = pairs > 0 ? term->dy : 0;
#pragma unroll 1
  for (int32_t pair = 0; pair < pairs; ++pair, fragment += pair_bytes) {
    const int32_t term_at = next_at;
    term += 2;
    if (pair + 1 < pairs) next_at = term->dy;  // early: an address depends on it
#pragma unroll
    for (int b = 0; b < S::kBundles; ++b) {
      uint32_t hi[S::kShare][2], lo[kThreeProducts ? S::kShare : 1][2];
#pragma unroll
      for (int j = 0; j < S::kShare; ++j) {
        const unsigned char* const at =
            fragment + (b * S::kShare + j) * kGroupedFragmentBytes;
        std::memcpy(hi[j], __builtin_assume_aligned(at, 8), 8);
        if constexpr (kThreeProducts) {
          std::memcpy(lo[j], __builtin_assume_aligned(at + low_at, 8), 8);
        }
      }
#pragma unroll
      for (int i = 0; i < S::kWarpTilesM; ++i) {
        uint32_t a[4], a_lo[4];
        LoadMatrixX4(a, row_at[i] + term_at + bundle_at[b]);
        if constexpr (sizeof(T) == 4) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float v = FromBits(a[e]);
            a[e] = RoundToTf32(v);
            if constexpr (kThreeProducts) a_lo[e] = RestOfTf32(v, a[e]);
          }
        }
        if constexpr (kThreeProducts) {
          // A tensor core truncates what it adds to its accumulator (mma.cuh).
          float part[S::kShare][4] = {};
#pragma unroll
          for (int j = 0; j < S::kShare; ++j) Mma(part[j], a_lo, hi[j], T{});
#pragma unroll
          for (int j = 0; j < S::kShare; ++j) Mma(part[j], a, lo[j], T{});
#pragma unroll
          for (int j = 0; j < S::kShare; ++j) Mma(part[j], a, hi[j], T{});
#pragma unroll
          for (int j = 0; j < S::kShare; ++j) {
#pragma unroll
            for (int e = 0; e < 4; ++e) sum[i][b * S::kShare + j][e] += part[j][e];
          }
        } else {
#pragma unroll
          for (int j = 0; j < S::kShare; ++j) {
            Mma(sum[i][b * S::kShare + j], a, hi[j], T{});
          }
        }
      }
    }
  }
}

// Stores 16 rows of a strip whose first channel is c. A lane has rows lane/4 and
// lane/4 + 8, which lie at row_at in dX if there is such a row. One copy of it serves
// with and without an epilogue: two would spill a register.
template <typename T, int kTiles>
__device__ __forceinline__ void StoreRows(const GroupedParams& params,
                                          const float (&sum)[kTiles][4],
                                          const int32_t (&row_at)[2],
                                          const bool (&row_exists)[2], int32_t c,
                                          int lane, T* __restrict__ dx) {
  // What a lane stores of a row: eight channels of the tile lane % 4, or two of each.
  constexpr int kCount = sizeof(T) == 2 ? 8 : 2, kStores = sizeof(T) == 2 ? 1 : kTiles;
  const auto channel = [&](int j) {
    return c + (sizeof(T) == 2 ? lane % 4 * 8 : j * 8 + lane % 4 * 2);
  };
  const auto exists = [&](int half, int j) {
    return row_exists[half] && (sizeof(T) == 4 || lane % 4 < kTiles) &&
           channel(j) < params.dx_channels;
  };
  EpilogueOperands<T, kCount> operands[2][kStores] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int j = 0; j < kStores; ++j) {
      if (exists(half, j)) {
        LoadOperands(params.epilogue, row_at[half] + channel(j), operands[half][j]);
      }
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if constexpr (sizeof(T) == 2) {
      // A lane has two channels of each tile. Exchanged within the quad, these are the
      // eight of one tile, which are one store.
      uint32_t word[4] = {};
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const T pair[2] = {Narrow(sum[j][2 * half], T{}),
                           Narrow(sum[j][2 * half + 1], T{})};
        std::memcpy(&word[j], pair, sizeof(pair));
      }
      TransposeQuad(word, lane);
      Adjacent<T, kCount> value;
      std::memcpy(&value, word, sizeof(value));
      ApplyOperands(params.epilogue, operands[half][0], value.element);
      if (exists(half, 0)) {
        *reinterpret_cast<Adjacent<T, kCount>*>(dx + row_at[half] + channel(0)) = value;
      }
    } else {
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        Adjacent<T, kCount> value = {{sum[j][2 * half], sum[j][2 * half + 1]}};
        ApplyOperands(params.epilogue, operands[half][j], value.element);
        if (exists(half, j)) {
          *reinterpret_cast<Adjacent<T, kCount>*>(dx + row_at[half] + channel(j)) = value;
        }
      }
    }
  }
}

// Computes again, by the definition, the elements of `special`: bit 16*i + 4*j + e for e
// of tile j of 16 rows i of a unit, whose rows are `rows` and whose first channel is c. A
// lane's results may have been stored by another one, hence the barrier.
template <typename T>
__device__ __forceinline__ void RepairUnit(const GroupedParams& params,
                                           const GroupedPlace& at,
                                           const GroupedPhase& phase,
                                           const GroupedRow* rows, uint64_t special,
                                           int32_t c, int lane, const T* __restrict__ dy,
                                           const T* __restrict__ w, T* __restrict__ dx) {
  const Geometry<int32_t>& g = params.geometry;
  __syncwarp();
#pragma unroll 1
  for (int bit = 0; special != 0; ++bit, special >>= 1) {
    if ((special & 1) == 0) continue;
    const int e = bit % 4;
    const GroupedRow row = rows[bit / 16 * 16 + lane / 4 + e / 2 * 8];
    const int32_t channel = c + bit / 4 % 4 * 8 + lane % 4 * 2 + e % 2;
    if (!RowExists(params, at, phase, row) || channel >= params.dx_channels) continue;
    const int32_t n = at.n + static_cast<int32_t>(row.image_i0 >> 16);
    const uint32_t i[kAxes] = {row.image_i0 & 0xffff, row.i1_i2 >> 16,
                               row.i1_i2 & 0xffff};
    int32_t h[kAxes];
#pragma unroll
    for (int a = 0; a < kAxes; ++a) {
      h[a] =
          phase.h0[a] + (at.i[a] + static_cast<int32_t>(i[a])) * g.axis[a].h_step.divisor;
    }
    const int32_t group = params.in_channels.Quotient(channel);
    const float sum = DirectSum<T, int32_t>(
        g, h, n * g.dy_batch + group * g.dy_group,
        group * g.w_group + (channel - group * g.in_channels) * g.w_in_channel, dy, w);
    const int32_t dx_at = TileInDx(params, at) + phase.dx + row.dx + channel;
    dx[dx_at] = ApplyEpilogue(params.epilogue, Narrow(sum, T{}), dx_at);
  }
}

// ---- the kernel -------------------------------------------------------------------

template <typename T, bool kThreeProducts, int kTiles, int kShare>
__global__ void __launch_bounds__(kGroupedThreads, kGroupedMinBlocks)
    GroupedKernel(const __grid_constant__ GroupedParams params, const T* __restrict__ dy,
                  const T* __restrict__ w, T* __restrict__ dx) {
  using S = GroupedShape<T, kThreeProducts, kTiles, kShare>;
  CU_DYNAMIC_SHARED(shared);
  unsigned char* const fragments = shared + params.fragments_at;
  GroupedTerm* const terms = reinterpret_cast<GroupedTerm*>(shared + params.terms_at);
  GroupedRow* const rows = reinterpret_cast<GroupedRow*>(shared + params.rows_at);
  GroupedPhase* const phases = reinterpret_cast<GroupedPhase*>(shared + params.phases_at);
  int32_t* const bundles = reinterpret_cast<int32_t*>(shared + params.bundles_at);

  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int warp = __shfl_sync(0xffffffffu, thread / 32, 0);  // ptxas sees: for all lanes
  const int strips = params.strips.divisor;
  const int32_t block = static_cast<int32_t>(blockIdx.x);
  int32_t tile = params.slabs.Quotient(block);
  const int32_t slab_channel = (block - tile * params.slabs.divisor) * strips * S::kStrip;
  const int32_t first_chunk = FirstChunk<S::kChunk>(params, slab_channel);

  CopyTile<T, S::kChunk>(params, PlaceOfTile(params, tile), first_chunk, shared, dy);
  CopyAsyncCommit();

  // What all tiles have in common, while the first one arrives.
  if (thread < params.phase_count) {
    GroupedPhase phase = PhaseOf(params, thread);
    for (int before = 0; before < thread; ++before) {
      phase.first_pair += PhaseOf(params, before).pairs;
    }
    phases[thread] = phase;
  }
  for (int r = thread; r < params.row_groups.divisor * S::kUnitRows;
       r += kGroupedThreads) {
    rows[r] = RowOfTile(params, r);
  }
  for (int b = thread; b < strips * S::kBundles; b += kGroupedThreads) {
    const int32_t c = slab_channel + b * S::kShare * 8;
    bundles[b] = (FirstChunk<S::kChunk>(params, c) - first_chunk) * kGroupedChunkBytes;
  }
  __syncthreads();
  for (int index = thread; index < 2 * params.pairs; index += kGroupedThreads) {
    terms[index] = TermOf(params, phases, index);
  }
  __syncthreads();
  FillFragments<T, kThreeProducts, S>(params, terms, slab_channel, w, fragments);

  const int32_t pair_bytes = strips * S::kTiles * kGroupedFragmentBytes;
  const int32_t units = strips * params.row_groups.divisor * params.phase_count;
  int32_t stage_at = 0;
#pragma unroll 1
  for (; tile < params.tile_count; tile += params.parts) {
    // The barrier publishes this tile, and the first time the fragments. It also means
    // that nobody still reads the tile before, whose place the next one takes.
    CopyAsyncWait<0>();
    __syncthreads();
    const unsigned char* const stage = shared + stage_at;
    stage_at = params.stage_bytes - stage_at;
    const int32_t next = tile + params.parts;
    if (next < params.tile_count) {
      CopyTile<T, S::kChunk>(params, PlaceOfTile(params, next), first_chunk,
                             shared + stage_at, dy);
    }
    CopyAsyncCommit();

    const GroupedPlace at = PlaceOfTile(params, tile);
#pragma unroll 1
    for (int32_t unit = warp; unit < units; unit += kGroupedWarps) {
      const int32_t rest = params.strips.Quotient(unit);
      const int32_t strip = unit - rest * strips;
      const int32_t phase_id = params.row_groups.Quotient(rest);
      const int32_t row_group = rest - phase_id * params.row_groups.divisor;
      const int32_t c = slab_channel + strip * S::kStrip;
      if (c >= params.dx_channels) continue;
      const GroupedPhase& phase = phases[phase_id];
      const GroupedRow* const unit_rows = rows + row_group * S::kUnitRows;

      float sum[S::kWarpTilesM][kTiles][4] = {};
      int32_t bundle_at[S::kBundles];
#pragma unroll
      for (int b = 0; b < S::kBundles; ++b)
        bundle_at[b] = bundles[strip * S::kBundles + b];
      MultiplyUnit<T, kThreeProducts, S>(stage, unit_rows, terms + 2 * phase.first_pair,
                                         fragments + phase.first_pair * pair_bytes +
                                             strip * kTiles * kGroupedFragmentBytes,
                                         phase.pairs, pair_bytes, params.low_at,
                                         bundle_at, lane, sum);

      // All zero unless a sum is not finite.
      float check[4] = {};
#pragma unroll
      for (int i = 0; i < S::kWarpTilesM; ++i) {
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) check[e] += sum[i][j][e] * 0.0f;
        }
      }
      uint64_t special = 0;
      if (check[0] + check[1] + check[2] + check[3] != 0.0f) {
#pragma unroll
        for (int i = 0; i < S::kWarpTilesM; ++i) {
#pragma unroll
          for (int j = 0; j < kTiles; ++j) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const bool finite = sum[i][j][e] - sum[i][j][e] == 0.0f;
              special |= static_cast<uint64_t>(!finite) << (16 * i + 4 * j + e);
            }
          }
        }
      }
      const int32_t unit_at = TileInDx(params, at) + phase.dx;
#pragma unroll
      for (int i = 0; i < S::kWarpTilesM; ++i) {
        int32_t row_at[2];
        bool row_exists[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const GroupedRow row = unit_rows[i * 16 + half * 8 + lane / 4];
          row_exists[half] = RowExists(params, at, phase, row);
          row_at[half] = row_exists[half] ? unit_at + row.dx : 0;
        }
        StoreRows<T, kTiles>(params, sum[i], row_at, row_exists, c, lane, dx);
      }
      RepairUnit<T>(params, at, phase, unit_rows, special, c, lane, dy, w, dx);
    }
  }
}

}  // namespace convgrad
