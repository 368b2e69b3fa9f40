// The gemm kernel's way (gemm.h) with short sums along rows that have one tap and no
// padding: pointwise layers of few channels, and first layers of nets, whose taps along a
// row are merged into channels (planner/padded_rows.h).
//
// Neighbouring positions of a row then read dY at equal distances, so that a register
// tile needs no pointer for each of its rows, and no copy of what they read:
//
//   dX[i, c] = sum over taps t, k   dY[at(t) + i*step + k] * W[t][k][c]
//
// Taps of the other axes that a row lacks are left out, so that no zero is multiplied and
// any filter may be used.
//
// Tiling: a strip is a part of a row, kStripPixels to twice as many long, or all of it.
// Register tile by register tile it makes all panels, so that dX is written in order of
// memory; panels that cannot be summed in dX come after that, each for the whole strip.
// The last tile overlaps the one before, whose rows come out with the same bits again.

#pragma once

#include "gemm_pack.h"
#include "gemm_rows.h"

namespace convgrad {
namespace CONVGRAD_ISA {
namespace {

constexpr int64_t kStripPixels = 24;
static_assert(kHasTiles || kStripPixels >= kMaxRegisterRows,
              "a strip is a register tile at least");
constexpr int kStripTaps = 64;
constexpr int64_t kStripSum = 384;  // operands of it, at most

// What a strip reads for each tap: in dY, and as a row of the packed panel.
template <typename O>
struct StripTaps {
  const O* dy[kStripTaps];
  int64_t filter[kStripTaps];
  int count;
};

// out[i*out_step ...] = sum over taps, k of dy[t][at + i*step + k] * b[filter[t] +
// k][...]
template <typename O, int kRows, int kVecs>
CONVGRAD_NOINLINE void MultiplyStrip(const StripTaps<O>& taps, int64_t at, int64_t step,
                                     int64_t k_count, const O* b, Sum<O>* out,
                                     int64_t out_step) {
  constexpr int L = kLanes<O>;
  Vec<Sum<O>, L> sum[kRows][kVecs] = {};
  for (int t = 0; t < taps.count; ++t) {
    const O* row[kRows];
    CONVGRAD_UNROLL
    for (int i = 0; i < kRows; ++i) row[i] = taps.dy[t] + (at + i * step);
    const O* bk = b + taps.filter[t] * (kVecs * L);
    for (int64_t k = 0; k < k_count; ++k) {
      Vec<O, L> column[kVecs];
      CONVGRAD_UNROLL
      for (int v = 0; v < kVecs; ++v) column[v] = Load<L>(bk + v * L);
      CONVGRAD_UNROLL
      for (int i = 0; i < kRows; ++i) {
        CONVGRAD_UNROLL
        for (int v = 0; v < kVecs; ++v)
          AddProducts<L, O>(&sum[i][v], column[v], row[i][k]);
      }
      bk += kVecs * L;
    }
  }
  CONVGRAD_UNROLL
  for (int i = 0; i < kRows; ++i) {
    CONVGRAD_UNROLL
    for (int v = 0; v < kVecs; ++v) Store<L>(out + i * out_step + v * L, sum[i][v]);
  }
}

// A strip of so many pixels, at least a register tile of them, times some panels of as
// many vectors, which lie b_step apart in the packed filter, and side by side in `out`.
template <typename O, int kVecs>
CONVGRAD_NOINLINE void MultiplyPanels(const StripTaps<O>& taps, int64_t pixels,
                                      int64_t step, int64_t k_count, int64_t panels,
                                      const O* b, int64_t b_step, Sum<O>* out,
                                      int64_t out_step) {
  constexpr int64_t kRows = RowsFor(kVecs);
  for (int64_t m = 0; m < pixels; m += kRows) {
    const int64_t first = m + kRows <= pixels ? m : pixels - kRows;
    for (int64_t i = 0; i < panels; ++i) {
      MultiplyStrip<O, kRows, kVecs>(taps, first * step, step, k_count, b + i * b_step,
                                     out + first * out_step + i * (kVecs * kLanes<O>),
                                     out_step);
    }
  }
}

template <typename O>
using StripMultiply = void (*)(const StripTaps<O>&, int64_t, int64_t, int64_t, int64_t,
                               const O*, int64_t, Sum<O>*, int64_t);

// For panels of so many vectors.
template <typename O>
CONVGRAD_INLINE StripMultiply<O> StripMultiplyOf(int vectors) {
  if constexpr (kPanelVectors<O> == 4) {
    if (vectors == 4) return MultiplyPanels<O, 4>;
    if (vectors == 3) return MultiplyPanels<O, 3>;
  }
  return vectors == 2 ? MultiplyPanels<O, 2> : MultiplyPanels<O, 1>;
}

// Whether strips serve a problem: one tap along a row, which every position has, rows of
// a register tile or more, and short sums.
template <typename O>
inline bool StripsServe(const CpuArgs& a) {
  if (kHasTiles) return false;
  const Problem& p = a.problem;
  const Phase& along = a.phase[2][0];
  if (a.phase_count[2] != 1 || along.r_count != 1 || along.h_count < RowsFor(1)) {
    return false;
  }
  for (const int64_t i : {int64_t{0}, along.h_count - 1}) {
    const TapRange taps = ValidTaps(along, p.axis[2].out, i);
    if (taps.lo != 0 || taps.hi != 1) return false;
  }
  const int64_t taps = MostTaps(a);
  return taps <= kStripTaps && taps * Depth<O>(p) <= kStripSum;
}

inline int64_t StripsOfRow(const CpuArgs& a) {
  const int64_t whole = a.phase[2][0].h_count / kStripPixels;
  return whole > 1 ? whole : 1;
}

// How many panels, the leading ones, are whole and have all their columns side by side.
template <typename T>
inline int64_t PanelsInPlace(const CpuArgs& a) {
  using O = Operand<T>;
  const Panel all = {0, a.problem.in_channels / kPanelColumns<O> * kPanelColumns<O>, 0};
  if (!kIsAcc<T> || all.columns == 0) return 0;
  const bool neighbours =
      a.column_dx[all.columns - 1] - a.column_dx[0] == all.columns - 1;
  return neighbours ? all.columns / kPanelColumns<O> : 0;
}

// Makes strips [first, end) of a phase, for all panels of a group.
template <typename T>
CONVGRAD_NOINLINE void MultiplyStrips(const CpuArgs& a, const Operand<T>* dy,
                                      const ActivationStrides& dy_at,
                                      const Phase* const* phase, int64_t group,
                                      int64_t first, int64_t end) {
  using O = Operand<T>;
  constexpr int64_t kMostWidth = kPanelVectors<O> * kLanes<O>;
  const Problem& p = a.problem;
  const Phase& along = *phase[2];
  const int64_t strips_of_row = StripsOfRow(a);
  const int64_t rows = p.batch * phase[0]->h_count * phase[1]->h_count;
  if (end > rows * strips_of_row) end = rows * strips_of_row;
  const int64_t panels = CeilDiv(p.in_channels, kPanelColumns<O>);
  const int64_t step = along.p_per_h * dy_at.axis[2];
  const int64_t dx_step = along.h_step * p.dx.axis[2];
  T* const dx_group = static_cast<T*>(a.dx) + group * p.dx.group;
  const StripMultiply<O> multiply_whole = StripMultiplyOf<O>(kPanelVectors<O>);
  const int64_t in_place = PanelsInPlace<T>(a);
  const int64_t panel_step = kMostWidth * PackedDepth<O>(p) * Taps(p);
  alignas(64) Sum<O> tile[2 * kStripPixels * kMostWidth];

  for (int64_t strip = first; strip < end; ++strip) {
    const int64_t row = strip / strips_of_row, part = strip % strips_of_row;
    const int64_t pixel = along.h_count * part / strips_of_row;
    const int64_t pixels = along.h_count * (part + 1) / strips_of_row - pixel;
    const int64_t i[2] = {row / phase[1]->h_count % phase[0]->h_count,
                          row % phase[1]->h_count};
    const int64_t n = row / phase[1]->h_count / phase[0]->h_count;
    int64_t dy_base = n * dy_at.batch + along.p0 * dy_at.axis[2] + pixel * step;
    int64_t dx_base = n * p.dx.batch + along.h0 * p.dx.axis[2] + pixel * dx_step;
    TapRange range[2];
    for (int x = 0; x < 2; ++x) {
      range[x] = ValidTaps(*phase[x], p.axis[x].out, i[x]);
      dy_base += (phase[x]->p0 + i[x] * phase[x]->p_per_h) * dy_at.axis[x];
      dx_base += (phase[x]->h0 + i[x] * phase[x]->h_step) * p.dx.axis[x];
    }
    StripTaps<O> taps;
    taps.count = 0;
    for (int64_t t0 = range[0].lo; t0 < range[0].hi; ++t0) {
      for (int64_t t1 = range[1].lo; t1 < range[1].hi; ++t1) {
        const int64_t r0 = phase[0]->r0 + t0 * phase[0]->r_step;
        const int64_t r1 = phase[1]->r0 + t1 * phase[1]->r_step;
        taps.dy[taps.count] = dy + dy_base - t0 * phase[0]->p_per_r * dy_at.axis[0] -
                              t1 * phase[1]->p_per_r * dy_at.axis[1];
        taps.filter[taps.count++] =
            ((r0 * p.axis[1].win + r1) * p.axis[2].win + along.r0) * PackedDepth<O>(p);
      }
    }
    GemmRows stored;  // of it only what is needed to store a tile
    stored.count = pixels;
    for (int64_t m = 0; m < pixels; ++m) stored.dx[m] = dx_base + m * dx_step;
    if constexpr (kIsAcc<T>) {
      if (in_place > 0) {
        multiply_whole(taps, pixels, step, Depth<O>(p), in_place,
                       PackedPanel<O>(a, group, PanelAt<O>(p, 0)), panel_step,
                       dx_group + dx_base + a.column_dx[0], dx_step);
      }
    }
    for (int64_t index = in_place; index < panels; ++index) {
      const Panel panel = PanelAt<O>(p, index);
      const int64_t width = panel.vectors * kLanes<O>;
      const int64_t* const column_dx = a.column_dx + panel.first;
      const O* const b = PackedPanel<O>(a, group, panel);
      const auto multiply = [&](Sum<O>* out, int64_t out_step) {
        StripMultiplyOf<O>(panel.vectors)(taps, pixels, step, Depth<O>(p), 1, b, 0, out,
                                          out_step);
      };
      if constexpr (kIsAcc<T>) {
        if (AreSumsOfDx<T>(panel, column_dx)) {
          multiply(dx_group + dx_base + column_dx[0], dx_step);
          continue;
        }
      }
      multiply(tile, width);
      StoreTile<T>(stored, tile, width, panel.columns, column_dx, dx_group);
    }
    for (int64_t index = 0; HasEpilogue(a) && index < panels; ++index) {
      const Panel panel = PanelAt<O>(p, index);
      FinishTile<T>(a, stored, panel.columns, a.column_dx + panel.first,
                    group * p.dx.group);
    }
  }
}

}  // namespace
}  // namespace CONVGRAD_ISA
}  // namespace convgrad
