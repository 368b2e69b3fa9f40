// The reference: one output at a time, straight from the definition.
//
//   dX[n,g,c,h] = sum over k and the taps of h's phase of dY[n,g,k,p] * W[g,k,c,r]
//
// Takes every problem: any strides, any type, any geometry, empty operands. Only
// connected indices are multiplied, so Inf and NaN are exact; the other kernels come
// here where they cannot promise that.

#pragma once

#include "epilogue.h"
#include "job.h"
#include "vec.h"

namespace convgrad {
namespace CONVGRAD_ISA {
namespace {

// One output of the group at (n, g, c, h[]).
template <typename T>
inline Acc<T> DirectOne(const CpuArgs& a, int64_t n, int64_t g, int64_t c,
                        const int64_t* h) {
  const Problem& p = a.problem;
  TapRange taps[kAxes];
  const Phase* phase[kAxes];
  int64_t read[kAxes];  // what tap 0 of the phase reads
  for (int x = 0; x < kAxes; ++x) {
    phase[x] = &a.phase[x][h[x] % a.phase_count[x]];
    const int64_t i = h[x] / a.phase_count[x];
    taps[x] = ValidTaps(*phase[x], p.axis[x].out, i);
    read[x] = phase[x]->p0 + i * phase[x]->p_per_h;
  }
  const T* dy = static_cast<const T*>(a.dy) + n * p.dy.batch + g * p.dy.group;
  const T* w = static_cast<const T*>(a.w) + g * p.w.group + c * p.w.in_channel;
  Acc<T> sum = 0;
  for (int64_t t0 = taps[0].lo; t0 < taps[0].hi; ++t0) {
    for (int64_t t1 = taps[1].lo; t1 < taps[1].hi; ++t1) {
      for (int64_t t2 = taps[2].lo; t2 < taps[2].hi; ++t2) {
        const int64_t t[kAxes] = {t0, t1, t2};
        const T* from = dy;
        const T* tap = w;
        for (int x = 0; x < kAxes; ++x) {
          from += (read[x] - t[x] * phase[x]->p_per_r) * p.dy.axis[x];
          tap += (phase[x]->r0 + t[x] * phase[x]->r_step) * p.w.axis[x];
        }
        for (int64_t k = 0; k < p.out_channels; ++k) {
          sum += LoadOne(from + k * p.dy.channel) * LoadOne(tap + k * p.w.out_channel);
        }
      }
    }
  }
  return sum;
}

template <typename T>
CONVGRAD_INLINE T* OutputAt(const CpuArgs& a, int64_t n, int64_t g, int64_t c,
                            const int64_t* h) {
  const ActivationStrides& s = a.problem.dx;
  return static_cast<T*>(a.dx) + n * s.batch + g * s.group + c * s.channel +
         h[0] * s.axis[0] + h[1] * s.axis[1] + h[2] * s.axis[2];
}

struct DirectState {
  CpuArgs args;
};

// A task makes one row (axis 2) of dX for every channel of a group.
template <typename T>
void DirectTask(const void* state, int64_t index) {
  const CpuArgs& a = static_cast<const DirectState*>(state)->args;
  const Problem& p = a.problem;
  int64_t h[kAxes];
  h[1] = index % p.axis[1].in;
  index /= p.axis[1].in;
  h[0] = index % p.axis[0].in;
  index /= p.axis[0].in;
  const int64_t g = index % p.groups;
  const int64_t n = index / p.groups;
  for (h[2] = 0; h[2] < p.axis[2].in; ++h[2]) {
    for (int64_t c = 0; c < p.in_channels; ++c) {
      StoreOne(OutputAt<T>(a, n, g, c, h), DirectOne<T>(a, n, g, c, h));
    }
  }
  h[2] = 0;
  ApplyEpilogueToBox<T>(a, OutputAt<T>(a, n, g, 0, h) - static_cast<T*>(a.dx),
                        p.axis[2].in, p.dx.axis[2], p.in_channels, p.dx.channel);
}

template <typename T>
void PrepareDirect(const CpuArgs& a, CpuJob* job) {
  const Problem& p = a.problem;
  SetState(job, DirectState{a});
  job->stages = 1;
  job->stage[0] = {p.batch * p.groups * p.axis[0].in * p.axis[1].in, DirectTask<T>};
}

}  // namespace
}  // namespace CONVGRAD_ISA
}  // namespace convgrad
