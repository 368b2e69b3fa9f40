// "depthwise": one input channel a group, on the FP32 units; products and sums are those
// of float32 (of float64 for f64), so that it serves precision HIGHEST too.
//
//   dX[n,c,h] = sum over k, r  dY[n, c*K + k, p] * W[c,k,r]
//   where   h + pad_lo = p*stride + r*dilation
//
// There is no channel to sum over that another output shares, hence nothing for a matrix
// product to do: in a channels-last layout neighbouring lanes take neighbouring channels,
// a lane has its own filter, and what decides is how few instructions surround a
// multiply-add. At the copy bandwidth of an H200 a multiprocessor has about 28 of them
// for each bf16 element of dX (18 bytes a clock, 128 lanes). A 3x3 filter takes 9, a 5x5
// filter 25.
//
// Lattices. With g = gcd(stride, dilation), stride = g*s and dilation = g*d, the
// positions h of one residue modulo the dilation form a problem of their own
// (MakeLattice):
//
//   h = h0 + dilation*m,  p = p0 + d*j,  u = u0 + m:    u = s*j + r,
//
// a dense problem of stride s, so that dilation costs no instruction in the inner loops.
// If g does not divide h0 + pad_lo then no tap reaches the lattice: its dY is empty.
// The outputs u = s*i .. s*i + s - 1 are the s phases of i, and read j = i, i - 1, ...
//
// Ring. For common filters, known when compiled. A thread has a run of kRun i across, all
// phases of them, and walks down the rows of dY. It holds its filter in registers, and a
// ring of sums for the `kRows` rows of dX that a row of dY reaches; so each row of dY is
// loaded once and unpacked once for all its taps and phases, while the row after it is on
// its way. Then the uppermost `step` rows are complete, are stored, and their place in
// the ring becomes that of the next ones: the loop is unrolled over a full turn, so that
// no register moves. Loads are predicated, their registers hold zeros where there is only
// padding; rows that are all padding are skipped.
//
// Window. For every other filter, up to 31x31 and beyond, and any channel multiplier. A
// block has up to 32 vectors of channels, whose filters it stages in shared memory as
// many rows of taps at a time as there is room for. A thread has a run of kRun i of one
// row and phase, and for each row of taps that sees some dY walks along the taps: a
// window of kRun vectors of dY slides over the row as a ring in registers. Each tap costs
// one vector of dY, one of W and kRun multiply-adds for each of its channels. The axes
// before the last are taken position by position (phase.h), with any lhs_dilation.
//
// Vectors are two channels where alignment permits, except of f64 and of f32 in the ring,
// otherwise a single one.
//
// Padding is multiplied as zeros only at the left and right ends of a row. Zero times an
// Inf of W gives a NaN that is not in the definition: a thread with such a tap (ring) or
// result (window) computes results that are not finite again at its end, by the
// definition (DirectSum).
//
// An epilogue (kernel.h) is left to a pass of its own: one word at a time on the way out,
// with no registers to load it early, would take longer than dX once more in whole
// vectors.
//
// Limits: dX and dY channels-last; no lhs_dilation on the last axis; dilations up to
// 2^15; an image that 32-bit indices can address (the host launches part after part of
// the batch); one row of a filter's taps fits in shared memory. The ring wants the rows
// of a filter one behind the other.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "direct.cuh"
#include "geometry.cuh"
#include "platform.cuh"
#include "primitives.cuh"

