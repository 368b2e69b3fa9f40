// The gemm kernel's way (gemm.h) with short sums along rows where every position has all
// taps: pointwise layers of few channels, rows without padding, and first layers of nets,
// whose taps along a row are merged into channels (planner/padded_rows.h).
//
// Neighbouring positions of a row then read dY at equal distances, so that a register
// tile needs no pointer for each of its rows, and no copy of what they read, unless that
// is padding that was taken for a part of the row:
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
static_assert(kHasTiles || kMaxRegisterRows <= kMostStripRows, "see job.h");
static_assert(kStripPixels >= kMostStripRows, "a strip is a register tile at least");
constexpr int64_t kStripSum = 384;   // operands of it, at most
constexpr int64_t kStripAhead = 24;  // how many pixels early reads are asked for

// What a strip, or a register tile of it, reads for each tap: from where on, and which
// row of the packed panel.
template <typename O>
struct StripTaps {
  const O* base;
  int64_t at[kStripTaps];
  int64_t filter[kStripTaps];
  int count;
};

template <typename O>
struct Strip {
  StripTaps<O> taps;
  int64_t pixels;   // a register tile at least
  int64_t step;     // from one to the next
  int64_t k_count;  // of a tap

  // Whether its row has padding that is not in memory; where in the row the strip begins,
  // and the part of the row that is in memory.
  bool padded;
  int64_t from, row_first, row_end;
};

// out[i*out_step ...] = sum over taps, k of a[t][i*step + k] * b[filter[t] + k][...],
// where a[t] begins `at` elements behind base + at[t]. If kAsks, asks for what the first
// tap will read kStripAhead pixels further on, and for where their sums will go.
template <typename O, int kRows, int kVecs, bool kAsks>
CONVGRAD_NOINLINE void MultiplyStrip(const StripTaps<O>& taps, int64_t at, int64_t step,
                                     int64_t k_count, const O* b, Sum<O>* out,
                                     int64_t out_step) {
  constexpr int L = kLanes<O>;
  constexpr int64_t kLine = 64 / static_cast<int>(sizeof(O));
  Vec<Sum<O>, L> sum[kRows][kVecs] = {};
  for (int t = 0; t < taps.count; ++t) {
    const O* row[kRows];
    CONVGRAD_UNROLL
    for (int i = 0; i < kRows; ++i) row[i] = taps.base + (taps.at[t] + at + i * step);
    const O* bk = b + taps.filter[t] * (kVecs * L);
    for (int64_t k0 = 0, k1; k0 < k_count; k0 = k1) {
      k1 = kAsks && k_count - k0 > kLine ? k0 + kLine : k_count;
      for (int i = 0; kAsks && t == 0 && i < kRows; ++i) {
        if (k0 == 0) __builtin_prefetch(out + (kStripAhead + i) * out_step, 1);
        __builtin_prefetch(row[i] + kStripAhead * step + k0);
      }
      for (int64_t k = k0; k < k1; ++k) {
        AddOuterProduct<O>(sum, bk, [&](int i) { return row[i][k]; });
        bk += kVecs * L;
      }
    }
  }
  CONVGRAD_UNROLL
  for (int i = 0; i < kRows; ++i) {
    CONVGRAD_UNROLL
    for (int v = 0; v < kVecs; ++v) {
      Store<L>(out + i * out_step + v * L, sum[i][v] + Vec<Sum<O>, L>{});  // +0, not -0
    }
  }
}

// Copies what a register tile reads, `length` elements for each tap from `at` on, with
// zeros for what lies outside of the row.
template <typename O>
CONVGRAD_NOINLINE void PadTile(const Strip<O>& strip, int64_t at, int64_t length, O* to,
                               StripTaps<O>* taps) {
  const auto within = [&](int64_t i) { return i < 0 ? 0 : i > length ? length : i; };
  const int64_t first = within(strip.row_first - strip.from - at);
  const int64_t end = within(strip.row_end - strip.from - at);
  taps->base = to;
  taps->count = strip.taps.count;
  for (int t = 0; t < taps->count; ++t) {
    taps->at[t] = t * length;
    taps->filter[t] = strip.taps.filter[t];
    const O* const from = strip.taps.base + (strip.taps.at[t] + at + first);
    for (int64_t i = 0; i < length; ++i) {
      *to++ = i >= first && i < end ? from[i - first] : O{};
    }
  }
}

