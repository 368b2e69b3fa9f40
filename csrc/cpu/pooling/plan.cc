// From shapes and attributes to the tiles of max_grad.h. Compiled for the baseline
// processor.

#include "plan.h"

#include <algorithm>
#include <vector>

#include "../planner/isa.h"

namespace convgrad {
namespace {

// Winners have the number of their tap; -1 is none. A 32-bit lane holds both.
constexpr int64_t kMostTaps = (int64_t{1} << 31) - 1;
// Windows over one position, all of whose winners are on the stack. With more, lax takes
// about as long.
constexpr int64_t kMostCover = 100;

// What tiles are cut to: larger ones share less of the windows at their edges, smaller
// ones stay in a processor's caches.
constexpr int64_t kTileBytes = 160 * 1024;
constexpr int64_t kTileChannels = 64, kLeastChannels = 16;
constexpr int64_t kRowElements = 2048;  // of a row of windows
// Of the packed rows of x. A tile that is cut to equal parts in the end may pack several
// where the larger one packed one, and then takes so much more.
constexpr int64_t kPackedXBytes = 32 * 1024;
static_assert(kTileBytes + kPackedXBytes <= kPoolStackBytes,
              "a task's stack is too small");

std::string CheckAttributes(const Ints& x_shape, const Ints& dy_shape,
                            const PoolAttributes& a) {
  const size_t rank = x_shape.size();
  struct {
    const char* name;
    const Ints* value;
    size_t size;
    int64_t low;
  } const vectors[] = {{"window_dimensions", &a.window_dimensions, rank, 1},
                       {"window_strides", &a.window_strides, rank, 1},
                       {"padding", &a.padding, 2 * rank, 0}};
  for (const auto& v : vectors) {
    if (v.value->size() != v.size || !AllWithin(*v.value, v.low, kMaxParameter)) {
      return std::string(v.name) + " must be " + std::to_string(v.size) +
             " integers no smaller than " + std::to_string(v.low) + ", got " +
             Show(*v.value);
    }
  }
  Ints expected(rank);
  for (size_t i = 0; i < rank; ++i) {
    const int64_t room =
        x_shape[i] + a.padding[2 * i] + a.padding[2 * i + 1] - a.window_dimensions[i];
    expected[i] = room < 0 ? 0 : room / a.window_strides[i] + 1;
  }
  if (dy_shape != expected) {
    return "dy must have shape " + Show(expected) + ", got " + Show(dy_shape);
  }
  if (std::count(x_shape.begin(), x_shape.end(), 0) > 0 ||
      std::count(expected.begin(), expected.end(), 0) > 0) {
    return "x and dy must have elements";
  }
  return "";
}

PoolAxis MakeAxis(int64_t in, int64_t out, int64_t window, int64_t stride,
                  int64_t pad_lo) {
  PoolAxis x{};
  x.in = in;
  x.out = out;
  x.window = window;
  x.stride = stride;
  x.pad_lo = pad_lo;
  x.cover = CeilDiv(window, stride);
  x.first_group = pad_lo / stride;
  x.groups = (pad_lo + in - 1) / stride - x.first_group + 1;
  return x;
}

// Merges dimensions without windows: [outer, axes.., inner]. An axis may have no windows
// either. Returns how many axes there are.
size_t Canonicalise(const Ints& x_shape, const Ints& dy_shape, const PoolAttributes& a,
                    PoolArgs* args) {
  std::vector<PoolAxis> axes;
  args->outer = args->inner = 1;
  for (size_t i = 0; i < x_shape.size(); ++i) {
    const bool moves = a.window_dimensions[i] > 1 || a.padding[2 * i] > 0 ||
                       a.padding[2 * i + 1] > 0 ||
                       (a.window_strides[i] > 1 && x_shape[i] > 1);
    if (moves) {
      if (args->inner > 1) axes.push_back(MakeAxis(args->inner, args->inner, 1, 1, 0));
      args->inner = 1;
      axes.push_back(MakeAxis(x_shape[i], dy_shape[i], a.window_dimensions[i],
                              a.window_strides[i], a.padding[2 * i]));
    } else {
      (axes.empty() ? args->outer : args->inner) *= x_shape[i];
    }
  }
  if (axes.empty()) {  // lanes rather than tasks
    axes.push_back(MakeAxis(args->outer, args->outer, 1, 1, 0));
    args->outer = 1;
  }
  axes.insert(axes.begin(), std::max<size_t>(kPoolAxes, axes.size()) - axes.size(),
              MakeAxis(1, 1, 1, 1, 0));
  std::copy(axes.end() - kPoolAxes, axes.end(), args->axis);
  return axes.size();
}

int64_t AccBytes(const PoolArgs& a) { return a.dtype == DType::kF64 ? 8 : 4; }

// The most windows that cover the groups of a tile.
int64_t Windows(const PoolAxis& x) {
  return std::min(x.tile_groups + x.cover - 1, x.out);
}

// The elements of a task's stack, for its tile.
int64_t Measure(PoolArgs* a) {
  const int64_t block = kPoolBlockBytes / AccBytes(*a);
  const auto whole = [block](int64_t n) { return CeilDiv(n, block) * block; };
  const int64_t most_of_x = kPackedXBytes / AccBytes(*a);
  const PoolAxis& x = a->axis[2];
  a->row = whole(Windows(x) * a->channels) + 2 * block;
  a->dx_row = whole(x.tile_groups * a->channels);
  a->rows = Windows(a->axis[0]) * Windows(a->axis[1]);
  const int64_t row_of_x = whole(std::min(x.window, x.stride) *
                                 (Windows(x) + (x.window - 1) / x.stride) * a->channels);
  a->x_slots = std::min(a->axis[0].window, kPoolSlots + 1) * a->axis[1].window;
  a->x_row = row_of_x;
  if (a->x_slots > kPoolSlots || x.window > kPoolTaps ||
      a->x_slots * row_of_x > most_of_x) {
    a->x_slots = 1;
    a->x_row =
        std::max(whole((Windows(x) + 1) * a->channels), std::min(row_of_x, most_of_x));
  }
  return a->row + a->x_slots * a->x_row + 2 * block + a->dx_row * PhasesAtOnce(*a) +
         2 * a->rows * a->row;
}

void CutIntoTiles(PoolArgs* a) {
  // The channels of the last tile are fewer, but not much.
  const int64_t cuts = CeilDiv(a->inner, kTileChannels);
  const PoolAxis* axis = a->axis;
  const auto cover = [](const PoolAxis& x) { return std::min(x.cover, x.out); };
  const int64_t share =
      kTileBytes / 16 / cover(axis[0]) / cover(axis[1]) / cover(axis[2]);
  a->channels = std::min(
      {CeilDiv(CeilDiv(a->inner, cuts), kLeastChannels) * kLeastChannels, a->inner,
       std::max(kLeastChannels, share / kLeastChannels * kLeastChannels)});
  for (PoolAxis& x : a->axis) x.tile_groups = 1;
  // Twice as long along one axis as long as that fits: along the one where the windows at
  // the edges are the largest part, the last one of several.
  for (;;) {
    PoolAxis* longest = nullptr;
    double most = 0;
    for (int i = kPoolAxes - 1; i >= 0; --i) {
      PoolAxis& x = a->axis[i];
      const int64_t before = x.tile_groups;
      if (before == x.groups) continue;
      x.tile_groups = std::min(2 * before, x.groups);
      const bool fits = Measure(a) * AccBytes(*a) <= kTileBytes &&
                        (i < 2 || Windows(x) * a->channels <= kRowElements);
      x.tile_groups = before;
      const double part = static_cast<double>(x.cover - 1) / static_cast<double>(before);
      if (fits && (longest == nullptr || part > most)) {
        longest = &x;
        most = part;
      }
    }
    if (longest == nullptr) break;
    longest->tile_groups = std::min(2 * longest->tile_groups, longest->groups);
  }
  for (PoolAxis& x : a->axis) {
    x.tiles = CeilDiv(x.groups, x.tile_groups);
    x.tile_groups = CeilDiv(x.groups, x.tiles);  // about the same for each
  }
  a->channel_tiles = CeilDiv(a->inner, a->channels);
}

// Whether one thread is done before another one would have woken up.
bool IsTooSmallToShare(const PoolArgs& a) {
  constexpr double kLeastShared = 2e5;  // taps that are looked at, and elements of dX
  double in = 1, taps = 1;
  for (const PoolAxis& x : a.axis) {
    in *= static_cast<double>(x.in);
    taps *= static_cast<double>(x.out) * static_cast<double>(x.window);
  }
  return (in + taps) * static_cast<double>(a.outer) * static_cast<double>(a.inner) <
         kLeastShared;
}

}  // namespace

std::string MakePool(const Ints& x_shape, const Ints& dy_shape, const PoolAttributes& a,
                     DType dtype, PoolArgs* args) {
  if (std::string error = CheckAttributes(x_shape, dy_shape, a); !error.empty()) {
    return error;
  }
  args->dtype = dtype;
  if (Canonicalise(x_shape, dy_shape, a, args) > kPoolAxes) {
    return "window_dimensions must be of at most 3 axes, those between them included, "
           "got " +
           Show(a.window_dimensions);
  }
  int64_t taps = 1, cover = 1;
  for (const PoolAxis& x : args->axis) {
    taps = std::min(taps, kMostTaps + 1) * x.window;
    cover = std::min(cover, kMostCover + 1) * std::min(x.cover, x.out);
  }
  if (taps > kMostTaps) {
    return "window_dimensions must have less than 2^31 taps, got " +
           Show(a.window_dimensions);
  }
  if (cover > kMostCover) {
    return "window_strides must be such that at most " + std::to_string(kMostCover) +
           " windows share an element, got " + Show(a.window_strides) +
           " for window_dimensions " + Show(a.window_dimensions);
  }
  CutIntoTiles(args);
  if (Measure(args) * AccBytes(*args) > kPoolStackBytes) {
    return "window_dimensions must leave a window that fits the stack of a task, got " +
           Show(a.window_dimensions);
  }
  return "";
}

double LooksAtWindow(const PoolArgs& args) {
  double looks = 1;
  for (const PoolAxis& x : args.axis) {
    looks *= std::max(
        1.0, static_cast<double>(x.tiles * Windows(x)) / static_cast<double>(x.out));
  }
  return looks;
}

void RunCpuMaxPoolGrad(const PoolArgs& args, const ParallelFor& parallel_for) {
  CpuJob job;
  ChosenIsa().kernels->max_pool_grad(args, &job);
  const CpuStage& stage = job.stage[0];
  if (IsTooSmallToShare(args)) {
    for (int64_t i = 0; i < stage.count; ++i) stage.task(job.state, i);
    return;
  }
  parallel_for(stage.count, [&](int64_t i) { stage.task(job.state, i); });
}

}  // namespace convgrad