namespace convgrad {

constexpr int kRingThreads = 128;
constexpr int kWindowThreads = 256;
constexpr int kWindowMinBlocks = 2;  // 128 registers
constexpr int kWindowLanes = 32;     // most vectors of channels of a block
constexpr int kWindowSharedBytes = 32 * 1024;
constexpr int kMostLattices = 1 << 15;  // of an axis: indices are squared

// An axis as the lattices see it.
struct DepthwiseAxis {
  int32_t in, out, pad_lo;
  int32_t stride, dilation;
  int32_t common;   // g
  int32_t step;     // s
  int32_t spacing;  // d
  int32_t inverse;  // of s modulo d
  int32_t dx_stride, dy_stride, w_stride;
};

struct DepthwiseParams {
  Geometry<int32_t> geometry;
  DepthwiseAxis axis[kAxes];
  // What an item's number is made up of, the fastest first; one that a kernel does not
  // use has the divisor one. `channels` counts vectors.
  Divider<int32_t> channels, runs, phases, residues_w, rows, residues_h, depth;
  int32_t items;
  int32_t groups;
  // Bytes from one position of a lattice to the next, for each axis: as parameters they
  // cost no registers.
  int64_t dy_step[kAxes], dx_step[kAxes];
  int32_t strip;  // ring: i of a strip of rows
  // Window: vectors of channels of a block, its items for each of them, and the rows of
  // taps that are staged together.
  Divider<int32_t> lanes, chunks;
  int32_t block_items, staged_rows, tap_rows;
  Divider<int32_t> window_cols, window_rows, multiplier;
};

// The positions h0 + dilation*m of dX, for 0 <= m < positions, and the positions
// p0 + spacing*j of dY, for 0 <= j < count, that reach them.
struct Lattice {
  int32_t u0, positions;
  int32_t p0, count;
};

__device__ __forceinline__ Lattice MakeLattice(const DepthwiseAxis& a, int32_t h0) {
  const int32_t at = h0 + a.pad_lo;
  if (a.dilation == 1) return {at, a.in, 0, a.out};
  int32_t odd = at % a.common;
  if (odd < 0) odd += a.common;
  int32_t p0 = (at - odd) / a.common % a.spacing;
  if (p0 < 0) p0 += a.spacing;
  p0 = p0 * a.inverse % a.spacing;
  const bool reached = odd == 0 && p0 < a.out;
  return {(at - odd - a.stride * p0) / a.dilation, (a.in - h0 - 1) / a.dilation + 1, p0,
          reached ? (a.out - p0 - 1) / a.spacing + 1 : 0};
}

__device__ __forceinline__ int32_t FloorDiv(int32_t n, int32_t d) {
  return n >= 0 ? n / d : -((d - 1 - n) / d);
}

// Whether 0 <= i < count.
__device__ __forceinline__ bool Within(int32_t i, int32_t count) {
  return static_cast<uint32_t>(i) < static_cast<uint32_t>(count);
}

// Adjacent channels, stored as one.
template <typename T, int kVector>
struct alignas(sizeof(T) * kVector) ChannelVector {
  T element[kVector];
};

// What they are loaded as. Unpacked late: a word is one register, its channels are two.
template <int kBytes>
struct WordOf;
template <>
struct WordOf<2> {
  using Type = unsigned short;
};
template <>
struct WordOf<4> {
  using Type = unsigned;
};
template <>
struct WordOf<8> {
  using Type = unsigned long long;
};
template <typename T, int kVector>
using Word = typename WordOf<sizeof(T) * kVector>::Type;

template <typename T, int kVector>
__device__ __forceinline__ void Unpack(Word<T, kVector> word,
                                       Accumulator<T> (&value)[kVector]) {
  if constexpr (std::is_same<T, __nv_bfloat16>::value && kVector == 2) {
    value[0] = __uint_as_float(word << 16);
    value[1] = __uint_as_float(word & 0xffff0000u);
  } else if constexpr (std::is_same<T, __half>::value && kVector == 2) {
    __half2 pair;
    std::memcpy(&pair, &word, sizeof(pair));
    const float2 both = __half22float2(pair);
    value[0] = both.x;
    value[1] = both.y;
  } else {
    T element[kVector];
    std::memcpy(element, &word, sizeof(element));
#pragma unroll
    for (int v = 0; v < kVector; ++v) value[v] = Widen(element[v]);
  }
}

template <typename T, int kVector>
__device__ __forceinline__ ChannelVector<T, kVector> Pack(
    const Accumulator<T> (&value)[kVector]) {
  ChannelVector<T, kVector> packed;
  if constexpr (std::is_same<T, __nv_bfloat16>::value && kVector == 2) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(value[0], value[1]);
    std::memcpy(&packed, &pair, sizeof(packed));
  } else if constexpr (std::is_same<T, __half>::value && kVector == 2) {
    const __half2 pair = __floats2half2_rn(value[0], value[1]);
    std::memcpy(&packed, &pair, sizeof(packed));
  } else {
#pragma unroll
    for (int v = 0; v < kVector; ++v) packed.element[v] = Narrow(value[v], T{});
  }
  return packed;
}

