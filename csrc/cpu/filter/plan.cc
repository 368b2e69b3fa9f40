#include "plan.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "../../phase.h"
#include "../../problem.h"
#include "../planner/canonical.h"
#include "../planner/isa.h"
#include "job.h"

namespace convgrad {
namespace {

constexpr const char* kNames[] = {"outer", "outer_lanes", nullptr};

int64_t AccBytes(const Problem& p) { return p.dtype == DType::kF64 ? 8 : 4; }

int64_t Positions(const Problem& p) {
  return p.axis[0].out * p.axis[1].out * p.axis[2].out;
}

int64_t FilterElements(const Problem& p) {
  return p.groups * p.in_channels * p.out_channels * Taps(p);
}

// ---- the problem as the kernel takes it
// -------------------------------------------------

// With the axes first along which nothing moves: packing goes along the last one.
Problem WithLongRows(const Problem& given) {
  Problem p = given;
  int to = kAxes;
  const auto place = [&](int from) {
    --to;
    p.axis[to] = given.axis[from];
    p.dx.axis[to] = given.dx.axis[from];
    p.dy.axis[to] = given.dy.axis[from];
    p.w.axis[to] = given.w.axis[from];
  };
  for (const bool moves : {true, false}) {
    for (int a = kAxes - 1; a >= 0; --a) {
      const Axis& x = given.axis[a];
      if ((x.in > 1 || x.out > 1 || x.win > 1) == moves) place(a);
    }
  }
  return p;
}

// One of the ways to compute dW. The form is symmetric in x and dY: read the other way
// (problem.h) in channels and their strides are those of dY, whose channels are rows
// then.
struct Way {
  Problem problem;
  bool exchanged, many_groups;
  int64_t w_at;  // where dW begins
};

bool HasLhsDilation(const Problem& p) {
  return std::any_of(p.axis, p.axis + kAxes,
                     [](const Axis& x) { return x.lhs_dilation > 1; });
}

// Time, in products of a lane, about: those that are computed, and for each element that
// is packed what a scalar copy costs or, in the lanes of narrow groups, a vector's.
double CostOf(const Way& way) {
  constexpr double kPerCopy = 16, kPerLane = 3;
  constexpr int64_t kRows = 6;
  const Problem& p = way.problem;
  const int64_t lanes = kBlockBytes / AccBytes(p);
  const auto in_lanes = [lanes](int64_t count) { return CeilDiv(count, lanes) * lanes; };
  const double c = 1.0 * p.in_channels, taps = 1.0 * Taps(p);
  double positions = 1.0 * p.batch * Positions(p), in = 1.0 * p.batch;
  double rows = taps * c;
  for (const Axis& x : p.axis) {
    in *= std::min(x.in, x.out * std::min(x.stride, x.win * x.rhs_dilation));
    positions /= x.lhs_dilation / Gcd(x.stride, x.lhs_dilation);
  }
  // Each tap has tiles of its own; in narrow groups, nearly empty ones.
  if (HasLhsDilation(p)) rows = taps * CeilDiv(p.in_channels, kRows) * kRows;
  if (way.many_groups) {
    const double every = 1.0 * in_lanes(p.groups * p.out_channels);
    return every * (positions * (rows + kPerLane) + in * c * kPerLane);
  }
  const double every = 1.0 * p.groups * in_lanes(p.out_channels);
  const double few_rows = rows < kRows ? kRows / rows : 1;
  return every * positions * (rows * few_rows + kPerLane) + kPerCopy * in * p.groups * c;
}

bool IsEmpty(const Problem& p) {
  const bool no_input = p.axis[0].in * p.axis[1].in * p.axis[2].in == 0;
  return no_input || p.batch * FilterElements(p) * Positions(p) == 0;
}

// Returns false if no way is of that name.
bool ChooseWay(const Problem& given, const char* kernel, Way* chosen) {
  const bool any = std::strcmp(kernel, "auto") == 0;
  double least = -1;
  for (const bool exchanged : {false, true}) {
    Way way{given, exchanged, false, 0};
    if (exchanged) way.problem = ForwardAsInputGrad(given, &way.w_at);
    way.problem = WithLongRows(way.problem);
    const Problem& p = way.problem;
    for (const bool many_groups : {false, true}) {
      if (!any && std::strcmp(kernel, kNames[many_groups]) != 0) continue;
      // Out channels of several groups have to lie evenly.
      const bool even = p.out_channels == 1 || p.groups == 1 ||
                        p.dy.group == p.out_channels * p.dy.channel;
      if (many_groups && !even) continue;
      way.many_groups = many_groups;
      const double cost = IsEmpty(p) ? 0 : CostOf(way);
      if (least >= 0 && cost >= least) continue;
      least = cost;
      *chosen = way;
    }
  }
  return least >= 0;
}

// ---- chunks and tasks ---------------------------------------------------------------

// The positions of a chunk: as many as keep a block of dY in a first-level cache, and
// whose sums one register may hold in float32 before rounding shows.
constexpr int64_t kChunkPositions = 512;
constexpr int64_t kPackedXBytes = 2 << 20;

// Along each axis the extent of the packed x of a chunk.
void SetExtents(const Problem& p, FilterPlan* plan) {
  for (int a = 0; a < kAxes; ++a) {
    const Axis& x = p.axis[a];
    const int64_t reach =
        (plan->chunk[1 + a] - 1) * x.stride + (x.win - 1) * x.rhs_dilation;
    plan->extent[a] = plan->dilated ? std::min(x.in, reach / x.lhs_dilation + 1)
                                    : reach / plan->x_step[a] + 1;
  }
  plan->packed_x = plan->chunk[0] * plan->extent[0] * plan->extent[1] * plan->extent[2] *
                   p.in_channels * (plan->many_groups ? plan->lanes : 1);
  plan->packed_x = CeilDiv(plan->packed_x, plan->lanes) * plan->lanes;  // aligned
}

// Equal parts of at most `most`.
int64_t EvenPart(int64_t size, int64_t most) {
  return CeilDiv(size, CeilDiv(size, std::max<int64_t>(1, std::min(size, most))));
}

void CutIntoChunks(const Problem& p, FilterPlan* plan) {
  int64_t room = kChunkPositions;
  const int64_t sizes[] = {p.batch, p.axis[0].out, p.axis[1].out, p.axis[2].out};
  for (int i = kAxes; i >= 0; --i) {
    plan->chunk[i] = EvenPart(sizes[i], room);
    room = plan->chunk[i] == sizes[i] ? room / sizes[i] : 1;
  }
  SetExtents(p, plan);
  for (int i = 0; i <= kAxes; ++i) {
    while (plan->packed_x * AccBytes(p) > kPackedXBytes && plan->chunk[i] > 1) {
      plan->chunk[i] = EvenPart(sizes[i], plan->chunk[i] / 2);
      SetExtents(p, plan);
    }
  }
  plan->chunks = 1;
  plan->packed_y = plan->lanes;
  for (int i = 0; i <= kAxes; ++i) {
    plan->grid[i] = CeilDiv(sizes[i], plan->chunk[i]);
    plan->chunks *= plan->grid[i];
    plan->packed_y *= plan->chunk[i];
  }
}

// Tasks for many threads, unless there is too little to do, as private copies of dW as
// long as these are small, else as parts of it, which pack the same x again.
void CutIntoTasks(const Problem& p, FilterPlan* plan) {
  constexpr double kLeastTask = 4e6;  // products
  constexpr int64_t kMost = 32, kLongRun = 16;
  constexpr int64_t kCopiesBytes = 16 << 20, kPacksBytes = 14 << 20;
  static_assert(kMost <= kMaxSplits, "a sum of the copies would not fit");
  const int64_t acc = AccBytes(p);
  const double products =
      1.0 * p.batch * Positions(p) * plan->units * plan->lanes * plan->rows;
  const int64_t wanted = std::clamp<int64_t>(
      static_cast<int64_t>(std::min(products / kLeastTask, 1e6)), 1, kMost);
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
  const int64_t packs = (plan->packed_x + plan->packed_y) * acc;
  while (plan->splits > 1 && plan->splits * packs > kPacksBytes) cut(plan->splits - 1);
  plan->unit_tasks = std::min(plan->units, CeilDiv(wanted, plan->splits));
  while (plan->unit_tasks > 1 && plan->splits * plan->unit_tasks * packs > kPacksBytes) {
    --plan->unit_tasks;
  }
  plan->tasks = plan->splits * plan->unit_tasks;
}

// Of the workspace.
int64_t Elements(const FilterPlan& plan) {
  return plan.tasks * (plan.packed_x + plan.packed_y) +
         plan.splits * plan.copy * (plan.two_levels ? 2 : 1);
}

FilterPlan PlanOf(const Way& way) {
  const Problem& p = way.problem;
  FilterPlan plan{};
  plan.many_groups = way.many_groups;
  plan.lanes = kBlockBytes / AccBytes(p);
  plan.lane_count = way.many_groups ? p.groups * p.out_channels : p.out_channels;
  plan.groups = way.many_groups ? 1 : p.groups;
  plan.blocks = CeilDiv(plan.lane_count, plan.lanes);
  plan.units = plan.groups * plan.blocks;
  plan.taps = Taps(p);
  plan.rows = plan.taps * p.in_channels;
  plan.copy = plan.units * plan.rows * plan.lanes;
  plan.dilated = HasLhsDilation(p);
  for (int a = 0; a < kAxes; ++a) {
    const Axis& x = p.axis[a];
    // What nothing moves along fits any step.
    const int64_t stride = x.out == 1 ? 0 : x.stride;
    const int64_t dilation = x.win == 1 ? 0 : x.rhs_dilation;
    const int64_t step = plan.dilated ? 1 : std::max<int64_t>(1, Gcd(stride, dilation));
    plan.x_step[a] = step;
    plan.meets_every[a] = x.lhs_dilation / Gcd(x.stride, x.lhs_dilation);
    plan.y_step[a] = stride / step;
    plan.tap_step[a] = dilation / step;
    const int64_t last = (x.out - 1) * x.stride + (x.win - 1) * x.rhs_dilation - x.pad_lo;
    plan.pads |= x.pad_lo > 0 || last >= x.in;
  }
  CutIntoChunks(p, &plan);
  CutIntoTasks(p, &plan);
  return plan;
}

}  // namespace

const char* const* CpuFilterKernelNames() { return kNames; }

bool PlanCpuFilterGrad(const Problem& problem, const char* kernel, Plan* plan) {
  Way way;
  if (!ChooseWay(problem, kernel, &way)) return false;
  plan->kernel = kNames[way.many_groups];
  plan->exchanged = way.exchanged;
  plan->workspace_bytes =
      IsEmpty(problem) ? 0 : Elements(PlanOf(way)) * AccBytes(problem);
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
  args.plan = PlanOf(way);
  args.x = way.exchanged ? dy : x;
  args.dy = way.exchanged ? x : dy;
  args.dw = static_cast<unsigned char*>(dw) + way.w_at * SizeInBytes(problem.dtype);
  args.workspace = workspace;
  std::vector<FilterTap> taps(static_cast<size_t>(args.plan.taps));
  const Axis* const axis = way.problem.axis;
  for (int64_t i = 0; i < args.plan.taps; ++i) {
    FilterTap& tap = taps[static_cast<size_t>(i)];
    int64_t rest = i;
    for (int a = kAxes - 1; a >= 0; --a) {
      tap.r[a] = rest % axis[a].win;
      rest /= axis[a].win;
    }
    for (int a = 0; a < kAxes; ++a) {
      tap.offset = tap.offset * args.plan.extent[a] + tap.r[a] * args.plan.tap_step[a];
    }
  }
  args.tap = taps.data();
  CpuJob job;
  ChosenIsa().kernels->filter(args, &job);
  for (int i = 0; i < job.stages; ++i) {
    const CpuStage& stage = job.stage[i];
    parallel_for(stage.count, [&](int64_t index) { stage.task(job.state, index); });
  }
}

}  // namespace convgrad
