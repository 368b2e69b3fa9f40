// The plans and launches of "few_channels" and "few_channels_3xtf32" (few_channels.cuh).

#include "few_channels.cuh"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "../kernel.h"
#include "../phase.h"
#include "geometry.cuh"
#include "kernel_table.h"
#include "planning.h"
#include "platform.cuh"

namespace convgrad {
namespace {

constexpr int64_t kReservedBytes = 1024;  // of shared memory, for each block

// ---- how a problem is cut up ------------------------------------------------------

// What does not depend on the choices of a plan.
struct FewProblem {
  bool taken;
  FewShape shape;
  int64_t planes;        // (image, position on the first axis)
  int64_t taps, phases;  // along the rows
  int64_t u_first, u_count, apart;
  int64_t most_taps_last, q_low, q_high, positions_all;
  int64_t slices;
};

FewProblem Analyse(const Problem& problem, bool three_products) {
  FewProblem few{};
  const Axis &plane = problem.axis[0], &rows = problem.axis[1], &last = problem.axis[2];
  if (problem.dtype == DType::kF64 || problem.groups != 1) return few;
  if (problem.dy.channel != 1 && problem.out_channels > 1) return few;
  if (problem.out_channels == 0) return few;
  for (const Axis& a : problem.axis) {
    if (a.lhs_dilation != 1 || a.win == 0 || a.out == 0) return few;
    if (PhaseCount(a) > kTabledPhases) return few;
  }
  if (plane.win != 1 || plane.stride != 1 || plane.pad_lo != 0 || plane.in != plane.out) {
    return few;
  }
  few.planes = problem.batch * plane.in;

  int64_t u_last = INT64_MIN;
  few.u_first = INT64_MAX;
  few.phases = std::min(PhaseCount(rows), rows.in);
  for (int64_t i = 0; i < few.phases; ++i) {
    const Phase phase = MakePhase(rows, i);
    few.taps = std::max(few.taps, phase.r_count);
    few.u_first = std::min(few.u_first, phase.p0);
    u_last = std::max(u_last, phase.p0 + phase.h_count - 1);
  }
  few.u_count = u_last - few.u_first + 1;
  few.apart = MakePhase(rows, 0).p_per_r;
  few.taps = std::max<int64_t>(few.taps, 1);
  if (few.taps > kFewMostTaps) return few;
  few.q_low = INT64_MAX;
  few.q_high = INT64_MIN;
  for (int64_t i = 0; i < std::min(PhaseCount(last), last.in); ++i) {
    const Phase phase = MakePhase(last, i);
    if (phase.r_count == 0) continue;
    few.most_taps_last = std::max(few.most_taps_last, phase.r_count);
    few.q_low = std::min(few.q_low, phase.p0 - (phase.r_count - 1) * phase.p_per_r);
    few.q_high = std::max(few.q_high, phase.p0);
  }
  if (few.most_taps_last >= 1 << kFewCountBits) return few;
  if (few.most_taps_last == 0) few.q_low = few.q_high = 0;
  few.positions_all = CeilDiv(last.in, PhaseCount(last));

  few.slices = CeilDiv(problem.out_channels * SizeInBytes(problem.dtype), kFewSliceBytes);
  few.shape = FewShapeOf(three_products, few.taps, few.slices);
  few.taken = true;
  return few;
}

// A choice of phases and warps for a block, and what follows from it.
struct FewLayout {
  int64_t phases, phase_groups, columns;
  int64_t column_tiles, slices_of_part, parts, pixel_warps, warps;
  int64_t positions, tiles;
  int64_t copied, pixels;  // of a row of dY; the latter are whole tiles of products
  int64_t pixel_bytes, stage_bytes, z_pitch, z_part, z_buffer;
  int64_t z_at, table_at, runs_at, shared_bytes;
};

// False if it needs more shared memory than that.
bool MakeLayout(const Problem& problem, const FewProblem& few, int64_t phases,
                int64_t pixel_warps, int64_t shared_bytes, FewLayout* layout) {
  FewLayout& l = *layout;
  const Axis& last = problem.axis[2];
  const int64_t size = SizeInBytes(problem.dtype);
  l.phases = phases;
  l.phase_groups = CeilDiv(few.phases, phases);
  l.columns = phases * last.win * problem.in_channels;
  l.column_tiles = CeilDiv(l.columns, kFewColumns);
  l.parts = CeilDiv(few.slices, few.shape.slices);
  l.slices_of_part = CeilDiv(few.slices, l.parts);
  l.parts = CeilDiv(few.slices, l.slices_of_part);
  l.pixel_warps = pixel_warps;
  l.warps = l.column_tiles * l.parts * pixel_warps;
  if (l.columns > kFewColumns * few.shape.warps || l.warps > few.shape.warps)
    return false;

  // All positions of a row in one tile, if that many pixels are a block's, else as many
  // as leave a tile aligned.
  const int64_t capacity = pixel_warps * few.shape.tiles * kFewTilePixels;
  const int64_t halo = few.q_high - few.q_low;
  l.positions = RoundUp(few.positions_all, kFewTilePixels);
  if (std::min(last.out, few.positions_all + halo) > capacity) {
    const int64_t most = (capacity - halo) / kFewTilePixels * kFewTilePixels;
    if (most <= 0) return false;
    l.positions = RoundUp(CeilDiv(few.positions_all, CeilDiv(few.positions_all, most)),
                          kFewTilePixels);
  }
  l.tiles = CeilDiv(few.positions_all, l.positions);
  l.copied = std::min(last.out, std::min(l.positions, few.positions_all) + halo);
  l.pixels = RoundUp(l.copied, kFewTilePixels);
  if (pixel_warps > 1 && pixel_warps > l.pixels / kFewTilePixels) return false;

  l.pixel_bytes = few.slices * kFewSliceBytes + kMmaChunkBytes;
  l.stage_bytes = l.pixels * l.pixel_bytes;
  // Neighbouring outputs are in columns of all channels and phases; each gets its share
  // of the banks.
  constexpr int64_t kBanks = 32;
  const int64_t apart =
      RoundUp(CeilDiv(kBanks, problem.in_channels * PhaseCount(last)), 2) % kBanks;
  l.z_pitch = l.pixels + (apart - l.pixels % kBanks + kBanks) % kBanks;
  l.z_part = l.columns * l.z_pitch;
  l.z_buffer = l.parts * l.z_part;
  const int64_t outputs =
      std::min(l.positions * PhaseCount(last), last.in) * problem.in_channels;
  l.z_at = kFewStages * l.stage_bytes;
  l.table_at = l.z_at + 2 * l.z_buffer * 4;
  l.runs_at = RoundUp(l.table_at + outputs * 4, kMmaChunkBytes);
  l.shared_bytes = l.runs_at + l.warps * kFewRun * size;
  return l.shared_bytes + kReservedBytes <= shared_bytes &&
         l.z_part < int64_t{1} << (32 - kFewCountBits);
}

// The strips of a group of phases.
int64_t CountStrips(const FewProblem& few, const FewLayout& layout, int64_t rows) {
  const int64_t classes = std::min(few.apart, few.u_count);
  return few.planes * classes * CeilDiv(CeilDiv(few.u_count, few.apart), rows) *
         layout.tiles;
}

int64_t ResidentBlocks(const FewProblem& few, const FewLayout& layout) {
  return std::max<int64_t>(
      1, std::min(few.shape.warps / layout.warps,
                  ReferenceGpu::kSharedBytes / (layout.shared_bytes + kReservedBytes)));
}

// ---- plans ------------------------------------------------------------------------

// Estimates, all of them: no measurement has corrected them. What a step (a row of a
// strip) asks of a multiprocessor, in instructions of a warp, in bytes of shared memory
// and in products; and how many cycles it takes a block that is alone.
constexpr double kSharedBytesPerCycle = 128;
constexpr double kIssuedPerCycle = 4 * 0.8;
constexpr double kTensorEfficiency = 0.85;
constexpr double kStripUs = 1.5;  // until the first row is there
constexpr double kBlockUs = 2.0;  // until the filter is in registers

Cost CostOf(const Problem& problem, const FewProblem& few, const FewLayout& layout,
            int64_t rows, double products_per_us) {
  const auto real = [](int64_t v) { return static_cast<double>(v); };
  const double size = real(SizeInBytes(problem.dtype));
  const Axis& last = problem.axis[2];
  const int64_t strips = CountStrips(few, layout, rows) * layout.phase_groups;
  const int64_t resident = std::min(ResidentBlocks(few, layout),
                                    CeilDiv(strips, ReferenceGpu::kMultiprocessors));
  const int64_t rounds = CeilDiv(strips, ReferenceGpu::kMultiprocessors * resident);

  const double warps = real(layout.warps);
  const double row_outputs =
      real(std::min(layout.positions * PhaseCount(last), last.in) * problem.in_channels);
  const double jobs = real(layout.phases) * std::ceil(row_outputs / kFewRun);
  const double copies =
      real(layout.copied * few.slices * (kFewSliceBytes / kMmaChunkBytes)) / 32 *
      (WidthOfDy(problem, nullptr) >= 8 ? 1.0 : 4.0);
  const double warp_tiles =
      real(layout.column_tiles * layout.parts * (layout.pixels / kFewTilePixels));
  const double multiplies = warp_tiles * real(layout.slices_of_part * 2 * few.shape.taps);
  const double products = multiplies * kFewColumns * kFewTilePixels * 32 / size;
  // Elements of z that a job reads, and instructions for each.
  const double terms = real(layout.parts * few.most_taps_last) * kFewRunPerLane;

  const double issued = 14 * copies + 1.3 * multiplies + 16 * warp_tiles +
                        jobs * (100 + 3 * terms) + 80 * warps;
  const double shared_bytes =
      real(layout.copied * few.slices * kFewSliceBytes * (1 + layout.column_tiles)) +
      4 * real(layout.z_buffer) + 128 * jobs * (terms + 6);
  const double copied_bytes =
      (real(layout.copied * problem.out_channels) + real(layout.phases) * row_outputs) *
      size;
  const double alone_us = (300 + 12 * copies / warps + 8 * multiplies / warps +
                           std::ceil(jobs / warps) * (150 + 10 * terms)) /
                          ReferenceGpu::kCyclesPerUs;
  const double shared_us = std::max(
      {copied_bytes / (ReferenceGpu::kCopyBytesPerUs / ReferenceGpu::kMultiprocessors),
       products / (products_per_us / ReferenceGpu::kMultiprocessors * kTensorEfficiency),
       shared_bytes / (kSharedBytesPerCycle * ReferenceGpu::kCyclesPerUs),
       issued / (kIssuedPerCycle * ReferenceGpu::kCyclesPerUs)});
  const double step_us = std::max(real(resident) * shared_us, alone_us);
  const double steps =
      real(std::min(rows, CeilDiv(few.u_count, few.apart)) + few.taps - 1);
  const double us = real(rounds) * (steps * step_us + kStripUs) + kBlockUs;
  return {1, 0, us, BytesMoved(problem) / ReferenceGpu::kCopyBytesPerUs, 0};
}

bool PlanFew(const Problem& problem, bool three_products, double products_per_us,
             int64_t shared_bytes, Plan* plan) {
  const FewProblem few = Analyse(problem, three_products);
  if (!few.taken || ImagesIn32Bits(problem, kFewSlack) == 0) return false;
  const Correction correction =
      CorrectionOf(three_products ? "few_channels_3xtf32" : "few_channels", problem);
  bool found = false;
  for (int64_t groups = 1; groups <= few.phases; ++groups) {
    const int64_t phases = CeilDiv(few.phases, groups);
    if (CeilDiv(few.phases, phases) != groups) continue;
    bool fits = false;
    for (int64_t pixel_warps = 1; pixel_warps <= few.shape.warps; ++pixel_warps) {
      FewLayout layout{};
      if (!MakeLayout(problem, few, phases, pixel_warps, shared_bytes, &layout)) continue;
      fits = true;
      const int64_t most_rows = CeilDiv(few.u_count, few.apart);
      for (int64_t cuts = 1; cuts <= most_rows; cuts *= 2) {
        const int64_t rows = CeilDiv(most_rows, cuts);
        const int64_t strips = CountStrips(few, layout, rows);
        if (strips * layout.phase_groups > kMaxBlocks) break;
        const Cost cost = CostOf(problem, few, layout, rows, products_per_us);
        const double us = ModelUs(cost, correction);
        if (found && us >= plan->model_us) continue;
        found = true;
        const int64_t at_once =
            std::max<int64_t>(1, ReferenceGpu::kMultiprocessors *
                                     ResidentBlocks(few, layout) / layout.phase_groups);
        plan->workspace_bytes = 0;
        plan->tile_m = rows * layout.positions;
        plan->tile_n = layout.columns;
        plan->tile_k =
            layout.slices_of_part * kFewSliceBytes / SizeInBytes(problem.dtype);
        plan->stages = kFewStages;
        plan->split_k = 1;
        plan->blocks = std::min(strips, at_once) * layout.phase_groups;
        plan->threads = layout.warps * 32;
        plan->resident = ResidentBlocks(few, layout);
        plan->shared_bytes = layout.shared_bytes;
        plan->cost = cost;
        plan->model_us = us;
      }
    }
    // More groups read dY more often.
    if (fits) break;
  }
  return found;
}

// ---- launches ---------------------------------------------------------------------

int StoreBytes(const Problem& problem, const void* dx, const Epilogue& epilogue) {
  const int64_t channels = problem.in_channels;
  if (problem.dx.channel != 1 && channels > 1) return 0;
  if (problem.dx.axis[2] != channels && problem.axis[2].in > 1) return 0;
  Alignment rows(dx, SizeInBytes(problem.dtype));
  rows.Add(epilogue.residual);
  rows.Add(epilogue.relu);
  rows.Add(problem.batch, problem.dx.batch);
  for (int i = 0; i < 2; ++i) rows.Add(problem.axis[i].in, problem.dx.axis[i]);
  return rows.Bytes();
}

FewParams MakeFewParams(const Problem& problem, const FewProblem& few,
                        const FewLayout& layout, int64_t rows, const void* dy,
                        const void* dx, const Epilogue& epilogue) {
  const auto i32 = [](int64_t v) { return static_cast<int32_t>(v); };
  const auto u32 = [](int64_t v) { return static_cast<unsigned>(v); };
  const Axis& last = problem.axis[2];
  FewParams params{};
  params.geometry = MakeGeometry<int32_t>(problem);
  params.strips = u32(CountStrips(few, layout, rows));
  params.phase_groups = u32(layout.phase_groups);
  params.classes = u32(std::min(few.apart, few.u_count));
  params.row_parts = u32(CeilDiv(CeilDiv(few.u_count, few.apart), rows));
  params.tiles = u32(layout.tiles);
  params.rows = i32(rows);
  params.u_first = i32(few.u_first);
  params.u_count = i32(few.u_count);
  params.taps = i32(few.taps);
  params.phases = i32(layout.phases);
  params.phase_count = i32(few.phases);
  params.columns_of_phase = i32(last.win * problem.in_channels);
  params.positions = i32(layout.positions);
  params.positions_all = i32(few.positions_all);
  params.q_low = i32(few.q_low);
  params.q_high = i32(few.q_high);
  params.most_taps_last = i32(few.most_taps_last);
  params.channels = Divider<int32_t>::Make(problem.in_channels);
  params.chunks = Divider<int32_t>::Make(few.slices * (kFewSliceBytes / kMmaChunkBytes));
  params.runs = Divider<int32_t>::Make(CeilDiv(
      std::min(layout.positions * PhaseCount(last), last.in) * problem.in_channels,
      kFewRun));
  params.column_tiles = i32(layout.column_tiles);
  params.parts = i32(layout.parts);
  params.pixel_warps = i32(layout.pixel_warps);
  params.slices = i32(few.slices);
  params.slices_of_part = i32(layout.slices_of_part);
  params.pixel_bytes = i32(layout.pixel_bytes);
  params.stage_bytes = i32(layout.stage_bytes);
  params.z_pitch = i32(layout.z_pitch);
  params.z_step =
      params.geometry.axis[2].r_step * i32(problem.in_channels * layout.z_pitch) -
      params.geometry.axis[2].p_per_r.divisor;
  params.z_part = i32(layout.z_part);
  params.z_buffer = i32(layout.z_buffer);
  params.z_at = i32(layout.z_at);
  params.table_at = i32(layout.table_at);
  params.runs_at = i32(layout.runs_at);
  params.dy_width = WidthOfDy(problem, dy);
  params.dy_wide =
      params.dy_width == kMmaChunkBytes &&
      problem.out_channels * SizeInBytes(problem.dtype) % kMmaChunkBytes == 0;
  params.store_bytes = StoreBytes(problem, dx, epilogue);
  params.epilogue = epilogue;
  return params;
}

template <typename T, bool kThreeProducts>
cudaError_t Enqueue(cudaStream_t stream, const FewProblem& few, const FewParams& params,
                    const Plan& plan, int64_t blocks, const T* dy, const T* w, T* dx) {
  static_assert(sizeof(FewParams) + 3 * sizeof(void*) <= kMaxParameterBytes,
                "the kernel's parameters must fit in constant memory's 4 KiB");
  const auto launch = [&](auto* kernel) {
    return CU_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)),
                     dim3(static_cast<unsigned>(plan.threads)),
                     static_cast<int>(plan.shared_bytes), stream, params, dy, w, dx);
  };
  const auto pick = [&](auto taps, auto slices) {
    constexpr FewShape kShape =
        FewShapeOf(kThreeProducts, decltype(taps)::value, decltype(slices)::value);
    return launch(
        FewChannelsKernel<T, kThreeProducts, kShape.taps, kShape.slices, kShape.tiles>);
  };
  const auto pick_slices = [&](auto taps) {
    switch (few.shape.slices) {
      case 1: return pick(taps, std::integral_constant<int, 1>{});
      case 2: return pick(taps, std::integral_constant<int, 2>{});
      default: return pick(taps, std::integral_constant<int, 3>{});
    }
  };
  switch (few.shape.taps) {
    case 1: return pick_slices(std::integral_constant<int, 1>{});
    case 2: return pick_slices(std::integral_constant<int, 2>{});
    case 3: return pick_slices(std::integral_constant<int, 3>{});
    case 4: return pick_slices(std::integral_constant<int, 4>{});
    default: return pick_slices(std::integral_constant<int, kFewMostTaps>{});
  }
}