template <typename T, int kVector>
__device__ __forceinline__ void StoreVector(T* to,
                                            const ChannelVector<T, kVector>& value) {
  *reinterpret_cast<ChannelVector<T, kVector>*>(to) = value;
}

// The address that many bytes further.
template <typename T>
__device__ __forceinline__ const T* Further(const T* p, int64_t bytes) {
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(p) + bytes);
}
template <typename T>
__device__ __forceinline__ T* Further(T* p, int64_t bytes) {
  return reinterpret_cast<T*>(reinterpret_cast<char*>(p) + bytes);
}

// Goes there. With multiples of the step, which the compiler would make of a few such
// calls, the addresses of a row would take up two registers each.
template <typename T>
__device__ __forceinline__ void Advance(T*& p, int64_t bytes) {
  p = Further(p, bytes);
  Forget(p);
}

// Computes an element of dX again if what was stored is not finite. Stores go through
// pointers whose origin the compiler has forgotten, so that dX must not be __restrict__.
template <typename T>
__device__ __forceinline__ void RepairElement(const Geometry<int32_t>& g, int32_t n,
                                              int32_t channel, const int32_t (&h)[kAxes],
                                              const T* __restrict__ dy,
                                              const T* __restrict__ w, T* dx) {
  int32_t at = n * g.dx_batch + channel * g.dx_group;
#pragma unroll
  for (int a = 0; a < kAxes; ++a) at += h[a] * g.axis[a].dx_stride;
  const Accumulator<T> stored = Widen(dx[at]);
  if (stored - stored == 0) return;
  const Accumulator<T> sum = DirectSum<T, int32_t>(
      g, h, n * g.dy_batch + channel * g.dy_group, channel * g.w_group, dy, w);
  dx[at] = Narrow(sum, T{});
}

// ---- ring -------------------------------------------------------------------------

template <typename T, int kFilterRows, int kFilterCols, int kStepDown, int kStepAcross>
struct RingShape {
  using Type = T;
  static constexpr int kRows = kFilterRows, kCols = kFilterCols;
  static constexpr int kStepH = kStepDown, kStepW = kStepAcross;
  static constexpr int kTaps = kRows * kCols;
  // Filters of two channels and more than 25 taps would need more registers than there
  // are.
  static constexpr int kVector = sizeof(T) == 2 && kTaps <= 25 ? 2 : 1;
  // Sizes of images are mostly multiples of seven.
  static constexpr int kRun = kRows == 1 ? 14 / kStepW : kStepW == 1 ? 7 : 4;
  // 128 or 168 registers for a thread.
  static constexpr int kMinBlocks = kTaps <= 9 ? 4 : 3;

  static constexpr int kHaloH = (kRows + kStepH - 1) / kStepH - 1;
  static constexpr int kHaloW = (kCols + kStepW - 1) / kStepW - 1;
  static constexpr int kReads = kRun + kHaloW;   // of a row of dY
  static constexpr int kWrites = kRun * kStepW;  // of a row of dX
  static constexpr int kTurn = kRows / static_cast<int>(Gcd(kRows, kStepH));
  // One word pads a tap's channels, so that writing along taps hits many banks.
  static constexpr int kPitch = kRingThreads * kVector + (sizeof(T) == 2 ? 2 : 1);

