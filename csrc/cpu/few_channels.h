// Pixels in lanes: depthwise and small groups channels-first, and few channels in any
// layout where there are too few out channels for few_channels_dot.h.
//
// A task makes a tile of dX, `rows` x `width` pixels of every channel of a group, from
// a window of dY that it first copies to its stack: [p0][p1][k][column] in the
// accumulation type, whatever dY's layout, with columns outside dY set to zero. Then for
// one row, one phase along it and one block of channels
//
//   dX[c, i] += dY[k, p - t*p_per_r + i] * W[k, t, c]      i in lanes,
//
// a register tile of kChannels x kVecs accumulators that shares the loads of dY among
// channels and each filter scalar among vectors. The phases of a row are put together in
// a row buffer and stored contiguously. Taps that miss dY along axes 0 and 1 are skipped.
//
// Where neighbouring pixels of a phase read every s-th position of dY, as a forward pass
// of stride s does, the window's rows are s strands, each with every s-th column: so i is
// in lanes there too. The taps along the row whose column is in one strand are a part of
// the sum.
//
// Zero columns are exact unless the filter holds an Inf or a NaN: such a group is
// computed by the definition.
//
// Limits: at most kMaxRowPhases phases along the row, at most kMaxStrands strands, and
// several only where dY lies in rows; a window that fits: ChoosePlaneTile in
// kernel_cpu.cc.

#pragma once

#include "direct.h"
#include "epilogue.h"
#include "footprint.h"
#include "job.h"
#include "vec.h"

