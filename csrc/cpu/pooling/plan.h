// The planner and entry point of the gradient of max pooling on a CPU.

#pragma once

#include <string>

#include "../../kernel.h"
#include "../../problem.h"
#include "job.h"

namespace convgrad {

// The attributes of the custom call, named as lax names them, for each dimension.
struct PoolAttributes {
  Ints window_dimensions, window_strides;
  Ints padding;  // low and high of the first dimension, then of the next
};

// Fills `args`, except its pointers, and returns the empty string, or says what is wrong
// with the request or beyond the kernel. No array is empty.
std::string MakePool(const Ints& x_shape, const Ints& dy_shape,
                     const PoolAttributes& attributes, DType dtype, PoolArgs* args);

// How often a window is looked at on average, since each tile has its own. Where windows
// overlap a lot and channels are many, tiles are small.
double LooksAtWindow(const PoolArgs& args);

// Computes dX of `args`, which MakePool has filled. All of it is written.
void RunCpuMaxPoolGrad(const PoolArgs& args, const ParallelFor& parallel_for);

}  // namespace convgrad