// A strip times some panels of as many vectors, which lie b_step apart in the packed
// filter, and side by side in `out`.
template <typename O, int kVecs>
CONVGRAD_NOINLINE void MultiplyPanels(const Strip<O>& strip, int64_t panels, const O* b,
                                      int64_t b_step, Sum<O>* out, int64_t out_step) {
  constexpr int64_t kRows = RowsFor(kVecs);
  const int64_t length = (kRows - 1) * strip.step + strip.k_count;
  // Where neighbours share no cache line, the processor foresees too few of them.
  const bool far_apart = strip.step * static_cast<int64_t>(sizeof(O)) > 64;
  for (int64_t m = 0; m < strip.pixels; m += kRows) {
    const int64_t first = m + kRows <= strip.pixels ? m : strip.pixels - kRows;
    const StripTaps<O>* taps = &strip.taps;
    int64_t at = first * strip.step;
    StripTaps<O> padded_taps;
    O padded[kStripTileElements];
    if (strip.padded &&
        (strip.from + at < strip.row_first || strip.from + at + length > strip.row_end)) {
      PadTile(strip, at, length, padded, &padded_taps);
      taps = &padded_taps;
      at = 0;
    }
    for (int64_t i = 0; i < panels; ++i) {
      const bool asks = i == 0 && far_apart && taps == &strip.taps;
      const auto multiply = asks ? MultiplyStrip<O, kRows, kVecs, true>
                                 : MultiplyStrip<O, kRows, kVecs, false>;
      multiply(*taps, at, strip.step, strip.k_count, b + i * b_step,
               out + first * out_step + i * (kVecs * kLanes<O>), out_step);
    }
  }
}

template <typename O>
using StripMultiply = void (*)(const Strip<O>&, int64_t, const O*, int64_t, Sum<O>*,
                               int64_t);

// For panels of so many vectors.
template <typename O>
CONVGRAD_INLINE StripMultiply<O> StripMultiplyOf(int vectors) {
  if constexpr (kPanelVectors<O> == 4) {
    if (vectors == 4) return MultiplyPanels<O, 4>;
    if (vectors == 3) return MultiplyPanels<O, 3>;
  }
  return vectors == 2 ? MultiplyPanels<O, 2> : MultiplyPanels<O, 1>;
}

