#include "problem.h"

#include <algorithm>
#include <utility>

namespace convgrad {
namespace {

// Far above any real size, and low enough that no product below can overflow.
constexpr int64_t kMaxExtent = int64_t{1} << 40;

bool IsPermutation(const Ints& v, size_t rank) {
  if (v.size() != rank) return false;
  Ints sorted = v;
  std::sort(sorted.begin(), sorted.end());
  for (size_t i = 0; i < rank; ++i) {
    if (sorted[i] != static_cast<int64_t>(i)) return false;
  }
  return true;
}

// Element strides of a dense array, by logical dimension.
Ints DenseStrides(const Ints& shape, const Ints& major_to_minor) {
  Ints strides(shape.size());
  int64_t step = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    strides[major_to_minor[i]] = step;
    step *= shape[major_to_minor[i]];
  }
  return strides;
}

// The number of positions between the first and the last of `size` elements that
// lie `dilation` apart, both counted.
int64_t DilatedSize(int64_t size, int64_t dilation) {
  return size == 0 ? 0 : (size - 1) * dilation + 1;
}

std::string CheckAttributes(const Attributes& a, size_t rank) {
  const size_t axes = rank - 2;
  struct {
    const char* name;
    const Ints* value;
    size_t size;
    int64_t low;
  } const vectors[] = {{"window_strides", &a.window_strides, axes, 1},
                       {"padding", &a.padding, 2 * axes, -kMaxParameter},
                       {"lhs_dilation", &a.lhs_dilation, axes, 1},
                       {"rhs_dilation", &a.rhs_dilation, axes, 1}};
  for (const auto& v : vectors) {
    if (v.value->size() != v.size || !AllWithin(*v.value, v.low, kMaxParameter)) {
      return std::string(v.name) + " must be " + std::to_string(v.size) +
             " integers no smaller than " + std::to_string(v.low) + ", got " +
             Show(*v.value);
    }
  }
  struct {
    const char* name;
    const Ints* value;
  } const permutations[] = {{"lhs_spec", &a.lhs_spec},     {"rhs_spec", &a.rhs_spec},
                            {"out_spec", &a.out_spec},     {"lhs_layout", &a.lhs_layout},
                            {"rhs_layout", &a.rhs_layout}, {"out_layout", &a.out_layout}};
  for (const auto& p : permutations) {
    if (!IsPermutation(*p.value, rank)) {
      return std::string(p.name) + " must be a permutation of the " +
             std::to_string(rank) + " dimensions, got " + Show(*p.value);
    }
  }
  if (a.feature_group_count < 1 || a.batch_group_count < 1 ||
      a.feature_group_count > kMaxParameter || a.batch_group_count > kMaxParameter ||
      (a.feature_group_count > 1 && a.batch_group_count > 1)) {
    return "feature_group_count and batch_group_count must be from 1 to 2^31 and at most "
           "one of them more than 1, got " +
           std::to_string(a.feature_group_count) + " and " +
           std::to_string(a.batch_group_count);
  }
  return "";
}

}  // namespace

std::string Show(const Ints& v) {
  std::string s = "(";
  for (size_t i = 0; i < v.size(); ++i) s += (i ? ", " : "") + std::to_string(v[i]);
  return s + (v.size() == 1 ? ",)" : ")");
}

bool AllWithin(const Ints& v, int64_t low, int64_t high) {
  return std::all_of(v.begin(), v.end(),
                     [=](int64_t x) { return low <= x && x <= high; });
}

std::string ShowShapes(const Ints& lhs_shape, const Ints& rhs_shape,
                       const Ints& out_shape) {
  return "lhs " + Show(lhs_shape) + ", rhs " + Show(rhs_shape) + ", out " +
         Show(out_shape);
}

const char* NameOf(Map map) {
  constexpr const char* kNames[] = {"forward", "input_grad", "filter_grad"};
  return kNames[static_cast<int>(map)];
}

Problem ForwardAsInputGrad(const Problem& given, int64_t* w_at) {
  Problem p = given;
  std::swap(p.in_channels, p.out_channels);
  std::swap(p.dx, p.dy);
  std::swap(p.w.in_channel, p.w.out_channel);
  *w_at = 0;
  for (int x = 0; x < kAxes; ++x) {
    Axis& axis = p.axis[x];
    std::swap(axis.in, axis.out);
    std::swap(axis.stride, axis.lhs_dilation);
    const int64_t last = std::max<int64_t>(axis.win - 1, 0);
    axis.pad_lo = last * axis.rhs_dilation - axis.pad_lo;
    *w_at += last * p.w.axis[x];
    p.w.axis[x] = -p.w.axis[x];
  }
  return p;
}

std::string AddPadding(const Ints& operand_shape, Ints* padding) {
  if (operand_shape.size() != 1 + padding->size() || padding->size() % 2 != 0 ||
      operand_shape[0] != 0 || !AllWithin(operand_shape, 0, kMaxParameter) ||
      !AllWithin(*padding, -kMaxParameter, kMaxParameter)) {
    return "the padding operand must have shape (0, low, low + high, ...), two sizes for "
           "each spatial axis, got " +
           Show(operand_shape) + " for padding " + Show(*padding);
  }
  for (size_t i = 0; i < padding->size(); i += 2) {
    (*padding)[i] += operand_shape[1 + i];
    (*padding)[i + 1] += operand_shape[2 + i] - operand_shape[1 + i];
  }
  return "";
}

