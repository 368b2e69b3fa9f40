// The epilogue (kernel.h), by the task that has just stored a part of dX, while that is
// still in its caches: what is read and written in memory is what the sums themselves
// would need, and the two arrays, once.

#pragma once

#include "job.h"
#include "vec.h"

namespace convgrad {
namespace CONVGRAD_ISA {
namespace {

template <typename T, int N>
CONVGRAD_INLINE void ApplyEpilogueToVector(const T* residual, const T* relu, T* dx) {
  using A = Acc<T>;
  using I = Vec<typename IntOf<A>::type, N>;
  if (residual != nullptr) Store<N>(dx, Load<N>(dx) + Load<N>(residual));
  if (relu != nullptr) {
    const I passes = Load<N>(relu) > Vec<A, N>{};
    Store<N>(dx, (Vec<A, N>)(passes & (I)Load<N>(dx)));
  }
}

// `count` neighbours from element `at` of dX on.
template <typename T>
CONVGRAD_NOINLINE void ApplyEpilogueToRun(const CpuArgs& a, int64_t at, int64_t count) {
  constexpr int N = kLanes<Acc<T>>;
  const T* residual = static_cast<const T*>(a.epilogue.residual);
  const T* relu = static_cast<const T*>(a.epilogue.relu);
  T* const dx = static_cast<T*>(a.dx);
  const auto of = [](const T* array, int64_t i) {
    return array == nullptr ? nullptr : array + i;
  };
  const int64_t end = at + count;
  for (; at + N <= end; at += N) {
    ApplyEpilogueToVector<T, N>(of(residual, at), of(relu, at), dx + at);
  }
  for (; at < end; ++at)
    ApplyEpilogueToVector<T, 1>(of(residual, at), of(relu, at), dx + at);
}

CONVGRAD_INLINE bool HasEpilogue(const CpuArgs& a) {
  return a.epilogue.residual != nullptr || a.epilogue.relu != nullptr;
}

// The elements at + i*step0 + j*step1.
template <typename T>
void ApplyEpilogueToBox(const CpuArgs& a, int64_t at, int64_t count0, int64_t step0,
                        int64_t count1, int64_t step1) {
  if (!HasEpilogue(a)) return;
  if (step1 != 1 && count1 != 1) {  // the neighbours innermost, if there are any
    const int64_t count = count0, step = step0;
    count0 = count1;
    step0 = step1;
    count1 = count;
    step1 = step;
  }
  const bool neighbours = step1 == 1 || count1 == 1;
  for (int64_t i = 0; i < count0; ++i, at += step0) {
    if (neighbours) {
      ApplyEpilogueToRun<T>(a, at, count1);
    } else {
      for (int64_t j = 0; j < count1; ++j) ApplyEpilogueToRun<T>(a, at + j * step1, 1);
    }
  }
}

}  // namespace
}  // namespace CONVGRAD_ISA
}  // namespace convgrad
