// What the implicit GEMMs (tiled.cuh, mma.cuh, wgmma.cuh) share: how their blocks are
// numbered, what the rows of a tile are in dX and dY, and which taps a tile needs.
//
// Rows are the pairs of an image and a position of one phase (phase.h) in lexicographic
// order, columns the input channels of one group.

#pragma once

#include <cstdint>
#include <type_traits>

#include "../phase.h"
#include "geometry.cuh"

namespace convgrad {

// A block's number is ((group, row tile, phases...), channel tile). The phases of a row
// tile are neighbours, because they read the same part of dY, write interleaved pixels of
// dX, and have more and fewer taps. They need not have equally many rows: there are tiles
// for the largest, and some have nothing to do.
struct TileGrid {
  int tile_m, tile_n;
  Divider<int32_t> row_tiles, channel_tiles, phases[kAxes];
  unsigned total;
};

// How many blocks a problem is. More than kMaxBlocks (kernel_table.h) are too many for a
// TileGrid.
inline int64_t CountTiles(const Problem& problem, int64_t tile_m, int64_t tile_n,
                          TileGrid* grid = nullptr) {
  int64_t rows = problem.batch, phases = 1;
  for (int i = 0; i < kAxes; ++i) {
    const Axis& a = problem.axis[i];
    // The first phase has the most positions; a phase beyond `in` has none.
    rows *= MakePhase(a, 0).h_count;
    const int64_t count = PhaseCount(a) < a.in ? PhaseCount(a) : a.in;
    if (grid != nullptr) grid->phases[i] = Divider<int32_t>::Make(count);
    phases *= count;
  }
  const int64_t row_tiles = (rows + tile_m - 1) / tile_m;
  const int64_t channel_tiles = (problem.in_channels + tile_n - 1) / tile_n;
  const int64_t total = problem.groups * row_tiles * phases * channel_tiles;
  if (grid != nullptr) {
    grid->tile_m = static_cast<int>(tile_m);
    grid->tile_n = static_cast<int>(tile_n);
    grid->row_tiles = Divider<int32_t>::Make(row_tiles);
    grid->channel_tiles = Divider<int32_t>::Make(channel_tiles);
    grid->total = static_cast<unsigned>(total);
  }
  return total;
}

inline TileGrid MakeTileGrid(const Problem& problem, int64_t tile_m, int64_t tile_n) {
  TileGrid grid{};
  CountTiles(problem, tile_m, tile_n, &grid);
  return grid;
}

// Where a tile lies: rows m0.. of a phase and group, channels c0..
template <typename Index>
struct TilePlace {
  Index c0, m0, group;
  Index h0[kAxes], positions[kAxes];
  PhaseTaps<Index> phase[kAxes];
  Index row_count;
};

template <typename Index>
__device__ __forceinline__ TilePlace<Index> PlaceTile(const Geometry<Index>& g,
                                                      const TileGrid& grid, unsigned id) {
  TilePlace<Index> at;
  int32_t rest = static_cast<int32_t>(id);
  at.c0 = static_cast<Index>(TakeDigit(grid.channel_tiles, &rest)) * grid.tile_n;
#pragma unroll
  for (int a = kAxes - 1; a >= 0; --a) {
    at.h0[a] = static_cast<Index>(TakeDigit(grid.phases[a], &rest));
    at.phase[a] = TapsOfPhase(g.axis[a], at.h0[a]);
    at.positions[a] = PositionsOf(g.axis[a], at.h0[a]).divisor;
  }
  at.m0 = static_cast<Index>(TakeDigit(grid.row_tiles, &rest)) * grid.tile_m;
  at.group = static_cast<Index>(rest);
  at.row_count = g.batch * at.positions[0] * at.positions[1] * at.positions[2];
  return at;
}

// What row m of a phase is: an image, a position in dX and, for tap zero, one in dY.
template <typename Index>
struct RowPlace {
  Index n, h[kAxes], p[kAxes];
};

template <typename Index>
__device__ __forceinline__ RowPlace<Index> PlaceRow(const Geometry<Index>& g,
                                                    const TilePlace<Index>& at, Index m) {
  RowPlace<Index> row;
#pragma unroll
  for (int a = kAxes - 1; a >= 0; --a) {
    const Index i = TakeDigit(PositionsOf(g.axis[a], at.h0[a]), &m);
    row.h[a] = at.h0[a] + i * g.axis[a].h_step.divisor;
    row.p[a] = at.phase[a].p0 + i * g.axis[a].p_per_h;
  }
  row.n = m;
  return row;
}

template <typename Index>
__device__ __forceinline__ Index OffsetInDx(const Geometry<Index>& g,
                                            const TilePlace<Index>& at,
                                            const RowPlace<Index>& row) {
  Index offset = row.n * g.dx_batch + at.group * g.dx_group;
#pragma unroll
  for (int a = 0; a < kAxes; ++a) offset += row.h[a] * g.axis[a].dx_stride;
  return offset;
}

// A row in shared memory: where it reads dY for tap zero, and where it writes dX. A row
// beyond the last has p = -1 on every axis, which no tap brings into dY.
template <typename Index>
struct alignas(16) TileRow {
  Index p[kAxes];
  Index dy, dx;
};

template <typename Index>
__device__ __forceinline__ TileRow<Index> MakeTileRow(const Geometry<Index>& g,
                                                      const TilePlace<Index>& at,
                                                      Index m) {
  TileRow<Index> row = {{-1, -1, -1}, 0, 0};
  if (m < at.row_count) {
    const RowPlace<Index> place = PlaceRow(g, at, m);
    row.dy = place.n * g.dy_batch + at.group * g.dy_group;
    row.dx = OffsetInDx(g, at, place);
#pragma unroll
    for (int a = 0; a < kAxes; ++a) {
      row.p[a] = place.p[a];
      row.dy += place.p[a] * g.axis[a].dy_stride;
    }
  }
  return row;
}

// Whether the tap that is shift[a] positions back on axis a is inside dY. Unsigned, a
// negative position is a huge one.
template <typename Index>
__device__ __forceinline__ bool Reaches(const Geometry<Index>& g,
                                        const TileRow<Index>& row,
                                        const Index (&shift)[kAxes]) {
  using Count = std::make_unsigned_t<Index>;
  bool inside = true;
#pragma unroll
  for (int a = 0; a < kAxes; ++a) {
    inside = inside &&
             static_cast<Count>(row.p[a] - shift[a]) < static_cast<Count>(g.axis[a].out);
  }
  return inside;
}

// The taps of an axis that a tile needs: their number, and for the first one how far back
// in dY and how far along the filter it lies.
template <typename Index>
struct TapSpan {
  Index count, shift, r;
};

// The taps that some row of a tile may need, between its first and its last row, whose
// positions in dY for tap zero these are: returns their number, and fills `spans` if
// `fills`. Rows are in lexicographic order, so on an axis they lie between the first and
// the last row's position as long as these two agree on everything before that axis,
// `together` standing for the image, and anywhere if not.
template <typename Index>
__device__ __forceinline__ Index LiveTapsBetween(const Geometry<Index>& g,
                                                 const TilePlace<Index>& at,
                                                 bool together,
                                                 const Index (&first)[kAxes],
                                                 const Index (&last)[kAxes], bool fills,
                                                 TapSpan<Index> (&spans)[kAxes]) {
  Index taps = 1;
#pragma unroll
  for (int a = 0; a < kAxes; ++a) {
    const AxisGeometry<Index>& axis = g.axis[a];
    const Index lowest = at.phase[a].p0;
    const Index highest = lowest + (at.positions[a] - 1) * axis.p_per_h;
    const TapRange<Index> live =
        LiveTaps(axis, together ? first[a] : lowest, together ? last[a] : highest,
                 at.phase[a].r_count);
    together = together && first[a] == last[a];
    taps *= live.count;
    if (fills) {
      spans[a] = {live.count, live.first * axis.p_per_r.divisor,
                  at.phase[a].r0 + live.first * axis.r_step};
    }
  }
  return taps;
}

// The same for a tile whose rows are in `rows`; one of the threads fills.
template <typename Index>
__device__ __forceinline__ Index FindLiveTaps(const Geometry<Index>& g,
                                              const TilePlace<Index>& at,
                                              const TileRow<Index>* rows, int tile_m,
                                              bool fills,
                                              TapSpan<Index> (&spans)[kAxes]) {
  const Index m_end = at.m0 + tile_m < at.row_count ? at.m0 + tile_m : at.row_count;
  const bool together = PlaceRow(g, at, at.m0).n == PlaceRow(g, at, m_end - 1).n;
  return LiveTapsBetween(g, at, together, rows[0].p, rows[m_end - 1 - at.m0].p, fills,
                         spans);
}

}  // namespace convgrad
