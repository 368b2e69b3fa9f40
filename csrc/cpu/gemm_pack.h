// Packing for the gemm kernel, both tensors into operands (gemm_bf16.h): k counts these.
//
// Filter: [group][panel of columns][tap][k][column], where a column is an input
// channel and a panel has up to kPanelColumns of them; the last one is padded with
// zeros to whole vectors, and k to whole tiles if there are such. Every tap of the window
// has its place, whichever phase it belongs to, so one packed filter serves all phases.
//
// dY: [n][p0][p1][p2][group][k], only if it cannot be read in place.

#pragma once

#include "gemm_bf16.h"
#include "job.h"
#include "vec.h"

namespace convgrad {
namespace CONVGRAD_ISA {
namespace {

// Register tiles, as rows x vectors of columns: accumulators, one row of B and a
// broadcast have to fit the registers. Wide tiles read less of A, tall ones less of B.
template <typename O>
constexpr int kPanelVectors = kVectorBytes == 64 ? 4 : 2;
template <typename O>
constexpr int kPanelColumns = kPanelVectors<O> * kLanes<O>;
static_assert(kPanelColumns<float> <= kMaxPanelColumns, "the workspace is too small");
static_assert(kPanelColumns<double> >= kMinPanelColumns, "too few nonfinite bytes");

// Where panel `index` of a group starts, in elements, and what it holds.
struct Panel {
  int64_t first, columns;  // of in_channels
  int vectors;             // columns rounded up
};

template <typename O>
CONVGRAD_INLINE Panel PanelAt(const Problem& p, int64_t index) {
  Panel out;
  out.first = index * kPanelColumns<O>;
  out.columns = p.in_channels - out.first;
  if (out.columns > kPanelColumns<O>) out.columns = kPanelColumns<O>;
  out.vectors = static_cast<int>(CeilDiv(out.columns, kLanes<O>));
  return out;
}

CONVGRAD_INLINE int64_t Taps(const Problem& p) {
  return p.axis[0].win * p.axis[1].win * p.axis[2].win;
}

// Rows of one tap of the packed filter.
template <typename O>
CONVGRAD_INLINE int64_t PackedDepth(const Problem& p) {
  return CeilDiv(Depth<O>(p), kDepthStep) * kDepthStep;
}

// Operands in the packed filter of one group.
template <typename O>
CONVGRAD_INLINE int64_t PackedGroup(const Problem& p) {
  return CeilDiv(p.in_channels, kLanes<O>) * kLanes<O> * PackedDepth<O>(p) * Taps(p);
}

// The packed filter of (group, panel); tap r is r * PackedDepth * vectors*lanes on.
template <typename O>
CONVGRAD_INLINE O* PackedPanel(const CpuArgs& a, int64_t g, const Panel& panel) {
  return static_cast<O*>(a.filter) + g * PackedGroup<O>(a.problem) +
         panel.first * PackedDepth<O>(a.problem) * Taps(a.problem);
}

CONVGRAD_INLINE int64_t FilterChunks(const Problem& p) {
  return CeilDiv(p.out_channels, kFilterPackChannels);
}

// Whether that holds an Inf or a NaN.
CONVGRAD_INLINE bool PanelHasNonfinite(const CpuArgs& a, int64_t group, int64_t panels,
                                       int64_t panel) {
  const int64_t chunks = FilterChunks(a.problem);
  const unsigned char* bytes = a.nonfinite + (group * panels + panel) * chunks;
  bool nonfinite = false;
  for (int64_t i = 0; i < chunks; ++i) nonfinite |= bytes[i] != 0;
  return nonfinite;
}

// A filter is packed by one of these, which differ in what lies side by side in memory.
// All note whether it is finite, and return what NoteNonfinite made of it.
//
//   columns                      PackTapCopied       forward, HWIO
//   out channels                 PackTapTransposed   dX, HWIO
//   (out channel, tap)           PackRunsTransposed  forward, OIHW
//   (column, tap), of few taps   PackFewTaps         dX, OIHW
//   taps                         PackTapsTransposed  dX, OIHW
//   nothing                      PackTapsStrided

// Packs operands [k0, k1) of one tap, whose out channels are contiguous: transposes
// squares of them and columns.
template <typename T>
inline Sum<Operand<T>> PackTapTransposed(const T* w, const int64_t* column_w,
                                         const Problem& p, const Panel& panel, int64_t k0,
                                         int64_t k1, Operand<T>* to) {
  using O = Operand<T>;
  constexpr int L = kLanes<O>;
  using V = Vec<O, L>;
  const int64_t width = panel.vectors * L;
  const int64_t whole = p.out_channels / kPerOperand<O>;
  Vec<Sum<O>, L> nonfinite{};
  Sum<O> rest = 0;
  for (int v = 0; v < panel.vectors; ++v) {
    const int64_t c0 = v * L;
    const int live = panel.columns - c0 < L ? static_cast<int>(panel.columns - c0) : L;
    int64_t k = k0;
    for (; k + L <= k1 && k + L <= whole; k += L) {
      V rows[L];
      for (int i = 0; i < L; ++i) {
        rows[i] = V{};
        // Too many streams for the processor to see: the next columns of this k.
        if (c0 + L + i < panel.columns) {
          __builtin_prefetch(w + column_w[c0 + L + i] + k * kPerOperand<O>);
        }
        if (i < live) {
          rows[i] = LoadAlong<O, L>(w + column_w[c0 + i] + k * kPerOperand<O>);
        }
      }
      for (int i = 0; i < L; ++i) NoteNonfinite<L, O>(&nonfinite, rows[i]);
      Transpose<O, L>(rows);
      for (int i = 0; i < L; ++i) Store<L>(to + (k + i) * width + c0, rows[i]);
    }
    for (; k < k1; ++k) {
      for (int i = 0; i < L; ++i) {
        const T* from = w + (i < live ? column_w[c0 + i] : 0) + k * kPerOperand<O>;
        const O value = i < live ? LoadOperand<O>(from, 1, k >= whole) : 0;
        NoteNonfinite<O>(&rest, value);
        to[k * width + c0 + i] = value;
      }
    }
  }
  for (int i = 0; i < L; ++i) rest += nonfinite[i];
  return rest;
}

// Packs operands [k0, k1) of one tap, whose columns are contiguous: copies rows. `w` is
// at the panel's first column.
template <typename T>
inline Sum<Operand<T>> PackTapCopied(const T* w, const Problem& p, const Panel& panel,
                                     int64_t k0, int64_t k1, Operand<T>* to) {
  using O = Operand<T>;
  constexpr int L = kLanes<O>;
  const int64_t width = panel.vectors * L;
  const int64_t whole = p.out_channels / kPerOperand<O>;
  const int64_t k_step = p.w.out_channel;
  Vec<Sum<O>, L> nonfinite{};
  Sum<O> rest = 0;
  // The columns of the next k follow, so that the last vector of this k can be read whole
  // and cut. Nothing is known to follow the last k.
  const int64_t left = panel.columns % L;
  const int64_t next = k_step >= L ? k1 - 1 : k0;
  for (int64_t k = k0; k < k1; ++k) {
    const T* from = w + k * kPerOperand<O> * k_step;
    O* row = to + k * width;
    int64_t c = 0;
    for (; c + L <= panel.columns; c += L) {
      const Vec<O, L> values = LoadAcross<O, L>(from + c, k_step, k >= whole);
      NoteNonfinite<L, O>(&nonfinite, values);
      Store<L>(row + c, values);
    }
    if (left > 0 && k < next) {
      const Vec<O, L> values =
          KeepLeading<O, L>(LoadAcross<O, L>(from + c, k_step, k >= whole), left);
      NoteNonfinite<L, O>(&nonfinite, values);
      Store<L>(row + c, values);
      c += L;
    }
    for (; c < width; ++c) {
      const O value =
          c < panel.columns ? LoadOperand<O>(from + c, k_step, k >= whole) : 0;
      NoteNonfinite<O>(&rest, value);
      row[c] = value;
    }
  }
  for (int i = 0; i < L; ++i) rest += nonfinite[i];
  return rest;
}

// Packs out channels [k0, k1) of all taps, which lie side by side: transposes squares of
// columns and taps. Near the filter's end, where a whole vector of taps cannot be read,
// the square starts earlier; a filter of fewer taps than lanes reads those of the next
// column too, where there is one, and drops them.
template <typename T>
inline Sum<Operand<T>> PackTapsTransposed(const T* w, const int64_t* column_w,
                                          const Problem& p, const Panel& panel,
                                          int64_t k0, int64_t k1, Operand<T>* to,
                                          int64_t tap_size) {
  using O = Operand<T>;
  constexpr int L = kLanes<O>;
  const int64_t width = panel.vectors * L;
  const int64_t whole = p.out_channels / kPerOperand<O>;
  const int64_t taps = Taps(p);
  // By the columns: those of a folded problem are more than it has input channels.
  int64_t end = 0;
  for (int64_t c = 0; c < panel.columns; ++c) {
    if (column_w[c] > end) end = column_w[c];
  }
  end += (p.out_channels - 1) * p.w.out_channel + taps;
  Vec<Sum<O>, L> nonfinite{};
  for (int64_t k = k0; k < k1; ++k) {
    const int64_t last_k = k >= whole ? k * kPerOperand<O> : (k + 1) * kPerOperand<O> - 1;
    for (int64_t c0 = 0; c0 < width; c0 += L) {
      for (int64_t r0 = 0; r0 < taps; r0 += L) {
        const int64_t r = r0 + L > taps && taps >= L ? taps - L : r0;
        Vec<O, L> square[L];
        for (int i = 0; i < L; ++i) {
          square[i] = Vec<O, L>{};
          if (c0 + i >= panel.columns) continue;
          const int64_t at = column_w[c0 + i] + r;
          const T* from = w + k * kPerOperand<O> * p.w.out_channel + at;
          if (last_k * p.w.out_channel + at + L <= end) {
            square[i] = LoadAcross<O, L>(from, p.w.out_channel, k >= whole);
          } else {
            for (int j = 0; j < L && r + j < taps; ++j) {
              square[i][j] = LoadOperand<O>(from + j, p.w.out_channel, k >= whole);
            }
          }
        }
        Transpose<O, L>(square);
        O* out = to + r * tap_size + k * width + c0;
        for (int j = 0; j < L && r + j < taps; ++j) {
          NoteNonfinite<L, O>(&nonfinite, square[j]);
          Store<L>(out + j * tap_size, square[j]);
        }
      }
    }
  }
  Sum<O> sum = 0;
  for (int i = 0; i < L; ++i) sum += nonfinite[i];
  return sum;
}

// Packs out channels [k0, k1) of taps so few that squares of them would be mostly empty:
// copies the columns of an out channel, which lie side by side, and picks them from the
// copy.
constexpr int64_t kFewTaps = 4;

// out[r][i] = run[i*kTaps + r].
template <typename A, int kTaps>
CONVGRAD_INLINE void SplitTaps(const A* run, Vec<A, kLanes<A>> (&out)[kTaps]) {
  constexpr int L = kLanes<A>;
  CONVGRAD_UNROLL
  for (int r = 0; r < kTaps; ++r) {
    out[r] = Load<L>(run);
    CONVGRAD_UNROLL
    for (int v = 1; v < kTaps; ++v) {  // lanes that lie in the run's vector v
      Vec<typename IntOf<A>::type, L> index{};
      for (int i = 0; i < L; ++i) {
        const int at = i * kTaps + r;
        index[i] = at / L == v ? L + at % L : v == 1 && at < L ? at : i;
      }
      out[r] = Pick<A, L>(out[r], Load<L>(run + v * L), index);
    }
  }
}

template <typename T, int kTaps>
inline Acc<T> PackFewTapsOf(const T* w, int64_t out_channel, const Panel& panel,
                            int64_t k0, int64_t k1, Acc<T>* to, int64_t tap_size) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  const int64_t width = panel.vectors * L;
  Vec<A, L> nonfinite{};
  A run[kTaps * kPanelColumns<A>] = {};  // zeros behind the last column
  for (int64_t k = k0; k < k1; ++k) {
    LoadRun(w + k * out_channel, panel.columns * kTaps, run);
    for (int64_t c = 0; c < width; c += L) {
      Vec<A, L> values[kTaps];
      SplitTaps<A, kTaps>(run + c * kTaps, values);
      CONVGRAD_UNROLL
      for (int r = 0; r < kTaps; ++r) {
        NoteNonfinite<L, A>(&nonfinite, values[r]);
        Store<L>(to + r * tap_size + k * width + c, values[r]);
      }
    }
  }
  A sum = 0;
  for (int i = 0; i < L; ++i) sum += nonfinite[i];
  return sum;
}

template <typename T>
inline Acc<T> PackFewTaps(const T* w, const int64_t* column_w, const Problem& p,
                          const Panel& panel, int64_t k0, int64_t k1, Acc<T>* to,
                          int64_t tap_size) {
  static_assert(kFewTaps == 4, "one of these for each number of taps");
  constexpr decltype(&PackFewTapsOf<T, 1>) kPack[] = {
      PackFewTapsOf<T, 1>, PackFewTapsOf<T, 2>, PackFewTapsOf<T, 3>, PackFewTapsOf<T, 4>};
  return kPack[Taps(p) - 1](w + column_w[0], p.w.out_channel, panel, k0, k1, to,
                            tap_size);
}

// Whether the columns of a panel lie side by side, each with all its taps.
CONVGRAD_INLINE bool ColumnsAreRuns(const Problem& p, const Panel& panel,
                                    const int64_t* column_w) {
  bool are_runs = RunOfTaps(p) == 1;
  for (int64_t c = 1; c < panel.columns; ++c) {
    are_runs &= column_w[c] == column_w[0] + c * Taps(p);
  }
  return are_runs;
}

// Packs out channels [k0, k1) of columns that are runs of (out channel, tap): transposes
// squares of columns and elements of their runs.
template <typename T>
inline Acc<T> PackRunsTransposed(const T* w, const int64_t* column_w, const Problem& p,
                                 const Panel& panel, int64_t k0, int64_t k1, Acc<T>* to,
                                 int64_t tap_size) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  const int64_t width = panel.vectors * L;
  const int64_t taps = Taps(p);
  const bool backwards = RunOfTaps(p) < 0;
  const T* const run = w + k0 * taps - (backwards ? taps - 1 : 0);
  const int64_t count = (k1 - k0) * taps;
  Vec<A, L> nonfinite{};
  for (int v = 0; v < panel.vectors; ++v) {
    const int64_t c0 = v * L;
    const int live = panel.columns - c0 < L ? static_cast<int>(panel.columns - c0) : L;
    // The place of the run's next element.
    int64_t k = k0, tap = 0;
    for (int64_t j = 0; j < count; j += L) {
      Vec<A, L> square[L];
      const int elements = count - j < L ? static_cast<int>(count - j) : L;
      for (int i = 0; i < L; ++i) {
        square[i] = Vec<A, L>{};
        if (i >= live) continue;
        const T* const from = run + column_w[c0 + i] + j;
        if (elements == L) {
          square[i] = Load<L>(from);
        } else {
          for (int e = 0; e < elements; ++e) square[i][e] = LoadOne(from + e);
        }
      }
      Transpose<A, L>(square);
      for (int e = 0; e < elements; ++e) {
        NoteNonfinite<L, A>(&nonfinite, square[e]);
        const int64_t r = backwards ? taps - 1 - tap : tap;
        Store<L>(to + r * tap_size + k * width + c0, square[e]);
        if (++tap == taps) {
          tap = 0;
          ++k;
        }
      }
    }
  }
  A sum = 0;
  for (int i = 0; i < L; ++i) sum += nonfinite[i];
  return sum;
}

// Packs out channels [k0, k1) of any filter, element by element.
template <typename T>
inline Sum<Operand<T>> PackTapsStrided(const T* w, const int64_t* column_w,
                                       const Problem& p, const Panel& panel, int64_t k0,
                                       int64_t k1, Operand<T>* to, int64_t tap_size) {
  using O = Operand<T>;
  const int64_t width = panel.vectors * kLanes<O>;
  const int64_t whole = p.out_channels / kPerOperand<O>;
  Sum<O> nonfinite = 0;
  for (int64_t k = k0; k < k1; ++k) {
    for (int64_t c = 0; c < width; ++c) {
      const bool live = c < panel.columns;
      const T* from = w + k * kPerOperand<O> * p.w.out_channel + (live ? column_w[c] : 0);
      O* out = to + k * width + c;
      for (int64_t r0 = 0; r0 < p.axis[0].win; ++r0) {
        for (int64_t r1 = 0; r1 < p.axis[1].win; ++r1) {
          const T* row = from + r0 * p.w.axis[0] + r1 * p.w.axis[1];
          for (int64_t r2 = 0; r2 < p.axis[2].win; ++r2) {
            const O value =
                live ? LoadOperand<O>(row + r2 * p.w.axis[2], p.w.out_channel, k >= whole)
                     : 0;
            NoteNonfinite<O>(&nonfinite, value);
            *out = value;
            out += tap_size;
          }
        }
      }
    }
  }
  return nonfinite;
}

// Whether the columns of a panel are neighbours in the filter.
CONVGRAD_INLINE bool ColumnsAreContiguous(const Panel& panel, const int64_t* column_w) {
  bool contiguous = true;
  for (int64_t c = 1; c < panel.columns; ++c) {
    contiguous &= column_w[c] == column_w[0] + c;
  }
  return contiguous;
}

// Operands [k0, k1) of one tap of a panel, if its columns are contiguous or its out
// channels are. `to` is where operand 0 would go.
template <typename T>
inline Sum<Operand<T>> PackTap(const Problem& p, const T* tap, const int64_t* column_w,
                               bool contiguous, const Panel& panel, int64_t k0,
                               int64_t k1, Operand<T>* to) {
  return contiguous ? PackTapCopied<T>(tap + column_w[0], p, panel, k0, k1, to)
                    : PackTapTransposed<T>(tap, column_w, p, panel, k0, k1, to);
}

// Packs operands [k0, k1) of all taps of a panel. `to` is where operand 0 of the first
// tap would go; the next tap is tap_size on.
template <typename T>
inline Sum<Operand<T>> PackTaps(const Problem& p, const T* w, const int64_t* column_w,
                                const Panel& panel, int64_t k0, int64_t k1,
                                Operand<T>* to, int64_t tap_size) {
  using O = Operand<T>;
  const bool contiguous = ColumnsAreContiguous(panel, column_w);
  if (contiguous || p.w.out_channel == 1) {
    Sum<O> nonfinite = 0;
    for (int64_t r0 = 0; r0 < p.axis[0].win; ++r0) {
      for (int64_t r1 = 0; r1 < p.axis[1].win; ++r1) {
        for (int64_t r2 = 0; r2 < p.axis[2].win; ++r2) {
          const T* tap = w + r0 * p.w.axis[0] + r1 * p.w.axis[1] + r2 * p.w.axis[2];
          nonfinite += PackTap<T>(p, tap, column_w, contiguous, panel, k0, k1, to);
          to += tap_size;
        }
      }
    }
    return nonfinite;
  }
  if constexpr (kPerOperand<O> == 1) {
    if (p.w.out_channel == Taps(p) && RunOfTaps(p) != 0) {
      return PackRunsTransposed<T>(w, column_w, p, panel, k0, k1, to, tap_size);
    }
    if (Taps(p) > 0 && Taps(p) <= kFewTaps && ColumnsAreRuns(p, panel, column_w)) {
      return PackFewTaps<T>(w, column_w, p, panel, k0, k1, to, tap_size);
    }
  }
  return RunOfTaps(p) == 1
             ? PackTapsTransposed<T>(w, column_w, p, panel, k0, k1, to, tap_size)
             : PackTapsStrided<T>(w, column_w, p, panel, k0, k1, to, tap_size);
}

// A task packs (group, panel, kFilterPackChannels out channels), all taps.
template <typename T>
void PackFilterTask(const CpuArgs& a, int64_t index) {
  using O = Operand<T>;
  const Problem& p = a.problem;
  constexpr int64_t kChunk = kFilterPackChannels / kPerOperand<O>;
  const int64_t panels = CeilDiv(p.in_channels, kPanelColumns<O>);
  const int64_t chunk = index % FilterChunks(p);
  const int64_t group = index / FilterChunks(p) / panels;
  const Panel panel = PanelAt<O>(p, index / FilterChunks(p) % panels);
  const int64_t width = panel.vectors * kLanes<O>;
  const int64_t depth = Depth<O>(p);
  const int64_t k0 = chunk * kChunk;
  const int64_t k1 = k0 + kChunk < depth ? k0 + kChunk : depth;
  const T* w = static_cast<const T*>(a.w) + group * p.w.group;
  const int64_t* column_w = a.column_w + panel.first;
  O* to = PackedPanel<O>(a, group, panel);
  const int64_t tap_size = PackedDepth<O>(p) * width;
  if (k1 == depth) {
    const int64_t padding = tap_size - depth * width;
    for (int64_t r = 0; padding > 0 && r < Taps(p); ++r) {
      __builtin_memset(to + r * tap_size + depth * width, 0, padding * sizeof(O));
    }
  }
  const Sum<O> nonfinite = PackTaps<T>(p, w, column_w, panel, k0, k1, to, tap_size);
  a.nonfinite[index] = HasNonfinite(nonfinite);
}

// Whether dY is an array of operands as it stands, with the out channels innermost.
template <typename T>
CONVGRAD_INLINE bool ReadsDyInPlace(const CpuArgs& a) {
  if constexpr (sizeof(T) == sizeof(Acc<T>)) {
    return a.packed_dy == nullptr;
  } else {
    const Problem& p = a.problem;
    int64_t odd = p.out_channels | p.dy.batch | p.dy.group;
    for (int x = 0; x < kAxes; ++x) odd |= p.dy.axis[x];
    return kPerOperand<Operand<T>> == 2 && p.dy.channel == 1 && odd % 2 == 0;
  }
}

// Where the gemm kernel reads dY, in operands.
template <typename T>
CONVGRAD_INLINE ActivationStrides DyOperandStrides(const CpuArgs& a) {
  using O = Operand<T>;
  const Problem& p = a.problem;
  ActivationStrides s;
  if (ReadsDyInPlace<T>(a)) {
    s = p.dy;
    s.group /= kPerOperand<O>;
    s.batch /= kPerOperand<O>;
    for (int x = 0; x < kAxes; ++x) s.axis[x] /= kPerOperand<O>;
    return s;
  }
  s.channel = 1;
  s.group = Depth<O>(p);
  s.axis[2] = p.groups * s.group;
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
  using O = Operand<T>;
  constexpr int L = kLanes<O>;
  constexpr int kPer = kPerOperand<O>;
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
  const ActivationStrides to_strides = DyOperandStrides<T>(a);
  const int64_t step = p.dy.axis[2];
  const int64_t to_step = to_strides.axis[2];
  const int64_t k_step = p.dy.channel;
  const int64_t depth = Depth<O>(p);
  const int64_t whole = p.out_channels / kPer;  // operands that are not half empty
  const T* from = static_cast<const T*>(a.dy) + n * p.dy.batch + g * p.dy.group +
                  row / p.axis[1].out * p.dy.axis[0] +
                  row % p.axis[1].out * p.dy.axis[1] + i0 * step;
  O* to = static_cast<O*>(a.packed_dy) + n * to_strides.batch + g * to_strides.group +
          row * to_strides.axis[1] + i0 * to_step;
  if (k_step == 1) {
    for (int64_t i = 0; i < count; ++i) {
      const T* src = from + i * step;
      O* dst = to + i * to_step;
      int64_t k = 0;
      for (; k + L <= whole; k += L) Store<L>(dst + k, LoadAlong<O, L>(src + k * kPer));
      for (; k < depth; ++k) dst[k] = LoadOperand<O>(src + k * kPer, 1, k >= whole);
    }
    return;
  }
  int64_t i = 0;
  if (step == 1) {
    for (; i + L <= count; i += L) {
      int64_t k = 0;
      for (; k + L <= whole; k += L) {
        Vec<O, L> rows[L];
        for (int j = 0; j < L; ++j) {
          rows[j] = LoadAcross<O, L>(from + (k + j) * kPer * k_step + i, k_step, false);
        }
        Transpose<O, L>(rows);
        for (int j = 0; j < L; ++j) Store<L>(to + (i + j) * to_step + k, rows[j]);
      }
      for (; k < depth; ++k) {
        const Vec<O, L> v =
            LoadAcross<O, L>(from + k * kPer * k_step + i, k_step, k >= whole);
        for (int j = 0; j < L; ++j) to[(i + j) * to_step + k] = v[j];
      }
    }
  }
  for (; i < count; ++i) {
    for (int64_t k = 0; k < depth; ++k) {
      to[i * to_step + k] =
          LoadOperand<O>(from + k * kPer * k_step + i * step, k_step, k >= whole);
    }
  }
}

}  // namespace
}  // namespace CONVGRAD_ISA
}  // namespace convgrad