template <typename T, bool kThreeProducts>
const char* LaunchFew(cudaStream_t stream, const Problem& problem, const Plan& plan,
                      const void* dy, const void* w, void* dx, const Epilogue& epilogue) {
  constexpr const char* kRefused = "the few_channels kernel does not take this problem";
  FewProblem few = Analyse(problem, kThreeProducts);
  if (!few.taken) return kRefused;
  // A plan names what it chose.
  FewLayout layout{};
  const int64_t phases = plan.tile_n / (problem.axis[2].win * problem.in_channels);
  const int64_t warps =
      CeilDiv(plan.tile_n, kFewColumns) *
      CeilDiv(few.slices * kFewSliceBytes, plan.tile_k * SizeInBytes(problem.dtype));
  if (!MakeLayout(problem, few, phases, plan.threads / 32 / warps,
                  plan.shared_bytes + kReservedBytes, &layout)) {
    return kRefused;
  }
  const int64_t rows = plan.tile_m / layout.positions;
  const auto launch = [&](const Problem& part, const T* dy_part, T* dx_part,
                          const Epilogue& epilogue_part) {
    few.planes = part.batch * part.axis[0].in;
    FewParams params =
        MakeFewParams(part, few, layout, rows, dy_part, dx_part, epilogue_part);
    params.strip_step =
        std::min(params.strips, static_cast<unsigned>(plan.blocks / layout.phase_groups));
    const int64_t blocks = static_cast<int64_t>(params.strip_step) * layout.phase_groups;
    return Enqueue<T, kThreeProducts>(stream, few, params, plan, blocks, dy_part,
                                      static_cast<const T*>(w), dx_part);
  };
  return ErrorText(LaunchInParts<T>(problem, kFewSlack, dy, dx, epilogue, launch));
}

}  // namespace

