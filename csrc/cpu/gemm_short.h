// The gemm kernel's way (gemm.h) with sums of few terms and many columns.
//
// There, finding what a register tile reads costs as much as the products, and so does
// following a pointer for each row and tap. So a task copies what its rows read, once for
// all panels: packed[register tile][tap, k][row]. Taps that no row of a tile has are left
// out.

#pragma once

#include "gemm_rows.h"
#include "gemm_tiles.h"

namespace convgrad {
namespace CONVGRAD_ISA {
namespace {

constexpr int64_t kShortSum = 384;   // operands of it, at most
constexpr int64_t kShortDepth = 64;  // of one tap
constexpr int kShortTaps = 192;      // and taps
constexpr int64_t kPackedBytes = 24 * 1024;
constexpr int kMaxShortTiles = 8;  // of registers, that a task makes
constexpr int kShortRows = kHasTiles ? 1 : RowsFor(kPanelVectors<float>);

template <typename O>
constexpr int64_t kPackedOperands = kPackedBytes / static_cast<int64_t>(sizeof(O));

// Register tiles of a task whose sums have so many terms.
template <typename O>
CONVGRAD_INLINE int64_t ShortTiles(int64_t terms) {
  const int64_t fit = kPackedOperands<O> / ((terms > 0 ? terms : 1) * kShortRows);
  return fit < 1 ? 1 : fit > kMaxShortTiles ? kMaxShortTiles : fit;
}

template <typename O>
struct ShortTile {
  O* packed;
  int64_t at[kShortTaps];      // of a tap, in `packed`
  int64_t filter[kShortTaps];  // row of the packed panel
  int taps, live;
};

// out[i][0 .. kVecs vectors) = sum over taps, k of a[t, k][i] * b[filter[t], k][...].
template <typename O, int kRows, int kVecs>
CONVGRAD_NOINLINE void MultiplyPacked(const ShortTile<O>& tile, int64_t k_count,
                                      const O* b, Sum<O>* const* out) {
  constexpr int L = kLanes<O>;
  Vec<Sum<O>, L> sum[kRows][kVecs] = {};
  for (int t = 0; t < tile.taps; ++t) {
    const O* a = tile.packed + tile.at[t];
    const O* bk = b + tile.filter[t] * (kVecs * L);
    for (int64_t k = 0; k < k_count; ++k) {
      AddOuterProduct<O>(sum, bk, [&](int i) { return a[i]; });
      a += kRows;
      bk += kVecs * L;
    }
  }
  CONVGRAD_UNROLL
  for (int i = 0; i < kRows; ++i) {
    CONVGRAD_UNROLL
    for (int v = 0; v < kVecs; ++v) {
      Store<L>(out[i] + v * L, sum[i][v] + Vec<Sum<O>, L>{});  // +0, not -0
    }
  }
}

// to[k][i] = row[i][k], for k below `count`, in squares of vectors: the last of them
// spill over into what is written next, and in the end over the packed operands.
template <typename O>
CONVGRAD_INLINE void CopyColumns(const O* const (&row)[kShortRows], int64_t count,
                                 O* to) {
  constexpr int L = kLanes<O> < 8 ? kLanes<O> : 8;
  constexpr int kSquares = (kShortRows + L - 1) / L;
  int64_t k = 0;
  for (; k + L <= count; k += L) {
    Vec<O, L> square[kSquares][L] = {};
    CONVGRAD_UNROLL
    for (int i = 0; i < kShortRows; ++i) square[i / L][i % L] = Load<L>(row[i] + k);
    CONVGRAD_UNROLL
    for (int j = 0; j < kSquares; ++j) Transpose<O, L>(square[j]);
    CONVGRAD_UNROLL
    for (int i = 0; i < L; ++i) {
      CONVGRAD_UNROLL
      for (int j = 0; j < kSquares; ++j) {
        Store<L>(to + (k + i) * kShortRows + j * L, square[j][i]);
      }
    }
  }
  for (; k < count; ++k) {
    for (int i = 0; i < kShortRows; ++i) to[k * kShortRows + i] = row[i][k];
  }
}

// Copies what the rows from m on read, for taps that some of them has.
//
// Neighbouring taps of few channels may lie side by side in dY, the last one first: where
// every row has all of them, they are copied as one. They are still added from the first
// one on, so that bits do not depend on which rows share a tile.
template <typename O>
inline void PackShortTile(const CpuArgs& a, const ActivationStrides& dy_at,
                          const GemmRows& rows, const Phase* const* phase, int64_t m,
                          const O* dy, ShortTile<O>* tile) {
  static constexpr O kZeros[kShortSum] = {};
  const Problem& p = a.problem;
  const Phase& along = *phase[2];
  Indirection<O, kShortRows> found;
  GemmBlock block;
  block.k0 = 0;
  block.k_count = Depth<O>(p);
  block.taps = 0;
  tile->taps = 0;
  bool whole = along.r_count > 1 && along.p_per_r * dy_at.axis[2] == block.k_count;
  for (int64_t i = m; i < m + kShortRows; ++i) {
    whole &= rows.lo[2][i] == 0 && rows.hi[2][i] == along.r_count;
  }
  const int64_t at_once = whole ? along.r_count : 1;
  const int64_t tap_step = along.r_step * PackedDepth<O>(p);
  O* to = tile->packed;
  const auto pack = [&] {
    FillIndirection(rows, block, m, dy, kZeros, &found);
    tile->live = found.live;
    for (int t = 0; t < found.taps; ++t) {
      for (int64_t back = at_once - 1; back >= 0; --back) {
        tile->at[tile->taps] = to - tile->packed + back * block.k_count * kShortRows;
        tile->filter[tile->taps++] = block.filter[found.tap[t]] - back * tap_step;
      }
      CopyColumns<O>(found.row[t], at_once * block.k_count, to);
      to += at_once * block.k_count * kShortRows;
    }
    block.taps = 0;
  };
  for (int64_t t0 = 0; t0 < phase[0]->r_count; ++t0) {
    for (int64_t t1 = 0; t1 < phase[1]->r_count; ++t1) {
      for (int64_t t2 = at_once - 1; t2 < along.r_count; ++t2) {
        AppendTap<O>(dy_at, p, phase, {t0, t1, t2}, 1, &block);
        if (block.taps == kBlockTaps) pack();
      }
    }
  }
  pack();
}

template <typename O>
using ShortMultiply = void (*)(const ShortTile<O>&, int64_t, const O*, Sum<O>* const*);

// For a panel of so many vectors.
template <typename O>
CONVGRAD_INLINE ShortMultiply<O> ShortMultiplyOf(int vectors) {
  if constexpr (kPanelVectors<O> == 4) {
    if (vectors == 4) return MultiplyPacked<O, kShortRows, 4>;
    if (vectors == 3) return MultiplyPacked<O, kShortRows, 3>;
  }
  return vectors == 2 ? MultiplyPacked<O, kShortRows, 2>
                      : MultiplyPacked<O, kShortRows, 1>;
}

// How far the panels from `first` on are finite and have all their columns side by side
// in dX, if they are few enough to be read again for every register tile; else `first`.
template <typename T>
inline int64_t PanelsInOrder(const CpuArgs& a, int64_t group, int64_t panels,
                             int64_t first, int64_t end) {
  using O = Operand<T>;
  constexpr int64_t kFilterBytes = 128 * 1024;
  const Problem& p = a.problem;
  const Panel all = {first * kPanelColumns<O>, (end - first) * kPanelColumns<O>, 0};
  const int64_t bytes =
      all.columns * Taps(p) * PackedDepth<O>(p) * static_cast<int64_t>(sizeof(O));
  if (bytes > kFilterBytes) return first;
  for (int64_t i = first; i < end; ++i) {
    const Panel panel = PanelAt<O>(p, i);
    const int64_t* const column_dx = a.column_dx + panel.first;
    const bool follows = column_dx[0] == a.column_dx[all.first] + panel.first - all.first;
    if (!follows || !AreSumsOfDx<T>(panel, column_dx) ||
        PanelHasNonfinite(a, group, panels, i)) {
      return i;
    }
  }
  return end;
}

// The panels from `first` to `end` whose filter is finite.
template <typename T>
CONVGRAD_NOINLINE void MultiplyShortSums(const CpuArgs& a, const Operand<T>* dy,
                                         const ActivationStrides& dy_at,
                                         const GemmRows& rows, const Phase* const* phase,
                                         int64_t group, int64_t first, int64_t end) {
  using O = Operand<T>;
  constexpr int64_t kMostWidth = kPanelVectors<O> * kLanes<O>;
  const Problem& p = a.problem;
  const int64_t panels = CeilDiv(p.in_channels, kPanelColumns<O>);
  const int64_t terms =
      phase[0]->r_count * phase[1]->r_count * phase[2]->r_count * Depth<O>(p);
  ShortTile<O> tile[kMaxShortTiles];
  O packed[kPackedOperands<O> + kMaxLanes];
  for (int64_t m = 0; m < rows.count; m += kShortRows) {
    tile[m / kShortRows].packed = packed + m * terms;
    PackShortTile<O>(a, dy_at, rows, phase, m, dy, &tile[m / kShortRows]);
  }

  T* const dx = static_cast<T*>(a.dx) + group * p.dx.group;
  const auto multiply_tile = [&](const Panel& panel, int64_t m,
                                 const GemmSums<Sum<O>>& sums) {
    const ShortTile<O>& at = tile[m / kShortRows];
    Sum<O> spare[kMostWidth];  // of rows that do not exist
    Sum<O>* out[kShortRows];
    for (int i = 0; i < kShortRows; ++i) {
      out[i] = i >= at.live ? spare : sums.Row(rows, m + i);
    }
    ShortMultiplyOf<O>(panel.vectors)(at, Depth<O>(p), PackedPanel<O>(a, group, panel),
                                      out);
  };
  const auto finish = [&](const Panel& panel) {
    if (!HasEpilogue(a)) return;
    ApplyEpilogueToTile<T>(a, rows, panel.columns, a.column_dx + panel.first,
                           group * p.dx.group);
  };

  if constexpr (kIsAcc<T>) {
    // Leading panels whose sums lie side by side in dX: in the order of memory.
    const int64_t last = PanelsInOrder<T>(a, group, panels, first, end);
    for (int64_t m = 0; m < rows.count && first < last; m += kShortRows) {
      for (int64_t i = first; i < last; ++i) {
        const Panel panel = PanelAt<O>(p, i);
        multiply_tile(panel, m, {dx + a.column_dx[panel.first], 0});
      }
    }
    for (; first < last; ++first) finish(PanelAt<O>(p, first));
  }
  alignas(64) Sum<O> sums_of_tile[kMaxShortTiles * kShortRows * kMostWidth];
  for (int64_t i = first; i < end; ++i) {
    if (PanelHasNonfinite(a, group, panels, i)) continue;
    const Panel panel = PanelAt<O>(p, i);
    const int64_t width = panel.vectors * kLanes<O>;
    const int64_t* const column_dx = a.column_dx + panel.first;
    const bool direct = AreSumsOfDx<T>(panel, column_dx);
    GemmSums<Sum<O>> sums = {sums_of_tile, width};
    if constexpr (kIsAcc<T>) {
      if (direct) sums = {dx + column_dx[0], 0};
    }
    for (int64_t m = 0; m < rows.count; m += kShortRows) multiply_tile(panel, m, sums);
    if (!direct) StoreTile<T>(rows, sums_of_tile, width, panel.columns, column_dx, dx);
    finish(panel);
  }
}

}  // namespace
}  // namespace CONVGRAD_ISA
}  // namespace convgrad
