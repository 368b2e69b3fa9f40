// The CPU planner and entry points for y and dX: a problem is brought into one form
// (planner/canonical.h), a kernel is chosen for it (planner/choose.h) from the table
// (planner/kernel_table.h) and run by one instruction set (planner/isa.h). Compiled for
// the baseline processor; the kernels themselves are in cpu/.

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/job.h"
#include "cpu/planner/choose.h"
#include "cpu/planner/padded_rows.h"
#include "kernel.h"
#include "phase.h"

namespace convgrad {
namespace {

// The elements of dX if it has no gaps, else 0.
int64_t DenseElements(const Problem& p) {
  int64_t elements = 1, furthest = 0;
  const auto add = [&](int64_t size, int64_t stride) {
    elements *= size;
    furthest += (size - 1) * stride;
  };
  add(p.batch, p.dx.batch);
  add(p.groups, p.dx.group);
  add(p.in_channels, p.dx.channel);
  for (int x = 0; x < kAxes; ++x) add(p.axis[x].in, p.dx.axis[x]);
  return furthest + 1 == elements ? elements : 0;
}

// Where each column of one group of the problem once folded lies in the filter and in dX,
// by increasing place in the latter.
struct Columns {
  std::vector<int64_t> w, dx;
};

Columns ColumnsOf(const Problem& p) {
  struct Loop {
    int64_t count, w, dx;
  };
  std::vector<Loop> loops = {{p.in_channels, p.w.in_channel, p.dx.channel}};
  if (Folded(p).in_channels > p.in_channels) {
    for (int x = 0; x < kAxes; ++x) {
      loops.push_back({p.axis[x].win, p.w.axis[x], p.dx.axis[x]});
    }
  }
  std::sort(loops.begin(), loops.end(),
            [](const Loop& a, const Loop& b) { return a.dx < b.dx; });
  // From the loop of the shortest steps on, each repeats what those before it made.
  Columns out{{0}, {0}};
  for (const Loop& loop : loops) {
    const size_t made = out.w.size();
    out.w.reserve(made * loop.count);
    out.dx.reserve(made * loop.count);
    for (int64_t i = 1; i < loop.count; ++i) {
      for (size_t j = 0; j < made; ++j) {
        out.w.push_back(out.w[j] + i * loop.w);
        out.dx.push_back(out.dx[j] + i * loop.dx);
      }
    }
  }
  return out;
}

// Whether the packed filter is not many times as large as the filter, as where its few
// columns are filled up to whole vectors. A small one may be. Images do not count, since
// an image's bits do not depend on its batch.
bool PacksLittle(const Problem& p, Kernel kernel) {
  constexpr int64_t kTimes = 4, kSmallBytes = 1 << 20;
  Problem filter = p;
  filter.batch = 0;
  const int64_t bytes = p.groups * p.in_channels * p.out_channels * Taps(p) *
                        static_cast<int64_t>(SizeInBytes(p.dtype));
  return LayOut(filter, kernel).bytes <= kTimes * bytes + kSmallBytes;
}

// Whether the definition has few products for each element that it writes anyway: a long
// window that meets y a few times.
bool IsLight(const Problem& p) {
  constexpr double kProducts = 32;  // for each element
  const double filter = 1.0 * p.groups * p.in_channels * p.out_channels * Taps(p);
  const double in = 1.0 * p.axis[0].in * p.axis[1].in * p.axis[2].in;
  const double out = 1.0 * p.axis[0].out * p.axis[1].out * p.axis[2].out;
  return p.batch * out * filter <= kProducts * (p.batch * p.groups * p.in_channels * in);
}

// XLA allocates large results and workspaces at every call. In pages of 4 KiB, finding
// and clearing them takes as long as filling them.
void AskForLargePages(void* base, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kLargePage = 2 << 20;
  const uintptr_t first =
      (reinterpret_cast<uintptr_t>(base) + kLargePage - 1) / kLargePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(base) + bytes) / kLargePage;
  if (end < first + 4) return;
  // A hint: nothing depends on whether it is taken.
  madvise(reinterpret_cast<void*>(first * kLargePage), (end - first) * kLargePage,
          MADV_HUGEPAGE);
#else
  (void)base;
  (void)bytes;
#endif
}

}  // namespace

