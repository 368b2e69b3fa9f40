// Out channels in lanes: few input channels, many out channels.
//
//   dX[c, i] = sum over taps t, k   dY[p(i) - t*p_per_r, k] * W[t][c][k]
//
// A register tile is kPixels neighbouring positions of a phase x kChannels channels.
// Each of its sums is a vector of partial sums over k, so that dY and the filter are both
// read along k, contiguously, and dY is not transposed: kPixels + kChannels loads for
// kPixels * kChannels multiply-adds. At the end the vectors are added up across their
// lanes, L of them at a time, in about three instructions each. That is little where a
// phase has many taps and out channels; FewChannelsTask is for the rest.
//
// A task makes some rows of dX (axis 1) of a segment of columns, so short that the rows
// of dY under it stay in L1 from one row of dX to the next.
//
// dY is read in place if it is channels-last in the accumulation type, else it is packed
// first. Positions outside dY are read as zeros, which is exact unless the filter holds
// an Inf or a NaN: such a group is computed with the taps of each position alone. Where K
// is no multiple of the lanes the last vector overlaps the one before, masked.
//
// Limits: at least kMaxLanes out channels, so that a vector of them can be loaded.

#pragma once

#include "epilogue.h"
#include "footprint.h"
#include "gemm_pack.h"
#include "job.h"
#include "vec.h"