  static_assert(kRows >= kStepH && kCols >= kStepW, "every phase has a tap");
  static_assert(kReads <= 32 && kWrites <= 32, "masks have 32 bits");
};

// What a thread needs for repairs: kept in shared memory, since the loop has no registers
// to spare.
struct RingPlace {
  int32_t n, channel, h0, w0, m_w, m_begin, m_end;
};

template <typename S>
__global__ void __launch_bounds__(kRingThreads, S::kMinBlocks)
    DepthwiseRingKernel(const __grid_constant__ DepthwiseParams params,
                        const typename S::Type* __restrict__ dy,
                        const typename S::Type* __restrict__ w, typename S::Type* dx) {
  using T = typename S::Type;
  constexpr int kVector = S::kVector;
  alignas(16) __shared__ T staged[S::kTaps][S::kPitch];
  __shared__ RingPlace places[kRingThreads];

  const Geometry<int32_t>& g = params.geometry;
  const DepthwiseAxis& down = params.axis[1];
  const DepthwiseAxis& across = params.axis[2];
  const int thread = static_cast<int>(threadIdx.x);
  const int32_t vectors = params.channels.divisor;
  const int32_t first = static_cast<int32_t>(blockIdx.x) * kRingThreads;

  // The filters of this block. Its items are consecutive, so that with more vectors of
  // channels than threads each thread has another one, and otherwise all are needed.
  const bool each = vectors > kRingThreads;
  {
    const int32_t from =
        each ? (first - params.channels.Quotient(first) * vectors) * kVector : 0;
    const int count = (each ? kRingThreads : vectors) * kVector * S::kTaps;
    int channel = thread / S::kTaps, tap = thread % S::kTaps;
    for (int e = thread; e < count; e += kRingThreads) {
      int32_t group = from + channel;
      if (group >= params.groups) group -= params.groups;
      staged[tap][channel] = w[group * g.w_group + tap * across.w_stride];
      channel += kRingThreads / S::kTaps;
      tap += kRingThreads % S::kTaps;
      if (tap >= S::kTaps) {
        tap -= S::kTaps;
        ++channel;
      }
    }
  }
  __syncthreads();
  int32_t rest = first + thread;
  if (rest >= params.items) return;

  const int32_t vector = TakeDigit(params.channels, &rest);
  const int32_t run = TakeDigit(params.runs, &rest);
  const int32_t w0 = TakeDigit(params.residues_w, &rest);
  const int32_t strip = TakeDigit(params.rows, &rest);
  const int32_t h0 = TakeDigit(params.residues_h, &rest);
  const int32_t n = rest;
  const int32_t channel = vector * kVector;

  float tap[S::kRows][S::kCols][kVector];
  float special = 0;  // becomes NaN with the first tap that is not finite
#pragma unroll
  for (int r = 0; r < S::kRows; ++r) {
#pragma unroll
    for (int s = 0; s < S::kCols; ++s) {
      const T* const of = &staged[r * S::kCols + s][(each ? thread : vector) * kVector];
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        tap[r][s][v] = Widen(of[v]);
        special += tap[r][s][v] * 0.0f;
      }
    }
  }

  const bool finite = special == 0;

  // Across: which columns exist, of dY and of dX.
  const Lattice lattice_w = MakeLattice(across, w0);
  const int32_t i_w = FloorDiv(lattice_w.u0, S::kStepW) + run * S::kRun;
  const int32_t m_w = S::kStepW * i_w - lattice_w.u0;  // of the first column of dX
  uint32_t reads = 0, writes = 0;
#pragma unroll
  for (int m = 0; m < S::kReads; ++m) {
    reads |= static_cast<uint32_t>(Within(i_w - S::kHaloW + m, lattice_w.count)) << m;
  }
