// The plans and launches of "mma" and "mma_3xtf32" (mma.cuh).

#include "mma.cuh"

#include <algorithm>
#include <cstdint>
#include <cstdlib>

#include "../kernel.h"
#include "geometry.cuh"
#include "kernel_table.h"
#include "planning.h"
#include "platform.cuh"

namespace convgrad {

// ---- what wgmma.cu shares ---------------------------------------------------------

Rewritten AsPatches(const Problem& problem) {
  Rewritten r{problem};
  const int64_t channels = problem.in_channels;
  if (problem.groups != 1) return r;
  if (channels > 1 && (problem.dx.channel != 1 || problem.w.in_channel != 1)) return r;
  int64_t taps = 1;  // of the axes behind
  for (int i = kAxes - 1; i >= 0; --i) {
    const Axis& a = problem.axis[i];
    if (a.lhs_dilation != 1 || a.pad_lo != 0 || a.stride != a.win) return r;
    if (a.in != a.out * a.stride) return r;
    if (a.win > 1 && (a.rhs_dilation != 1 || problem.w.axis[i] != taps * channels)) {
      return r;
    }
    taps *= a.win;
  }
  const int64_t rows = problem.axis[1].win, run = problem.axis[2].win * channels;
  if (taps == 1 || (run > channels && problem.dx.axis[2] != channels)) return r;
  r.run = run;
  r.run_gap = problem.dx.axis[1] - run;
  r.plane = rows * run;
  r.plane_gap = problem.dx.axis[0] - rows * problem.dx.axis[1];
  r.problem.in_channels = taps * channels;
  r.problem.dx.channel = 1;
  r.problem.w.in_channel = 1;
  for (int i = 0; i < kAxes; ++i) {
    r.problem.dx.axis[i] *= problem.axis[i].stride;
    r.problem.w.axis[i] = 0;
    r.problem.axis[i].in = problem.axis[i].out;
    r.problem.axis[i].win = r.problem.axis[i].stride = 1;
    r.problem.axis[i].rhs_dilation = 1;
  }
  return r;
}

TapCounts CountTaps(const Problem& problem) {
  TapCounts taps{1, 1};
  for (const Axis& a : problem.axis) {
    const int64_t phases = std::min(PhaseCount(a), a.in);
    int64_t most = 0, all = 0;
    for (int64_t phase = 0; phase < phases; ++phase) {
      const int64_t count = MakePhase(a, phase).r_count;
      most = std::max(most, count);
      all += count;
    }
    taps.most *= static_cast<double>(most);
    taps.average *= static_cast<double>(all) / static_cast<double>(phases);
  }
  return taps;
}

int WidthOfRuns(const Rewritten& rewritten, const void* dx, const Epilogue& epilogue) {
  const Problem& problem = rewritten.problem;
  // Every run starts as aligned as every row does.
  Alignment runs(nullptr, SizeInBytes(problem.dtype));
  runs.Add(problem.in_channels / rewritten.run + 1, rewritten.run);
  runs.Add(problem.in_channels / rewritten.run + 1, rewritten.run + rewritten.run_gap);
  runs.Add(problem.in_channels / rewritten.plane + 1, rewritten.plane_gap);
  runs.Add(epilogue.residual);
  runs.Add(epilogue.relu);
  return problem.dx.channel == 1 || problem.in_channels == 1
             ? std::min(WidthOfDx(problem, dx), runs.Bytes())
             : 0;
}

MmaParams MakeMmaParams(const Rewritten& rewritten, int64_t tile_m, int64_t tile_n,
                        int64_t parts, const void* dy, const void* w, const void* dx,
                        const Epilogue& epilogue) {
  const Problem& problem = rewritten.problem;
  MmaParams params{};
  params.geometry = MakeGeometry<int32_t>(problem);
  params.grid = MakeTileGrid(problem, tile_m, tile_n);
  params.parts = static_cast<unsigned>(parts);
  params.dy_width = WidthOfDy(problem, dy);
  params.w_width = WidthOfW(problem, w);
  const int width = WidthOfRuns(rewritten, dx, epilogue);
  params.vector_store = width >= VectorBytes(problem.dtype);
  params.pair_store = problem.dtype != DType::kF32 && width >= 4;
  params.run = Divider<int32_t>::Make(rewritten.run);
  params.plane = Divider<int32_t>::Make(rewritten.plane);
  params.run_gap = static_cast<int32_t>(rewritten.run_gap);
  params.plane_gap = static_cast<int32_t>(rewritten.plane_gap);
  params.epilogue = epilogue;
  return params;
}

template <typename T>
cudaError_t EnqueueMmaReduce(cudaStream_t stream, const MmaParams& params, const T* dy,
                             const T* w, T* dx, const float4* partial) {
  const int64_t strips = static_cast<int64_t>(params.grid.total) *
                         (params.grid.tile_m * params.grid.tile_n / kMmaStripElements);
  return CU_LAUNCH((MmaReduceKernel<T>),
                   dim3(static_cast<unsigned>(CeilDiv(strips, kMmaReduceWarps))),
                   dim3(kMmaReduceWarps * 32), 0, stream, params, dy, w, dx, partial);
}
template cudaError_t EnqueueMmaReduce(cudaStream_t, const MmaParams&,
                                      const __nv_bfloat16*, const __nv_bfloat16*,
                                      __nv_bfloat16*, const float4*);
template cudaError_t EnqueueMmaReduce(cudaStream_t, const MmaParams&, const __half*,
                                      const __half*, __half*, const float4*);
template cudaError_t EnqueueMmaReduce(cudaStream_t, const MmaParams&, const float*,
                                      const float*, float*, const float4*);

namespace {

constexpr int64_t kMaxParts = 32;
constexpr int64_t kMinSlicesOfPart =
    8;  // fewer, and filling the ring is most of the work
constexpr int64_t kMaxWorkspaceBytes = int64_t{64} << 20;

// ---- how wide copies may be -------------------------------------------------------

// Whether chunks are aligned and exist as a whole or not at all.
bool IsWide(const Problem& problem, const void* dy, const void* w) {
  const int64_t chunk = kMmaChunkBytes / SizeInBytes(problem.dtype);
  return problem.in_channels % chunk == 0 && problem.out_channels % chunk == 0 &&
         WidthOfDy(problem, dy) == kMmaChunkBytes &&
         WidthOfW(problem, w) == kMmaChunkBytes;
}

// ---- tiles ------------------------------------------------------------------------

struct TileChoice {
  int64_t m, n, k, threads, shared_bytes, resident;
  // Estimates: the part of the tensor cores' rate that a full multiprocessor reaches, and
  // how many warps make it full. Three products for a load need fewer.
  double efficiency, warps_when_full;
};

template <typename T, bool kThreeProducts, int kM, int kN>
constexpr TileChoice ChoiceOf(double efficiency) {
  using S = MmaTile<T, kThreeProducts, kM, kN>;
  return {S::kM,           S::kN,         S::kK,      S::kThreads,
          S::kSharedBytes, S::kMinBlocks, efficiency, kThreeProducts ? 8.0 : 12.0};
}

// The first is only for wide copies and one product.
template <typename T, bool kThreeProducts>
constexpr TileChoice kChoices[] = {
    ChoiceOf<T, kThreeProducts, 128, 128>(1.0),
    ChoiceOf<T, kThreeProducts, 128, 64>(0.9),
    ChoiceOf<T, kThreeProducts, 64, 64>(0.75),
};

// ---- plans ------------------------------------------------------------------------

// What narrow copies cost, as a factor of the time: an estimate, by the number of
// instructions.
double CopyPenalty(int width) {
  return width >= 16 ? 1.0 : width == 8 ? 1.1 : width == 4 ? 1.3 : 1.8;
}

// What a problem cut up like this costs. Blocks are dealt out to multiprocessors; each
// shares the tensor cores of one with as many as fit beside it, and they take that many
// warps to keep busy.
Cost CostOf(const Problem& problem, const TileChoice& tile, int64_t tiles, int64_t parts,
            const TapCounts& taps, double products_per_us, int width) {
  constexpr double kStartUs = 1.0;  // of a block, until the first slice is there
  const int64_t rounds = CeilDiv(tiles * parts, ReferenceGpu::kMultiprocessors);
  const int64_t beside = std::min(rounds, tile.resident);
  const double busy = std::min(
      1.0, static_cast<double>(beside * tile.threads) / 32 / tile.warps_when_full);
  const double rate = products_per_us / ReferenceGpu::kMultiprocessors * tile.efficiency /
                      CopyPenalty(width);
  const double products_of_tap = static_cast<double>(
      tile.m * tile.n * CeilDiv(problem.out_channels, tile.k) * tile.k);
  const double average = products_of_tap * taps.average / static_cast<double>(parts);
  const double longest = products_of_tap * taps.most / static_cast<double>(parts);
  const double multiply_us =
      std::max(static_cast<double>(rounds) * average, longest) / (rate * busy) +
      kStartUs * static_cast<double>(CeilDiv(rounds, tile.resident));
  const double copy_us = BytesMoved(problem) / ReferenceGpu::kCopyBytesPerUs;
  Cost cost{1, 0, multiply_us, copy_us, 0};
  if (parts > 1) {
    const double partial_bytes = static_cast<double>(tiles * parts * tile.m * tile.n) * 4;
    cost.launches += 1;
    cost.fixed_us += 2 * partial_bytes / ReferenceGpu::kCopyBytesPerUs;
  }
  return cost;
}

template <typename T, bool kThreeProducts>
bool PlanTyped(const Problem& given, double products_per_us, Plan* plan) {
  const Problem problem = AsPatches(given).problem;
  if (problem.dy.channel != 1 && problem.out_channels > 1) return false;
  if (problem.w.in_channel != 1 && problem.in_channels > 1) return false;
  const int64_t images = ImagesIn32Bits(problem, kMmaSlack);
  if (images == 0) return false;
  const bool whole = images == problem.batch;
  const int width = std::min(WidthOfDy(problem, nullptr), WidthOfW(problem, nullptr));
  const TapCounts taps = CountTaps(problem);
  const Correction correction =
      CorrectionOf(kThreeProducts ? "mma_3xtf32" : "mma", problem);
  bool found = false;
  for (const TileChoice& tile : kChoices<T, kThreeProducts>) {
    if (tile.n == 128 && (kThreeProducts || !IsWide(problem, nullptr, nullptr))) continue;
    const int64_t tiles = CountTiles(problem, tile.m, tile.n);
    const double slices =
        taps.most * static_cast<double>(CeilDiv(problem.out_channels, tile.k));
    for (int64_t parts = 1; parts <= kMaxParts; ++parts) {
      const int64_t bytes = parts == 1 ? 0 : parts * tiles * tile.m * tile.n * 4;
      if (parts > 1 &&
          (!whole || slices < static_cast<double>(parts * kMinSlicesOfPart) ||
           bytes > std::min(kMaxWorkspaceBytes, given.workspace_limit))) {
        break;
      }
      if (tiles * parts > kMaxBlocks) break;
      const Cost cost = CostOf(problem, tile, tiles, parts, taps, products_per_us, width);
      const double us = ModelUs(cost, correction);
      if (found && us >= plan->model_us) continue;
      found = true;
      plan->workspace_bytes = bytes;
      plan->tile_m = tile.m;
      plan->tile_n = tile.n;
      plan->tile_k = tile.k;
      plan->stages = kMmaStages;
      plan->split_k = parts;
      plan->blocks = tiles * parts;
      plan->threads = tile.threads;
      plan->resident = tile.resident;
      plan->shared_bytes = tile.shared_bytes;
      plan->cost = cost;
      plan->model_us = us;
    }
  }
  return found;
}

// ---- launches ---------------------------------------------------------------------

template <typename T, bool kThreeProducts, int kM, int kN, bool kWide>
cudaError_t Enqueue(cudaStream_t stream, const MmaParams& params, const T* dy, const T* w,
                    T* dx, float4* partial) {
  static_assert(sizeof(MmaParams) + 4 * sizeof(void*) <= kMaxParameterBytes,
                "the kernel's parameters must fit in constant memory's 4 KiB");
  using S = MmaTile<T, kThreeProducts, kM, kN>;
  return CU_LAUNCH((MmaKernel<T, kThreeProducts, kM, kN, kWide>),
                   dim3(params.grid.total * params.parts), dim3(S::kThreads),
                   S::kSharedBytes, stream, params, dy, w, dx, partial);
}

// One part of the batch.
template <typename T, bool kThreeProducts>
cudaError_t EnqueuePart(cudaStream_t stream, const Rewritten& rewritten, const Plan& plan,
                        const T* dy, const T* w, T* dx, float4* partial,
                        const Epilogue& epilogue) {
  const Problem& problem = rewritten.problem;
  const bool wide = IsWide(problem, dy, w);
  const int64_t tile_m = plan.tile_m;
  // A plan assumes aligned arrays. If they are not, half a tile takes twice as many
  // blocks and no more workspace.
  const int64_t tile_n = wide ? plan.tile_n : std::min<int64_t>(plan.tile_n, 64);
  const MmaParams params =
      MakeMmaParams(rewritten, tile_m, tile_n, plan.split_k, dy, w, dx, epilogue);
  const auto enqueue = [&] {
    if constexpr (!kThreeProducts) {
      if (tile_n == 128) {
        return Enqueue<T, kThreeProducts, 128, 128, true>(stream, params, dy, w, dx,
                                                          partial);
      }
    }
    if (tile_m == 128) {
      return wide ? Enqueue<T, kThreeProducts, 128, 64, true>(stream, params, dy, w, dx,
                                                              partial)
                  : Enqueue<T, kThreeProducts, 128, 64, false>(stream, params, dy, w, dx,
                                                               partial);
    }
    return wide ? Enqueue<T, kThreeProducts, 64, 64, true>(stream, params, dy, w, dx,
                                                           partial)
                : Enqueue<T, kThreeProducts, 64, 64, false>(stream, params, dy, w, dx,
                                                            partial);
  };
  const cudaError_t status = enqueue();
  if (status != cudaSuccess || plan.split_k == 1) return status;
  return EnqueueMmaReduce<T>(stream, params, dy, w, dx, partial);
}

template <typename T, bool kThreeProducts>
const char* LaunchTyped(cudaStream_t stream, const Problem& problem, const Plan& plan,
                        const void* dy, const void* w, void* dx, void* workspace,
                        const Epilogue& epilogue) {
  Rewritten rewritten = AsPatches(problem);
  const auto launch = [&](const Problem& part, const T* dy_part, T* dx_part,
                          const Epilogue& epilogue_part) {
    rewritten.problem = part;
    return EnqueuePart<T, kThreeProducts>(stream, rewritten, plan, dy_part,
                                          static_cast<const T*>(w), dx_part,
                                          static_cast<float4*>(workspace), epilogue_part);
  };
  const Problem whole = rewritten.problem;
  return ErrorText(LaunchInParts<T>(whole, kMmaSlack, dy, dx, epilogue, launch));
}

}  // namespace

bool PlanMma(const Problem& problem, int64_t, Plan* plan) {
  switch (problem.dtype) {
    case DType::kF64: return false;
    case DType::kF32:
      return problem.allow_tf32 &&
             PlanTyped<float, false>(problem, ReferenceGpu::kMmaTf32PerUs, plan);
    case DType::kBF16:
      return PlanTyped<__nv_bfloat16, false>(problem, ReferenceGpu::kMma16PerUs, plan);
    case DType::kF16:
      return PlanTyped<__half, false>(problem, ReferenceGpu::kMma16PerUs, plan);
  }
  return false;
}

const char* LaunchMma(CUstream_st* stream, const Problem& problem, const Plan& plan,
                      const void* dy, const void* w, void* dx, void* workspace,
                      const Epilogue& epilogue) {
  switch (problem.dtype) {
    case DType::kF64: break;
    case DType::kF32:
      return LaunchTyped<float, false>(stream, problem, plan, dy, w, dx, workspace,
                                       epilogue);
    case DType::kBF16:
      return LaunchTyped<__nv_bfloat16, false>(stream, problem, plan, dy, w, dx,
                                               workspace, epilogue);
    case DType::kF16:
      return LaunchTyped<__half, false>(stream, problem, plan, dy, w, dx, workspace,
                                        epilogue);
  }
  return "the mma kernel takes no float64";
}

bool PlanMma3xTf32(const Problem& problem, int64_t, Plan* plan) {
  return problem.dtype == DType::kF32 &&
         PlanTyped<float, true>(problem, ReferenceGpu::kMmaTf32PerUs / 3, plan);
}

const char* LaunchMma3xTf32(CUstream_st* stream, const Problem& problem, const Plan& plan,
                            const void* dy, const void* w, void* dx, void* workspace,
                            const Epilogue& epilogue) {
  return LaunchTyped<float, true>(stream, problem, plan, dy, w, dx, workspace, epilogue);
}

}  // namespace convgrad