// ---- entry points -----------------------------------------------------------------

const char* const* CpuKernelNames() { return KernelNames(); }

const char* CpuIsa() { return ChosenIsa().name; }
const char* const* CpuIsas() { return BuiltIsaNames(); }
const char* CpuBestIsa() { return BestIsaName(); }

bool IsTooSmallToShare(const Problem& p, bool all_are_busy) {
  // In multiply-adds.
  constexpr double kPerElement = 4, kLeastShared = 4e5, kLeastSharedIfBusy = 8e6;
  const auto positions = [&p](auto size) {
    return 1.0 * size(p.axis[0]) * size(p.axis[1]) * size(p.axis[2]);
  };
  const double in = positions([](const Axis& x) { return x.in; });
  const double out = positions([](const Axis& x) { return x.out; });
  const double taps = positions([](const Axis& x) { return x.win; });
  const double images = 1.0 * p.batch * p.groups, c = 1.0 * p.in_channels,
               k = 1.0 * p.out_channels;
  const double elements = images * (in * c + out * k) + taps * c * k * p.groups;
  return images * out * taps * c * k + kPerElement * elements <
         (all_are_busy ? kLeastSharedIfBusy : kLeastShared);
}

namespace {

// Rows are padded where gemm runs them and the workspace holds that, too. It also holds
// what the problem wants as it is, for a filter that is not finite.
PaddedRows PadRowsWithin(const Problem& problem, int64_t* bytes) {
  PaddedRows padded = PadRows(problem);
  if (!padded.serves) return padded;
  const int64_t copies = padded.dy_bytes + padded.filter_bytes;
  const int64_t as_is = LayOut(Folded(problem), Kernel::kGemm).bytes;
  padded.problem.workspace_limit = problem.workspace_limit - copies;
  *bytes = std::max(as_is, copies + LayOut(Folded(padded.problem), Kernel::kGemm).bytes);
  padded.serves = *bytes <= problem.workspace_limit;
  return padded;
}

}  // namespace

namespace {

// PlanCpu for one of the forms of the problem, which plan->merges_windows names.
bool PlanForm(const Problem& given, const char* kernel, Plan* plan) {
  int64_t w_at;
  Problem problem = Canonical(given, plan->merges_windows, &w_at);
  bool packs_little = true;
  const auto make = [&](const char* wanted) {
    Chosen chosen;
    if (!Choose(problem, wanted, &chosen)) return false;
    const bool is_gemm = chosen.kernel == Kernel::kGemm;
    const Problem run = is_gemm ? Folded(problem) : problem;
    plan->kernel = chosen.name;
    plan->workspace_bytes = LayOut(run, chosen.kernel).bytes;
    packs_little = PacksLittle(run, chosen.kernel);
    if (int64_t bytes; is_gemm && PadRowsWithin(problem, &bytes).serves) {
      plan->workspace_bytes = bytes;
    }
    return true;
  };
  const auto fits = [&] { return plan->workspace_bytes <= problem.workspace_limit; };
  plan->exchanged = false;
  const bool any = std::strcmp(kernel, "auto") == 0;
  // One kernel for any number of images: an image's bits do not depend on its batch.
  const bool for_lanes = any && HasImagesForLanes(problem);
  if (for_lanes || (any && HasLongWindow(problem))) {
    const Problem as_given = problem;
    problem = Exchanged(problem);
    const bool made = make(for_lanes ? RowOf(Kernel::kGemm).name : kernel);
    if (made && fits() && (for_lanes || packs_little)) {
      plan->exchanged = true;
      return true;
    }
    problem = as_given;
  }
  if (!make(kernel)) return false;
  if (!any || (fits() && packs_little)) return true;
  // The most special first, then what the workspace holds at any cost: `direct`, which
  // takes everything and wants next to nothing, is the slowest.
  const auto make_fitting = [&](Kernel k) { return make(RowOf(k).name) && fits(); };
  // Of groups depthwise first: stored programs of float64 bring its workspace.
  if (problem.groups > 1 && make_fitting(Kernel::kDepthwise) && packs_little) return true;
  constexpr int kCount = sizeof(kKernels) / sizeof(kKernels[0]);
  for (int i = kCount; i-- > 1;) {
    if (make_fitting(kKernels[i]) && packs_little) return true;
  }
  if (IsLight(problem)) return make(RowOf(Kernel::kDirect).name);
  if (make(kernel) && fits()) return true;
  for (int i = kCount; i-- > 0;) {
    if (make_fitting(kKernels[i])) return true;
  }
  return make(kernel);
}

}  // namespace