#pragma unroll
  for (int c = 0; c < S::kWrites; ++c) {
    writes |= static_cast<uint32_t>(Within(m_w + c, lattice_w.positions)) << c;
  }

  // Down: the strip has the rows i_begin.. of all phases, which are the rows m_begin.. of
  // the lattice. Its first rows of dY reach above it too.
  const Lattice lattice_h = MakeLattice(down, h0);
  const int32_t i_begin = FloorDiv(lattice_h.u0, S::kStepH) + strip * params.strip;
  const int32_t m_low = S::kStepH * i_begin - lattice_h.u0;
  const int32_t m_begin = m_low < 0 ? 0 : m_low;
  const int32_t m_high = m_low + S::kStepH * params.strip;
  const int32_t m_end = m_high < lattice_h.positions ? m_high : lattice_h.positions;
  const int32_t m_count = m_end - m_begin;
  places[thread] = {n, channel, h0, w0, m_w, m_begin, m_end};

  const int64_t dy_row = params.dy_step[1], dy_col = params.dy_step[2];
  const int64_t dx_row = params.dx_step[1], dx_col = params.dx_step[2];
  // Rows before the first of dY have nothing to add to any sum.
  int32_t j = i_begin - S::kHaloH;
  if (j < 0) j = i_begin < 0 ? i_begin : 0;
  int32_t m = S::kStepH * j - lattice_h.u0 - m_begin;  // counted from the strip's first
  const int32_t j_first = j < 0 ? 0 : j;
  const T* from = Further(dy + n * g.dy_batch + channel * g.dy_group +
                              static_cast<int64_t>(lattice_h.p0) * down.dy_stride +
                              static_cast<int64_t>(lattice_w.p0) * across.dy_stride,
                          j_first * dy_row + (i_w - S::kHaloW) * dy_col);
  T* to = Further(dx + n * g.dx_batch + channel * g.dx_group + h0 * down.dx_stride +
                      w0 * across.dx_stride,
                  (m + m_begin) * dx_row + m_w * dx_col);

  // The row of dY that is used next. Where a column does not exist, zeros remain.
  Word<T, kVector> packed[S::kReads] = {};
  if (j_first < lattice_h.count) {
    const T* at = from;
#pragma unroll
    for (int c = 0; c < S::kReads; ++c) {
      LoadIf(packed[c], at, reads & 1u << c);
      Advance(at, dy_col);
    }
  }

  float sum[S::kRows][S::kWrites][kVector] = {};
#pragma unroll 1
  while (m < m_count) {
#pragma unroll
    for (int turn = 0; turn < S::kTurn; ++turn) {
      if (m >= m_count) break;
      // The rows of dX that this row of dY is the first to reach.
#pragma unroll
      for (int r = S::kRows - S::kStepH; r < S::kRows; ++r) {
#pragma unroll
        for (int c = 0; c < S::kWrites; ++c) {
#pragma unroll
          for (int v = 0; v < kVector; ++v) {
            sum[(S::kStepH * turn + r) % S::kRows][c][v] = 0;
          }
        }
      }
      const bool inside = Within(j, lattice_h.count);
      ++j;
      if (inside) {
        Advance(from, dy_row);
        const T* at = from;
        uint32_t exist = j < lattice_h.count ? reads : 0;
        Forget(exist);
#pragma unroll
        for (int c = 0; c < S::kReads; ++c) {
          float x[kVector];
          Unpack<T, kVector>(packed[c], x);
          LoadIf(packed[c], at, exist & 1u << c);
          Advance(at, dy_col);
#pragma unroll
          for (int r = 0; r < S::kRows; ++r) {
#pragma unroll
            for (int s = 0; s < S::kCols; ++s) {
              const int i = c - S::kHaloW + s / S::kStepW;
              if (i < 0 || i >= S::kRun) continue;
              float (&to_sum)[kVector] =
                  sum[(S::kStepH * turn + r) % S::kRows][S::kStepW * i + s % S::kStepW];
#pragma unroll
              for (int v = 0; v < kVector; ++v) to_sum[v] += x[v] * tap[r][s][v];
            }
          }
        }
      }

      // The rows of dX that no other row of dY reaches.
#pragma unroll
      for (int r = 0; r < S::kStepH; ++r) {
        if (Within(m, m_count)) {
          T* at = to;
          uint32_t mine = writes;
          Forget(mine);
#pragma unroll
          for (int c = 0; c < S::kWrites; ++c) {
            const float (&value)[kVector] = sum[(S::kStepH * turn + r) % S::kRows][c];
            const auto narrow = Pack<T, kVector>(value);
            if ((mine & 1u << c) != 0) StoreVector(at, narrow);
            Advance(at, dx_col);
          }
        }
        ++m;
        Advance(to, dx_row);
      }
    }
  }

  if (finite) return;
  const RingPlace& kept = places[thread];
