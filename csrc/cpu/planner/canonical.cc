#include "canonical.h"

#include <algorithm>

#include "../../phase.h"

namespace convgrad {

int64_t Taps(const Problem& p) { return p.axis[0].win * p.axis[1].win * p.axis[2].win; }

bool IsEmpty(const Problem& p) {
  const auto has_none = [](const Axis& x) {
    return x.in == 0 || x.out == 0 || x.win == 0;
  };
  return p.batch == 0 || p.groups == 0 || p.in_channels == 0 || p.out_channels == 0 ||
         std::any_of(p.axis, p.axis + kAxes, has_none);
}

int64_t AccBytes(const Problem& p) { return p.dtype == DType::kF64 ? 8 : 4; }

bool IsTrivial(const Axis& x) {
  return x.in == 1 && x.out == 1 && x.win == 1 && x.pad_lo == 0;
}

void CopyAxis(const Problem& from, int from_axis, Problem* to, int to_axis) {
  to->axis[to_axis] = from.axis[from_axis];
  to->dx.axis[to_axis] = from.dx.axis[from_axis];
  to->dy.axis[to_axis] = from.dy.axis[from_axis];
  to->w.axis[to_axis] = from.w.axis[from_axis];
}

void SwapAxes(int a, int b, Problem* p) {
  std::swap(p->axis[a], p->axis[b]);
  std::swap(p->dx.axis[a], p->dx.axis[b]);
  std::swap(p->dy.axis[a], p->dy.axis[b]);
  std::swap(p->w.axis[a], p->w.axis[b]);
}

Problem TrivialAxesFirst(const Problem& given) {
  Problem p = given;
  int to = kAxes;
  for (const bool trivial : {false, true}) {
    for (int x = kAxes - 1; x >= 0; --x) {
      if (IsTrivial(given.axis[x]) == trivial) CopyAxis(given, x, &p, --to);
    }
  }
  return p;
}

int64_t PhasePositions(const Axis& x) { return CeilDiv(x.in, PhaseCount(x)); }

namespace {

// The axis that should be the last, whose neighbouring positions of one phase kernels
// compute together. If dX is contiguous along the last one only very few positions there
// outweigh that.
int ChooseRowAxis(const Problem& p) {
  const int64_t enough = p.dx.axis[2] == 1 && p.axis[2].in > 1 ? 4 : 8;
  const int64_t positions = PhasePositions(p.axis[2]);
  int best = 2;
  for (int x = 0; x < 2; ++x) {
    const Axis& axis = p.axis[x];
    const bool for_planes =
        axis.stride % axis.lhs_dilation == 0 && PhaseCount(axis) <= kMaxRowPhases;
    const int64_t most = best == 2 ? 2 * positions : PhasePositions(p.axis[best]);
    if (for_planes && PhasePositions(axis) >= most) best = x;
  }
  return positions < enough ? best : 2;
}

// Leaves out the leading and trailing taps that meet padding alone, as most of a window
// do on an image of one position, and returns how many are left out in front.
int64_t TrimTaps(Axis* x) {
  if (x->win == 0 || x->out == 0) return 0;
  const auto floor_div = [](int64_t a, int64_t b) { return a / b - (a % b < 0 ? 1 : 0); };
  // Of what the first and the last position of y read, in steps of x.
  const int64_t first = -floor_div((x->out - 1) * x->stride - x->pad_lo, x->rhs_dilation);
  const int64_t last =
      floor_div(x->pad_lo + (x->in - 1) * x->lhs_dilation, x->rhs_dilation);
  const int64_t from = std::max<int64_t>(first, 0), to = std::min(last, x->win - 1);
  if (from > to) return 0;
  x->win = to - from + 1;
  x->pad_lo -= from * x->rhs_dilation;
  return from;
}

// Whether one x meets each y along an axis, by a tap of its own, from the last one on.
bool IsWholeWindow(const Axis& x) {
  return x.in == 1 && x.win > 1 && x.out == x.win && x.stride == x.rhs_dilation &&
         x.pad_lo == (x.win - 1) * x.rhs_dilation;
}

// Kernels number the taps of an axis in 32 bits. An axis as it was given has no more.
constexpr int64_t kMostTapsOfAxis = INT32_MAX;

// Makes channels of a window as large as y: a fully connected layer, written as the
// forward pass of a convolution, is a matrix product with one long sum. As far as memory
// has the taps in a row, and channels before or behind them.
void MergeWholeWindow(Problem* p, int64_t* w_at) {
  Axis* const x = p->axis;
  for (int a = kAxes - 1; a > 0; --a) {
    if (!IsWholeWindow(x[a]) || !IsWholeWindow(x[a - 1])) continue;
    const int64_t win = x[a].win;
    if (p->dy.axis[a - 1] != win * p->dy.axis[a]) return;
    if (p->w.axis[a - 1] != win * p->w.axis[a]) return;
    const int64_t all = x[a - 1].win * win;
    if (all > kMostTapsOfAxis) return;
    p->dy.axis[a - 1] = p->dy.axis[a];
    p->w.axis[a - 1] = p->w.axis[a];
    x[a - 1] = Axis{};
    x[a - 1].win = x[a - 1].out = all;
    x[a - 1].pad_lo = all - 1;
    x[a] = Axis{};
  }
  const auto is_whole = [&](int a) { return IsWholeWindow(x[a]); };
  const int at = is_whole(0) ? 0 : is_whole(1) ? 1 : 2;
  if (p->groups > 1 || !is_whole(at)) return;
  const int64_t k = p->out_channels, taps = x[at].win;
  const int64_t dy_step = p->dy.axis[at], w_step = -p->w.axis[at];
  if (k == 1 || (p->dy.channel == taps * dy_step && p->w.out_channel == taps * w_step)) {
    p->dy.channel = dy_step;
    p->w.out_channel = w_step;
  } else if (dy_step != k * p->dy.channel || w_step != k * p->w.out_channel) {
    return;
  }
  *w_at -= (taps - 1) * w_step;
  p->out_channels = k * taps;
  x[at] = Axis{};
}

// Without the stride and dilations that no tap uses.
Axis WithoutIdleSteps(Axis x) {
  if (IsTrivial(x)) return Axis{};
  if (x.win == 1) x.rhs_dilation = 1;
  // All taps meet one y: as if the window moved on by its own width, so that each tap is
  // a phase of its own.
  if (x.out == 1 && x.lhs_dilation == 1) x.stride = (x.win - 1) * x.rhs_dilation + 1;
  return x;
}

// Whether each position of x along an axis meets the one of y with its number.
bool IsPointwise(const Axis& x) {
  return x.win == 1 && x.stride == 1 && x.lhs_dilation == 1 && x.pad_lo == 0 &&
         x.in == x.out;
}

// Whether an axis of `count` positions, with these strides, goes on where the last axis
// ends, in x and in y.
bool FollowsRow(const Problem& p, int64_t dx, int64_t dy, int64_t count) {
  return count > 1 && dx == p.dx.axis[2] * p.axis[2].in &&
         dy == p.dy.axis[2] * p.axis[2].in;
}

void LengthenRow(int64_t times, Problem* p) {
  p->axis[2].in *= times;
  p->axis[2].out *= times;
}

// Images, too. Not where their number would then decide between two kernels
// (FewChannelsBeatGemm): an image's bits do not depend on its batch, unless dY is taken
// for the filter (Exchanged).
void MergePointwiseImages(Problem* p) {
  const bool decides = p->axis[2].in < kLongRow && p->in_channels <= kMaxFewChannels &&
                       p->out_channels <= kMaxRowChannels;
  if (decides || !FollowsRow(*p, p->dx.batch, p->dy.batch, p->batch)) return;
  LengthenRow(p->batch, p);
  p->batch = 1;
}

}  // namespace

bool MergePointwiseAxes(Problem* p) {
  for (const Axis& x : p->axis) {
    if (!IsPointwise(x)) return false;
  }
  for (int x = 1; x >= 0; --x) {
    const int64_t count = p->axis[x].in;
    if (count > 1 && !FollowsRow(*p, p->dx.axis[x], p->dy.axis[x], count)) return false;
    LengthenRow(count, p);
    p->axis[x] = Axis{};
  }
  return true;
}

void MergeTaps(int x, Problem* p, int64_t* w_at) {
  constexpr int64_t kFewOutChannels = 16;
  Axis& axis = p->axis[x];
  const int64_t k = p->out_channels;
  const bool is_run = p->dy.axis[x] == k && (k == 1 || p->dy.channel == 1) &&
                      (k == 1 || p->w.axis[x] == -k * p->w.out_channel);
  const bool packs = p->dtype == DType::kF16 || p->dtype == DType::kBF16;
  if (p->groups > 1 || k > kFewOutChannels || axis.win < 2 || axis.out == 0 || !is_run ||
      axis.stride != 1 || axis.rhs_dilation != 1 || axis.pad_lo != axis.win - 1 ||
      (axis.in - 1) * axis.lhs_dilation + axis.win > axis.out ||
      (packs && axis.win > axis.lhs_dilation)) {
    return;
  }
  *w_at += (axis.win - 1) * p->w.axis[x];  // the run begins with the last tap
  p->out_channels = k * axis.win;
  p->w.out_channel = -p->w.axis[x] / k;
  p->w.axis[x] = 0;
  p->dy.channel = 1;
  p->dy.axis[x] *= axis.lhs_dilation;
  const int64_t positions = axis.in;
  axis = Axis{};
  axis.in = axis.out = positions;
}

Problem Canonical(const Problem& given, bool merges_windows, int64_t* w_at) {
  *w_at = 0;
  if (IsEmpty(given)) return given;  // what follows divides by sizes
  Problem trimmed = given;
  for (int x = 0; x < kAxes; ++x) {
    *w_at += TrimTaps(&trimmed.axis[x]) * given.w.axis[x];
  }
  if (merges_windows) MergeWholeWindow(&trimmed, w_at);
  for (int x = 0; x < kAxes; ++x) MergeTaps(x, &trimmed, w_at);
  Problem p = TrivialAxesFirst(trimmed);
  for (Axis& x : p.axis) x = WithoutIdleSteps(x);
  if (MergePointwiseAxes(&p)) MergePointwiseImages(&p);
  if (const int x = ChooseRowAxis(p); x != 2) SwapAxes(x, 2, &p);
  return p;
}

Problem Exchanged(const Problem& given) {
  Problem p = given;
  std::swap(p.batch, p.in_channels);
  std::swap(p.dx.batch, p.dx.channel);
  p.dy = {given.w.in_channel, given.w.group, given.w.out_channel, {}};
  p.w = {given.dy.group, given.dy.channel, given.dy.batch, {}};
  for (int x = 0; x < kAxes; ++x) {
    std::swap(p.axis[x].out, p.axis[x].win);
    std::swap(p.axis[x].stride, p.axis[x].rhs_dilation);
    p.dy.axis[x] = given.w.axis[x];
    p.w.axis[x] = given.dy.axis[x];
  }
  return p;
}

bool HasLongWindow(const Problem& p) {
  constexpr int64_t kManyTaps = 64, kTimesResult = 4, kFewTerms = 16;
  const int64_t taps = Taps(p);
  const int64_t results = p.axis[0].out * p.axis[1].out * p.axis[2].out;
  if (p.groups > 1 || results == 0 || taps < kManyTaps ||
      taps <= kTimesResult * results) {
    return false;
  }
  // With images for channels, a channels-last dX is stored one element at a time: too
  // slow if each is a sum of few.
  int64_t terms = p.out_channels;
  for (const Axis& x : p.axis) terms *= std::min(x.out, CeilDiv(x.win, x.stride));
  const bool channels_last = p.in_channels > 1 && p.dx.channel == 1;
  return !channels_last || terms >= kFewTerms;
}

bool HasImagesForLanes(const Problem& p) {
  const int64_t results = p.axis[0].out * p.axis[1].out * p.axis[2].out;
  // With one position, images lie side by side in any layout, and are rows of a product.
  const bool has_positions = p.axis[0].in * p.axis[1].in * p.axis[2].in > 1;
  return p.groups == 1 && p.in_channels == 1 && p.dx.batch == 1 && has_positions &&
         results <= Taps(p);
}

double LivePart(const Problem& p) {
  double part = 1;
  for (const Axis& x : p.axis) {
    // Taps differ in their phases until these repeat.
    const int64_t step = PhaseCount(x);
    const int64_t live = std::min(x.win, x.stride / Gcd(x.stride, x.rhs_dilation));
    part *= std::min(1.0, static_cast<double>(live) / static_cast<double>(step));
  }
  return part;
}

}  // namespace convgrad
