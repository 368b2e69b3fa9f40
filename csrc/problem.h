// From shapes and attributes to a Problem, every disagreement named. Nothing that
// a caller passes is trusted: these checks are what stands between a malformed
// custom call and a wild pointer.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernel.h"

namespace convgrad {

using Ints = std::vector<int64_t>;

// The attributes of the custom call, named as lax names them. `lhs` is x (here dX),
// `rhs` the filter and `out` is y (here dY).
struct Attributes {
  Ints window_strides;
  Ints padding;  // low and high of the first axis, then of the next
  Ints lhs_dilation, rhs_dilation;
  Ints lhs_spec, rhs_spec, out_spec;        // as in lax.ConvDimensionNumbers
  Ints lhs_layout, rhs_layout, out_layout;  // dimensions from major to minor
  int64_t feature_group_count, batch_group_count;
};

// The most that a stride, a padding or a window may be; no product of two overflows.
constexpr int64_t kMaxParameter = int64_t{1} << 31;

std::string Show(const Ints& v);  // as Python does, for a message
bool AllWithin(const Ints& v, int64_t low, int64_t high);

// The three shapes, for a message.
std::string ShowShapes(const Ints& lhs_shape, const Ints& rhs_shape,
                       const Ints& out_shape);

// Adds the padding that reached the handler as the shape of an empty operand, since it
// was no static value when the program was lowered: 0, then for each spatial axis what is
// added to the low side and what is added to both. Returns what is wrong with the shape.
std::string AddPadding(const Ints& operand_shape, Ints* padding);

// Which array of the convolution is the result (docs/mathematics.md).
enum class Map { kForward, kInputGrad, kFilterGrad };

// "forward", "input_grad" or "filter_grad".
const char* NameOf(Map map);

// An array of the convolution: x, the filter or y, or its gradient.
enum Role { kLhs, kRhs, kOut };

// The arrays of a map: its two operands and its result.
struct Roles {
  Role operand[2], result;
};
constexpr Roles RolesOf(Map map) {
  return map == Map::kForward     ? Roles{{kLhs, kRhs}, kOut}
         : map == Map::kInputGrad ? Roles{{kOut, kRhs}, kLhs}
                                  : Roles{{kLhs, kOut}, kRhs};
}

// The forward map as the input gradient that it is: read the other way, with x in the
// place of dY and y in that of dX. Per axis h*lhs_dilation = p*stride - pad_lo +
// r*rhs_dilation becomes, with r' = win - 1 - r,
//
//   p*stride = h*lhs_dilation - ((win - 1)*rhs_dilation - pad_lo) + r'*rhs_dilation,
//
// so that sizes, and stride and lhs_dilation, change places, and the filter is walked
// backwards: by negative strides, from its last tap, `w_at` elements after its first.
Problem ForwardAsInputGrad(const Problem& problem, int64_t* w_at);

// Fills `problem`, the input gradient's (except dtype and allow_tf32), and returns the
// empty string, or says what is wrong with the request.
std::string MakeProblem(const Ints& lhs_shape, const Ints& rhs_shape,
                        const Ints& out_shape, const Attributes& attributes,
                        Problem* problem);

}  // namespace convgrad