#pragma unroll 1
  for (int32_t row = kept.m_begin; row < kept.m_end; ++row) {
#pragma unroll 1
    for (int c = 0; c < S::kWrites * kVector; ++c) {
      if ((writes >> c / kVector & 1) == 0) continue;
      const int32_t h[kAxes] = {0, kept.h0 + down.dilation * row,
                                kept.w0 + across.dilation * (kept.m_w + c / kVector)};
      RepairElement(g, kept.n, kept.channel + c % kVector, h, dy, w, dx);
    }
  }
}

// ---- window -----------------------------------------------------------------------

// Adds a row of taps to the sums of a run: taps t of tap_count, tap_pitch apart in shared
// memory. Output k and tap t read position j + k - t of the j_count positions of dY; row
// is where position zero lies.
template <typename T, int kVector, int kRun>
__device__ __forceinline__ void SlideAlong(const T* row, int64_t dy_col, int32_t j,
                                           int32_t j_count, const Accumulator<T>* taps,
                                           int tap_pitch, int32_t tap_count,
                                           Accumulator<T> (&sum)[kRun][kVector]) {
  using Acc = Accumulator<T>;
  // Taps that see some dY. From the first one on no j + 0 - t is beyond the end.
  const int32_t t_begin = j < j_count ? 0 : j - j_count + 1;
  const int32_t t_end = tap_count < j + kRun ? tap_count : j + kRun;
  int32_t taps_left = t_end - t_begin;
  if (taps_left <= 0) return;

  int32_t at = j - t_begin;  // what output 0 reads
  const T* from = Further(row, at * dy_col);
  const Acc* tap = taps + t_begin * tap_pitch;
  Acc window[kRun][kVector];
  {
    const T* next = from;
#pragma unroll
    for (int k = 1; k < kRun; ++k) {
      Word<T, kVector> packed = 0;
      Advance(next, dy_col);
      LoadIf(packed, next, Within(at + k, j_count));
      Unpack<T, kVector>(packed, window[k]);
    }
  }
  Word<T, kVector> packed = 0;
  LoadIf(packed, from, at >= 0);

  // One tap, while what the next one needs is loaded.
  const auto step = [&](int turn, bool exists) {
    // What output kRun - 1 has just read makes place for what output 0 reads now.
    Unpack<T, kVector>(packed, window[(kRun - turn) % kRun]);
    const auto weight = *reinterpret_cast<const ChannelVector<Acc, kVector>*>(tap);
    tap += tap_pitch;
    Advance(from, -dy_col);
    packed = 0;
    LoadIf(packed, from, exists);
#pragma unroll
    for (int k = 0; k < kRun; ++k) {
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        sum[k][v] += window[(kRun - turn + k) % kRun][v] * weight.element[v];
      }
    }
  };
  // Full turns of the ring need no tests as long as all that they load exists.
