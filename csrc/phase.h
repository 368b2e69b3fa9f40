// The phases of a strided input gradient, one axis at a time (docs/mathematics.md).
//
// The taps r that reach input position h are those with
//   r*rhs_dilation = h*lhs_dilation + pad_lo   (mod stride),
// so positions fall into stride/gcd(stride, lhs_dilation) phases, and the taps of
// a phase are one residue class modulo stride/gcd(stride, rhs_dilation), or none.
// Within a phase everything is affine, and no inserted zero is ever multiplied.

#pragma once

#include "kernel.h"

#ifdef __CUDACC__
#define CONVGRAD_HOST_DEVICE __host__ __device__
#else
#define CONVGRAD_HOST_DEVICE
#endif

namespace convgrad {

// Position i of the phase is h = h0 + i*h_step, for 0 <= i < h_count; its tap t
// is r = r0 + t*r_step, for 0 <= t < r_count; together they read
// p = p0 + i*p_per_h - t*p_per_r, where a p outside [0, out) contributes nothing.
// A phase that no tap reaches has r_count = 0: its positions are zero.
struct Phase {
  int64_t h0, h_step, h_count;
  int64_t r0, r_step, r_count;
  int64_t p0, p_per_h, p_per_r;
};

CONVGRAD_HOST_DEVICE constexpr int64_t Gcd(int64_t a, int64_t b) {
  while (b != 0) {
    int64_t t = a % b;
    a = b;
    b = t;
  }
  return a;
}

// The number below m, at least 1, whose product with a is 1 (mod m); a and m have no
// common factor.
CONVGRAD_HOST_DEVICE constexpr int64_t InverseModulo(int64_t a, int64_t m) {
  int64_t rest = a % m, old_rest = m, factor = 1, old_factor = 0;
  while (rest != 0) {
    const int64_t times = old_rest / rest;
    const int64_t next_rest = old_rest - times * rest;
    const int64_t next_factor = old_factor - times * factor;
    old_rest = rest;
    old_factor = factor;
    rest = next_rest;
    factor = next_factor;
  }
  return (old_factor % m + m) % m;
}

CONVGRAD_HOST_DEVICE constexpr int64_t PhaseCount(const Axis& a) {
  return a.stride / Gcd(a.stride, a.lhs_dilation);
}

CONVGRAD_HOST_DEVICE constexpr Phase MakePhase(const Axis& a, int64_t phase) {
  Phase f{};
  f.h0 = phase;
  f.h_step = PhaseCount(a);
  f.h_count = a.in > phase ? (a.in - phase + f.h_step - 1) / f.h_step : 0;
  f.p_per_h = a.lhs_dilation / Gcd(a.stride, a.lhs_dilation);
  const int64_t g = Gcd(a.stride, a.rhs_dilation);
  f.r_step = a.stride / g;
  f.p_per_r = a.rhs_dilation / g;
  const int64_t target = phase * a.lhs_dilation + a.pad_lo;
  if (target % g != 0) return f;
  // The least r with r*p_per_r = target/g (mod r_step).
  const int64_t residue = (target / g % f.r_step + f.r_step) % f.r_step;
  const int64_t r = residue * InverseModulo(f.p_per_r, f.r_step) % f.r_step;
  if (r < a.win) {
    f.r0 = r;
    f.r_count = (a.win - r + f.r_step - 1) / f.r_step;
    f.p0 = (target - r * a.rhs_dilation) / a.stride;
  }
  return f;
}

}  // namespace convgrad