bool PlanCpu(const Problem& given, const char* kernel, Plan* plan) {
  // A kernel by name may take the taps alone, and a stored program may bring the
  // workspace of when windows were not merged: that of the plan without a limit tells.
  plan->merges_windows = std::any_of(given.axis, given.axis + kAxes, [](const Axis& x) {
    return x.in == 1 && x.win > 1;
  });
  if (plan->merges_windows) {
    Problem free = given;
    free.workspace_limit = INT64_MAX;
    plan->merges_windows =
        PlanForm(free, kernel, plan) && plan->workspace_bytes <= given.workspace_limit;
  }
  return PlanForm(given, kernel, plan);
}

WorkspaceBound BoundCpuWorkspace(const Problem& given) {
  Problem p = given;
  p.batch = 0;  // leaves out the packed dY
  WorkspaceBound bound{};
  const auto include = [&](const Problem& problem, Kernel kernel) {
    const Workspace w = LayOut(problem, kernel);
    bound.bytes = std::max(bound.bytes, w.bytes);
    if (w.pack_dy) bound.bytes_per_position = p.groups * p.out_channels * AccBytes(p);
  };
  for (Kernel kernel : {Kernel::kDirect, Kernel::kGemm, Kernel::kDepthwise}) {
    include(p, kernel);
  }
  if (p.in_channels <= kMaxFewChannels) {
    include(p, Kernel::kFewChannels);
    include(p, Kernel::kFewChannelsDot);
  }
  // Where y has one position, too, each tap may be a column (WithoutIdleSteps).
  for (Axis& x : p.axis) {
    if (x.lhs_dilation == 1 && x.rhs_dilation == 1) x.stride = x.win;
    x.in = x.stride;
    x.out = 1;
    x.pad_lo = 0;
  }
  if (IsFoldable(p)) include(Folded(p), Kernel::kGemm);
  // And where x has one, a channel (MergeWholeWindow).
  Problem merged = p;
  merged.out_channels *= Taps(p);
  for (Axis& x : merged.axis) x = Axis{};
  if (p.groups == 1 && p.out_channels == 1)
    merged.dy.channel = 2;  // its taps may lie apart
  include(merged, Kernel::kGemm);
  if (p.in_channels <= kMaxFewChannels) include(merged, Kernel::kFewChannelsDot);
  const WorkspaceBound padded = BoundPaddedRows(given);
  bound.bytes = std::max(bound.bytes, padded.bytes);
  bound.bytes_per_position =
      std::max(bound.bytes_per_position, padded.bytes_per_position);
  bound.bytes += 64;  // the packed dY is rounded up
  return bound;
}

