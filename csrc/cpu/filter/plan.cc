#include "plan.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "../../phase.h"
#include "../../problem.h"
#include "../planner/canonical.h"
#include "../planner/isa.h"
#include "job.h"

namespace convgrad {
namespace {

// By whether lanes hold several groups, and whether x and dY are exchanged; and where
// lanes hold positions, which makes no difference to either.
constexpr const char* kNames[] = {
    "outer", "outer_lanes", "outer_exchanged", "outer_lanes_exchanged", "dots", nullptr};
constexpr int kDotsName = 4;

int64_t Positions(const Problem& p) {
  return p.axis[0].out * p.axis[1].out * p.axis[2].out;
}

int64_t FilterElements(const Problem& p) {
  return p.groups * p.in_channels * p.out_channels * Taps(p);
}

// ---- the problem as the kernel takes it -------------------------------------------

// With the axes first along which nothing moves, or little, since packing goes along the
// last one. That is the images where these are next to each other in memory: to a sum of
// products they are an axis like others.
Problem WithLongRows(const Problem& given, bool swaps_axes) {
  Problem p = TrivialAxesFirst(given);
  constexpr int64_t kShortRow = 8, kTimes = 4;
  if (swaps_axes && p.axis[2].out < kShortRow &&
      p.axis[1].out >= kTimes * p.axis[2].out) {
    SwapAxes(1, 2, &p);
  }
  const bool side_by_side = p.batch > 1 && (p.dx.batch == 1 || p.dy.batch == 1);
  if (!side_by_side || !IsTrivial(p.axis[0])) return p;
  constexpr int kRow = kAxes - 1;
  for (int a = 0; a < kRow; ++a) CopyAxis(p, a + 1, &p, a);
  p.axis[kRow] = Axis{};
  p.axis[kRow].in = p.axis[kRow].out = p.batch;
  p.dx.axis[kRow] = p.dx.batch;
  p.dy.axis[kRow] = p.dy.batch;
  p.batch = 1;
  return p;
}

// One of the ways to compute dW. The form is symmetric in x and dY: read the other way
// (problem.h) in channels and their strides are those of dY, whose channels are rows
// then.
struct Way {
  Problem problem;
  bool exchanged, many_groups, dots;
  int64_t w_at;  // where dW begins
  FilterPlan plan;
};

const char* NameOf(const Way& way) {
  if (way.dots) return kNames[kDotsName];
  return kNames[(way.many_groups ? 1 : 0) + (way.exchanged ? 2 : 0)];
}

bool HasLhsDilation(const Problem& p) {
  return std::any_of(p.axis, p.axis + kAxes,
                     [](const Axis& x) { return x.lhs_dilation > 1; });
}

// The positions of a chunk: as many as keep a block of dY in a first-level cache, and
// whose sums one register may hold in float32 before rounding shows.
constexpr int64_t kChunkPositions = 512;

// And where lanes hold positions: as many as outweigh the sums across lanes.
constexpr int64_t kDotPositions = 1024;

// ---- chunks and tasks -------------------------------------------------------------

// Of a chunk, which shares a second- or third-level cache.
constexpr int64_t kPackedXBytes = 2 << 20;

// Along each axis the extent of the packed x of a chunk.
void SetExtents(const Problem& p, FilterPlan* plan) {
  for (int a = 0; a < kAxes; ++a) {
    const Axis& x = p.axis[a];
    const int64_t footprint =
        (plan->chunk[1 + a] - 1) * x.stride + (x.win - 1) * x.rhs_dilation;
    plan->extent[a] = plan->each_tap ? std::min(x.in, footprint / x.lhs_dilation + 1)
                                     : footprint / plan->x_step[a] + 1;
  }
  plan->packed_x = plan->chunk[0] * plan->extent[0] * plan->extent[1] * plan->extent[2] *
                   p.in_channels * (plan->many_groups ? plan->lanes : 1);
  plan->packed_x = CeilDiv(plan->packed_x, plan->lanes) * plan->lanes;  // aligned
}

// Equal parts of at most `most`.
int64_t EvenPart(int64_t size, int64_t most) {
  return CeilDiv(size, CeilDiv(size, std::max<int64_t>(1, std::min(size, most))));
}

// Positions along the middle axis that a chunk takes before its rows, 1 for none. Where
// nothing moves along rows, whole rows may leave room for one position beside them, whose
// window would be packed for that alone.
int64_t PositionsBeforeRows(const Problem& p, int64_t room) {
  constexpr int64_t kLeastRow = 16, kTimesSpan = 4;
  const Axis& x = p.axis[1];
  const int64_t span = (x.win - 1) * x.rhs_dilation / x.stride;
  if (p.axis[2].win > 1 || std::max<int64_t>(1, room / p.axis[2].out) > span) return 1;
  return std::min({x.out, kTimesSpan * span, room / kLeastRow});
}

void CutIntoChunks(const Problem& p, bool may_be_before_rows, FilterPlan* plan) {
  const int64_t positions = plan->dots ? kDotPositions : kChunkPositions;
  const int64_t sizes[] = {p.batch, p.axis[0].out, p.axis[1].out, p.axis[2].out};
  const int64_t before_rows = may_be_before_rows ? PositionsBeforeRows(p, positions) : 1;
  int64_t room = positions / before_rows;
  for (int i = kAxes; i >= 0; --i) {
    plan->chunk[i] = EvenPart(sizes[i], room);
    if (i == kAxes && before_rows > 1) {
      room = positions / plan->chunk[i];
    } else {
      room = plan->chunk[i] == sizes[i] ? room / sizes[i] : 1;
    }
  }
  if (!plan->dots) SetExtents(p, plan);
  for (int i = 0; i <= kAxes; ++i) {
    while (plan->packed_x * AccBytes(p) > kPackedXBytes && plan->chunk[i] > 1) {
      const int64_t chunk = plan->chunk[i], packed = plan->packed_x;
      plan->chunk[i] = EvenPart(sizes[i], chunk / 2);
      SetExtents(p, plan);
      if (plan->packed_x <= packed / 4 * 3) continue;
      // What taps span does not shrink with the positions.
      plan->chunk[i] = chunk;
      SetExtents(p, plan);
      break;
    }
  }
  plan->chunks = 1;
  plan->packed_y = plan->dots ? 0 : plan->lanes;
  for (int i = 0; i <= kAxes; ++i) {
    plan->grid[i] = CeilDiv(sizes[i], plan->chunk[i]);
    plan->chunks *= plan->grid[i];
    plan->packed_y *= plan->chunk[i];
  }
}

// Tasks for many threads, unless there is too little to do, as private copies of dW as
// long as these are small, else as parts of it, which pack the same x again.
void CutIntoTasks(const Problem& p, FilterPlan* plan) {
  constexpr int64_t kTileRowsAbout = 6;
  // Work is counted in products; an element that is packed or written costs kPerElement
  // of them, and packing is at most the kPacksPerTask-th part of a task.
  constexpr double kLeastTask = 4e6, kLeastTaskAtOnce = 1e6;
  constexpr double kPerElement = 16, kPacksPerTask = 3;
  constexpr int64_t kMost = 32, kLongRun = 16;
  constexpr int64_t kCopiesBytes = 16 << 20, kPacksBytes = 14 << 20;
  static_assert(kMost <= kMaxSplits, "a sum of the copies would not fit");
  const int64_t acc = AccBytes(p);
  const double products =
      1.0 * p.batch * Positions(p) * plan->units * plan->lanes * plan->rows;
  const auto tasks_of = [&](double work, double least) {
    return std::clamp<int64_t>(static_cast<int64_t>(std::min(work / least, 1e6)), 1,
                               kMost);
  };
  const int64_t wanted = tasks_of(products, kLeastTask);
  const int64_t copy_bytes = plan->copy * acc;
  const int64_t room = std::max(kCopiesBytes, 2 * FilterElements(p) * acc);
  const auto cut = [&](int64_t splits) {
    plan->splits = splits;
    const int64_t each = CeilDiv(plan->chunks, splits);
    plan->two_levels = each > kLongRun;
    plan->run = each;
    if (!plan->two_levels) return;
    plan->run = 1;
    while (plan->run * plan->run < each) ++plan->run;
  };
  const auto fits = [&] {
    return plan->splits * copy_bytes * (plan->two_levels ? 2 : 1) <= room;
  };
  cut(std::min(wanted, plan->chunks));
  while (plan->splits > 1 && !fits()) cut(plan->splits - 1);
  const int64_t packed = plan->packed_x + plan->packed_y * plan->packed_units;
  const int64_t packs = (packed + plan->meets) * acc;
  while (plan->splits > 1 && plan->splits * packs > kPacksBytes) cut(plan->splits - 1);
  // Tasks of the same chunks pack the same x again, hence few of them. Where there is one
  // chunk, tasks need no copies of dW and may be small; writing dW is part of their work.
  const double each = static_cast<double>(CeilDiv(plan->chunks, plan->splits));
  const double packing = kPacksPerTask * kPerElement * each * packed;
  const int64_t wanted_units =
      plan->chunks == 1
          ? tasks_of(products + kPerElement * plan->units * plan->lanes * plan->rows,
                     std::max(kLeastTaskAtOnce, packing))
          : tasks_of(products / plan->splits, std::max(kLeastTask, packing));
  const int64_t parts = plan->by_rows ? CeilDiv(plan->rows, kTileRowsAbout) : plan->units;
  plan->unit_tasks = std::min(parts, wanted_units);
  while (plan->unit_tasks > 1 && plan->splits * plan->unit_tasks * packs > kPacksBytes) {
    --plan->unit_tasks;
  }
  plan->tasks = plan->splits * plan->unit_tasks;
}

// Of the workspace.
int64_t Elements(const FilterPlan& plan) {
  const int64_t copies = plan.at_once ? plan.tasks : plan.splits;
  return plan.tasks * (plan.packed_x + plan.packed_y * plan.packed_units + plan.meets) +
         copies * plan.copy * (plan.two_levels ? 2 : 1);
}

bool Fits(const FilterPlan& plan, const Problem& p) {
  return Elements(plan) * AccBytes(p) <= p.workspace_limit;
}

// Whether what the windows of a chunk span is mostly padding, or gaps between taps. In
// floating point: parameters may be as large as 2^31.
bool SpansPadding(const Problem& p) {
  constexpr double kTimes = 2;
  double padded = 1, inside = 1;
  for (const Axis& x : p.axis) {
    const auto positions = static_cast<double>(std::min(x.out, kChunkPositions));
    const int64_t step = std::max<int64_t>(
        1, Gcd(x.out == 1 ? 0 : x.stride, x.win == 1 ? 0 : x.rhs_dilation));
    const double footprint =
        (positions - 1) * static_cast<double>(x.stride) +
        static_cast<double>(x.win - 1) * static_cast<double>(x.rhs_dilation);
    padded *= footprint / static_cast<double>(step) + 1;
    inside *= std::min(static_cast<double>(x.in), footprint + 1);
  }
  return padded > kTimes * inside + kChunkPositions;
}

// Whether rows of dW are runs of memory, each a sum of so few products that the order of
// writing decides.
bool WritesByRows(const Problem& p, const FilterPlan& plan) {
  constexpr int64_t kFewPositions = 64, kPackedYBytes = 128 << 10;
  return !plan.many_groups && plan.groups == 1 && plan.units > 1 &&
         p.w.out_channel == 1 && p.batch * Positions(p) <= kFewPositions &&
         plan.packed_y * plan.units * AccBytes(p) <= kPackedYBytes;
}

// Whether rows of positions are runs of memory, of one tap that is inside x everywhere.
bool DotsTake(const Problem& p) {
  if (Taps(p) != 1 || p.axis[2].out < kLeastDotRun) return false;
  if (p.axis[2].stride != 1 || p.dx.axis[2] != 1 || p.dy.axis[2] != 1) return false;
  return std::all_of(p.axis, p.axis + kAxes, [](const Axis& x) {
    return x.lhs_dilation == 1 && x.pad_lo <= 0 &&
           (x.out - 1) * x.stride - x.pad_lo < x.in;
  });
}

FilterPlan PlanOf(const Problem& p, bool many_groups, bool dots, bool before_rows) {
  FilterPlan plan{};
  plan.many_groups = many_groups;
  plan.dots = dots;
  plan.lanes = kBlockBytes / AccBytes(p);
  plan.lane_count = many_groups ? p.groups * p.out_channels : p.out_channels;
  plan.groups = many_groups ? 1 : p.groups;
  plan.blocks = CeilDiv(plan.lane_count, plan.lanes);
  plan.units = plan.groups * plan.blocks;
  plan.taps = Taps(p);
  plan.rows = plan.taps * p.in_channels;
  plan.each_tap = HasLhsDilation(p) || SpansPadding(p);
  for (int a = 0; a < kAxes; ++a) {
    const Axis& x = p.axis[a];
    // What nothing moves along fits any step.
    const int64_t stride = x.out == 1 ? 0 : x.stride;
    const int64_t dilation = x.win == 1 ? 0 : x.rhs_dilation;
    const int64_t step = plan.each_tap ? 1 : std::max<int64_t>(1, Gcd(stride, dilation));
    plan.x_step[a] = step;
    plan.meets_every[a] = x.lhs_dilation / Gcd(x.stride, x.lhs_dilation);
    plan.y_step[a] = stride / step;
    plan.tap_step[a] = dilation / step;
    const int64_t last = (x.out - 1) * x.stride + (x.win - 1) * x.rhs_dilation - x.pad_lo;
    plan.pads |= x.pad_lo > 0 || last >= x.in;
  }
  const int64_t windows = p.axis[0].win + p.axis[1].win + p.axis[2].win;
  if (!dots) {
    plan.meets =
        CeilDiv(windows * static_cast<int64_t>(sizeof(Meets)), kBlockBytes) * plan.lanes;
  }
  CutIntoChunks(p, before_rows, &plan);
  plan.at_once = plan.chunks == 1;
  const auto cut = [&](bool by_rows) {
    plan.by_rows = by_rows;
    plan.packed_units = by_rows ? plan.units : 1;
    plan.copy = plan.lanes * plan.rows * plan.units;
    CutIntoTasks(p, &plan);
    if (plan.at_once && dots) {
      plan.copy = 0;
    } else if (plan.at_once) {
      const int64_t slice = plan.many_groups ? p.in_channels : kSliceChannels;
      plan.copy = plan.lanes * plan.taps * std::min(slice, p.in_channels);
    }
  };
  cut(plan.at_once && !dots && WritesByRows(p, plan));
  // A stored program brings the workspace that it was planned with, maybe by an older
  // version that wanted less.
  if (plan.by_rows && !Fits(plan, p)) cut(false);
  while (!Fits(plan, p) && plan.unit_tasks > 1) {
    --plan.unit_tasks;
    plan.tasks = plan.splits * plan.unit_tasks;
  }
  return plan;
}

// ---- the choice of a way ----------------------------------------------------------

// As CostOf, where lanes hold positions: products of whole vectors and tiles, and for
// each tile of a chunk the sums across lanes.
double CostOfDots(const Problem& p, const FilterPlan& plan) {
  constexpr double kPerTile = 300;
  constexpr int64_t kTileChannels = 3, kTileLanes = 4;
  const double tiles = 1.0 * p.groups * CeilDiv(p.in_channels, kTileChannels) *
                       CeilDiv(p.out_channels, kTileLanes);
  const int64_t vector = plan.lanes / 2;
  const double positions = 1.0 * p.batch * p.axis[0].out * p.axis[1].out *
                           CeilDiv(p.axis[2].out, vector) * vector;
  return tiles *
         (1.0 * kTileChannels * kTileLanes * positions + 1.0 * plan.chunks * kPerTile);
}

// Time, in products of a lane, about: the products; what a tile costs besides; and for
// each element that is packed a scalar copy or, in the lanes of narrow groups, a
// vector's.
double CostOf(const Way& way) {
  constexpr double kPerCopy = 16, kPerLane = 3, kPerTile = 1000;
  constexpr int64_t kRows = 6;
  const Problem& p = way.problem;
  const FilterPlan& plan = way.plan;
  const int64_t c = p.in_channels;
  const double tiles = plan.each_tap ? 1.0 * plan.taps * CeilDiv(c, kRows)
                                     : 1.0 * CeilDiv(plan.rows, kRows);
  double positions = 1.0 * p.batch * Positions(p);
  for (const int64_t every : plan.meets_every) positions /= static_cast<double>(every);
  // A block's vectors are too few for the latency of sums of few rows.
  const double rows =
      std::max(kRows / 2.0, way.many_groups ? 1.0 * plan.rows : kRows * tiles);
  const bool by_vectors =
      way.many_groups &&
      (p.out_channels == 1 || (p.out_channels == c && plan.lanes % p.out_channels == 0));
  // For each unit or group; of one group by all tasks that share a chunk.
  const int64_t packs = way.many_groups    ? plan.units
                        : plan.groups == 1 ? plan.unit_tasks
                                           : plan.groups;
  const double packed =
      1.0 * plan.chunks * plan.packed_x * (by_vectors ? kPerLane : kPerCopy) * packs;
  return plan.units * (plan.lanes * positions * (rows + kPerLane) +
                       1.0 * plan.chunks * tiles * kPerTile) +
         packed;
}

// What vectors hold: out channels of one group, or of several, or positions.
enum class Lanes { kOneGroup, kManyGroups, kPositions };

// How problems are cut up: as now, and as earlier versions did. A stored program brings
// the workspace of its own version's plan.
struct Version {
  bool swaps_axes, before_rows;
};
constexpr Version kVersions[] = {{true, true}, {true, false}, {false, false}};

// The cheapest way of that name, or of any; of those that fit the workspace, if it must.
bool ChooseWay(const Problem& given, const char* kernel, const Version& version,
               bool must_fit, Way* chosen) {
  const bool any = std::strcmp(kernel, "auto") == 0;
  double least = -1;
  for (const bool exchanged : {false, true}) {
    Way way{given, exchanged, false, false, 0, {}};
    if (exchanged) way.problem = ForwardAsInputGrad(given, &way.w_at);
    way.problem = WithLongRows(way.problem, version.swaps_axes);
    const Problem& p = way.problem;
    for (const Lanes lanes : {Lanes::kOneGroup, Lanes::kManyGroups, Lanes::kPositions}) {
      if (lanes == Lanes::kPositions) MergePointwiseAxes(&way.problem);
      const bool many_groups = lanes == Lanes::kManyGroups;
      way.many_groups = many_groups;
      way.dots = lanes == Lanes::kPositions;
      if (!any && std::strcmp(kernel, NameOf(way)) != 0) continue;
      if (way.dots && (exchanged || !DotsTake(p))) continue;
      // Out channels of several groups have to lie evenly.
      const bool even = p.out_channels == 1 || p.groups == 1 ||
                        p.dy.group == p.out_channels * p.dy.channel;
      if (many_groups && (!even || (any && p.groups == 1))) continue;
      double cost = 0;
      if (!IsEmpty(p)) {
        const auto plan_of = [&](const Problem& problem) {
          return PlanOf(problem, many_groups, way.dots, version.before_rows);
        };
        // Without a limit: the handler, which has that of the plan, is to choose again
        // what was planned.
        Problem free = p;
        free.workspace_limit = INT64_MAX;
        way.plan = plan_of(free);
        cost = way.dots ? CostOfDots(p, way.plan) : CostOf(way);
        if (!Fits(way.plan, given)) way.plan = plan_of(p);
        if (must_fit && !Fits(way.plan, given)) continue;
      }
      if (least >= 0 && cost >= least) continue;
      least = cost;
      *chosen = way;
    }
  }
  return least >= 0;
}

// Returns false if no way is of that name.
bool ChooseWay(const Problem& given, const char* kernel, Way* chosen) {
  for (const Version& version : kVersions) {
    if (ChooseWay(given, kernel, version, true, chosen)) return true;
  }
  return ChooseWay(given, kernel, kVersions[0], false, chosen);
}

// ---- tables for the kernel --------------------------------------------------------

std::vector<FilterTap> TapsOf(const Problem& p) {
  std::vector<FilterTap> taps(static_cast<size_t>(Taps(p)));
  for (size_t i = 0; i < taps.size(); ++i) {
    int64_t rest = static_cast<int64_t>(i);
    for (int a = kAxes - 1; a >= 0; --a) {
      taps[i].r[a] = rest % p.axis[a].win;
      rest /= p.axis[a].win;
    }
  }
  return taps;
}

std::vector<int64_t> RowOffsets(const Problem& p, const FilterPlan& plan,
                                const std::vector<FilterTap>& taps) {
  std::vector<int64_t> offsets;
  offsets.reserve(static_cast<size_t>(plan.rows));
  const int64_t slice = plan.many_groups ? p.in_channels : kSliceChannels;
  const int64_t plane =
      plan.chunk[0] * plan.extent[0] * plan.extent[1] * plan.extent[2] * plan.lanes;
  for (int64_t first = 0; first < p.in_channels; first += slice) {
    const int64_t channels = std::min(slice, p.in_channels - first);
    for (const FilterTap& tap : taps) {
      int64_t position = 0;
      for (int a = 0; a < kAxes && !plan.each_tap; ++a) {
        position = position * plan.extent[a] + tap.r[a] * plan.tap_step[a];
      }
      const int64_t width = plan.many_groups ? plan.lanes : channels;
      for (int64_t c = 0; c < channels; ++c) {
        offsets.push_back(position * width + c * (plan.many_groups ? plane : 1));
      }
    }
  }
  return offsets;
}

}  // namespace

const char* const* CpuFilterKernelNames() { return kNames; }

bool PlanCpuFilterGrad(const Problem& problem, const char* kernel, Plan* plan) {
  Way way;
  if (!ChooseWay(problem, kernel, &way)) return false;
  plan->kernel = NameOf(way);
  plan->exchanged = false;  // the name says it
  plan->workspace_bytes = IsEmpty(problem) ? 0 : Elements(way.plan) * AccBytes(problem);
  return true;
}

void RunCpuFilterGrad(const Problem& problem, const Plan& plan, const void* x,
                      const void* dy, void* dw, void* workspace,
                      const ParallelFor& parallel_for) {
  if (IsEmpty(problem)) {
    std::memset(
        dw, 0, static_cast<size_t>(FilterElements(problem) * SizeInBytes(problem.dtype)));
    return;
  }
  Way way;
  if (!ChooseWay(problem, plan.kernel, &way)) return;
  FilterArgs args{};
  args.problem = way.problem;
  args.plan = way.plan;
  args.x = way.exchanged ? dy : x;
  args.dy = way.exchanged ? x : dy;
  args.dw = static_cast<unsigned char*>(dw) + way.w_at * SizeInBytes(problem.dtype);
  args.workspace = workspace;
  const std::vector<FilterTap> taps = TapsOf(way.problem);
  const std::vector<int64_t> offsets = RowOffsets(way.problem, args.plan, taps);
  args.tap = taps.data();
  args.row_offset = offsets.data();
  CpuJob job;
  ChosenIsa().kernels->filter(args, &job);
  // What is one task is too little for several, and so is the little that it writes.
  constexpr int64_t kLittle = 1 << 16;
  const bool alone = args.plan.tasks == 1 && args.plan.copy <= kLittle;
  for (int i = 0; i < job.stages; ++i) {
    const CpuStage& stage = job.stage[i];
    if (alone) {
      for (int64_t index = 0; index < stage.count; ++index) stage.task(job.state, index);
      continue;
    }
    parallel_for(stage.count, [&](int64_t index) { stage.task(job.state, index); });
  }
}

}  // namespace convgrad
