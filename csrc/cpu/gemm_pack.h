// Packing for the gemm kernel, both operands into the accumulation type.
//
// Filter: [group][panel of columns][tap][k][column], where a column is an input
// channel and a panel has up to kPanelColumns of them; the last one is padded with
// zeros to whole vectors. Every tap of the window has its place, whichever phase it
// belongs to, so one packed filter serves all phases.
//
// dY: [n][p0][p1][p2][group][k], only if it cannot be read in place.

#pragma once

#include "job.h"
#include "vec.h"

namespace convgrad {
namespace CONVGRAD_ISA {
namespace {

// Register tiles, as rows x vectors of columns: accumulators, one row of B and a
// broadcast have to fit the registers. Wide tiles read less of A, tall ones less of B.
template <typename A>
constexpr int kPanelVectors = kVectorBytes == 64 ? 4 : 2;
template <typename A>
constexpr int kPanelColumns = kPanelVectors<A> * kLanes<A>;
static_assert(kPanelColumns<float> <= kMaxPanelColumns, "the workspace is too small");
static_assert(kPanelColumns<double> >= kMinPanelColumns, "too few taint bytes");

// Where panel `index` of a group starts, in elements, and what it holds.
struct Panel {
  int64_t first, columns;  // of in_channels
  int vectors;             // columns rounded up
};

template <typename A>
CONVGRAD_INLINE Panel PanelAt(const Problem& p, int64_t index) {
  Panel out;
  out.first = index * kPanelColumns<A>;
  out.columns = p.in_channels - out.first;
  if (out.columns > kPanelColumns<A>) out.columns = kPanelColumns<A>;
  out.vectors = static_cast<int>(CeilDiv(out.columns, kLanes<A>));
  return out;
}

CONVGRAD_INLINE int64_t Taps(const Problem& p) {
  return p.axis[0].win * p.axis[1].win * p.axis[2].win;
}

// Elements of the packed filter of one group.
template <typename A>
CONVGRAD_INLINE int64_t PackedGroup(const Problem& p) {
  return CeilDiv(p.in_channels, kLanes<A>) * kLanes<A> * p.out_channels * Taps(p);
}

// The packed filter of (group, panel); tap r is r * out_channels * vectors*lanes on.
template <typename A>
CONVGRAD_INLINE A* PackedPanel(const CpuArgs& a, int64_t g, const Panel& panel) {
  return static_cast<A*>(a.filter) + g * PackedGroup<A>(a.problem) +
         panel.first * a.problem.out_channels * Taps(a.problem);
}

CONVGRAD_INLINE int64_t FilterChunks(const Problem& p) {
  return CeilDiv(p.out_channels, kFilterPackChannels);
}

// Packs out channels [k0, k1) of one tap by transposing squares: for filters whose
// out channels are contiguous (HWIO). Returns the sum of value * 0.
template <typename T>
inline Acc<T> PackTapTransposed(const T* w, const int64_t* column_w, const Panel& panel,
                                int64_t k0, int64_t k1, Acc<T>* to) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  using V = Vec<A, L>;
  const int64_t width = panel.vectors * L;
  V taint{};
  A rest = 0;
  for (int v = 0; v < panel.vectors; ++v) {
    const int64_t c0 = v * L;
    const int live = panel.columns - c0 < L ? static_cast<int>(panel.columns - c0) : L;
    int64_t k = k0;
    for (; k + L <= k1; k += L) {
      V rows[L];
      for (int i = 0; i < L; ++i) {
        rows[i] = V{};
        if (i < live) rows[i] = Load<L>(w + column_w[c0 + i] + k);
      }
      for (int i = 0; i < L; ++i) taint += rows[i] * 0;
      Transpose<A, L>(rows);
      for (int i = 0; i < L; ++i) Store<L>(to + (k + i) * width + c0, rows[i]);
    }
    for (; k < k1; ++k) {
      for (int i = 0; i < L; ++i) {
        const A value = i < live ? LoadOne(w + column_w[c0 + i] + k) : 0;
        rest += value * 0;
        to[k * width + c0 + i] = value;
      }
    }
  }
  for (int i = 0; i < L; ++i) rest += taint[i];
  return rest;
}

// The same by copying rows: for filters whose columns are contiguous, such as that of a
// transposed convolution in HWIO. `w` is at the panel's first column.
template <typename T>
inline Acc<T> PackTapCopied(const T* w, int64_t out_channel_step, const Panel& panel,
                            int64_t k0, int64_t k1, Acc<T>* to) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  const int64_t width = panel.vectors * L;
  Vec<A, L> taint{};
  A rest = 0;
  for (int64_t k = k0; k < k1; ++k) {
    const T* from = w + k * out_channel_step;
    A* row = to + k * width;
    int64_t c = 0;
    for (; c + L <= panel.columns; c += L) {
      const Vec<A, L> values = Load<L>(from + c);
      taint += values * 0;
      Store<L>(row + c, values);
    }
    for (; c < width; ++c) {
      const A value = c < panel.columns ? LoadOne(from + c) : 0;
      rest += value * 0;
      row[c] = value;
    }
  }
  for (int i = 0; i < L; ++i) rest += taint[i];
  return rest;
}

// The same for all taps at once and any strides; reads taps innermost, which is how
// OIHW has them.
template <typename T>
inline Acc<T> PackTapsStrided(const T* w, const int64_t* column_w, const Problem& p,
                              const Panel& panel, int64_t k0, int64_t k1, Acc<T>* to) {
  using A = Acc<T>;
  const int64_t width = panel.vectors * kLanes<A>;
  const int64_t tap_size = p.out_channels * width;
  A taint = 0;
  for (int64_t k = k0; k < k1; ++k) {
    for (int64_t c = 0; c < width; ++c) {
      const bool live = c < panel.columns;
      const T* from = w + k * p.w.out_channel + (live ? column_w[c] : 0);
      A* out = to + k * width + c;
      for (int64_t r0 = 0; r0 < p.axis[0].win; ++r0) {
        for (int64_t r1 = 0; r1 < p.axis[1].win; ++r1) {
          const T* row = from + r0 * p.w.axis[0] + r1 * p.w.axis[1];
          for (int64_t r2 = 0; r2 < p.axis[2].win; ++r2) {
            const A value = live ? LoadOne(row + r2 * p.w.axis[2]) : 0;
            taint += value * 0;
            *out = value;
            out += tap_size;
          }
        }
      }
    }
  }
  return taint;
}

// Whether the columns of a panel are neighbours in the filter.
CONVGRAD_INLINE bool ColumnsAreContiguous(const Panel& panel, const int64_t* column_w) {
  bool contiguous = true;
  for (int64_t c = 1; c < panel.columns; ++c) {
    contiguous &= column_w[c] == column_w[0] + c;
  }
  return contiguous;
}

// Out channels [k0, k1) of one tap of a panel, if its columns are contiguous or
// out_channel == 1; the first goes `to`. Returns whether they hold an Inf or a NaN.
template <typename T>
inline Acc<T> PackTap(const Problem& p, const T* tap, const int64_t* column_w,
                      bool contiguous, const Panel& panel, int64_t k0, int64_t k1,
                      Acc<T>* to) {
  tap += k0 * p.w.out_channel;
  return contiguous
             ? PackTapCopied<T>(tap + column_w[0], p.w.out_channel, panel, 0, k1 - k0, to)
             : PackTapTransposed<T>(tap, column_w, panel, 0, k1 - k0, to);
}

// A task packs (group, panel, kFilterPackChannels out channels), all taps.
template <typename T>
void PackFilterTask(const CpuArgs& a, int64_t index) {
  using A = Acc<T>;
  const Problem& p = a.problem;
  const int64_t panels = CeilDiv(p.in_channels, kPanelColumns<A>);
  const int64_t chunk = index % FilterChunks(p);
  const int64_t group = index / FilterChunks(p) / panels;
  const Panel panel = PanelAt<A>(p, index / FilterChunks(p) % panels);
  const int64_t k0 = chunk * kFilterPackChannels;
  const int64_t k1 = k0 + kFilterPackChannels < p.out_channels ? k0 + kFilterPackChannels
                                                               : p.out_channels;
  const T* w = static_cast<const T*>(a.w) + group * p.w.group;
  const int64_t* column_w = a.column_w + panel.first;
  A* to = PackedPanel<A>(a, group, panel);
  A taint = 0;
  const bool contiguous = ColumnsAreContiguous(panel, column_w);
  if (contiguous || p.w.out_channel == 1) {
    for (int64_t r0 = 0; r0 < p.axis[0].win; ++r0) {
      for (int64_t r1 = 0; r1 < p.axis[1].win; ++r1) {
        for (int64_t r2 = 0; r2 < p.axis[2].win; ++r2) {
          const T* tap = w + r0 * p.w.axis[0] + r1 * p.w.axis[1] + r2 * p.w.axis[2];
          taint += PackTap<T>(p, tap, column_w, contiguous, panel, k0, k1,
                              to + k0 * panel.vectors * kLanes<A>);
          to += p.out_channels * panel.vectors * kLanes<A>;
        }
      }
    }
  } else {
    taint = PackTapsStrided<T>(w, column_w, p, panel, k0, k1, to);
  }
  a.taint[index] = IsTainted(taint);
}

// Where dY is read from by the gemm kernel, in the accumulation type.
CONVGRAD_INLINE ActivationStrides PackedDyStrides(const Problem& p) {
  ActivationStrides s;
  s.channel = 1;
  s.group = p.out_channels;
  s.axis[2] = p.groups * p.out_channels;
  s.axis[1] = s.axis[2] * p.axis[2].out;
  s.axis[0] = s.axis[1] * p.axis[1].out;
  s.batch = s.axis[0] * p.axis[0].out;
  return s;
}

// The positions of dY as `outer` runs of `inner` equally spaced ones.
struct DyRuns {
  int64_t outer, inner;
  int64_t outer_rows;  // rows (axis 1) that one step of `outer` skips
};

CONVGRAD_INLINE DyRuns RunsOfDy(const Problem& p) {
  const int64_t rows = p.axis[0].out * p.axis[1].out;
  const bool merge1 = p.dy.axis[1] == p.dy.axis[2] * p.axis[2].out;
  const bool merge0 =
      merge1 && (p.axis[0].out == 1 || p.dy.axis[0] == p.dy.axis[1] * p.axis[1].out);
  if (merge0) return {1, rows * p.axis[2].out, rows};
  if (merge1) return {p.axis[0].out, p.axis[1].out * p.axis[2].out, p.axis[1].out};
  return {rows, p.axis[2].out, 1};
}

constexpr int64_t kDyPackPositions = 64;

CONVGRAD_INLINE int64_t PackDyTasks(const Problem& p) {
  const DyRuns runs = RunsOfDy(p);
  return p.batch * p.groups * runs.outer * CeilDiv(runs.inner, kDyPackPositions);
}

// A task packs kDyPackPositions positions of a run, all out channels of one group.
template <typename T>
void PackDyTask(const CpuArgs& a, int64_t index) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  const Problem& p = a.problem;
  const DyRuns runs = RunsOfDy(p);
  const int64_t chunks = CeilDiv(runs.inner, kDyPackPositions);
  const int64_t i0 = index % chunks * kDyPackPositions;
  const int64_t count =
      runs.inner - i0 < kDyPackPositions ? runs.inner - i0 : kDyPackPositions;
  index /= chunks;
  const int64_t row = index % runs.outer * runs.outer_rows;
  index /= runs.outer;
  const int64_t g = index % p.groups;
  const int64_t n = index / p.groups;
  const ActivationStrides to_strides = PackedDyStrides(p);
  const int64_t step = p.dy.axis[2];
  const int64_t to_step = to_strides.axis[2];
  const int64_t k_step = p.dy.channel;
  const int64_t k_count = p.out_channels;
  const T* from = static_cast<const T*>(a.dy) + n * p.dy.batch + g * p.dy.group +
                  row / p.axis[1].out * p.dy.axis[0] +
                  row % p.axis[1].out * p.dy.axis[1] + i0 * step;
  A* to = static_cast<A*>(a.packed_dy) + n * to_strides.batch + g * to_strides.group +
          row * to_strides.axis[1] + i0 * to_step;
  if (k_step == 1) {
    for (int64_t i = 0; i < count; ++i) {
      const T* src = from + i * step;
      A* dst = to + i * to_step;
      int64_t k = 0;
      for (; k + L <= k_count; k += L) Store<L>(dst + k, Load<L>(src + k));
      for (; k < k_count; ++k) dst[k] = LoadOne(src + k);
    }
    return;
  }
  int64_t i = 0;
  if (step == 1) {
    for (; i + L <= count; i += L) {
      int64_t k = 0;
      for (; k + L <= k_count; k += L) {
        Vec<A, L> rows[L];
        for (int j = 0; j < L; ++j) rows[j] = Load<L>(from + (k + j) * k_step + i);
        Transpose<A, L>(rows);
        for (int j = 0; j < L; ++j) Store<L>(to + (i + j) * to_step + k, rows[j]);
      }
      for (; k < k_count; ++k) {
        const Vec<A, L> v = Load<L>(from + k * k_step + i);
        for (int j = 0; j < L; ++j) to[(i + j) * to_step + k] = v[j];
      }
    }
  }
  for (; i < count; ++i) {
    for (int64_t k = 0; k < k_count; ++k) {
      to[i * to_step + k] = LoadOne(from + k * k_step + i * step);
    }
  }
}

}  // namespace
}  // namespace CONVGRAD_ISA
}  // namespace convgrad
