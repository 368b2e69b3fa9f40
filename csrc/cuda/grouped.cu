// The plans and launches of "grouped" (grouped.cuh).

#include "grouped.cuh"

#include <algorithm>
#include <cstdint>

#include "../kernel.h"
#include "geometry.cuh"
#include "kernel_table.h"
#include "planning.h"
#include "platform.cuh"

namespace convgrad {
namespace {

// The smallest number from `a` on that leaves `rest` when divided by `b`.
int64_t RoundUpTo(int64_t a, int64_t rest, int64_t b) {
  return a + ((rest - a) % b + b) % b;
}

// ---- what the kernel takes --------------------------------------------------------

bool ThreeProducts(const Problem& problem) {
  return problem.dtype == DType::kF32 && !problem.allow_tf32;
}

// Whether the strides over pixels are multiples of `unit` elements. The stride of a
// dimension of size one says nothing.
bool PixelsAreAligned(const Problem& problem, const ActivationStrides& strides,
                      bool of_dx, int64_t unit) {
  if (problem.batch > 1 && strides.batch % unit != 0) return false;
  for (int i = 0; i < kAxes; ++i) {
    const int64_t size = of_dx ? problem.axis[i].in : problem.axis[i].out;
    if (size > 1 && strides.axis[i] % unit != 0) return false;
  }
  return true;
}

// Elements that loads of dY and stores of dX take at a time.
int64_t UnitOfDy(const Problem& problem) {
  return kGroupedChunkBytes / SizeInBytes(problem.dtype);
}
int64_t UnitOfDx(const Problem& problem) {
  return problem.dtype == DType::kF32 ? 2 : UnitOfDy(problem);
}

bool Takes(const Problem& problem) {
  const int64_t c = problem.in_channels, k = problem.out_channels, g = problem.groups;
  if (problem.dtype == DType::kF64 || c > kGroupedMaxChannels ||
      k > kGroupedMaxChannels || k == 0) {
    return false;
  }
  if (problem.dx.channel != 1 || problem.dy.channel != 1) return false;
  if (g > 1 && (problem.dx.group != c || problem.dy.group != k)) return false;
  return g * c % UnitOfDx(problem) == 0 && g * k % UnitOfDy(problem) == 0 &&
         PixelsAreAligned(problem, problem.dx, true, UnitOfDx(problem)) &&
         PixelsAreAligned(problem, problem.dy, false, UnitOfDy(problem));
}

// ---- how a problem is cut up ------------------------------------------------------

struct Strip {
  int tiles, share;  // kTiles and kShare
};
constexpr Strip kStrips[] = {{4, 4}, {4, 2}, {3, 3}, {4, 1}};

// What does not depend on the tile. The names are those of GroupedParams.
struct Work {
  int64_t phases[kAxes], phase_count, most_positions[kAxes];
  int64_t p_per_h[kAxes];
  int64_t lowest_p[kAxes], p_span[kAxes];  // of dY, from one position of each phase
  Strip strip;
  int64_t bundle_chunks, pairs;  // of all phases
  int64_t tiles_n;               // of 8 channels
  int64_t warp_tiles_m;
  bool three_products;
  int64_t shared_bytes;  // that a block may have
};

int64_t FirstChunkOf(const Problem& problem, int64_t c) {
  const int64_t last = problem.groups * problem.in_channels - 1;
  return std::min(c, last) / problem.in_channels * problem.out_channels /
         UnitOfDy(problem);
}

// Chunks of dY that a bundle of `share` tiles needs at most. The pattern repeats after as
// many bundles as a group has channels, if not before.
int64_t BundleChunks(const Problem& problem, int64_t share) {
  const int64_t channels = problem.groups * problem.in_channels;
  int64_t most = 0;
  for (int64_t b = 0; b < problem.in_channels && b * share * 8 < channels; ++b) {
    const int64_t last = std::min((b + 1) * share * 8, channels) - 1;
    const int64_t end = (last / problem.in_channels + 1) * problem.out_channels;
    most = std::max(
        most, CeilDiv(end, UnitOfDy(problem)) - FirstChunkOf(problem, b * share * 8));
  }
  return most;
}

// Chunks of a pixel of dY that a slab copies.
int64_t SlabChunks(const Problem& problem, const Work& work, int64_t strips) {
  const int64_t channels = problem.groups * problem.in_channels;
  const int64_t strip = work.strip.tiles * 8, bundle = work.strip.share * 8;
  int64_t most = 0;
  for (int64_t s = 0; s < problem.in_channels && s * strips * strip < channels; ++s) {
    // Bundles beyond the last channel are those of a strip that begins before it.
    const int64_t begin = s * strips * strip;
    const int64_t end =
        std::min(begin + strips * strip, RoundUp(channels, strip)) - bundle;
    most = std::max(most, FirstChunkOf(problem, end) + work.bundle_chunks -
                              FirstChunkOf(problem, begin));
  }
  return most;
}

// Pairs of chunks, over all phases.
int64_t CountPairs(const Problem& problem, const Work& work, int64_t bundle_chunks) {
  int64_t pairs = 0;
  for (int64_t id = 0; id < work.phase_count; ++id) {
    int64_t chunks = bundle_chunks, rest = id;
    for (int a = kAxes - 1; a >= 0; --a) {
      chunks *= MakePhase(problem.axis[a], rest % work.phases[a]).r_count;
      rest /= work.phases[a];
    }
    pairs += (chunks + 1) / 2;
  }
  return pairs;
}

// Wavefronts of 128 bytes of shared memory for an mma.sync, and cycles of the tensor
// cores for one.
double WavefrontsOfMma(const Work& work, Strip strip) {
  const double b = work.three_products ? 4 : 2;
  return 4.0 / strip.share + b / static_cast<double>(work.warp_tiles_m);
}
double CyclesOfMma(const Problem& problem, bool three_products) {
  const double products = 16 * 8 * (problem.dtype == DType::kF32 ? 8 : 16);
  const double per_us = problem.dtype == DType::kF32 ? ReferenceGpu::kMmaTf32PerUs
                                                     : ReferenceGpu::kMma16PerUs;
  return products * (three_products ? 3 : 1) * ReferenceGpu::kCyclesPerUs *
         static_cast<double>(ReferenceGpu::kMultiprocessors) / per_us;
}

bool MakeWork(const Problem& problem, int64_t shared_bytes, Work* work) {
  work->shared_bytes = shared_bytes;
  work->three_products = ThreeProducts(problem);
  work->warp_tiles_m = work->three_products ? 2 : 4;
  work->phase_count = 1;
  for (int a = 0; a < kAxes; ++a) {
    const Axis& axis = problem.axis[a];
    work->phases[a] = std::min(PhaseCount(axis), axis.in);
    work->phase_count *= work->phases[a];
    if (work->phase_count > kGroupedMaxPhases) return false;
    const Phase most = MakePhase(axis, 0);
    work->most_positions[a] = most.h_count;
    work->p_per_h[a] = most.p_per_h;
    int64_t low = 0, high = 0;
    bool reached = false;
    for (int64_t id = 0; id < work->phases[a]; ++id) {
      const Phase phase = MakePhase(axis, id);
      if (phase.r_count == 0) continue;
      const int64_t first = phase.p0 - (phase.r_count - 1) * phase.p_per_r;
      low = reached ? std::min(low, first) : first;
      high = reached ? std::max(high, phase.p0) : phase.p0;
      reached = true;
    }
    work->lowest_p[a] = low;
    work->p_span[a] = high - low + 1;
  }
  // The strip whose channels take the least time.
  const int64_t tiles_n = CeilDiv(problem.groups * problem.in_channels, 8);
  double least = 0;
  for (const Strip& strip : kStrips) {
    const int64_t chunks = BundleChunks(problem, strip.share);
    const int64_t pairs = CountPairs(problem, *work, chunks);
    const double cycles =
        static_cast<double>(RoundUp(tiles_n, strip.tiles) * std::max<int64_t>(pairs, 1)) *
        std::max(WavefrontsOfMma(*work, strip),
                 CyclesOfMma(problem, work->three_products));
    if (least > 0 && cycles >= least) continue;
    least = cycles;
    work->strip = strip;
    work->bundle_chunks = chunks;
    work->pairs = pairs;
    work->tiles_n = tiles_n;
  }
  return true;
}

// A slab and a tile of positions.
struct Cut {
  int64_t strips, chunks;  // of a slab; the latter by SlabChunks
  int64_t images, size[kAxes];
  // All else follows from these.
  int64_t rows, row_groups, tiles[kAxes], tile_count, dy_size[kAxes];
  int64_t pitch[kAxes], image_pitch, stage_bytes, fragment_bytes;
  int64_t slabs, parts, stages, resident, shared_bytes;
  Cost cost;
  double model_us;
};

// Fills in what follows, except the model. Returns false if a block does not fit.
bool FinishCut(const Problem& problem, const Work& work, Cut* cut) {
  constexpr int64_t kChunkBytes = kGroupedChunkBytes, kBanks = 8;  // of 16 bytes
  cut->tile_count = CeilDiv(problem.batch, cut->images);
  cut->rows = cut->images;
  for (int a = 0; a < kAxes; ++a) {
    cut->tiles[a] = CeilDiv(work.most_positions[a], cut->size[a]);
    cut->tile_count *= cut->tiles[a];
    cut->rows *= cut->size[a];
    cut->dy_size[a] = (cut->size[a] - 1) * work.p_per_h[a] + work.p_span[a];
  }
  cut->row_groups = CeilDiv(cut->rows, work.warp_tiles_m * 16);
  cut->slabs = CeilDiv(work.tiles_n, cut->strips * work.strip.tiles);
  const int64_t pixel = cut->chunks | 1;
  // In double: an absurd dilation overflows nothing.
  if (static_cast<double>(cut->images * pixel * kChunkBytes) *
          static_cast<double>(cut->dy_size[0]) * static_cast<double>(cut->dy_size[1]) *
          static_cast<double>(cut->dy_size[2]) >
      static_cast<double>(work.shared_bytes)) {
    return false;
  }
  // The step from the last position of a row, plane or image to the next one is, modulo
  // the banks, that from one position to the next.
  const int64_t row =
      RoundUpTo(pixel * cut->dy_size[2], cut->size[2] * pixel % kBanks, kBanks);
  const int64_t plane =
      RoundUpTo(row * cut->dy_size[1], cut->size[1] * row % kBanks, kBanks);
  const int64_t image =
      RoundUpTo(plane * cut->dy_size[0], cut->size[0] * plane % kBanks, kBanks);
  cut->pitch[2] = pixel * kChunkBytes;
  cut->pitch[1] = row * kChunkBytes;
  cut->pitch[0] = plane * kChunkBytes;
  cut->image_pitch = image * kChunkBytes;
  cut->stage_bytes = cut->images * cut->image_pitch;
  const int64_t slab_tiles = cut->strips * work.strip.tiles;
  cut->fragment_bytes = work.pairs * slab_tiles * kGroupedFragmentBytes;
  const int64_t table_bytes =
      cut->fragment_bytes * (work.three_products ? 2 : 1) +
      2 * work.pairs * static_cast<int64_t>(sizeof(GroupedTerm)) +
      cut->row_groups * work.warp_tiles_m * 16 *
          static_cast<int64_t>(sizeof(GroupedRow)) +
      RoundUp(work.phase_count * static_cast<int64_t>(sizeof(GroupedPhase)), 16) +
      RoundUp(cut->strips * work.strip.tiles * 4, 16);
  // As many blocks as fit on the multiprocessors, each with equally many tiles; or one a
  // tile, which then needs one stage only.
  constexpr int64_t kReserved = 1024;  // of a block, by the hardware
  const auto fit = [&](int64_t stages) {
    cut->stages = stages;
    cut->shared_bytes = stages * cut->stage_bytes + table_bytes;
    cut->resident = cut->shared_bytes > work.shared_bytes
                        ? 0
                        : std::min<int64_t>(kGroupedMinBlocks,
                                            (ReferenceGpu::kSharedBytes + kReserved) /
                                                (cut->shared_bytes + kReserved));
    return std::max<int64_t>(1,
                             cut->resident * ReferenceGpu::kMultiprocessors / cut->slabs);
  };
  const int64_t parts = fit(2);
  if (cut->resident > 0 && parts < cut->tile_count) {
    cut->parts = CeilDiv(cut->tile_count, CeilDiv(cut->tile_count, parts));
  } else {
    fit(1);
    cut->parts = cut->tile_count;
  }
  return cut->resident > 0 && cut->slabs * cut->parts <= kMaxBlocks;
}

// What a problem cut up like this costs. All numbers of instructions are counts of the
// source, all efficiencies guesses.
Cost CostOf(const Problem& problem, const Work& work, const Cut& cut) {
  constexpr double kStartUs = 1.5;      // the first loads of a kernel, the last stores
  constexpr double kWarpsWhenFull = 8;  // of a multiprocessor
  constexpr double kEfficiency = 0.75;  // of whatever unit a tile keeps busiest
  constexpr double kTileUs = 0.15;      // its ends, where warps wait for each other
  constexpr double kLatencyUs = 1;      // of the copies of the next tile
  constexpr double kL2BytesPerUs = 5.5e6;
  constexpr double kUnhidden = 0.1;  // of what should hide behind the slowest
  const auto real = [](int64_t v) { return static_cast<double>(v); };
  const double size = real(SizeInBytes(problem.dtype));
  double dx_bytes = size * real(problem.batch * problem.groups * problem.in_channels);
  double dy_bytes = size * real(problem.batch * problem.groups * problem.out_channels);
  double w_bytes =
      size * real(problem.groups * problem.in_channels * problem.out_channels);
  // Of what a tile copies, the part that is inside dY.
  double read_bytes = real(cut.tile_count * cut.slabs * cut.images * cut.chunks) * 16;
  for (int a = 0; a < kAxes; ++a) {
    const Axis& axis = problem.axis[a];
    dx_bytes *= real(axis.in);
    dy_bytes *= real(axis.out);
    w_bytes *= real(axis.win);
    read_bytes *= std::min(
        real(cut.dy_size[a]),
        real(axis.out) * (1 + real(cut.dy_size[a] - cut.size[a]) / real(axis.out + 1)) /
            real(cut.tiles[a]));
  }
  // Pieces of pixels that are not whole lines move at a lower rate.
  const int64_t channels = std::min(cut.strips * work.strip.tiles, work.tiles_n) * 8;
  const double rate = size * real(channels) >= 128 || cut.slabs == 1 ? 0.85 : 0.75;
  const double dram_us =
      (dx_bytes + dy_bytes + w_bytes) / (ReferenceGpu::kCopyBytesPerUs * rate);
  const double l2_us = (dx_bytes + read_bytes) / (kL2BytesPerUs * rate);

  // A tile on a multiprocessor of its own: wavefronts of shared memory, tensor cores,
  // instructions of four schedulers.
  const double bundles = real(work.strip.tiles / work.strip.share);
  const double strip_rows = real(cut.strips * cut.row_groups);  // units of one phase
  const double mma = strip_rows * real(work.pairs * work.warp_tiles_m * work.strip.tiles);
  const double copies = real(cut.stage_bytes) / 16;
  const double wavefronts = mma * WavefrontsOfMma(work, work.strip) + copies / 8;
  const double tensor = mma * CyclesOfMma(problem, work.three_products);
  const double per_fragment = problem.dtype == DType::kF32 ? 6 : 2;  // of A
  const double instructions =
      mma * (work.three_products ? 7 : 1) +
      mma / real(work.strip.share) * (per_fragment + (work.three_products ? 8 : 0)) +
      strip_rows * real(work.pairs) * (8 + 2 * bundles) +
      strip_rows * real(work.phase_count) * (100 + 110 * real(work.warp_tiles_m)) +
      copies / 32 * 20;
  const double cycles = std::max({wavefronts, tensor, instructions / 4});
  const double units = strip_rows * real(work.phase_count);
  const double busy_warps =
      units / real(CeilDiv(static_cast<int64_t>(units), kGroupedWarps));
  const int64_t blocks = cut.slabs * cut.parts;
  const int64_t beside =
      std::min(cut.resident, CeilDiv(blocks, ReferenceGpu::kMultiprocessors));
  const double busy = std::min(1.0, real(beside) * busy_warps / kWarpsWhenFull);
  // Tiles that one multiprocessor computes, side by side or one after the other.
  const int64_t rounds = CeilDiv(cut.tile_count, cut.parts) *
                         CeilDiv(blocks, beside * ReferenceGpu::kMultiprocessors);
  const double walk_us =
      real(rounds) *
      std::max(kLatencyUs,
               real(beside) * cycles / ReferenceGpu::kCyclesPerUs / (busy * kEfficiency));

  // Before that each block builds B while its first tile arrives.
  const double fill =
      real(work.pairs * 2 * UnitOfDy(problem) * cut.strips * work.strip.tiles) / 32 * 90 /
      4 / ReferenceGpu::kCyclesPerUs;
  const double load = real(cut.stage_bytes * ReferenceGpu::kMultiprocessors) /
                      ReferenceGpu::kCopyBytesPerUs;
  const double once_us = real(CeilDiv(blocks, ReferenceGpu::kMultiprocessors)) * fill;
  const double fixed_us = kStartUs + once_us + real(beside) * load / 2 +
                          std::min(dram_us, l2_us) * kUnhidden + real(rounds) * kTileUs;
  return {1, fixed_us, walk_us, std::max(dram_us, l2_us), kUnhidden};
}

// The largest size up to `most` that cuts `all` into equal parts.
int64_t Balanced(int64_t all, int64_t most) {
  return CeilDiv(all, CeilDiv(all, std::max<int64_t>(1, std::min(all, most))));
}

bool ChooseCut(const Problem& problem, const Work& work, Cut* best) {
  constexpr int64_t kRows[] = {64, 128, 192, 256, 384, kGroupedMaxRows};
  const Correction correction = CorrectionOf("grouped", problem);
  bool found = false;
  for (int64_t strips = 1; strips <= 4; strips *= 2) {
    if (strips > 1 && strips / 2 * work.strip.tiles >= work.tiles_n) break;
    Cut cut{};
    cut.strips = strips;
    cut.chunks = SlabChunks(problem, work, strips);
    for (int64_t width = 8; width <= kGroupedMaxRows; width *= 2) {
      cut.size[2] = Balanced(work.most_positions[2], width);
      for (const int64_t rows : kRows) {
        if (rows < cut.size[2]) continue;
        cut.size[1] = Balanced(work.most_positions[1], rows / cut.size[2]);
        const int64_t plane = cut.size[2] * cut.size[1];
        cut.size[0] = Balanced(work.most_positions[0], rows / plane);
        const int64_t volume = plane * cut.size[0];
        const bool whole = std::equal(cut.size, cut.size + kAxes, work.most_positions);
        cut.images = whole ? Balanced(problem.batch, rows / volume) : 1;
        if (!FinishCut(problem, work, &cut)) continue;
        cut.cost = CostOf(problem, work, cut);
        cut.model_us = ModelUs(cut.cost, correction);
        if (found && cut.model_us >= best->model_us) continue;
        *best = cut;
        found = true;
      }
      if (width >= work.most_positions[2]) break;
    }
  }
  return found;
}

// ---- launches ---------------------------------------------------------------------

GroupedParams MakeGroupedParams(const Problem& problem, const Work& work,
                                const Cut& cut) {
  const auto index = [](int64_t v) { return static_cast<int32_t>(v); };
  const auto divider = [](int64_t v) { return Divider<int32_t>::Make(v); };
  GroupedParams params{};
  params.geometry = MakeGeometry<int32_t>(problem);
  params.in_channels = divider(problem.in_channels);
  params.out_channels = divider(problem.out_channels);
  params.dx_channels = index(problem.groups * problem.in_channels);
  params.dy_chunks = index(problem.groups * problem.out_channels / UnitOfDy(problem));
  params.phase_count = index(work.phase_count);
  params.images = index(cut.images);
  params.rows = index(cut.rows);
  for (int a = 0; a < kAxes; ++a) {
    params.phases[a] = index(work.phases[a]);
    params.size[a] = index(cut.size[a]);
    params.tiles[a] = divider(cut.tiles[a]);
    params.dy_low[a] = index(work.lowest_p[a]);
    params.dy_size[a] = divider(cut.dy_size[a]);
    params.pitch[a] = index(cut.pitch[a]);
  }
  params.tile_count = index(cut.tile_count);
  params.copy_rows = index(cut.images * cut.dy_size[0] * cut.dy_size[1]);
  params.chunks = divider(cut.chunks);
  params.image_pitch = index(cut.image_pitch);
  params.slabs = divider(cut.slabs);
  params.parts = index(cut.parts);
  params.strips = divider(cut.strips);
  params.row_groups = divider(cut.row_groups);
  params.bundle_chunks = index(work.bundle_chunks);
  params.pairs = index(work.pairs);
  params.stage_bytes = index(cut.stage_bytes);
  params.low_at = index(cut.fragment_bytes);
  params.fragments_at = index(cut.stages * cut.stage_bytes);
  params.terms_at =
      index(params.fragments_at + cut.fragment_bytes * (work.three_products ? 2 : 1));
  params.rows_at =
      index(params.terms_at + 2 * work.pairs * static_cast<int64_t>(sizeof(GroupedTerm)));
  params.phases_at = index(params.rows_at + cut.row_groups * work.warp_tiles_m * 16 *
                                                static_cast<int64_t>(sizeof(GroupedRow)));
  params.bundles_at =
      index(params.phases_at +
            RoundUp(work.phase_count * static_cast<int64_t>(sizeof(GroupedPhase)), 16));
  return params;
}

template <typename T, bool kThreeProducts>
cudaError_t EnqueuePart(cudaStream_t stream, const Problem& problem, const Plan& plan,
                        int64_t shared_bytes, const T* dy, const T* w, T* dx,
                        const Epilogue& epilogue) {
  static_assert(sizeof(GroupedParams) + 3 * sizeof(void*) <= kMaxParameterBytes,
                "the kernel's parameters must fit in constant memory's 4 KiB");
  Work work{};
  if (!MakeWork(problem, shared_bytes, &work)) return cudaErrorInvalidValue;
  Cut cut{};
  cut.strips = plan.tile_n / (work.strip.tiles * 8);
  cut.chunks = SlabChunks(problem, work, cut.strips);
  cut.images = plan.box[0];
  std::copy_n(plan.box + 1, kAxes, cut.size);
  if (!FinishCut(problem, work, &cut)) return cudaErrorInvalidValue;
  GroupedParams params = MakeGroupedParams(problem, work, cut);
  params.epilogue = epilogue;
  const dim3 grid(static_cast<unsigned>(cut.slabs * cut.parts));
  const auto enqueue = [&](auto* kernel) {
    return CU_LAUNCH(kernel, grid, dim3(kGroupedThreads),
                     static_cast<int>(cut.shared_bytes), stream, params, dy, w, dx);
  };
  if (work.strip.tiles == 3) return enqueue(GroupedKernel<T, kThreeProducts, 3, 3>);
  switch (work.strip.share) {
    case 4: return enqueue(GroupedKernel<T, kThreeProducts, 4, 4>);
    case 2: return enqueue(GroupedKernel<T, kThreeProducts, 4, 2>);
    default: return enqueue(GroupedKernel<T, kThreeProducts, 4, 1>);
  }
}

template <typename T, bool kThreeProducts>
const char* LaunchTyped(cudaStream_t stream, const Problem& problem, const Plan& plan,
                        int64_t shared_bytes, const void* dy, const void* w, void* dx,
                        const Epilogue& epilogue) {
  const auto launch = [&](const Problem& part, const T* dy_part, T* dx_part,
                          const Epilogue& epilogue_part) {
    return EnqueuePart<T, kThreeProducts>(stream, part, plan, shared_bytes, dy_part,
                                          static_cast<const T*>(w), dx_part,
                                          epilogue_part);
  };
  return ErrorText(LaunchInParts<T>(problem, 0, dy, dx, epilogue, launch));
}

}  // namespace

bool PlanGrouped(const Problem& problem, int64_t shared_bytes, Plan* plan) {
  if (!Takes(problem)) return false;
  Problem part = problem;
  part.batch = ImagesIn32Bits(problem, 0);
  if (part.batch == 0) return false;
  Work work{};
  Cut cut{};
  if (!MakeWork(part, shared_bytes, &work) || !ChooseCut(part, work, &cut)) return false;
  plan->tile_m = cut.rows;
  plan->tile_n = cut.strips * work.strip.tiles * 8;
  plan->tile_k = 2 * UnitOfDy(problem);
  plan->box[0] = cut.images;
  std::copy_n(cut.size, kAxes, plan->box + 1);
  plan->stages = cut.stages;
  plan->split_k = 1;
  plan->blocks = cut.slabs * cut.parts;
  plan->threads = kGroupedThreads;
  plan->resident = cut.resident;
  plan->shared_bytes = cut.shared_bytes;
  plan->cost = Repeated(cut.cost, CeilDiv(problem.batch, part.batch));
  plan->model_us = ModelUs(plan->cost, CorrectionOf("grouped", problem));
  return true;
}

const char* LaunchGrouped(CUstream_st* stream, const Problem& problem, const Plan& plan,
                          const void* dy, const void* w, void* dx, void* workspace,
                          const Epilogue& epilogue) {
  // A plan assumes aligned arrays, which XLA's are.
  uintptr_t address = 0;
  for (const void* array :
       {dy, static_cast<const void*>(dx), epilogue.residual, epilogue.relu}) {
    address |= reinterpret_cast<uintptr_t>(array);
  }
  if (address % kGroupedChunkBytes != 0) {
    return LaunchDirect(stream, problem, plan, dy, w, dx, workspace, epilogue);
  }
  Gpu gpu{};
  if (const char* error = CurrentGpu(&gpu); error != nullptr) return error;
  const int64_t bytes = gpu.shared_bytes;
  switch (problem.dtype) {
    case DType::kF64: break;
    case DType::kF32:
      return problem.allow_tf32 ? LaunchTyped<float, false>(stream, problem, plan, bytes,
                                                            dy, w, dx, epilogue)
                                : LaunchTyped<float, true>(stream, problem, plan, bytes,
                                                           dy, w, dx, epilogue);
    case DType::kBF16:
      return LaunchTyped<__nv_bfloat16, false>(stream, problem, plan, bytes, dy, w, dx,
                                               epilogue);
    case DType::kF16:
      return LaunchTyped<__half, false>(stream, problem, plan, bytes, dy, w, dx,
                                        epilogue);
  }
  return "the grouped kernel takes no float64";
}

}  // namespace convgrad
