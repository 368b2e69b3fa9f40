#include "choose.h"

#include <algorithm>
#include <cstring>

#include "../../phase.h"

namespace convgrad {
namespace {

// Stores between which others lie, as along rows of a channels-first dX: each costs as
// much as one of a whole cache line.
bool StoresApart(const Problem& p) { return p.dx.axis[2] == 1 && p.in_channels > 1; }

// Whether taps reach so little of dX that the gemm kernel, which visits live phases alone
// once dX is cleared as a whole, is the fastest.
bool IsMostlyZeros(const Problem& p) {
  return LivePart(p) <= (StoresApart(p) ? 0.25 : 0.125);
}

constexpr int64_t kFewChannels = 4;  // fewer than that waste a gemm's lanes

// Whether few_channels_dot beats gemm, whose vectors hold `columns` of dX. Counted in
// vectors for each position of dX, folded or not: multiply-adds, and for each sum of the
// former four more to add it up across lanes and store it, while the latter's loads,
// one for each multiply-add, cost it a quarter more. But gemm has bfloat16 arithmetic,
// and wastes fewer lanes of float64.
bool DotsAreFaster(const Problem& p, int64_t columns) {
  if (columns <= kFewChannels && p.dtype != DType::kF64) return true;
  if (columns > kMaxFewChannels || p.dtype == DType::kBF16) return false;
  const int64_t lanes = 64 / AccBytes(p);
  double taps = 1.0 * Taps(p);
  for (const Axis& x : p.axis) taps /= static_cast<double>(PhaseCount(x));
  const double vectors = taps * CeilDiv(p.out_channels, lanes);
  return static_cast<double>(columns) * (vectors + 4) <=
         1.25 * taps * p.out_channels * CeilDiv(columns, lanes);
}

// Channels-first: copying a window of dY is cheap.
bool LiesInRows(const Problem& p) { return p.dx.axis[2] == 1 && p.dy.axis[2] == 1; }

bool RowsFillVectors(const Problem& p) { return PhasePositions(p.axis[2]) >= kLongRow; }

// Whether pixels in lanes beat channels in lanes, for up to kMaxFewChannels of them: on
// rows that fill vectors, if dY has so few channels that a gemm's sums are short.
bool FewChannelsBeatGemm(const Problem& p) {
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

// Whether the depthwise kernel's permutations, where groups have several channels, cost
// more than they save. In float64 they span several vectors.
bool PermutesTooMuch(const Problem& p) {
  constexpr int64_t kLargeGroup = 6;
  if (p.in_channels <= 2 && p.out_channels >= kLargeGroup) return true;
  return p.dtype == DType::kF64 && std::max(p.in_channels, p.out_channels) > 1;
}

// Or whether its vectors would be nearly empty.
bool DepthwiseIsSlow(const Problem& p) {
  constexpr int64_t kFewGroups = 10;
  if (p.in_channels == 1 && p.out_channels == 1) return p.groups < 4;
  return p.groups <= kFewGroups || PermutesTooMuch(p);
}

bool Takes(Kernel kernel, const Problem& p) { return RowOf(kernel).takes(p); }

// Of gemm's matrix product, whatever workspace there is: a plan's own has to lead to the
// same choice as none.
int64_t Columns(const Problem& p) {
  Problem free = p;
  free.workspace_limit = INT64_MAX;
  return Folded(free).in_channels;
}

// Groups so small that pixels may be in lanes as well as channels.
bool HasSmallGroups(const Problem& p) {
  return std::max(p.in_channels, p.out_channels) <= kMaxFewChannels;
}

Chosen Named(Kernel kernel) { return {kernel, RowOf(kernel).name}; }

// few_channels by the name of depthwise, whose place it takes.
Chosen DepthwiseByPixels() {
  return {Kernel::kFewChannels, RowOf(Kernel::kDepthwise).name};
}

bool ChooseByName(const Problem& p, const char* name, Chosen* chosen) {
  for (const Kernel kernel : kKernels) {
    if (std::strcmp(name, RowOf(kernel).name) != 0) continue;
    *chosen = Named(kernel);
    if (Takes(kernel, p)) return true;
    if (kernel != Kernel::kDepthwise || !HasSmallGroups(p)) return false;
    *chosen = DepthwiseByPixels();
    return Takes(Kernel::kFewChannels, p);
  }
  return false;
}

Chosen ChooseForGroups(const Problem& p) {
  const bool depthwise = Takes(Kernel::kDepthwise, p);
  const bool few_channels = HasSmallGroups(p) && Takes(Kernel::kFewChannels, p);
  if (HasSmallGroups(p) && DepthwiseIsSlow(p)) {
    // The kernel gathers a row of each channel. In float64 that is a cache line for each
    // pixel, and every group fetches the same lines for a little of each.
    constexpr int64_t kManyGroups = 32;
    const bool cheap = LiesInRows(p) || p.dtype != DType::kF64 || p.groups < kManyGroups;
    if (cheap && RowsFillVectors(p) && few_channels) return Named(Kernel::kFewChannels);
    if (depthwise && PermutesTooMuch(p)) return Named(Kernel::kGemm);
  }
  if (depthwise) return Named(Kernel::kDepthwise);
  if (few_channels && LiesInRows(p)) return DepthwiseByPixels();
  const bool few = Columns(p) <= kFewChannels;
  return Named(few && Takes(Kernel::kFewChannels, p) ? Kernel::kFewChannels
                                                     : Kernel::kGemm);
}

Chosen ChooseDense(const Problem& p) {
  if (IsMostlyZeros(p)) return Named(Kernel::kGemm);
  const int64_t columns = Columns(p);
  const bool few_channels = Takes(Kernel::kFewChannels, p);
  if (few_channels && columns == p.in_channels && FewChannelsBeatGemm(p)) {
    return Named(Kernel::kFewChannels);
  }
  const bool dots = Takes(Kernel::kFewChannelsDot, p);
  if (dots && DotsAreFaster(p, columns)) return Named(Kernel::kFewChannelsDot);
  const bool few = few_channels && !dots && columns <= kFewChannels;
  return Named(few ? Kernel::kFewChannels : Kernel::kGemm);
}

}  // namespace

bool Choose(const Problem& p, const char* name, Chosen* chosen) {
  if (std::strcmp(name, "auto") != 0) return ChooseByName(p, name, chosen);
  *chosen = IsEmpty(p)     ? Named(Kernel::kDirect)
            : p.groups > 1 ? ChooseForGroups(p)
                           : ChooseDense(p);
  return true;
}

bool ClearsFirst(const Problem& p) { return LivePart(p) <= (StoresApart(p) ? 0.6 : 0.3); }

}  // namespace convgrad