namespace convgrad {
namespace CONVGRAD_ISA {
namespace {

struct FewChannelsState {
  CpuArgs args;
  PlaneTile tile;
  int64_t row_tasks, column_tasks;
};

// The packed filter is [group][r0][r1][r2][k][c].
template <typename T>
void FewChannelsPackTask(const void* state, int64_t g) {
  using A = Acc<T>;
  const FewChannelsState& s = *static_cast<const FewChannelsState*>(state);
  const Problem& p = s.args.problem;
  const int64_t taps = p.axis[0].win * p.axis[1].win * p.axis[2].win;
  A* to = static_cast<A*>(s.args.filter) + g * p.out_channels * taps * p.in_channels;
  const T* w = static_cast<const T*>(s.args.w) + g * p.w.group;
  A nonfinite = 0;
  for (int64_t r0 = 0; r0 < p.axis[0].win; ++r0) {
    for (int64_t r1 = 0; r1 < p.axis[1].win; ++r1) {
      for (int64_t r2 = 0; r2 < p.axis[2].win; ++r2) {
        for (int64_t k = 0; k < p.out_channels; ++k) {
          const T* from = w + k * p.w.out_channel + r0 * p.w.axis[0] + r1 * p.w.axis[1] +
                          r2 * p.w.axis[2];
          for (int64_t c = 0; c < p.in_channels; ++c) {
            const A value = LoadOne(from + c * p.w.in_channel);
            nonfinite += value * 0;
            *to++ = value;
          }
        }
      }
    }
  }
  s.args.nonfinite[g] = HasNonfinite(nonfinite);
}

// The window of dY on the stack.
template <typename A>
struct Window {
  A* data;
  Footprint p0, p1;  // clipped to dY
  int64_t column;    // which position of dY column 0 is
  int64_t cols;      // elements from channel to channel
  int64_t strands;   // column i is element i / strands of strand i % strands
  int64_t row_step;
};

// Columns [lo, hi) of a channel's row, which is a run of memory, into their strands.
template <typename T>
inline void FillStrands(const T* from, int64_t lo, int64_t hi, int64_t strands,
                        int64_t strand, Acc<T>* to) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  int64_t i = lo;
  if (strands == 2) {
    if (i < hi && i % 2 != 0) {
      to[strand + i / 2] = LoadOne(from + i);
      ++i;
    }
    Vec<typename IntOf<A>::type, L> even, odd;
    for (int j = 0; j < L; ++j) {
      even[j] = 2 * j;
      odd[j] = 2 * j + 1;
    }
    for (; i + 2 * L <= hi; i += 2 * L) {
      const Vec<A, L> a = Load<L>(from + i), b = Load<L>(from + i + L);
      Store<L>(to + i / 2, Pick<A, L>(a, b, even));
      Store<L>(to + strand + i / 2, Pick<A, L>(a, b, odd));
    }
  }
  A* first = to + i / strands;
  int64_t of = i % strands;
  for (; i < hi; ++i) {
    first[of * strand] = LoadOne(from + i);
    if (++of < strands) continue;
    of = 0;
    ++first;
  }
}

// Copies the window in.
template <typename T>
inline void FillWindow(const Problem& p, const T* dy, const Window<Acc<T>>& win) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  // Columns [lo, hi) of the window are inside dY.
  int64_t lo = -win.column, hi = p.axis[2].out - win.column;
  if (lo < 0) lo = 0;
  if (hi > win.cols) hi = win.cols;
  if (lo > win.cols) lo = win.cols;
  if (hi < lo) hi = lo;
  const int64_t step = p.dy.axis[2];
  A* to = win.data;
  for (int64_t q0 = win.p0.lo; q0 < win.p0.hi; ++q0) {
    for (int64_t q1 = win.p1.lo; q1 < win.p1.hi; ++q1, to += win.row_step) {
      const T* row = dy + q0 * p.dy.axis[0] + q1 * p.dy.axis[1] + win.column * step;
      int64_t k = 0;
      if (win.strands > 1) {
        const int64_t strand = win.cols / win.strands;
        for (; k < p.out_channels; ++k) {
          A* out = to + k * win.cols;
          // What lies outside dY is little beside the rest.
          if (lo > 0 || hi < win.cols) {
            __builtin_memset(out, 0, static_cast<size_t>(win.cols) * sizeof(A));
          }
          FillStrands<T>(row + k * p.dy.channel, lo, hi, win.strands, strand, out);
        }
        continue;
      }
      if (p.dy.channel == 1) {
        for (; k + L <= p.out_channels; k += L) {
          int64_t i = lo;
          for (; i + L <= hi; i += L) {
            Vec<A, L> square[L];
            for (int j = 0; j < L; ++j) square[j] = Load<L>(row + (i + j) * step + k);
            Transpose<A, L>(square);
            for (int j = 0; j < L; ++j) Store<L>(to + (k + j) * win.cols + i, square[j]);
          }
          for (; i < hi; ++i) {
            const Vec<A, L> one = Load<L>(row + i * step + k);
            for (int j = 0; j < L; ++j) to[(k + j) * win.cols + i] = one[j];
          }
        }
      }
      for (; k < p.out_channels; ++k) {
        const T* from = row + k * p.dy.channel;
        A* out = to + k * win.cols;
        int64_t i = lo;
        if (step == 1) {
          for (; i + L <= hi; i += L) Store<L>(out + i, Load<L>(from + i));
        }
        for (; i < hi; ++i) out[i] = LoadOne(from + i * step);
      }
      for (int64_t k = 0; k < p.out_channels; ++k) {
        A* out = to + k * win.cols;
        for (int64_t i = 0; i < lo; ++i) out[i] = 0;
        for (int64_t i = hi; i < win.cols; ++i) out[i] = 0;
      }
    }
  }
}

// What one phase of one row sums over, as loops over the window and the filter at once:
// the taps along each axis and the out channels, the longest innermost.
struct PlaneLoop {
  int64_t count, dy_step, filter_step;
};

// A part of the sum: the taps along the row whose columns are in one strand.
template <typename A>
struct PlanePart {
  const A* dy;  // of position 0, at the start of every loop
  const A* filter;
  PlaneLoop loop[4];
};

template <typename A>
struct PlaneTaps {
  PlanePart<A> part[kMaxStrands];
  int64_t parts;
};

// kVecs vectors of positions from i on, of kChannels channels; stored in the row buffer,
// whose channels are c_step apart.
template <typename A, int kChannels, int kVecs>
__attribute__((noinline)) void PlaneMultiply(const PlaneTaps<A>& taps, int64_t i, A* to,
                                             int64_t c_step) {
  constexpr int L = kLanes<A>;
  using V = Vec<A, L>;
  V sum[kChannels][kVecs] = {};
  for (int64_t part = 0; part < taps.parts; ++part) {
    const PlanePart<A>& f = taps.part[part];
    const PlaneLoop* loop = f.loop;
    for (int64_t i0 = 0; i0 < loop[0].count; ++i0) {
      for (int64_t i1 = 0; i1 < loop[1].count; ++i1) {
        for (int64_t i2 = 0; i2 < loop[2].count; ++i2) {
          const A* x = f.dy + i + i0 * loop[0].dy_step + i1 * loop[1].dy_step +
                       i2 * loop[2].dy_step;
          const A* w = f.filter + i0 * loop[0].filter_step + i1 * loop[1].filter_step +
                       i2 * loop[2].filter_step;
          for (int64_t i3 = 0; i3 < loop[3].count; ++i3) {
            // Each load of dY is likely to straddle two cache lines: load it once.
            V scale[kChannels];
            CONVGRAD_UNROLL
            for (int c = 0; c < kChannels; ++c) scale[c] = V{} + w[c];
            CONVGRAD_UNROLL
            for (int v = 0; v < kVecs; ++v) {
              const V in = Load<L>(x + v * L);
              CONVGRAD_UNROLL
              for (int c = 0; c < kChannels; ++c) sum[c][v] += in * scale[c];
            }
            x += loop[3].dy_step;
            w += loop[3].filter_step;
          }
        }
      }
    }
  }
  CONVGRAD_UNROLL
  for (int c = 0; c < kChannels; ++c) {
    CONVGRAD_UNROLL
    for (int v = 0; v < kVecs; ++v) Store<L>(to + c * c_step + i + v * L, sum[c][v]);
  }
}

// All vectors of a phase of a row.
template <typename A, int kChannels>
inline void PlanePhase(const PlaneTaps<A>& f, int64_t vectors, A* to, int64_t c_step) {
  constexpr int L = kLanes<A>;
  constexpr int kMost =
      kVectorRegisters == 32 ? (kChannels == 1 ? 8 : 4) : (kChannels > 2 ? 2 : 4);
  int64_t v = 0;
  for (; v + kMost <= vectors; v += kMost) {
    PlaneMultiply<A, kChannels, kMost>(f, v * L, to, c_step);
  }
  if constexpr (kMost > 4) {
    if (v + 4 <= vectors) {
      PlaneMultiply<A, kChannels, 4>(f, v * L, to, c_step);
      v += 4;
    }
  }
  if constexpr (kMost > 2) {
    if (v + 2 <= vectors) {
      PlaneMultiply<A, kChannels, 2>(f, v * L, to, c_step);
      v += 2;
    }
  }
  if (v < vectors) PlaneMultiply<A, kChannels, 1>(f, v * L, to, c_step);
}

// The largest row buffer: kPlaneChannels rows, every phase rounded up to whole vectors.
template <typename A>
constexpr int64_t kRowBuffer =
    kPlaneChannels * (kRowBytes + kMaxRowPhases * 64) / static_cast<int64_t>(sizeof(A));

// Stores `width` pixels of one channel, pixel w from buffer[w % phases][w / phases].
template <typename T>
inline void StoreRow(Acc<T>* buffer, int64_t phases, int64_t phase_step, int64_t width,
                     int64_t dx_step, T* dx) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  int64_t w = 0;
  if (dx_step == 1 && phases == 1) return StoreRun(dx, buffer, width);
  if (dx_step == 1 && phases == 2) {
    for (; w + 2 * L <= width; w += 2 * L) {
      const auto even = Load<L>(buffer + w / 2);
      const auto odd = Load<L>(buffer + phase_step + w / 2);
      Store<L>(dx + w, Interleave<A, L, 0>(even, odd));
      Store<L>(dx + w + L, Interleave<A, L, L>(even, odd));
    }
  }
  // What is to be rounded is rounded in vectors first, a phase at a time.
  [[maybe_unused]] T rounded[kRowBuffer<A> / kPlaneChannels];
  const int64_t first = w / phases;
  for (int64_t x = 0; x < phases; ++x) {
    const T* from;
    if constexpr (sizeof(T) == sizeof(A)) {
      from = buffer + x * phase_step;
    } else {
      StoreRun(rounded, buffer + x * phase_step, CeilDiv(width - x, phases));
      from = rounded;
    }
    int64_t at = first * phases + x;
    for (int64_t i = first; at < width; ++i, at += phases) dx[at * dx_step] = from[i];
  }
}