std::string MakeProblem(const Ints& lhs_shape, const Ints& rhs_shape,
                        const Ints& out_shape, const Attributes& a, Problem* problem) {
  const std::string shapes = ShowShapes(lhs_shape, rhs_shape, out_shape);
  const size_t rank = lhs_shape.size();
  if (rhs_shape.size() != rank || out_shape.size() != rank || rank < 2 ||
      rank > 2 + kAxes) {
    return "operands must have one rank from 2 to 5, got " + shapes;
  }
  for (const Ints* shape : {&lhs_shape, &rhs_shape, &out_shape}) {
    // A product of sizes must fit too: it is the number of elements.
    int64_t elements = 1;
    for (int64_t size : *shape) {
      if (size < 0 || size > kMaxExtent ||
          (size > 0 && elements > (int64_t{1} << 62) / size)) {
        return "sizes out of range, got " + shapes;
      }
      elements *= std::max<int64_t>(size, 1);
    }
  }
  if (std::string error = CheckAttributes(a, rank); !error.empty()) {
    return error + " for " + shapes;
  }

  const int64_t lhs_batch = lhs_shape[a.lhs_spec[0]],
                lhs_feature = lhs_shape[a.lhs_spec[1]];
  const int64_t rhs_out = rhs_shape[a.rhs_spec[0]], rhs_in = rhs_shape[a.rhs_spec[1]];
  const int64_t out_batch = out_shape[a.out_spec[0]],
                out_feature = out_shape[a.out_spec[1]];
  const int64_t groups = std::max(a.feature_group_count, a.batch_group_count);
  const bool batch_groups = a.batch_group_count > 1;
  // By division: a product with a count that a caller made up may overflow.
  const auto is_multiple = [](int64_t value, int64_t part, int64_t count) {
    return value % count == 0 && value / count == part;
  };
  if (!is_multiple(lhs_feature, rhs_in, a.feature_group_count)) {
    return "lhs features must be rhs input features times feature_group_count, got " +
           std::to_string(lhs_feature) + " and " + std::to_string(rhs_in) + " * " +
           std::to_string(a.feature_group_count) + " in " + shapes;
  }
  if (out_feature != rhs_out || rhs_out % groups != 0) {
    return "out features must be rhs output features, a multiple of the group count " +
           std::to_string(groups) + ", got " + shapes;
  }
  if (!is_multiple(lhs_batch, out_batch, a.batch_group_count)) {
    return "lhs batch must be out batch times batch_group_count " +
           std::to_string(a.batch_group_count) + ", got " + shapes;
  }

  const Ints lhs_step = DenseStrides(lhs_shape, a.lhs_layout);
  const Ints rhs_step = DenseStrides(rhs_shape, a.rhs_layout);
  const Ints out_step = DenseStrides(out_shape, a.out_layout);
  Problem p{};
  p.batch = out_batch;
  p.groups = groups;
  p.in_channels = rhs_in;
  p.out_channels = rhs_out / groups;
  p.dx.batch = lhs_step[a.lhs_spec[0]];
  p.dx.channel = lhs_step[a.lhs_spec[1]];
  p.dx.group = batch_groups ? out_batch * p.dx.batch : p.in_channels * p.dx.channel;
  p.dy.batch = out_step[a.out_spec[0]];
  p.dy.channel = out_step[a.out_spec[1]];
  p.dy.group = p.out_channels * p.dy.channel;
  p.w.out_channel = rhs_step[a.rhs_spec[0]];
  p.w.in_channel = rhs_step[a.rhs_spec[1]];
  p.w.group = p.out_channels * p.w.out_channel;

  const size_t axes = rank - 2;
  for (size_t i = 0; i < axes; ++i) {
    const size_t to = kAxes - axes + i;
    Axis& axis = p.axis[to];
    axis.in = lhs_shape[a.lhs_spec[2 + i]];
    axis.out = out_shape[a.out_spec[2 + i]];
    axis.win = rhs_shape[a.rhs_spec[2 + i]];
    axis.stride = a.window_strides[i];
    axis.lhs_dilation = a.lhs_dilation[i];
    axis.rhs_dilation = a.rhs_dilation[i];
    axis.pad_lo = a.padding[2 * i];
    p.dx.axis[to] = lhs_step[a.lhs_spec[2 + i]];
    p.dy.axis[to] = out_step[a.out_spec[2 + i]];
    p.w.axis[to] = rhs_step[a.rhs_spec[2 + i]];
    if (axis.in > kMaxParameter || axis.win > kMaxParameter) {
      return "spatial sizes out of range, got " + shapes;
    }
    const int64_t padded =
        DilatedSize(axis.in, axis.lhs_dilation) + a.padding[2 * i] + a.padding[2 * i + 1];
    const int64_t window = DilatedSize(axis.win, axis.rhs_dilation);
    const int64_t expected = padded < window ? 0 : (padded - window) / axis.stride + 1;
    if (axis.out != expected) {
      return "spatial dimension " + std::to_string(i) + " of out must be " +
             std::to_string(expected) + ", got " + shapes;
    }
  }
  *problem = p;
  return "";
}

}  // namespace convgrad