#pragma unroll 1
  for (; taps_left >= kRun && at >= kRun; taps_left -= kRun, at -= kRun) {
#pragma unroll
    for (int turn = 0; turn < kRun; ++turn) step(turn, true);
  }
#pragma unroll 1
  while (taps_left > 0) {
#pragma unroll
    for (int turn = 0; turn < kRun; ++turn) {
      if (taps_left <= 0) break;
      --taps_left;
      --at;
      step(turn, at >= 0);
    }
  }
}

// The phase, taps and first position in dY of one position of an axis.
struct AxisPlace {
  int32_t p, r_first, r_count;
};

__device__ __forceinline__ AxisPlace PlaceOnAxis(const AxisGeometry<int32_t>& a,
                                                 int32_t h) {
  const int32_t i = a.h_step.Quotient(h);
  const PhaseTaps<int32_t> phase = TapsOfPhase(a, h - i * a.h_step.divisor);
  const int32_t p = phase.p0 + i * a.p_per_h;
  const TapRange<int32_t> live = LiveTaps(a, p, p, phase.r_count);
  return {p - live.first * a.p_per_r.divisor, phase.r0 + live.first * a.r_step,
          live.count};
}

// The position in dY that tap r brings to the place, or -1.
__device__ __forceinline__ int32_t Reads(const AxisGeometry<int32_t>& a,
                                         const AxisPlace& at, int32_t r) {
  const int32_t beyond = r - at.r_first;
  if (beyond < 0) return -1;
  const int32_t t = a.r_step == 1 ? beyond : beyond / a.r_step;
  if (t >= at.r_count || t * a.r_step != beyond) return -1;
  return at.p - t * a.p_per_r.divisor;
}

// Where a thread's outputs are: kept in shared memory, as a RingPlace is.
struct WindowPlace {
  int32_t n, channel, h_deep, h, w0, m_first, positions;
};

