// The kernels for y and dX: which problems each takes, and what memory it wants. A new
// one is a row of this table, and a rule in choose.cc.
//
//   direct            any problem, by the definition
//   gemm              dense, and groups with enough channels
//   depthwise         few channels a group, channels-last: channels in lanes
//   few_channels      few channels (a group), any layout: pixels in lanes
//   few_channels_dot  few input channels, many out channels: these in lanes
//
// Each is in the file of its name in cpu/.

#pragma once

#include "canonical.h"
#include "isa.h"

namespace convgrad {

enum class Kernel { kDirect, kGemm, kDepthwise, kFewChannels, kFewChannelsDot };

constexpr Kernel kKernels[] = {Kernel::kDirect, Kernel::kGemm, Kernel::kDepthwise,
                               Kernel::kFewChannels, Kernel::kFewChannelsDot};

// What a kernel's workspace holds. Offsets in bytes; sizes are bounds over all
// instruction sets.
struct Workspace {
  int64_t filter, nonfinite, zeros, packed_dy;
  bool pack_dy;
  int64_t bytes;

  // Appends so many bytes, and returns where they begin.
  int64_t Take(int64_t more) {
    const int64_t at = bytes;
    bytes += CeilDiv(more, 64) * 64;
    return at;
  }
};

struct KernelRow {
  // As explain() and the custom call's attribute `kernel` have it. few_channels goes by
  // the name of depthwise where it takes its place.
  const char* name;
  bool (*takes)(const Problem& p);
  void (*lay_out)(const Problem& p, Workspace* out);
  PrepareJob (*prepare)(const Isa& isa, const Problem& p);
};

const KernelRow& RowOf(Kernel kernel);

// The names of all, and null.
const char* const* KernelNames();

// `p` is folded already if it is to be.
Workspace LayOut(const Problem& p, Kernel kernel);

// The tile of few_channels, whose rows are 0 if it does not take the problem.
PlaneTile ChoosePlaneTile(const Problem& p);

// A patch embedding, where every input sees exactly one tap, is a matrix product whose
// columns are the pairs (tap, input channel):
//   dX[p*stride + r, c] = sum over k  dY[p, k] * W[k, (r, c)].
// Its folded problem is a 1x1 convolution of that many channels over the positions p.
bool IsFoldable(const Problem& p);

// As given if it is not foldable, or if the workspace is that of a program that was
// stored before such problems were folded, and too small.
Problem Folded(const Problem& given);

}  // namespace convgrad
