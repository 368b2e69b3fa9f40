// The CPU planner and entry points: which kernel takes a problem (planner/canonical.h),
// how much workspace it wants, and its run by one instruction set (planner/isa.h).
// Compiled for the baseline processor; the kernels themselves are in cpu/.
//
//   direct        any problem, by the definition                       cpu/direct.h
//   gemm          dense, and groups with enough channels               cpu/gemm.h
//   depthwise     few channels a group: channels-last with channels    cpu/channels.h
//                 in lanes, channels-first with pixels in lanes        cpu/planes.h
//   few_channels  few input channels, any layout: pixels in lanes      cpu/planes.h
//   few_channels_dot  few input channels, many out channels, in lanes  cpu/dots.h

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/job.h"
#include "cpu/planner/canonical.h"
#include "cpu/planner/isa.h"
#include "cpu/planner/padded_rows.h"
#include "kernel.h"
#include "phase.h"

namespace convgrad {
namespace {

// ---- positions that no tap reaches -------------------------------------------------

// Stores between which others lie, as along rows of a channels-first dX: each costs as
// much as one of a whole cache line.
bool StoresApart(const Problem& p) { return p.dx.axis[2] == 1 && p.in_channels > 1; }

// Whether taps reach so little of dX that the gemm kernel, which visits live phases alone
// once dX is cleared as a whole, is the fastest.
bool IsMostlyZeros(const Problem& p) {
  return LivePart(p) <= (StoresApart(p) ? 0.25 : 0.125);
}

// Whether the gemm kernel clears dX first.
bool ClearsFirst(const Problem& p) { return LivePart(p) <= (StoresApart(p) ? 0.6 : 0.3); }

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

// ---- planning ---------------------------------------------------------------------

enum class Kernel { kDirect, kGemm, kChannels, kPlanes, kDots };

constexpr const char* kNames[] = {"direct",           "gemm", "depthwise", "few_channels",
                                  "few_channels_dot", nullptr};
constexpr int kKernelCount = sizeof(kNames) / sizeof(kNames[0]) - 1;

bool IsEmpty(const Problem& p) {
  return p.batch * p.groups * p.out_channels * Taps(p) == 0 ||
         p.axis[0].out * p.axis[1].out * p.axis[2].out == 0;
}

bool GemmTakes(const Problem& p) { return !IsEmpty(p); }

// Channels of the groups side by side, and vectors that whole groups can fill.
bool ChannelsTakes(const Problem& p) {
  const int64_t k = p.out_channels, c = p.in_channels;
  if (IsEmpty(p) || p.axis[0].win * p.axis[1].win > kMaxFilterRows) return false;
  if ((k > 1 && p.dy.channel != 1) || (c > 1 && p.dx.channel != 1)) return false;
  if (p.groups > 1 && (p.dy.group != k || p.dx.group != c)) return false;
  if (k == 1 && c == 1) return true;
  const int64_t largest = std::max(k, c);
  return largest <= kMaxSharedGroup &&
         (p.groups * k >= kMaxLanes || (largest <= 4 && p.groups * k >= 4));
}

// Positions of dY that `inputs` neighbouring positions of dX can reach.
int64_t ReachedBy(const Axis& x, int64_t inputs) {
  return ((inputs - 1) * x.lhs_dilation + (x.win - 1) * x.rhs_dilation) / x.stride + 1;
}

PlaneTile ChoosePlaneTile(const Problem& p, int64_t window_bytes) {
  const PlaneTile none = {0, 0, 0};
  const Axis& row = p.axis[2];
  const int64_t phases = PhaseCount(row);
  const int64_t strands = row.lhs_dilation / Gcd(row.stride, row.lhs_dilation);
  if (IsEmpty(p) || phases > kMaxRowPhases || strands > kMaxStrands) return none;
  // What is not a run of memory is copied one by one into strands: too slow.
  if (strands > 1 && p.dy.axis[2] != 1) return none;
  const int64_t lanes = 64 / AccBytes(p);  // of the widest vectors
  const int64_t budget = window_bytes / AccBytes(p);
  const int64_t box0 = std::min(ReachedBy(p.axis[0], 1), p.axis[0].out);
  const int64_t step = lanes * phases;  // a vector of every phase
  const int64_t most = std::min(kRowBytes / AccBytes(p) / step, CeilDiv(row.in, step));
  for (int64_t vectors = most; vectors > 0; --vectors) {
    PlaneTile tile;
    tile.width = vectors * step;
    tile.cols = CeilDiv(ReachedBy(row, tile.width), strands) * strands;
    const auto fits = [&](int64_t rows) {
      const int64_t box1 = std::min(ReachedBy(p.axis[1], rows), p.axis[1].out);
      return p.out_channels * box0 * box1 * tile.cols <= budget;
    };
    if (!fits(1)) continue;
    tile.rows = 1;
    while (tile.rows < p.axis[1].in && fits(tile.rows + 1)) ++tile.rows;
    return tile;
  }
  return none;
}

PlaneTile ChoosePlaneTile(const Problem& p) {
  const PlaneTile tile = ChoosePlaneTile(p, kWindowBytes);
  return tile.rows > 0 ? tile : ChoosePlaneTile(p, kLargeWindowBytes);
}

bool PlanesTakes(const Problem& p) { return ChoosePlaneTile(p).rows > 0; }

bool DotsTakes(const Problem& p) {
  return !IsEmpty(p) && p.in_channels <= kMaxFewChannels && p.out_channels >= kMaxLanes;
}

// A patch embedding, where every input sees exactly one tap, is a matrix product whose
// columns are the pairs (tap, input channel):
//   dX[p*stride + r, c] = sum over k  dY[p, k] * W[k, (r, c)].
// Its folded problem is a 1x1 convolution of that many channels over the positions p.
bool IsFoldable(const Problem& p) {
  bool strided = false;
  for (const Axis& x : p.axis) {
    if (x.lhs_dilation != 1 || (x.rhs_dilation != 1 && x.win > 1)) return false;
    if (x.win != x.stride || x.pad_lo != 0 || x.in != x.out * x.stride) return false;
    strided |= x.stride > 1;
  }
  return strided;
}

int64_t GemmWorkspaceBytes(const Problem& p);

// As given if the workspace is that of a program that was stored before such problems
// were folded, and too small.
Problem Folded(const Problem& given) {
  if (!IsFoldable(given)) return given;
  Problem p = given;
  for (int x = 0; x < kAxes; ++x) {
    Axis& axis = p.axis[x];
    p.in_channels *= axis.win;
    p.dx.axis[x] *= axis.stride;
    axis.in = axis.out;
    axis.win = axis.stride = axis.rhs_dilation = 1;
  }
  return GemmWorkspaceBytes(p) <= given.workspace_limit ? p : given;
}

struct Column {
  int64_t w, dx;
};

// The columns of one group of the problem once folded, by increasing place in dX.
std::vector<Column> Columns(const Problem& p) {
  const int64_t taps = Folded(p).in_channels / p.in_channels;
  const bool fold = taps > 1;
  std::vector<Column> out;
  out.reserve(p.in_channels * taps);
  for (int64_t c = 0; c < p.in_channels; ++c) {
    for (int64_t r = 0; r < taps; ++r) {
      Column column = {c * p.w.in_channel, c * p.dx.channel};
      int64_t rest = r;
      for (int x = kAxes - 1; fold && x >= 0; --x) {
        column.w += rest % p.axis[x].win * p.w.axis[x];
        column.dx += rest % p.axis[x].win * p.dx.axis[x];
        rest /= p.axis[x].win;
      }
      out.push_back(column);
    }
  }
  const auto before = [](const Column& a, const Column& b) { return a.dx < b.dx; };
  if (!std::is_sorted(out.begin(), out.end(), before)) {
    std::sort(out.begin(), out.end(), before);
  }
  return out;
}

constexpr int64_t kFewChannels = 4;  // fewer than that waste a gemm's lanes

// Whether few_channels_dot beats gemm, whose vectors hold `columns` of dX. Counted in
// vectors for each position of dX, folded or not: multiply-adds, and for each sum of the
// former four more to add it up across lanes and store it, while the latter's loads,
// one for each multiply-add, cost it a quarter more. But gemm has bfloat16 arithmetic.
bool DotsAreFaster(const Problem& p, int64_t columns) {
  if (columns <= kFewChannels) return true;
  if (p.dtype == DType::kBF16) return false;
  double products = 1.0 * p.out_channels * Taps(p);
  for (const Axis& x : p.axis) products /= static_cast<double>(PhaseCount(x));
  const int64_t lanes = 64 / AccBytes(p);
  return columns <= kMaxFewChannels &&
         static_cast<double>(columns) * (products / lanes + 4) <=
             1.25 * products * CeilDiv(columns, lanes);
}

// Channels-first: copying a window of dY is cheap.
bool LiesInRows(const Problem& p) { return p.dx.axis[2] == 1 && p.dy.axis[2] == 1; }

bool RowsFillVectors(const Problem& p) { return PhasePositions(p.axis[2]) >= kLongRow; }

// Whether pixels in lanes beat channels in lanes, for up to kMaxFewChannels of them: on
// rows that fill vectors, if dY has so few channels that a gemm's sums are short.
bool PlanesBeatGemm(const Problem& p) {
  const bool in_rows = LiesInRows(p);
  if (!RowsFillVectors(p)) return false;
  // But gemm has bfloat16 arithmetic.
  if (p.dtype == DType::kBF16 && p.in_channels > 4 && p.out_channels > 8) return false;
  // And where there is one tap, reading channels is most of the work: gemm does so in
  // place.
  constexpr int64_t kLeastColumns = 6;
  if (!in_rows && Taps(p) == 1 && p.in_channels >= kLeastColumns) return false;
  return p.in_channels <= (in_rows ? kMaxFewChannels : 12) &&
         p.out_channels <= (in_rows ? kMaxRowChannels : 8);
}

// Whether the channels kernel's permutations, where groups have several channels, cost
// more than they save.
bool PermutesTooMuch(const Problem& p) {
  constexpr int64_t kLargeGroup = 6;
  if (p.in_channels <= 2 && p.out_channels >= kLargeGroup) return true;
  return p.dtype == DType::kF64 && std::max(p.in_channels, p.out_channels) >= 4;
}

// Or whether its vectors would be nearly empty.
bool ChannelsAreSlow(const Problem& p) {
  constexpr int64_t kFewGroups = 10;
  if (p.in_channels == 1 && p.out_channels == 1) return p.groups < 4;
  return p.groups <= kFewGroups || PermutesTooMuch(p);
}

bool Choose(const Problem& p, const char* name, const char** chosen, Kernel* kernel) {
  const auto pick = [&](int index, Kernel k) {
    *chosen = kNames[index];
    *kernel = k;
    return true;
  };
  const bool any = std::strcmp(name, "auto") == 0;
  const auto asked = [&](int index) { return std::strcmp(name, kNames[index]) == 0; };
  if (asked(0) || (any && IsEmpty(p))) return pick(0, Kernel::kDirect);
  if (asked(2) || (any && p.groups > 1)) {
    const int64_t largest = std::max(p.in_channels, p.out_channels);
    const bool small = largest <= kMaxFewChannels;
    if (any && small && ChannelsAreSlow(p)) {
      const bool planes = LiesInRows(p) || p.dtype != DType::kF64;
      if (planes && RowsFillVectors(p) && PlanesTakes(p)) return pick(3, Kernel::kPlanes);
      if (ChannelsTakes(p) && PermutesTooMuch(p)) return pick(1, Kernel::kGemm);
    }
    if (ChannelsTakes(p)) return pick(2, Kernel::kChannels);
    if (small && (LiesInRows(p) || asked(2)) && PlanesTakes(p)) {
      return pick(2, Kernel::kPlanes);
    }
  }
  if (any && p.groups == 1 && IsMostlyZeros(p)) return pick(1, Kernel::kGemm);
  const int64_t columns = Folded(p).in_channels;
  if (any && p.groups == 1 && columns == p.in_channels && PlanesBeatGemm(p) &&
      PlanesTakes(p)) {
    return pick(3, Kernel::kPlanes);
  }
  if (asked(4) || (any && p.groups == 1 && DotsAreFaster(p, columns))) {
    if (DotsTakes(p)) return pick(4, Kernel::kDots);
  }
  if (asked(3) || (any && columns <= kFewChannels)) {
    if (p.in_channels <= kMaxFewChannels && PlanesTakes(p)) {
      return pick(3, Kernel::kPlanes);
    }
  }
  if ((asked(1) || any) && GemmTakes(p)) return pick(1, Kernel::kGemm);
  return false;
}

// ---- the workspace ----------------------------------------------------------------

// Offsets in bytes; sizes are bounds over all instruction sets.
struct Workspace {
  int64_t filter, taint, zeros, packed_dy;
  bool pack_dy;
  int64_t bytes;
};

// `p` is folded already if it is to be.
Workspace LayOut(const Problem& p, Kernel kernel) {
  Workspace out{};
  const int64_t acc = AccBytes(p);
  const auto take = [&out](int64_t bytes) {
    const int64_t at = out.bytes;
    out.bytes += CeilDiv(bytes, 64) * 64;
    return at;
  };
  const auto take_packed_dy = [&] {
    out.pack_dy = p.dtype == DType::kBF16 || p.dtype == DType::kF16 ||
                  (p.dy.channel != 1 && p.out_channels != 1);
    if (!out.pack_dy) return;
    out.packed_dy = take(p.batch * p.groups * p.axis[0].out * p.axis[1].out *
                         p.axis[2].out * p.out_channels * acc);
  };
  const int64_t filter = p.out_channels * Taps(p) * acc;  // of one input channel
  if (kernel == Kernel::kGemm) {
    const int64_t columns = CeilDiv(p.in_channels, kMaxLanes) * kMaxLanes;
    const int64_t tiles =  // bfloat16 in whole tiles, where GemmOf may fill them
        p.out_channels >= kLeastTileChannels || kEmulatesTiles
            ? CeilDiv(p.out_channels, kTileChannels) * kTileChannels * Taps(p) * 2
            : 0;
    out.filter = take(p.groups * columns *
                      (p.dtype == DType::kBF16 ? std::max(filter, tiles) : filter));
    out.taint = take(p.groups * CeilDiv(p.in_channels, kMinPanelColumns) *
                     CeilDiv(p.out_channels, kFilterPackChannels));
    out.zeros = take(p.groups * p.out_channels * acc);
    take_packed_dy();
  } else if (kernel == Kernel::kChannels) {
    const int64_t largest = std::max(p.in_channels, p.out_channels);
    int64_t lanes = 0, blocks = 0;
    for (const int64_t n : {1, 2, 4, 8, 16}) {
      if (n < largest) continue;
      const int64_t in_block = std::min(n / largest, p.groups);
      lanes = std::max(lanes, CeilDiv(p.groups, in_block) * n);
      blocks = std::max(blocks, CeilDiv(p.groups, in_block));
    }
    out.filter = take(lanes * filter);
    out.taint = take(blocks);
  } else if (kernel == Kernel::kPlanes) {
    out.filter = take(p.groups * p.in_channels * filter);
    out.taint = take(p.groups);
  } else if (kernel == Kernel::kDots) {
    const int64_t k = CeilDiv(p.out_channels, kMaxLanes) * kMaxLanes;
    out.filter = take(p.groups * p.in_channels * Taps(p) * k * acc);
    out.taint = take(p.groups);
    out.zeros = take(p.out_channels * acc);
    take_packed_dy();
  }
  return out;
}

int64_t GemmWorkspaceBytes(const Problem& p) { return LayOut(p, Kernel::kGemm).bytes; }

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

// XLA allocates large results and workspaces anew at every call: in pages of 4 KiB,
// finding and clearing them takes as long as filling them.
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

const char* const* CpuKernelNames() { return kNames; }

const char* CpuIsa() { return ChosenIsa().name; }
const char* const* CpuIsas() { return BuiltIsaNames(); }
const char* CpuBestIsa() { return BestIsaName(); }

bool IsTooSmallToShare(const Problem& p) {
  constexpr double kLeastShared = 4e5, kPerElement = 4;  // in multiply-adds
  const auto positions = [&p](auto size) {
    return 1.0 * size(p.axis[0]) * size(p.axis[1]) * size(p.axis[2]);
  };
  const double in = positions([](const Axis& x) { return x.in; });
  const double out = positions([](const Axis& x) { return x.out; });
  const double taps = positions([](const Axis& x) { return x.win; });
  const double images = 1.0 * p.batch * p.groups, c = 1.0 * p.in_channels,
               k = 1.0 * p.out_channels;
  const double elements = images * (in * c + out * k) + taps * c * k * p.groups;
  return images * out * taps * c * k + kPerElement * elements < kLeastShared;
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

bool PlanCpu(const Problem& given, const char* kernel, Plan* plan) {
  int64_t w_at;
  Problem problem = Canonical(given, &w_at);
  bool packs_little = true;
  const auto make = [&](const char* wanted) {
    Kernel chosen;
    if (!Choose(problem, wanted, &plan->kernel, &chosen)) return false;
    const Problem run = chosen == Kernel::kGemm ? Folded(problem) : problem;
    plan->workspace_bytes = LayOut(run, chosen).bytes;
    packs_little = PacksLittle(run, chosen);
    if (int64_t bytes; chosen == Kernel::kGemm && PadRowsWithin(problem, &bytes).serves) {
      plan->workspace_bytes = bytes;
    }
    return true;
  };
  const auto fits = [&] { return plan->workspace_bytes <= problem.workspace_limit; };
  plan->exchanged = false;
  const bool any = std::strcmp(kernel, "auto") == 0;
  if (any && HasLongWindow(problem)) {
    const Problem as_given = problem;
    problem = Exchanged(problem);
    if (make(kernel) && fits() && packs_little) {
      plan->exchanged = true;
      return true;
    }
    problem = as_given;
  }
  if (!make(kernel)) return false;
  if (!any || (fits() && packs_little)) return true;
  // The most special first, then what the workspace holds at any cost: `direct`, which
  // takes everything and wants next to nothing, is the slowest.
  for (int i = kKernelCount; i-- > 1;) {
    if (make(kNames[i]) && fits() && packs_little) return true;
  }
  if (IsLight(problem)) return make(kNames[0]);
  if (make(kernel) && fits()) return true;
  for (int i = kKernelCount; i-- > 0;) {
    if (make(kNames[i]) && fits()) return true;
  }
  return make(kernel);
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
  for (Kernel kernel : {Kernel::kDirect, Kernel::kGemm, Kernel::kChannels}) {
    include(p, kernel);
  }
  if (p.in_channels <= kMaxFewChannels) {
    include(p, Kernel::kPlanes);
    include(p, Kernel::kDots);
  }
  // Where y has one position, too, each tap may be a column (WithoutIdleSteps).
  for (Axis& x : p.axis) {
    if (x.lhs_dilation == 1 && x.rhs_dilation == 1) x.stride = x.win;
    x.in = x.stride;
    x.out = 1;
    x.pad_lo = 0;
  }
  if (IsFoldable(p)) include(Folded(p), Kernel::kGemm);
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
  Problem problem = Canonical(given, &w_at);
  w = static_cast<const unsigned char*>(w) + w_at * SizeInBytes(given.dtype);
  if (plan.exchanged) {
    problem = Exchanged(problem);
    std::swap(dy, w);
  }
  const char* name;
  Kernel kernel;
  if (!Choose(problem, plan.kernel, &name, &kernel)) return;

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
  args.taint = base + at.taint;
  args.zeros = base + at.zeros;
  args.packed_dy = at.pack_dy ? base + at.packed_dy : nullptr;
  std::vector<int64_t> column_w, column_dx;
  if (kernel == Kernel::kGemm) {
    for (const Column& column : Columns(problem)) {
      column_w.push_back(column.w);
      column_dx.push_back(column.dx);
    }
    args.column_w = column_w.data();
    args.column_dx = column_dx.data();
  }
  if (kernel == Kernel::kPlanes) args.plane_tile = ChoosePlaneTile(problem);

  const Isa& isa = ChosenIsa();
  const CpuKernels& kernels = *isa.kernels;
  CpuJob job;
  switch (kernel) {
    case Kernel::kDirect: kernels.direct(args, &job); break;
    case Kernel::kGemm: GemmOf(isa, args.problem)(args, &job); break;
    case Kernel::kChannels: kernels.channels(args, &job); break;
    case Kernel::kPlanes: kernels.planes(args, &job); break;
    case Kernel::kDots: kernels.dots(args, &job); break;
  }
  for (int i = 0; i < job.stages; ++i) {
    const CpuStage& stage = job.stage[i];
    parallel_for(stage.count, [&](int64_t index) { stage.task(job.state, index); });
  }
}

}  // namespace convgrad