bool PlanFewChannels(const Problem& problem, int64_t shared_bytes, Plan* plan) {
  if (problem.dtype == DType::kF32) {
    return problem.allow_tf32 &&
           PlanFew(problem, false, ReferenceGpu::kMmaTf32PerUs, shared_bytes, plan);
  }
  return PlanFew(problem, false, ReferenceGpu::kMma16PerUs, shared_bytes, plan);
}

const char* LaunchFewChannels(CUstream_st* stream, const Problem& problem,
                              const Plan& plan, const void* dy, const void* w, void* dx,
                              void*, const Epilogue& epilogue) {
  switch (problem.dtype) {
    case DType::kF64: break;
    case DType::kF32:
      return LaunchFew<float, false>(stream, problem, plan, dy, w, dx, epilogue);
    case DType::kBF16:
      return LaunchFew<__nv_bfloat16, false>(stream, problem, plan, dy, w, dx, epilogue);
    case DType::kF16:
      return LaunchFew<__half, false>(stream, problem, plan, dy, w, dx, epilogue);
  }
  return "the few_channels kernel takes no float64";
}

bool PlanFewChannels3xTf32(const Problem& problem, int64_t shared_bytes, Plan* plan) {
  return problem.dtype == DType::kF32 &&
         PlanFew(problem, true, ReferenceGpu::kMmaTf32PerUs / 3, shared_bytes, plan);
}

const char* LaunchFewChannels3xTf32(CUstream_st* stream, const Problem& problem,
                                    const Plan& plan, const void* dy, const void* w,
                                    void* dx, void*, const Epilogue& epilogue) {
  return LaunchFew<float, true>(stream, problem, plan, dy, w, dx, epilogue);
}

}  // namespace convgrad
