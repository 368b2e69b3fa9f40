#include "kernel_table.h"

#include <algorithm>
#include <iterator>

#include "../../phase.h"

namespace convgrad {

namespace {

// ---- which problems a kernel takes ------------------------------------------------

bool TakesAny(const Problem&) { return true; }

bool GemmTakes(const Problem& p) { return !IsEmpty(p); }

// Channels of the groups side by side, and vectors that whole groups can fill.
bool DepthwiseTakes(const Problem& p) {
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

bool FewChannelsTakes(const Problem& p) {
  return p.in_channels <= kMaxFewChannels && ChoosePlaneTile(p).rows > 0;
}

bool FewChannelsDotTakes(const Problem& p) {
  return !IsEmpty(p) && p.in_channels <= kMaxFewChannels && p.out_channels >= kMaxLanes;
}

// ---- what it wants of the workspace -----------------------------------------------

// Of one input channel, in the accumulation type.
int64_t FilterBytes(const Problem& p) { return p.out_channels * Taps(p) * AccBytes(p); }

// dY, unless operands are read where they lie.
void TakePackedDy(const Problem& p, Workspace* out) {
  out->pack_dy = p.dtype == DType::kBF16 || p.dtype == DType::kF16 ||
                 (p.dy.channel != 1 && p.out_channels != 1);
  if (!out->pack_dy) return;
  out->packed_dy = out->Take(p.batch * p.groups * p.axis[0].out * p.axis[1].out *
                             p.axis[2].out * p.out_channels * AccBytes(p));
}

void LayOutNothing(const Problem&, Workspace*) {}

void LayOutGemm(const Problem& p, Workspace* out) {
  const int64_t columns = CeilDiv(p.in_channels, kMaxLanes) * kMaxLanes;
  const int64_t tiles =  // bfloat16 in whole tiles, where GemmOf may fill them
      p.out_channels >= kLeastTileChannels || kEmulatesTiles
          ? CeilDiv(p.out_channels, kTileChannels) * kTileChannels * Taps(p) * 2
          : 0;
  const int64_t filter = FilterBytes(p);
  out->filter = out->Take(p.groups * columns *
                          (p.dtype == DType::kBF16 ? std::max(filter, tiles) : filter));
  out->nonfinite = out->Take(p.groups * CeilDiv(p.in_channels, kMinPanelColumns) *
                             CeilDiv(p.out_channels, kFilterPackChannels));
  out->zeros = out->Take(p.groups * p.out_channels * AccBytes(p));
  TakePackedDy(p, out);
}

void LayOutDepthwise(const Problem& p, Workspace* out) {
  // 1: the bound of a stored program's workspace is asked of empty problems, too.
  const int64_t largest = std::max<int64_t>({p.in_channels, p.out_channels, 1});
  int64_t lanes = 0, blocks = 0;
  for (const int64_t n : {1, 2, 4, 8, 16}) {
    if (n < largest) continue;
    const int64_t in_block = std::min(n / largest, p.groups);
    lanes = std::max(lanes, CeilDiv(p.groups, in_block) * n);
    blocks = std::max(blocks, CeilDiv(p.groups, in_block));
  }
  out->filter = out->Take(lanes * FilterBytes(p));
  out->nonfinite = out->Take(blocks);
}

void LayOutFewChannels(const Problem& p, Workspace* out) {
  out->filter = out->Take(p.groups * p.in_channels * FilterBytes(p));
  out->nonfinite = out->Take(p.groups);
}

void LayOutFewChannelsDot(const Problem& p, Workspace* out) {
  const int64_t k = CeilDiv(p.out_channels, kMaxLanes) * kMaxLanes;
  out->filter = out->Take(p.groups * p.in_channels * Taps(p) * k * AccBytes(p));
  out->nonfinite = out->Take(p.groups);
  out->zeros = out->Take(p.out_channels * AccBytes(p));
  TakePackedDy(p, out);
}

// ---- the table --------------------------------------------------------------------

template <PrepareJob CpuKernels::* kMember>
PrepareJob OfIsa(const Isa& isa, const Problem&) {
  return isa.kernels->*kMember;
}

// In the order of `Kernel`.
constexpr KernelRow kTable[] = {
    {"direct", TakesAny, LayOutNothing, OfIsa<&CpuKernels::direct>},
    {"gemm", GemmTakes, LayOutGemm, GemmOf},
    {"depthwise", DepthwiseTakes, LayOutDepthwise, OfIsa<&CpuKernels::depthwise>},
    {"few_channels", FewChannelsTakes, LayOutFewChannels,
     OfIsa<&CpuKernels::few_channels>},
    {"few_channels_dot", FewChannelsDotTakes, LayOutFewChannelsDot,
     OfIsa<&CpuKernels::few_channels_dot>},
};
static_assert(std::size(kTable) == std::size(kKernels), "a row for each kernel");

}  // namespace

PlaneTile ChoosePlaneTile(const Problem& p) {
  const PlaneTile tile = ChoosePlaneTile(p, kWindowBytes);
  return tile.rows > 0 ? tile : ChoosePlaneTile(p, kLargeWindowBytes);
}

const KernelRow& RowOf(Kernel kernel) { return kTable[static_cast<int>(kernel)]; }

const char* const* KernelNames() {
  static constexpr const char* kNames[] = {kTable[0].name, kTable[1].name, kTable[2].name,
                                           kTable[3].name, kTable[4].name, nullptr};
  static_assert(std::size(kNames) == std::size(kTable) + 1, "a name for each kernel");
  return kNames;
}

Workspace LayOut(const Problem& p, Kernel kernel) {
  Workspace out{};
  RowOf(kernel).lay_out(p, &out);
  return out;
}

bool IsFoldable(const Problem& p) {
  bool strided = false;
  for (const Axis& x : p.axis) {
    if (x.lhs_dilation != 1 || (x.rhs_dilation != 1 && x.win > 1)) return false;
    if (x.win != x.stride || x.pad_lo != 0 || x.in != x.out * x.stride) return false;
    strided |= x.stride > 1;
  }
  return strided;
}

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
  return LayOut(p, Kernel::kGemm).bytes <= given.workspace_limit ? p : given;
}

}  // namespace convgrad