void RunCpu(const Problem& given, const Plan& plan, const void* dy, const void* w,
            void* dx, void* workspace, const Epilogue& epilogue, int64_t threads,
            const ParallelFor& parallel_for) {
  int64_t w_at;
  Problem problem = Canonical(given, plan.merges_windows, &w_at);
  w = static_cast<const unsigned char*>(w) + w_at * SizeInBytes(given.dtype);
  if (plan.exchanged) {
    problem = Exchanged(problem);
    std::swap(dy, w);
  }
  Chosen chosen;
  if (!Choose(problem, plan.kernel, &chosen)) return;
  const Kernel kernel = chosen.kernel;

  unsigned char* base = static_cast<unsigned char*>(workspace);
  AskForLargePages(base, plan.workspace_bytes);
  CpuArgs args{};
  if (int64_t bytes; kernel == Kernel::kGemm) {
    const PaddedRows padded = PadRowsWithin(problem, &bytes);
    if (padded.serves && PackPaddedRows(problem, padded, dy, w, base, parallel_for)) {
      if (!padded.in_place) dy = base;
      args.row_first = padded.row_first;
      args.row_end = padded.row_end;
      w = base + padded.dy_bytes + padded.w_at * SizeInBytes(problem.dtype);
      base += padded.dy_bytes + padded.filter_bytes;
      problem = padded.problem;
    }
  }

  args.problem = kernel == Kernel::kGemm ? Folded(problem) : problem;
  const Workspace at = LayOut(args.problem, kernel);
  AskForLargePages(dx, problem.batch * problem.groups * problem.in_channels *
                           problem.axis[0].in * problem.axis[1].in * problem.axis[2].in *
                           SizeInBytes(problem.dtype));
  args.dy = dy;
  args.w = w;
  args.dx = dx;
  args.epilogue = epilogue;
  args.threads = threads;
  const bool clears = kernel == Kernel::kGemm && epilogue.IsNone() &&
                      ClearsFirst(args.problem) && DenseElements(problem) > 0;
  if (clears) {
    constexpr int64_t kTaskBytes = 256 * 1024;
    const int64_t bytes = DenseElements(problem) * SizeInBytes(problem.dtype);
    parallel_for(CeilDiv(bytes, kTaskBytes), [&](int64_t i) {
      std::memset(static_cast<unsigned char*>(dx) + i * kTaskBytes, 0,
                  static_cast<size_t>(std::min(kTaskBytes, bytes - i * kTaskBytes)));
    });
  }
  std::vector<Phase> phases[kAxes];
  for (int x = 0; x < kAxes; ++x) {
    const Axis& axis = args.problem.axis[x];
    for (int64_t i = 0; i < std::min(PhaseCount(axis), axis.in); ++i) {
      const Phase phase = MakePhase(axis, i);
      if (!clears || phase.r_count > 0) phases[x].push_back(phase);
    }
    if (phases[x].empty()) return;  // every sum is empty
    args.phase[x] = phases[x].data();
    args.phase_count[x] = static_cast<int64_t>(phases[x].size());
  }
  args.filter = base + at.filter;
  args.nonfinite = base + at.nonfinite;
  args.zeros = base + at.zeros;
  args.packed_dy = at.pack_dy ? base + at.packed_dy : nullptr;
  Columns columns;
  if (kernel == Kernel::kGemm) {
    columns = ColumnsOf(problem);
    args.column_w = columns.w.data();
    args.column_dx = columns.dx.data();
  }
  if (kernel == Kernel::kFewChannels) args.plane_tile = ChoosePlaneTile(problem);

  CpuJob job;
  RowOf(kernel).prepare(ChosenIsa(), args.problem)(args, &job);
  // Waking threads takes longer than filling a small workspace.
  constexpr int64_t kLeastSharedBytes = 16 * 1024;
  for (int i = 0; i < job.stages; ++i) {
    const CpuStage& stage = job.stage[i];
    if (i + 1 < job.stages && at.bytes < kLeastSharedBytes) {
      for (int64_t index = 0; index < stage.count; ++index) stage.task(job.state, index);
      continue;
    }
    parallel_for(stage.count, [&](int64_t index) { stage.task(job.state, index); });
  }
}

}  // namespace convgrad