template <typename T, int kVector, int kRun>
__global__ void __launch_bounds__(kWindowThreads, kWindowMinBlocks)
    DepthwiseWindowKernel(const __grid_constant__ DepthwiseParams params,
                          const T* __restrict__ dy, const T* __restrict__ w, T* dx) {
  using Acc = Accumulator<T>;
  __shared__ WindowPlace places[kWindowThreads];
  CU_DYNAMIC_SHARED(shared);
  Acc* const staged = reinterpret_cast<Acc*>(shared);

  const Geometry<int32_t>& g = params.geometry;
  const DepthwiseAxis& across = params.axis[2];
  const int thread = static_cast<int>(threadIdx.x);
  const int32_t lanes = params.lanes.divisor;
  const int pitch = (lanes | 1) * kVector;  // between taps; odd, for the banks

  int32_t rest = static_cast<int32_t>(blockIdx.x);
  const int32_t first_vector = TakeDigit(params.chunks, &rest) * lanes;
  const int32_t first_item = rest * params.block_items;
  int32_t item = thread;
  const int32_t lane = TakeDigit(params.lanes, &item);
  const int32_t channel = (first_vector + lane) * kVector;
  const bool active = item < params.block_items && first_item + item < params.items &&
                      first_vector + lane < params.channels.divisor;
  item = active ? first_item + item : first_item;

  const int32_t run = TakeDigit(params.runs, &item);
  const int32_t phase = TakeDigit(params.phases, &item);
  const int32_t w0 = TakeDigit(params.residues_w, &item);
  const int32_t h = TakeDigit(params.rows, &item);
  const int32_t h_deep = TakeDigit(params.depth, &item);
  const int32_t n = item;

  const Lattice lattice = MakeLattice(across, w0);
  const int32_t i = FloorDiv(lattice.u0, across.step) + run * kRun;
  places[thread] = {
      n, channel, h_deep, h, w0, across.step * i + phase - lattice.u0, lattice.positions};
  const int32_t tap_count =
      lattice.count == 0 || phase >= params.window_cols.divisor
          ? 0
          : (params.window_cols.divisor - 1 - phase) / across.step + 1;
  const AxisPlace deep = PlaceOnAxis(g.axis[0], h_deep);
  const AxisPlace place = PlaceOnAxis(g.axis[1], h);
  const T* const image = dy + n * g.dy_batch + channel * g.dy_group +
                         static_cast<int64_t>(lattice.p0) * across.dy_stride;
  const int64_t dy_col = params.dy_step[2];

  Acc sum[kRun][kVector] = {};
  // Rows of taps are numbered (depth, row, channel of the multiplier).
  const int32_t cols = params.window_cols.divisor;
  const int32_t tap_rows = params.tap_rows;
#pragma unroll 1
  for (int32_t z0 = 0; z0 < tap_rows; z0 += params.staged_rows) {
    const int32_t z_end =
        z0 + params.staged_rows < tap_rows ? z0 + params.staged_rows : tap_rows;
    __syncthreads();  // nobody reads the rows before
    for (int32_t e = thread % 32; e < (z_end - z0) * cols; e += 32) {
      int32_t z = e;
      const int32_t s = TakeDigit(params.window_cols, &z);
      z += z0;
      const int32_t k = TakeDigit(params.multiplier, &z);
      const int32_t r = TakeDigit(params.window_rows, &z);
      const T* const filter = w + z * g.axis[0].w_stride + r * g.axis[1].w_stride +
                              s * across.w_stride + k * g.w_out_channel;
      for (int c = thread / 32; c < lanes * kVector; c += kWindowThreads / 32) {
        const int32_t group = first_vector * kVector + c;
        staged[e * pitch + c] =
            group < params.groups ? Widen(filter[group * g.w_group]) : Acc{0};
      }
    }
    __syncthreads();
    if (!active) continue;
#pragma unroll 1
    for (int32_t z = z0; z < z_end; ++z) {
      int32_t tap = z;
      const int32_t k = TakeDigit(params.multiplier, &tap);
      const int32_t r = TakeDigit(params.window_rows, &tap);
      const int32_t p_deep = Reads(g.axis[0], deep, tap);
      const int32_t p = Reads(g.axis[1], place, r);
      if (p_deep < 0 || p < 0) continue;
      const T* const row = image + p_deep * g.axis[0].dy_stride +
                           p * g.axis[1].dy_stride + k * g.dy_channel;
      SlideAlong<T, kVector, kRun>(
          row, dy_col, i, lattice.count,
          staged + ((z - z0) * cols + phase) * pitch + lane * kVector,
          across.step * pitch, tap_count, sum);
    }
  }
  if (!active) return;

  const WindowPlace& kept = places[thread];
  const int64_t dx_col = params.dx_step[2];
  T* const to = Further(dx + kept.n * g.dx_batch + kept.channel * g.dx_group +
                            kept.h_deep * g.axis[0].dx_stride +
                            kept.h * g.axis[1].dx_stride + kept.w0 * across.dx_stride,
                        kept.m_first * dx_col);
  Acc special = 0;  // becomes NaN with the first result that is not finite
#pragma unroll
  for (int k = 0; k < kRun; ++k) {
#pragma unroll
    for (int v = 0; v < kVector; ++v) special += sum[k][v] * 0;
    if (Within(kept.m_first + k * across.step, kept.positions)) {
      StoreVector(Further(to, k * across.step * dx_col), Pack<T, kVector>(sum[k]));
    }
  }
  if (special == 0) return;
#pragma unroll 1
  for (int k = 0; k < kRun * kVector; ++k) {
    const int32_t m = kept.m_first + k / kVector * across.step;
    if (!Within(m, kept.positions)) continue;
    const int32_t at[kAxes] = {kept.h_deep, kept.h, kept.w0 + across.dilation * m};
    RepairElement(g, kept.n, kept.channel + k % kVector, at, dy, w, dx);
  }
}

}  // namespace convgrad