namespace convgrad {
namespace CONVGRAD_ISA {
namespace {

// Sums, a row of the filter and a vector of dY have to fit the registers. The sums are
// a multiple of the lanes, or nearly.
CONVGRAD_INLINE constexpr int DotPixels(int channels) {
  return kVectorRegisters == 32 ? (channels == 1   ? 16
                                   : channels == 2 ? 12
                                   : channels == 3 ? 8
                                                   : 6)
                                : (channels == 1   ? 12
                                   : channels == 2 ? 6
                                   : channels == 3 ? 4
                                                   : 2);
}
constexpr int64_t kMaxDotSums = 24;  // of a tile
// Most channels of a tile; fewer versions for float64, which is rare.
template <typename A>
constexpr int kDotChannels = sizeof(A) == 8 ? 2 : 4;

struct DotOut;
template <typename A>
using DotStore = void (*)(const A* sums, int64_t i, int64_t pixels, int64_t channels,
                          const DotOut& out);

struct DotsState {
  CpuArgs args;
  const void* dy;           // packed or in place
  ActivationStrides dy_at;  // of that
  int64_t vectors, tail;    // whole vectors of out channels, and what is left of them
  int64_t channel_step;     // elements of the packed filter from channel to channel
  int64_t rows, columns;    // of dX, of a task
  int64_t row_tasks, column_tasks;
  void (*store)();           // a DotStore of the accumulation type
  void (*apply_epilogue)();  // ApplyEpilogueToBox of the element type
};

// The packed filter is [group][r0][r1][r2][c][k], k in whole vectors; the last of them
// holds what the overlapping load of dY holds, and zeros. A task packs one group.
template <typename T>
inline void PackDotFilter(const DotsState& s, int64_t g) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  const Problem& p = s.args.problem;
  A* to = static_cast<A*>(s.args.filter) + g * Taps(p) * p.in_channels * s.channel_step;
  const T* w = static_cast<const T*>(s.args.w) + g * p.w.group;
  A nonfinite = 0;
  for (int64_t r0 = 0; r0 < p.axis[0].win; ++r0) {
    for (int64_t r1 = 0; r1 < p.axis[1].win; ++r1) {
      for (int64_t r2 = 0; r2 < p.axis[2].win; ++r2) {
        for (int64_t c = 0; c < p.in_channels; ++c, to += s.channel_step) {
          const T* from = w + r0 * p.w.axis[0] + r1 * p.w.axis[1] + r2 * p.w.axis[2] +
                          c * p.w.in_channel;
          for (int64_t k = 0; k < p.out_channels; ++k) {
            const A value = LoadOne(from + k * p.w.out_channel);
            nonfinite += value * 0;
            to[k < s.vectors * L ? k : k + L - s.tail] = value;
          }
          for (int64_t i = 0; s.tail > 0 && i < L - s.tail; ++i)
            to[s.vectors * L + i] = 0;
        }
      }
    }
  }
  s.args.nonfinite[g] = HasNonfinite(nonfinite);
}

// The first stage: packs the filter, clears the zeros that stand for positions outside
// dY, and packs dY.
template <typename T>
void DotsPackTask(const void* state, int64_t index) {
  const DotsState& s = *static_cast<const DotsState*>(state);
  const Problem& p = s.args.problem;
  if (index == 0) __builtin_memset(s.args.zeros, 0, sizeof(Acc<T>) * p.out_channels);
  if (index < p.groups) return PackDotFilter<T>(s, index);
  PackDyTask<T>(s.args, index - p.groups);
}

// The sum of each of kCount vectors, to neighbouring elements.
template <typename A, int kCount>
CONVGRAD_INLINE void StoreSums(const Vec<A, kLanes<A>>* sum, A* to) {
  constexpr int L = kLanes<A>;
  if constexpr (kCount >= L) {
    Store<L>(to, AddLanes<A, L>(sum));
    StoreSums<A, kCount - L>(sum + L, to + L);
  } else if constexpr (kCount > 0) {
    constexpr int kPart = kCount >= 8 ? 8 : kCount >= 4 ? 4 : kCount >= 2 ? 2 : 1;
    const Vec<A, L> sums = AddLanes<A, kPart>(sum);
    __builtin_memcpy(to, &sums, kPart * sizeof(A));
    StoreSums<A, kCount - kPart>(sum + kPart, to + kPart);
  }
}

// ---- the register tile ------------------------------------------------------------

// What the positions of one row and phase of dX sum over.
template <typename A>
struct DotTaps {
  const A* dy;  // position 0 of dY's row, at the first tap of the axes 0 and 1
  const A* filter;
  int64_t count[kAxes];     // of taps
  int64_t dy_back[kAxes];   // elements from what a tap reads back to what the next does
  int64_t tap_step[kAxes];  // of the filter
  int64_t vectors, tail, channel_step;
  int64_t pixel_step;  // elements of dY between neighbouring positions of the phase
  int64_t dy_step, out, p_per_h, p_per_r;
  const A* zeros;
};

// Keeps the compiler from loading a value again for each use, which would make loads,
// not multiply-adds, the limit.
template <typename V>
CONVGRAD_INLINE void KeepInRegister(V& v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__x86_64__)
  asm("" : "+x"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
}

// sum[j][c] += dY[x + (j - t)*step + k] * w[t][c][k] over kTaps taps and whole vectors.
// Four addresses share a base, because there are fewer registers for addresses than
// positions; `step` is made to look variable, or the compiler would undo that.
template <typename A, int kChannels, int kTaps>
CONVGRAD_INLINE void AddInside(
    const A* x, int64_t step, const A* w, int64_t w_step, int64_t tap_step,
    int64_t vectors, Vec<A, kLanes<A>> (&sum)[DotPixels(kChannels)][kChannels]) {
  constexpr int L = kLanes<A>;
  constexpr int kPixels = DotPixels(kChannels);
  constexpr int kLoads = kPixels + kTaps - 1;  // the first is that of the last tap
  constexpr int kBases = (kLoads + 3) / 4;
  using V = Vec<A, L>;
  const A* base[kBases];
  CONVGRAD_UNROLL
  for (int b = 0; b < kBases; ++b) base[b] = x + (4 * b - (kTaps - 1)) * step;
  int64_t step3 = 3 * step;
  for (int64_t v = 0; v < vectors; ++v) {
    asm("" : "+r"(step), "+r"(step3), "+r"(w_step));
    V scale[kTaps][kChannels];
    CONVGRAD_UNROLL
    for (int t = 0; t < kTaps; ++t) {
      CONVGRAD_UNROLL
      for (int c = 0; c < kChannels; ++c) {
        scale[t][c] = Load<L>(w + t * tap_step + c * w_step);
      }
    }
    CONVGRAD_UNROLL
    for (int i = 0; i < kPixels; ++i) {
      V in = Load<L>(base[i / 4] + (i % 4 == 3 ? step3 : (i % 4) * step));
      if constexpr (kChannels * kTaps > 1) KeepInRegister(in);
      CONVGRAD_UNROLL
      for (int t = 0; t < kTaps; ++t) {
        const int j = i - (kTaps - 1) + t;
        CONVGRAD_UNROLL
        for (int c = 0; c < kChannels; ++c) {
          if (j >= 0) sum[j][c] += in * scale[t][c];
        }
      }
    }
    // Apart, since a loop of more than 16 turns is not unrolled.
    if constexpr (kTaps > 1) {
      static_assert(kTaps == 2, "one load more than there are positions");
      const V in = Load<L>(base[kPixels / 4] + kPixels % 4 * step);
      CONVGRAD_UNROLL
      for (int c = 0; c < kChannels; ++c) sum[kPixels - 1][c] += in * scale[0][c];
    }
    CONVGRAD_UNROLL
    for (int b = 0; b < kBases; ++b) base[b] += L;
    w += L;
  }
}

// Positions whose tap 0 reads p, p + p_per_h, ...
template <typename A, int kChannels>
__attribute__((noinline)) void DotTile(const DotTaps<A>& f, int64_t p, A* to) {
  constexpr int L = kLanes<A>;
  constexpr int kPixels = DotPixels(kChannels);
  using V = Vec<A, L>;
  using Mask = Vec<typename IntOf<A>::type, L>;
  V sum[kPixels][kChannels] = {};
  for (int64_t t0 = 0; t0 < f.count[0]; ++t0) {
    for (int64_t t1 = 0; t1 < f.count[1]; ++t1) {
      const A* row = f.dy - t0 * f.dy_back[0] - t1 * f.dy_back[1];
      const A* tap = f.filter + t0 * f.tap_step[0] + t1 * f.tap_step[1];
      int64_t at = p;
      for (int64_t t2 = 0; t2 < f.count[2]; ++t2, tap += f.tap_step[2], at -= f.p_per_r) {
        int64_t v = 0;
        const int64_t last_read = at + (kPixels - 1) * f.p_per_h;
        if constexpr (kChannels == 1) {
          // With one sum a load the loads would be the limit: two taps share them.
          if (at >= f.p_per_r && last_read < f.out && t2 + 1 < f.count[2] &&
              f.p_per_h == f.p_per_r && f.tail == 0) {
            AddInside<A, kChannels, 2>(row + at * f.dy_step, f.pixel_step, tap,
                                       f.channel_step, f.tap_step[2], f.vectors, sum);
            ++t2;
            tap += f.tap_step[2];
            at -= f.p_per_r;
            continue;
          }
        }
        if (at >= 0 && last_read < f.out) {
          AddInside<A, kChannels, 1>(row + at * f.dy_step, f.pixel_step, tap,
                                     f.channel_step, 0, f.vectors, sum);
          if (f.tail == 0) continue;
          v = f.vectors;
        }
        // At the border, and the last vector of channels anywhere.
        const A* x[kPixels];
        bool any = false;
        CONVGRAD_UNROLL
        for (int j = 0; j < kPixels; ++j) {
          const int64_t read = at + j * f.p_per_h;
          const bool inside = static_cast<uint64_t>(read) < static_cast<uint64_t>(f.out);
          x[j] = inside ? row + read * f.dy_step : f.zeros;
          any |= inside;
        }
        for (; any && v < f.vectors + (f.tail > 0); ++v) {
          const bool last = v == f.vectors;
          const int64_t k = v * L - (last ? L - f.tail : 0);
          Mask mask{};
          for (int l = 0; l < L; ++l) mask[l] = last && l < L - f.tail ? 0 : -1;
          V scale[kChannels];
          CONVGRAD_UNROLL
          for (int c = 0; c < kChannels; ++c) {
            scale[c] = Load<L>(tap + c * f.channel_step + v * L);
          }
          CONVGRAD_UNROLL
          for (int j = 0; j < kPixels; ++j) {
            V in = (V)((Mask)Load<L>(x[j] + k) & mask);
            KeepInRegister(in);
            CONVGRAD_UNROLL
            for (int c = 0; c < kChannels; ++c) sum[j][c] += in * scale[c];
          }
        }
      }
    }
  }
  StoreSums<A, kPixels * kChannels>(&sum[0][0], to);
}

// ---- rows and tasks ---------------------------------------------------------------

// Where the positions of a row and phase are stored.
struct DotOut {
  void* dx;  // the group's first element in dX of the image
  int64_t at, pixel_step, channel_step;
};

// Rounds and stores `pixels` positions from position i on, of `channels` channels.
template <typename T>
void StoreDots(const Acc<T>* sums, int64_t i, int64_t pixels, int64_t channels,
               const DotOut& out) {
  T* to = static_cast<T*>(out.dx) + out.at + i * out.pixel_step;
  const int64_t count = pixels * channels;
  if (out.pixel_step == channels && (channels == 1 || out.channel_step == 1)) {
    return StoreRun(to, sums, count);
  }
  T rounded[kMaxDotSums];
  StoreRun(rounded, sums, count);
  const T* from = rounded;
  for (int64_t j = 0; j < pixels; ++j, to += out.pixel_step) {
    for (int64_t c = 0; c < channels; ++c) to[c * out.channel_step] = *from++;
  }
}

// Positions [i, end) of a phase, of `channels` channels.
template <typename A>
CONVGRAD_INLINE void DotSegment(const DotsState& s, const DotTaps<A>& f,
                                const Phase& phase, int64_t i, int64_t end,
                                int64_t channels, bool mask_taps, const DotOut& out) {
  const auto store = reinterpret_cast<DotStore<A>>(s.store);
  auto* tile = channels == 1 ? DotTile<A, 1> : DotTile<A, 2>;
  if constexpr (kDotChannels<A> == 4) {
    if (channels == 3) tile = DotTile<A, 3>;
    if (channels == 4) tile = DotTile<A, 4>;
  }
  const int64_t width = DotPixels(static_cast<int>(channels));
  alignas(64) A sums[kMaxDotSums];
  for (const int64_t first = i; i < end; i += width) {
    // The last tile overlaps the one before, if there is one.
    if (i + width > end && end - first >= width) i = end - width;
    const int64_t pixels = end - i < width ? end - i : width;
    if (!mask_taps) {
      tile(f, phase.p0 + i * f.p_per_h, sums);
      store(sums, i, pixels, channels, out);
      continue;
    }
    // The first position of a tile is right if all its taps are inside dY.
    for (int64_t j = i; j < i + pixels; ++j) {
      const TapRange taps = ValidTaps(phase, f.out, j);
      DotTaps<A> one = f;
      one.count[2] = taps.hi - taps.lo;
      one.filter += taps.lo * f.tap_step[2];
      tile(one, phase.p0 + j * f.p_per_h - taps.lo * f.p_per_r, sums);
      store(sums, j, 1, channels, out);
    }
  }
}

template <typename A>
void DotsTask(const void* state, int64_t index) {
  const DotsState& s = *static_cast<const DotsState*>(state);
  const CpuArgs& a = s.args;
  const Problem& p = a.problem;
  const int64_t column_task = index % s.column_tasks;
  index /= s.column_tasks;
  const int64_t row_task = index % s.row_tasks;
  index /= s.row_tasks;
  const int64_t h0 = index % p.axis[0].in;
  index /= p.axis[0].in;
  const int64_t g = index % p.groups;
  const int64_t n = index / p.groups;

  const Axis* x = p.axis;
  const int64_t phases = a.phase_count[2];
  const Phase& f0 = a.phase[0][h0 % a.phase_count[0]];
  const int64_t i0 = h0 / a.phase_count[0];
  const TapRange taps0 = ValidTaps(f0, x[0].out, i0);
  const A* dy = static_cast<const A*>(s.dy) + n * s.dy_at.batch + g * s.dy_at.group +
                (f0.p0 + i0 * f0.p_per_h - taps0.lo * f0.p_per_r) * s.dy_at.axis[0];
  const int64_t tap = p.in_channels * s.channel_step;
  const A* filter = static_cast<const A*>(a.filter) + g * Taps(p) * tap;
  const int64_t dx = n * p.dx.batch + g * p.dx.group + h0 * p.dx.axis[0];

  const int64_t w_lo = column_task * s.columns;
  const int64_t w_hi = w_lo + s.columns < x[2].in ? w_lo + s.columns : x[2].in;
  const int64_t h_lo = row_task * s.rows;
  const int64_t h_hi = h_lo + s.rows < x[1].in ? h_lo + s.rows : x[1].in;
  const Footprint columns = Clip(FootprintOf(x[2], w_lo, w_hi), x[2].out);
  int64_t fetched = Clip(FootprintOf(x[1], h_lo, h_lo + 1), x[1].out).hi;
  for (int64_t h1 = h_lo; h1 < h_hi; ++h1) {
    const Footprint next =
        Clip(FootprintOf(x[1], h_lo, h1 + 2 < h_hi ? h1 + 2 : h_hi), x[1].out);
    for (; fetched < next.hi; ++fetched) {
      const A* row = dy + fetched * s.dy_at.axis[1] + columns.lo * s.dy_at.axis[2];
      const int64_t elements = (columns.hi - columns.lo) * s.dy_at.axis[2];
      for (int64_t i = 0; i < elements; i += 64 / sizeof(A)) __builtin_prefetch(row + i);
    }
    const Phase& f1 = a.phase[1][h1 % a.phase_count[1]];
    const int64_t i1 = h1 / a.phase_count[1];
    const TapRange taps1 = ValidTaps(f1, x[1].out, i1);
    for (int64_t y = 0; y < phases; ++y) {
      const Phase& f2 = a.phase[2][y];
      const int64_t end = CeilDiv(w_hi - y, phases);
      const int64_t row_tap =
          (f0.r0 + taps0.lo * f0.r_step) * x[1].win + f1.r0 + taps1.lo * f1.r_step;
      DotTaps<A> f = {
          dy + (f1.p0 + i1 * f1.p_per_h - taps1.lo * f1.p_per_r) * s.dy_at.axis[1],
          filter + (row_tap * x[2].win + f2.r0) * tap,
          {taps0.hi - taps0.lo, taps1.hi - taps1.lo, f2.r_count},
          {f0.p_per_r * s.dy_at.axis[0], f1.p_per_r * s.dy_at.axis[1],
           f2.p_per_r * s.dy_at.axis[2]},
          {f0.r_step * x[1].win * x[2].win * tap, f1.r_step * x[2].win * tap,
           f2.r_step * tap},
          s.vectors,
          s.tail,
          s.channel_step,
          f2.p_per_h * s.dy_at.axis[2],
          s.dy_at.axis[2],
          x[2].out,
          f2.p_per_h,
          f2.p_per_r,
          static_cast<const A*>(a.zeros)};
      DotOut out = {a.dx, dx + h1 * p.dx.axis[1] + y * p.dx.axis[2],
                    phases * p.dx.axis[2], p.dx.channel};
      for (int64_t c = 0; c < p.in_channels; c += kDotChannels<A>) {
        const int64_t channels =
            p.in_channels - c < kDotChannels<A> ? p.in_channels - c : kDotChannels<A>;
        DotSegment(s, f, f2, w_lo / phases, end, channels, a.nonfinite[g] != 0, out);
        f.filter += kDotChannels<A> * s.channel_step;
        out.at += kDotChannels<A> * p.dx.channel;
      }
    }
    const auto apply_epilogue =
        reinterpret_cast<decltype(&ApplyEpilogueToBox<A>)>(s.apply_epilogue);
    apply_epilogue(a, dx + h1 * p.dx.axis[1] + w_lo * p.dx.axis[2], w_hi - w_lo,
                   p.dx.axis[2], p.in_channels, p.dx.channel);
  }
}

template <typename T>
void PrepareFewChannelsDot(const CpuArgs& a, CpuJob* job) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  constexpr int64_t kWindow = 14 * 1024;  // bytes of dY that should stay in L1
  constexpr int64_t kTaskRows = 16;
  const Problem& p = a.problem;
  DotsState s{};
  s.args = a;
  s.store = reinterpret_cast<void (*)()>(static_cast<DotStore<A>>(StoreDots<T>));
  s.apply_epilogue = reinterpret_cast<void (*)()>(&ApplyEpilogueToBox<T>);
  const bool pack_dy = !ReadsDyInPlace<T>(a);
  s.dy = pack_dy ? a.packed_dy : a.dy;
  s.dy_at = DyOperandStrides<T>(a);
  s.vectors = p.out_channels / L;
  s.tail = p.out_channels % L;
  s.channel_step = CeilDiv(p.out_channels, L) * L;
  int64_t taps = 1;  // rows of dY that a row of dX reads
  for (int x = 0; x < 2; ++x) {
    int64_t most = 0;
    for (int64_t i = 0; i < a.phase_count[x]; ++i) {
      if (a.phase[x][i].r_count > most) most = a.phase[x][i].r_count;
    }
    if (most > 0) taps *= most;
  }
  const int64_t channels =
      p.in_channels < kDotChannels<A> ? p.in_channels : kDotChannels<A>;
  const int64_t pixels = DotPixels(static_cast<int>(channels));
  const int64_t pixel_bytes = taps * p.out_channels * static_cast<int64_t>(sizeof(A));
  int64_t tiles = kWindow / (pixel_bytes * pixels);
  if (tiles < 1) tiles = 1;
  s.columns = tiles * pixels * a.phase_count[2];
  s.rows = p.axis[1].in < kTaskRows ? p.axis[1].in : kTaskRows;
  s.row_tasks = CeilDiv(p.axis[1].in, s.rows);
  s.column_tasks = CeilDiv(p.axis[2].in, s.columns);
  SetState(job, s);
  job->stages = 2;
  job->stage[0] = {p.groups + (pack_dy ? PackDyTasks(p) : 0), DotsPackTask<T>};
  job->stage[1] = {p.batch * p.groups * p.axis[0].in * s.row_tasks * s.column_tasks,
                   DotsTask<A>};
}

}  // namespace
}  // namespace CONVGRAD_ISA
}  // namespace convgrad