// Whether strips serve a problem: every position of a row has all taps, a row is as long
// as a register tile, and sums are short.
template <typename O>
inline bool StripsServe(const CpuArgs& a) {
  if (a.row_end > 0) return true;
  if (kHasTiles) return false;
  const Problem& p = a.problem;
  const Phase& along = a.phase[2][0];
  if (a.phase_count[2] != 1 || along.r_count == 0 || along.h_count < RowsFor(1)) {
    return false;
  }
  for (const int64_t i : {int64_t{0}, along.h_count - 1}) {
    const TapRange taps = ValidTaps(along, p.axis[2].out, i);
    if (taps.lo != 0 || taps.hi != along.r_count) return false;
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

// Places strip `index` of a phase, in dY and in dX, where it begins at the result.
template <typename O>
CONVGRAD_INLINE int64_t PlaceStrip(const CpuArgs& a, const ActivationStrides& dy_at,
                                   const Phase* const* phase, int64_t index,
                                   Strip<O>* strip) {
  const Problem& p = a.problem;
  const Phase& along = *phase[2];
  const int64_t strips_of_row = StripsOfRow(a);
  const int64_t row = index / strips_of_row, part = index % strips_of_row;
  const int64_t pixel = along.h_count * part / strips_of_row;
  strip->pixels = along.h_count * (part + 1) / strips_of_row - pixel;
  strip->from = along.p0 * dy_at.axis[2] + pixel * strip->step;
  const int64_t i[2] = {row / phase[1]->h_count % phase[0]->h_count,
                        row % phase[1]->h_count};
  const int64_t n = row / phase[1]->h_count / phase[0]->h_count;
  int64_t dy_base = n * dy_at.batch + strip->from - strip->row_first;
  int64_t dx_base = n * p.dx.batch + (along.h0 + pixel * along.h_step) * p.dx.axis[2];
  TapRange range[2];
  for (int x = 0; x < 2; ++x) {
    range[x] = ValidTaps(*phase[x], p.axis[x].out, i[x]);
    dy_base += (phase[x]->p0 + i[x] * phase[x]->p_per_h) * dy_at.axis[x];
    dx_base += (phase[x]->h0 + i[x] * phase[x]->h_step) * p.dx.axis[x];
  }
  StripTaps<O>& taps = strip->taps;
  taps.count = 0;
  for (int64_t t0 = range[0].lo; t0 < range[0].hi; ++t0) {
    for (int64_t t1 = range[1].lo; t1 < range[1].hi; ++t1) {
      const int64_t r0 = phase[0]->r0 + t0 * phase[0]->r_step;
      const int64_t r1 = phase[1]->r0 + t1 * phase[1]->r_step;
      const int64_t at = dy_base - t0 * phase[0]->p_per_r * dy_at.axis[0] -
                         t1 * phase[1]->p_per_r * dy_at.axis[1];
      const int64_t row_of_filter = (r0 * p.axis[1].win + r1) * p.axis[2].win;
      for (int64_t t2 = 0; t2 < along.r_count; ++t2) {
        taps.at[taps.count] = at - t2 * along.p_per_r * dy_at.axis[2];
        taps.filter[taps.count++] =
            (row_of_filter + along.r0 + t2 * along.r_step) * PackedDepth<O>(p);
      }
    }
  }
  return dx_base;
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
  const int64_t rows = p.batch * phase[0]->h_count * phase[1]->h_count;
  if (end > rows * StripsOfRow(a)) end = rows * StripsOfRow(a);
  const int64_t panels = CeilDiv(p.in_channels, kPanelColumns<O>);
  const int64_t dx_step = phase[2]->h_step * p.dx.axis[2];
  T* const dx = static_cast<T*>(a.dx) + group * p.dx.group;
  const int64_t in_place = PanelsInPlace<T>(a);
  const int64_t panel_step = kMostWidth * PackedDepth<O>(p) * Taps(p);
  alignas(64) Sum<O> tile[2 * kStripPixels * kMostWidth];

  Strip<O> strip;
  strip.taps.base = dy;
  strip.step = phase[2]->p_per_h * dy_at.axis[2];
  strip.k_count = Depth<O>(p);
  strip.padded = a.row_end > 0;
  strip.row_first = a.row_first;
  strip.row_end = a.row_end;
  for (int64_t index = first; index < end; ++index) {
    const int64_t dx_base = PlaceStrip(a, dy_at, phase, index, &strip);
    GemmRows stored;  // of it only what is needed to store a tile
    stored.count = strip.pixels;
    for (int64_t m = 0; m < strip.pixels; ++m) stored.dx[m] = dx_base + m * dx_step;
    if constexpr (kIsAcc<T>) {
      if (in_place > 0) {
        StripMultiplyOf<O>(kPanelVectors<O>)(
            strip, in_place, PackedPanel<O>(a, group, PanelAt<O>(p, 0)), panel_step,
            dx + dx_base + a.column_dx[0], dx_step);
      }
    }
    for (int64_t i = in_place; i < panels; ++i) {
      const Panel panel = PanelAt<O>(p, i);
      const int64_t width = panel.vectors * kLanes<O>;
      const int64_t* const column_dx = a.column_dx + panel.first;
      const O* const b = PackedPanel<O>(a, group, panel);
      const StripMultiply<O> multiply = StripMultiplyOf<O>(panel.vectors);
      if constexpr (kIsAcc<T>) {
        if (AreSumsOfDx<T>(panel, column_dx)) {
          multiply(strip, 1, b, 0, dx + dx_base + column_dx[0], dx_step);
          continue;
        }
      }
      multiply(strip, 1, b, 0, tile, width);
      StoreTile<T>(stored, tile, width, panel.columns, column_dx, dx);
    }
    for (int64_t i = 0; HasEpilogue(a) && i < panels; ++i) {
      const Panel panel = PanelAt<O>(p, i);
      ApplyEpilogueToTile<T>(a, stored, panel.columns, a.column_dx + panel.first,
                             group * p.dx.group);
    }
  }
}

}  // namespace
}  // namespace CONVGRAD_ISA
}  // namespace convgrad
