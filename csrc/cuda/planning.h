// What the plan functions of several kernels need to know about a problem. Needs no CUDA.

#pragma once

#include <cstdint>

#include "../kernel.h"

namespace convgrad {

constexpr int kWidestCopy = 16;  // bytes

inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t RoundUp(int64_t a, int64_t b) { return CeilDiv(a, b) * b; }

// The bytes, a power of two up to 16, to which all of an operand's rows are aligned. The
// stride of a dimension of size one says nothing.
class Alignment {
 public:
  Alignment(const void* base, int64_t element_bytes)
      : bits_(reinterpret_cast<uintptr_t>(base) | kWidestCopy),
        element_bytes_(static_cast<uintptr_t>(element_bytes)) {}
  void Add(int64_t size, int64_t stride) {
    if (size > 1) bits_ |= static_cast<uintptr_t>(stride) * element_bytes_;
  }
  // Another operand with the same strides.
  void Add(const void* base) { bits_ |= reinterpret_cast<uintptr_t>(base); }
  int Bytes() const { return static_cast<int>(bits_ & (~bits_ + 1)); }

 private:
  uintptr_t bits_, element_bytes_;
};

inline int WidthOfDy(const Problem& problem, const void* dy) {
  Alignment rows(dy, SizeInBytes(problem.dtype));
  rows.Add(problem.batch, problem.dy.batch);
  rows.Add(problem.groups, problem.dy.group);
  for (int i = 0; i < kAxes; ++i) rows.Add(problem.axis[i].out, problem.dy.axis[i]);
  return rows.Bytes();
}

inline int WidthOfW(const Problem& problem, const void* w) {
  Alignment rows(w, SizeInBytes(problem.dtype));
  rows.Add(problem.groups, problem.w.group);
  rows.Add(problem.out_channels, problem.w.out_channel);
  for (int i = 0; i < kAxes; ++i) rows.Add(problem.axis[i].win, problem.w.axis[i]);
  return rows.Bytes();
}

inline int WidthOfDx(const Problem& problem, const void* dx) {
  Alignment rows(dx, SizeInBytes(problem.dtype));
  rows.Add(problem.batch, problem.dx.batch);
  rows.Add(problem.groups, problem.dx.group);
  for (int i = 0; i < kAxes; ++i) rows.Add(problem.axis[i].in, problem.dx.axis[i]);
  return rows.Bytes();
}

// What must be read and written at least.
inline double BytesMoved(const Problem& problem) {
  double dx = static_cast<double>(problem.in_channels);
  double dy = static_cast<double>(problem.out_channels);
  double w = dx * dy * static_cast<double>(problem.groups);
  dx *= static_cast<double>(problem.batch * problem.groups);
  dy *= static_cast<double>(problem.batch * problem.groups);
  for (const Axis& a : problem.axis) {
    dx *= static_cast<double>(a.in);
    dy *= static_cast<double>(a.out);
    w *= static_cast<double>(a.win);
  }
  return (dx + dy + w) * static_cast<double>(SizeInBytes(problem.dtype));
}

}  // namespace convgrad
