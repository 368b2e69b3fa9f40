// A Problem in the form that the kernels index with: passed to them by value, in
// 32-bit arithmetic where every offset fits (`Index`), else in 64-bit arithmetic.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <type_traits>

#include "../kernel.h"
#include "../phase.h"
#include "platform.cuh"

namespace convgrad {

// Phases of an axis that the host computes. With more of them, the 64-bit kernels run,
// which work out the phases beyond the table themselves.
constexpr int kTabledPhases = 32;

// CUDA before 12.1, and every architecture before sm_70, takes no more.
constexpr int kMaxParameterBytes = 4096;

// Division by a number that the host knows. A GPU has no integer division; the 64-bit
// one is emulated, the 32-bit one is the multiplication below.
template <typename Index>
struct Divider {
  Index divisor;

  static Divider Make(int64_t divisor) { return {static_cast<Index>(divisor)}; }
  __device__ __forceinline__ Index Quotient(Index n) const { return n / divisor; }
};

// With s = 31 + ceil(log2(d)) and m = ceil(2^s / d), floor(n*m / 2^s) is floor(n/d)
// for 0 <= n < 2^31: m*d exceeds 2^s by e < d <= 2^(s-31), so that the error of n*m/2^s,
// n*e / (d*2^s), is under 1/d.
template <>
struct Divider<int32_t> {
  int32_t divisor;
  uint32_t multiplier;
  uint32_t shift;

