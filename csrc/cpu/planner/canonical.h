// One form for CPU problems that are the same, whatever their layout and however they
// were written, so that the planner meets fewer kinds.

#pragma once

#include "../../kernel.h"
#include "../job.h"

namespace convgrad {

constexpr int64_t kMaxFewChannels = 16;
constexpr int64_t kMaxRowChannels = 32;  // out channels of a window that lies in rows
constexpr int64_t kLongRow = 16;         // positions that fill vectors

int64_t Taps(const Problem& p);

// Whether all sums are empty, or there is none.
bool IsEmpty(const Problem& p);

// Of an element of a sum.
int64_t AccBytes(const Problem& p);

// An axis along which nothing happens: one position of x meets one of y by one tap.
bool IsTrivial(const Axis& x);

// Makes an axis of one problem, with its strides, that of another.
void CopyAxis(const Problem& from, int from_axis, Problem* to, int to_axis);

void SwapAxes(int a, int b, Problem* p);

// With such axes before all others, which keep their order.
Problem TrivialAxesFirst(const Problem& given);

// Makes channels of the taps along an axis, where a forward convolution of few channels
// is read as an input gradient and pads nothing: what its window reads along the last
// axis is one run of memory. The sums are fewer and longer then, and the axis is
// pointwise. `w_at` moves to where the filter begins then, in elements.
//
// Windows may overlap. Not if dY is packed, which would write each element many times.
void MergeTaps(int x, Problem* p, int64_t* w_at);

// Makes one long axis of those of a pointwise problem, as far as memory has them in a
// row. Returns whether it is all of them.
bool MergePointwiseAxes(Problem* p);

// Along an axis, in the phase that has most.
int64_t PhasePositions(const Axis& x);

// The problem with its trivial axes first, and without idle taps and steps; its filter
// begins w_at elements after the given one's. If it may, the taps of a window as large as
// y become channels. An empty one stays as it is. Kernels are made for long rows along
// the last axis, which a net for signals may write as [N, T, 1, C] or, with a few sensors
// beside each other, as [N, T, 3, C].
Problem Canonical(const Problem& given, bool merges_windows, int64_t* w_at);

// The same sum with the roles of dY and W exchanged: an image of dY is a filter for one
// input channel, and the filter of an input channel is an image.
//   dX[c, n, h] = sum over k, p  W[c, k, r] * dY[k, n, p],   where h is as before
Problem Exchanged(const Problem& given);

// Whether that is worth trying. Kernels keep a filter at hand and walk along rows of dY;
// a window many times as large as the result (template matching, deconvolution, and the
// derivatives of a filter gradient, whose filters are images) is the wrong way round.
bool HasLongWindow(const Problem& p);

// Likewise. A window no smaller than the result is enough where images lie side by side
// in memory, and fill vector lanes that a single channel leaves empty.
bool HasImagesForLanes(const Problem& p);

// The part of dX that some tap reaches: one in 64 under a 1x1 filter of stride 8.
double LivePart(const Problem& p);

}  // namespace convgrad
