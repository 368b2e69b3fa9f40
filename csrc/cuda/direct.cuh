// "direct": one thread an element of dX, any Problem. The kernel that the others are
// measured against.
//
//   dX[n,g,c,h] = sum over k, t  dY[n,g,k, p - t*p_per_r] * W[g,k,c, r0 + t*r_step]
//
// on every axis, where (p, r0) belong to the phase of h (phase.h) and t runs over just
// those taps that fall into dY: nothing is multiplied by an inserted zero or by padding.
//
// Threads are numbered along the dimensions of dX in the order of their strides, so that
// a warp writes consecutive elements whatever the layout is. In a channels-last layout
// the threads of a warp then differ in c: dY is one broadcast load for all of them, and
// the loads of W coalesce if its input channels are contiguous.
//
// Each product costs two loads, hence at best about an eighth of the arithmetic rate.

#pragma once

#include <algorithm>

#include "epilogue.cuh"
#include "geometry.cuh"

namespace convgrad {

constexpr int kDirectThreads = 256;
// Blocks that a multiprocessor should hold: up to 64 registers a thread, or 255. Left to
// itself, ptxas aims for fewer and spills.
template <typename Index>
constexpr int kDirectMinBlocks = sizeof(Index) == 4 ? 4 : 1;
// More blocks than any GPU holds at once; beyond that, threads take several elements.
constexpr int64_t kDirectMaxBlocks = 1 << 20;

// A dimension of dX, and how far one step along it goes in each array. A step along a
// spatial axis goes nowhere in dY and W: what it does there depends on its phase.
template <typename Index>
struct OutputDimension {
  Divider<Index> size;
  Index dx, dy, w;  // strides
  int axis;         // of the spatial axes, or -1
};
constexpr int kOutputDimensions = 3 + kAxes;

template <typename Index>
struct DirectParams {
  Geometry<Index> geometry;
  Index outputs;
  OutputDimension<Index> dimension[kOutputDimensions];  // the fastest one first
  Epilogue epilogue;
};

// The sum behind the element of dX at position h of an image and channel, by the
// definition: only connected indices are multiplied, so that Inf and NaN are exact. dy_at
// and w_at are the offsets of the image and group in dY, of the group and input channel
// in W. Faster kernels come here for the elements that they cannot answer for.
template <typename T, typename Index>
__device__ __forceinline__ Accumulator<T> DirectSum(const Geometry<Index>& g,
                                                    const Index (&h)[kAxes], Index dy_at,
                                                    Index w_at, const T* __restrict__ dy,
                                                    const T* __restrict__ w) {
  Index taps[kAxes], dy_per_tap[kAxes], w_per_tap[kAxes];
#pragma unroll
  for (int a = 0; a < kAxes; ++a) {
    const AxisGeometry<Index>& axis = g.axis[a];
    const Index i = axis.h_step.Quotient(h[a]);
    const PhaseTaps<Index> phase =
        TapsOfPhase(axis, static_cast<Index>(h[a] - i * axis.h_step.divisor));
    const Index p = phase.p0 + i * axis.p_per_h;
    const TapRange<Index> live = LiveTaps(axis, p, p, phase.r_count);
    taps[a] = live.count;
    dy_at += (p - live.first * axis.p_per_r.divisor) * axis.dy_stride;
    w_at += (phase.r0 + live.first * axis.r_step) * axis.w_stride;
    dy_per_tap[a] = -axis.p_per_r.divisor * axis.dy_stride;
    w_per_tap[a] = axis.r_step * axis.w_stride;
  }

  Accumulator<T> sum = 0;
  for (Index t0 = 0; t0 < taps[0]; ++t0) {
    for (Index t1 = 0; t1 < taps[1]; ++t1) {
      for (Index t2 = 0; t2 < taps[2]; ++t2) {
        const Index dy_tap =
            dy_at + t0 * dy_per_tap[0] + t1 * dy_per_tap[1] + t2 * dy_per_tap[2];
        const Index w_tap =
            w_at + t0 * w_per_tap[0] + t1 * w_per_tap[1] + t2 * w_per_tap[2];
#pragma unroll 4
        for (Index k = 0; k < g.out_channels; ++k) {
          sum += Widen(dy[dy_tap + k * g.dy_channel]) *
                 Widen(w[w_tap + k * g.w_out_channel]);
        }
      }
    }
  }
  return sum;
}

template <typename T, typename Index>
__global__ void __launch_bounds__(kDirectThreads, kDirectMinBlocks<Index>)
    DirectKernel(const __grid_constant__ DirectParams<Index> params,
                 const T* __restrict__ dy, const T* __restrict__ w, T* __restrict__ dx) {
  const Geometry<Index>& g = params.geometry;
  // Unsigned: the last step goes beyond `outputs`, and may go beyond 2^31.
  using Count = std::make_unsigned_t<Index>;
  const Count step = static_cast<Count>(gridDim.x) * kDirectThreads;
  for (Count id = static_cast<Count>(blockIdx.x) * kDirectThreads + threadIdx.x;
       id < static_cast<Count>(params.outputs); id += step) {
    Index rest = static_cast<Index>(id);
    Index h[kAxes] = {};
    Index dx_at = 0, dy_at = 0, w_at = 0;
#pragma unroll
    for (int d = 0; d < kOutputDimensions; ++d) {
      const OutputDimension<Index>& dimension = params.dimension[d];
      const Index i = TakeDigit(dimension.size, &rest);
      dx_at += i * dimension.dx;
      dy_at += i * dimension.dy;
      w_at += i * dimension.w;
      // An indexed h[dimension.axis] would put h in local memory.
#pragma unroll
      for (int a = 0; a < kAxes; ++a) h[a] = dimension.axis == a ? i : h[a];
    }

    const Accumulator<T> sum = DirectSum(g, h, dy_at, w_at, dy, w);
    dx[dx_at] = ApplyEpilogue(params.epilogue, Narrow(sum, T{}), dx_at);
  }
}

template <typename Index>
DirectParams<Index> MakeDirectParams(const Problem& problem) {
  struct Dimension {
    int64_t size, dx, dy, w;
    int axis;
  };
  Dimension dimensions[kOutputDimensions] = {
      {problem.batch, problem.dx.batch, problem.dy.batch, 0, -1},
      {problem.groups, problem.dx.group, problem.dy.group, problem.w.group, -1},
      {problem.in_channels, problem.dx.channel, 0, problem.w.in_channel, -1},
  };
  for (int i = 0; i < kAxes; ++i) {
    dimensions[3 + i] = {problem.axis[i].in, problem.dx.axis[i], 0, 0, i};
  }
  // The stride of a dimension of size one says nothing about the layout.
  std::stable_sort(std::begin(dimensions), std::end(dimensions),
                   [](const Dimension& a, const Dimension& b) {
                     if ((a.size == 1) != (b.size == 1)) return b.size == 1;
                     return std::llabs(a.dx) < std::llabs(b.dx);
                   });
  DirectParams<Index> params{};
  params.geometry = MakeGeometry<Index>(problem);
  params.outputs = 1;
  for (int d = 0; d < kOutputDimensions; ++d) {
    const Dimension& from = dimensions[d];
    params.outputs *= static_cast<Index>(from.size);
    params.dimension[d] = {Divider<Index>::Make(from.size), static_cast<Index>(from.dx),
                           static_cast<Index>(from.dy), static_cast<Index>(from.w),
                           from.axis};
  }
  return params;
}

inline int64_t DirectBlocks(const Problem& problem) {
  int64_t outputs = problem.batch * problem.groups * problem.in_channels;
  for (const Axis& a : problem.axis) outputs *= a.in;
  return std::min((outputs + kDirectThreads - 1) / kDirectThreads, kDirectMaxBlocks);
}

template <typename T, typename Index>
cudaError_t EnqueueDirect(cudaStream_t stream, const Problem& problem, const T* dy,
                          const T* w, T* dx, const Epilogue& epilogue) {
  static_assert(sizeof(DirectParams<Index>) + 3 * sizeof(void*) <= kMaxParameterBytes,
                "the kernel's parameters must fit in constant memory's 4 KiB");
  DirectParams<Index> params = MakeDirectParams<Index>(problem);
  params.epilogue = epilogue;
  const dim3 grid(static_cast<unsigned>(DirectBlocks(problem)));
  return CU_LAUNCH((DirectKernel<T, Index>), grid, dim3(kDirectThreads), 0, stream,
                   params, dy, w, dx);
}

}  // namespace convgrad