  static Divider Make(int64_t divisor) {
    uint32_t shift = 31;
    while ((int64_t{1} << (shift - 31)) < divisor) ++shift;
    const uint64_t power = uint64_t{1} << shift;
    const uint64_t d = static_cast<uint64_t>(divisor);
    return {static_cast<int32_t>(divisor), static_cast<uint32_t>((power + d - 1) / d),
            shift};
  }
  __device__ __forceinline__ int32_t Quotient(int32_t n) const {
    return static_cast<int32_t>(
        (static_cast<uint64_t>(static_cast<uint32_t>(n)) * multiplier) >> shift);
  }
};

// Takes a number apart: the remainder, and the quotient in its place.
template <typename Index>
__device__ __forceinline__ Index TakeDigit(const Divider<Index>& size, Index* rest) {
  const Index quotient = size.Quotient(*rest);
  const Index digit = *rest - quotient * size.divisor;
  *rest = quotient;
  return digit;
}

// What tells the phases of one axis apart; the names are those of Phase.
template <typename Index>
struct PhaseTaps {
  Index r0, r_count, p0;
};

template <typename Index>
struct AxisGeometry {
  Index in, out;
  Index p_per_h, r_step;
  Divider<Index> h_step, p_per_r;
  Index dx_stride, dy_stride, w_stride;
  // The positions of a phase: [1] of the first `longer` phases, [0] of the others.
  Divider<Index> positions[2];
  Index longer;
  PhaseTaps<Index> tabled[kTabledPhases];
  struct None {};
  // For the phases beyond the table, which 32-bit kernels do not have.
  std::conditional_t<sizeof(Index) == 8, Axis, None> axis;
};

template <typename Index>
__device__ __forceinline__ const Divider<Index>& PositionsOf(const AxisGeometry<Index>& a,
                                                             Index phase) {
  return a.positions[phase < a.longer ? 1 : 0];
}

template <typename Index>
struct Geometry {
  Index batch, in_channels, out_channels;
  Index dx_batch, dx_group, dx_channel;  // strides
  Index dy_batch, dy_group, dy_channel;
  Index w_group, w_out_channel, w_in_channel;
  AxisGeometry<Index> axis[kAxes];
};

template <typename Index>
__device__ __forceinline__ PhaseTaps<Index> TapsOfPhase(const AxisGeometry<Index>& a,
                                                        Index phase) {
  if constexpr (sizeof(Index) == 8) {
    if (phase >= kTabledPhases) {
      const Phase f = MakePhase(a.axis, phase);
      return {static_cast<Index>(f.r0), static_cast<Index>(f.r_count),
              static_cast<Index>(f.p0)};
    }
  }
  return a.tabled[phase];
}

template <typename Index>
struct TapRange {
  Index first, count;
};

// The taps t of a phase for which p - t*p_per_r may lie in [0, out) for some p of
// [p_low, p_high]: all others see padding only.
template <typename Index>
__device__ __forceinline__ TapRange<Index> LiveTaps(const AxisGeometry<Index>& a,
                                                    Index p_low, Index p_high,
                                                    Index r_count) {
  if (p_high < 0) return {0, 0};
  const Index first = p_low < a.out ? 0 : a.p_per_r.Quotient(p_low - a.out) + 1;
  const Index reached = a.p_per_r.Quotient(p_high);
  const Index last = reached < r_count ? reached : r_count - 1;
  return {first, last < first ? 0 : last - first + 1};
}

template <typename Index>
Geometry<Index> MakeGeometry(const Problem& problem) {
  const auto index = [](int64_t v) { return static_cast<Index>(v); };
  Geometry<Index> g{};
  g.batch = index(problem.batch);
  g.in_channels = index(problem.in_channels);
  g.out_channels = index(problem.out_channels);
  g.dx_batch = index(problem.dx.batch);
  g.dx_group = index(problem.dx.group);
  g.dx_channel = index(problem.dx.channel);
  g.dy_batch = index(problem.dy.batch);
  g.dy_group = index(problem.dy.group);
  g.dy_channel = index(problem.dy.channel);
  g.w_group = index(problem.w.group);
  g.w_out_channel = index(problem.w.out_channel);
  g.w_in_channel = index(problem.w.in_channel);
  for (int i = 0; i < kAxes; ++i) {
    const Axis& from = problem.axis[i];
    AxisGeometry<Index>& to = g.axis[i];
    const Phase first = MakePhase(from, 0);
    to.in = index(from.in);
    to.out = index(from.out);
    to.p_per_h = index(first.p_per_h);
    to.r_step = index(first.r_step);
    to.h_step = Divider<Index>::Make(first.h_step);
    to.p_per_r = Divider<Index>::Make(first.p_per_r);
    const int64_t least = from.in / first.h_step;
    to.positions[0] = Divider<Index>::Make(least > 0 ? least : 1);  // or no such phase
    to.positions[1] = Divider<Index>::Make(least + 1);
    to.longer = index(from.in % first.h_step);
    to.dx_stride = index(problem.dx.axis[i]);
    to.dy_stride = index(problem.dy.axis[i]);
    to.w_stride = index(problem.w.axis[i]);
    for (int phase = 0; phase < kTabledPhases && phase < first.h_step; ++phase) {
      const Phase f = MakePhase(from, phase);
      to.tabled[phase] = {index(f.r0), index(f.r_count), index(f.p0)};
    }
    if constexpr (sizeof(Index) == 8) to.axis = from;
  }
  return g;
}

// Whether the 32-bit kernels take a problem: every offset and count that they form,
// intermediate sums included, must fit, and every phase must be in the table; `slack` is
// how far a kernel may count beyond a channel dimension. In double, which cannot overflow
// and is exact enough for a limit.
inline bool FitsIn32Bits(const Problem& problem, int slack) {
  constexpr double kLimit = 2147483648.0 - (1 << 20);
  const auto extent = [](double count, int64_t stride) {
    return count * static_cast<double>(std::llabs(stride));
  };
  const double batch = static_cast<double>(problem.batch);
  const double groups = static_cast<double>(problem.groups);
  const double in_channels = static_cast<double>(problem.in_channels) + slack;
  const double out_channels = static_cast<double>(problem.out_channels) + slack;
  double outputs = batch * groups * in_channels;
  double terms = out_channels;
  double dx = extent(batch, problem.dx.batch) + extent(groups, problem.dx.group) +
              extent(in_channels, problem.dx.channel);
  double dy = extent(batch, problem.dy.batch) + extent(groups, problem.dy.group) +
              extent(out_channels, problem.dy.channel);
  double w = extent(groups, problem.w.group) +
             extent(out_channels, problem.w.out_channel) +
             extent(in_channels, problem.w.in_channel);
  for (int i = 0; i < kAxes; ++i) {
    const Axis& a = problem.axis[i];
    // |h*lhs_dilation + pad_lo| + |r*rhs_dilation|, from which every p is formed.
    const double span = static_cast<double>(a.in) * static_cast<double>(a.lhs_dilation) +
                        static_cast<double>(std::llabs(a.pad_lo)) +
                        static_cast<double>(a.win) * static_cast<double>(a.rhs_dilation) +
                        static_cast<double>(a.stride);
    if (span + static_cast<double>(a.out) >= kLimit) return false;
    if (PhaseCount(a) > kTabledPhases) return false;
    outputs *= static_cast<double>(a.in);
    terms *= static_cast<double>(a.win);
    dx += extent(static_cast<double>(a.in), problem.dx.axis[i]);
    dy += extent(span / static_cast<double>(a.stride) + 1, problem.dy.axis[i]);
    w += extent(static_cast<double>(a.win), problem.w.axis[i]);
  }
  return outputs < kLimit && terms < kLimit && dx < kLimit && dy < kLimit && w < kLimit;
}

// How many images at a time the 32-bit kernels take, 0 if not even one.
inline int64_t ImagesIn32Bits(Problem problem, int slack) {
  int64_t low = 0, high = problem.batch;
  while (low < high) {
    problem.batch = low + (high - low + 1) / 2;
    if (FitsIn32Bits(problem, slack)) {
      low = problem.batch;
    } else {
      high = problem.batch - 1;
    }
  }
  return low;
}

// Launches a kernel without a 64-bit version for one part of the batch after the other:
// launch(part, dy, dx, epilogue). Returns cudaErrorInvalidValue if an image is too large
// by itself.
template <typename T, typename Launch>
cudaError_t LaunchInParts(const Problem& problem, int slack, const void* dy, void* dx,
                          const Epilogue& epilogue, Launch launch) {
  const int64_t images = ImagesIn32Bits(problem, slack);
  if (images == 0) return cudaErrorInvalidValue;
  Problem part = problem;
  cudaError_t status = cudaSuccess;
  for (int64_t n = 0; n < problem.batch && status == cudaSuccess; n += images) {
    part.batch = images < problem.batch - n ? images : problem.batch - n;
    const auto further = [&](const void* of_dx) {
      return of_dx == nullptr ? nullptr
                              : static_cast<const T*>(of_dx) + n * problem.dx.batch;
    };
    status = launch(part, static_cast<const T*>(dy) + n * problem.dy.batch,
                    static_cast<T*>(dx) + n * problem.dx.batch,
                    Epilogue{further(epilogue.residual), further(epilogue.relu)});
  }
  return status;
}

}  // namespace convgrad