// Taps along the row as many as this apart read one strand.
inline int64_t TapsApart(int64_t strands, const Phase& row) {
  return strands == 1 ? 1 : strands / Gcd(strands, row.p_per_r);
}

template <typename T>
void FewChannelsTask(const void* state, int64_t index) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  const FewChannelsState& s = *static_cast<const FewChannelsState*>(state);
  const CpuArgs& a = s.args;
  const Problem& p = a.problem;
  const int64_t column_task = index % s.column_tasks;
  index /= s.column_tasks;
  const int64_t row_task = index % s.row_tasks;
  index /= s.row_tasks;
  int64_t h[kAxes];
  h[0] = index % p.axis[0].in;
  index /= p.axis[0].in;
  const int64_t g = index % p.groups;
  const int64_t n = index / p.groups;

  const int64_t h1_lo = row_task * s.tile.rows, w_lo = column_task * s.tile.width;
  const int64_t h1_hi =
      h1_lo + s.tile.rows < p.axis[1].in ? h1_lo + s.tile.rows : p.axis[1].in;
  const int64_t w_hi =
      w_lo + s.tile.width < p.axis[2].in ? w_lo + s.tile.width : p.axis[2].in;

  const auto finish_row = [&] {
    h[2] = w_lo;
    ApplyEpilogueToBox<T>(a, OutputAt<T>(a, n, g, 0, h) - static_cast<T*>(a.dx),
                          p.in_channels, p.dx.channel, w_hi - w_lo, p.dx.axis[2]);
  };
  if (a.nonfinite[g]) {
    for (h[1] = h1_lo; h[1] < h1_hi; ++h[1]) {
      for (h[2] = w_lo; h[2] < w_hi; ++h[2]) {
        for (int64_t c = 0; c < p.in_channels; ++c) {
          StoreOne(OutputAt<T>(a, n, g, c, h), DirectOne<T>(a, n, g, c, h));
        }
      }
      finish_row();
    }
    return;
  }

  alignas(64) A data[kLargeWindowBytes / sizeof(A)];
  alignas(64) A buffer[kRowBuffer<A>];
  Window<A> win;
  win.data = data;
  win.p0 = Clip(FootprintOf(p.axis[0], h[0], h[0] + 1), p.axis[0].out);
  win.p1 = Clip(FootprintOf(p.axis[1], h1_lo, h1_hi), p.axis[1].out);
  win.column = FootprintOf(p.axis[2], w_lo, w_hi).lo;
  win.cols = s.tile.cols;
  win.strands = a.phase[2][0].p_per_h;
  const int64_t box1 = win.p1.hi - win.p1.lo;
  win.row_step = p.out_channels * win.cols;
  FillWindow<T>(p, static_cast<const T*>(a.dy) + n * p.dy.batch + g * p.dy.group, win);

  const int64_t phases = a.phase_count[2];
  const int64_t phase_step = CeilDiv(CeilDiv(w_hi - w_lo, phases), L) * L;
  const int64_t c_step = phases * phase_step;
  const Axis* x = p.axis;
  const Phase& f0 = a.phase[0][h[0] % a.phase_count[0]];
  const int64_t i0 = h[0] / a.phase_count[0];
  const int64_t filter_tap = p.out_channels * p.in_channels;
  const int64_t filter_row = x[2].win * filter_tap;
  const A* filter =
      static_cast<const A*>(a.filter) + g * x[0].win * x[1].win * filter_row;
  const TapRange taps0 = ValidTaps(f0, x[0].out, i0);
  // Where a row's first taps of a phase begin in their strand. The tile starts at
  // position w_lo / phases of every phase, by its width.
  int64_t in_row[kMaxRowPhases][kMaxStrands];
  for (int64_t y = 0; y < a.phase_count[2]; ++y) {
    const Phase& f2 = a.phase[2][y];
    const int64_t apart = TapsApart(win.strands, f2);
    for (int64_t t = 0; t < apart && t < f2.r_count; ++t) {
      const int64_t column =
          f2.p0 + w_lo / phases * win.strands - t * f2.p_per_r - win.column;
      in_row[y][t] =
          column % win.strands * (win.cols / win.strands) + column / win.strands;
    }
  }
  for (h[1] = h1_lo; h[1] < h1_hi; ++h[1]) {
    const Phase& f1 = a.phase[1][h[1] % a.phase_count[1]];
    const int64_t i1 = h[1] / a.phase_count[1];
    const TapRange taps1 = ValidTaps(f1, x[1].out, i1);
    // The row of the window that the first valid tap reads, and its row of the filter.
    const int64_t row =
        (f0.p0 + i0 * f0.p_per_h - taps0.lo * f0.p_per_r - win.p0.lo) * box1 +
        (f1.p0 + i1 * f1.p_per_h - taps1.lo * f1.p_per_r - win.p1.lo);
    const int64_t tap_row =
        (f0.r0 + taps0.lo * f0.r_step) * x[1].win + (f1.r0 + taps1.lo * f1.r_step);
    const PlaneLoop over0 = {taps0.hi - taps0.lo, -f0.p_per_r * box1 * win.row_step,
                             f0.r_step * x[1].win * filter_row};
    const PlaneLoop over1 = {taps1.hi - taps1.lo, -f1.p_per_r * win.row_step,
                             f1.r_step * filter_row};
    const PlaneLoop over_k = {p.out_channels, win.cols, p.in_channels};
    for (int64_t c0 = 0; c0 < p.in_channels; c0 += kPlaneChannels) {
      const int64_t channels =
          p.in_channels - c0 < kPlaneChannels ? p.in_channels - c0 : kPlaneChannels;
      for (int64_t y = 0; y < phases; ++y) {
        const Phase& f2 = a.phase[2][y];
        const int64_t count = CeilDiv(w_hi - w_lo - y, phases);
        if (count <= 0) continue;
        const int64_t apart = TapsApart(win.strands, f2);
        const PlaneLoop over2 = {0, -f2.p_per_r * apart / win.strands,
                                 f2.r_step * filter_tap * apart};
        const bool k_inside = over_k.count > f2.r_count;
        PlaneTaps<A> f;
        f.parts = apart < f2.r_count ? apart : f2.r_count;
        for (int64_t t = 0; t < f.parts; ++t) {
          const int64_t tap = f2.r0 + t * f2.r_step;
          f.part[t] = {data + row * win.row_step + in_row[y][t],
                       filter + tap_row * filter_row + tap * filter_tap + c0,
                       {k_inside ? over0 : over_k, k_inside ? over1 : over0,
                        k_inside ? over2 : over1, k_inside ? over_k : over2}};
          f.part[t].loop[k_inside ? 2 : 3].count = CeilDiv(f2.r_count - t, apart);
        }
        A* to = buffer + y * phase_step;
        const int64_t vectors = CeilDiv(count, L);
        switch (channels) {
          case 1: PlanePhase<A, 1>(f, vectors, to, c_step); break;
          case 2: PlanePhase<A, 2>(f, vectors, to, c_step); break;
          case 3: PlanePhase<A, 3>(f, vectors, to, c_step); break;
          default: PlanePhase<A, 4>(f, vectors, to, c_step);
        }
      }
      h[2] = w_lo;
      for (int64_t c = 0; c < channels; ++c) {
        StoreRow<T>(buffer + c * c_step, phases, phase_step, w_hi - w_lo, p.dx.axis[2],
                    OutputAt<T>(a, n, g, c0 + c, h));
      }
    }
    finish_row();
  }
}

template <typename T>
void PrepareFewChannels(const CpuArgs& a, CpuJob* job) {
  const Problem& p = a.problem;
  FewChannelsState s{};
  s.args = a;
  s.tile = a.plane_tile;
  s.row_tasks = CeilDiv(p.axis[1].in, s.tile.rows);
  s.column_tasks = CeilDiv(p.axis[2].in, s.tile.width);
  SetState(job, s);
  job->stages = 2;
  job->stage[0] = {p.groups, FewChannelsPackTask<T>};
  job->stage[1] = {p.batch * p.groups * p.axis[0].in * s.row_tasks * s.column_tasks,
                   FewChannelsTask<T>};
}

}  // namespace
}  // namespace CONVGRAD_ISA
}  // namespace convgrad
