// The plans and launches of "wgmma" (wgmma.cuh).

#include "wgmma.cuh"

#include <algorithm>
#include <cstdint>

#include "../kernel.h"
#include "../phase.h"
#include "geometry.cuh"
#include "kernel_table.h"
#include "planning.h"
#include "platform.cuh"
#include "tensor_map.cuh"

namespace convgrad {
namespace {

constexpr int64_t kMaxParts = 32;
constexpr int64_t kMinSlicesOfPart =
    8;  // fewer, and filling the ring is most of the work
constexpr int64_t kMaxPartialBytes = int64_t{64} << 20;

// ---- what TMA can fetch -----------------------------------------------------------

// Of dY's tensor maps: the last axes, without leading ones that are not there.
int MapAxes(const Problem& problem) {
  int first = 0;
  while (first < kAxes - 1) {
    const Axis& a = problem.axis[first];
    if (a.in != 1 || a.out != 1 || a.win != 1 || a.pad_lo != 0) break;
    ++first;
  }
  return kAxes - first;
}

// Where the pixels of a phase begin and end, beyond the first and the last of dY, and how
// far its taps reach (wgmma.cuh).
struct PixelBox {
  int64_t lower, upper, furthest;
};

PixelBox BoxOfPhase(const Axis& a, const Phase& f) {
  const int64_t furthest = (f.r_count - 1) * f.p_per_r;
  const int64_t lower = f.p0 - furthest;
  return {lower, lower + (f.h_count - 1) * f.p_per_h - (a.out - 1), furthest};
}

int64_t CountPhases(const Problem& problem, int axis) {
  return std::min(PhaseCount(problem.axis[axis]), problem.axis[axis].in);
}

bool AxisFitsMaps(const Axis& a, int64_t phases, int axes) {
  const int64_t corner = CornerLimit(axes);
  for (int64_t phase = 0; phase < phases; ++phase) {
    const Phase f = MakePhase(a, phase);
    if (f.p_per_h > kMostStep) return false;
    if (f.r_count == 0) continue;
    const PixelBox box = BoxOfPhase(a, f);
    if (std::min(box.lower, box.upper) < -corner) return false;
    if (std::max(box.lower, box.upper) >= corner) return false;
    if (box.furthest >= OffsetLimit(axes)) return false;
  }
  return true;
}

// Whether each of several groups is worth a tile: its out channels are whole slices and
// its input channels whole vectors.
bool HasWholeGroups(const Problem& problem) {
  const int64_t size = SizeInBytes(problem.dtype);
  return problem.groups == 1 ||
         (problem.out_channels * size % kSwizzleBytes == 0 &&
          problem.in_channels * size % VectorBytes(problem.dtype) == 0);
}

// Whether the channels of such groups lie side by side: they are one dimension of a map.
bool GroupsFitMaps(const Problem& problem) {
  return problem.groups == 1 ||
         (problem.dy.group == problem.out_channels &&
          problem.w.group == problem.out_channels * problem.w.out_channel);
}

// Whether dX is stored in whole vectors, the rows of dY and W are whole chunks, and every
// group and phase can be told to TMA. Arrays may be null, which is as good as aligned.
bool FitsTma(const Rewritten& rewritten, const void* dy, const void* w, const void* dx,
             const Epilogue& epilogue) {
  const Problem& problem = rewritten.problem;
  if (!GroupsFitMaps(problem)) return false;
  const int vector = VectorBytes(problem.dtype);
  if (problem.in_channels * SizeInBytes(problem.dtype) % vector != 0) return false;
  if (WidthOfRuns(rewritten, dx, epilogue) < vector) return false;
  if (WidthOfDy(problem, dy) != kWidestCopy) return false;
  if (problem.dtype != DType::kF32 && WidthOfW(problem, w) != kWidestCopy) return false;
  const int axes = MapAxes(problem);
  int64_t phases = 1;
  for (int i = 0; i < kAxes; ++i) {
    phases *= CountPhases(problem, i);
    if (phases > kWgmmaPhases) return false;
    if (i < kAxes - axes) continue;
    if (!AxisFitsMaps(problem.axis[i], CountPhases(problem, i), axes)) return false;
  }
  return true;
}

// ---- tensor maps ------------------------------------------------------------------

// Appends a dimension. The stride of one of size one is not used, but has to be valid.
void Append(TensorShape* shape, int64_t size, int64_t stride_bytes) {
  shape->size[shape->rank] = static_cast<uint64_t>(size);
  shape->stride[shape->rank - 1] =
      size == 1 ? kWidestCopy : static_cast<uint64_t>(stride_bytes);
  ++shape->rank;
}

template <typename T>
cudaError_t EncodeDy(const Problem& problem, const T* dy, uint32_t pixels,
                     WgmmaParams* params) {
  constexpr int64_t kSize = static_cast<int64_t>(sizeof(T));
  const int axes = MapAxes(problem);
  params->axes = axes;
  TensorShape shape{
      1, {static_cast<uint64_t>(problem.groups * problem.out_channels)}, {}};
  for (int i = kAxes - 1; i >= kAxes - axes; --i) {
    Append(&shape, problem.axis[i].out, problem.dy.axis[i] * kSize);
  }
  Append(&shape, problem.batch, problem.dy.batch * kSize);
  int64_t phases[kAxes];
  for (int i = 0; i < kAxes; ++i) phases[i] = CountPhases(problem, i);
  for (int64_t id = 0; id < phases[0] * phases[1] * phases[2]; ++id) {
    const int64_t of_axis[kAxes] = {id / phases[2] / phases[1],
                                    id / phases[2] % phases[1], id % phases[2]};
    int lower[kAxes], upper[kAxes], step[kAxes];
    bool reached = true;
    for (int i = kAxes - 1; i >= kAxes - axes; --i) {
      const Phase f = MakePhase(problem.axis[i], of_axis[i]);
      const PixelBox box = BoxOfPhase(problem.axis[i], f);
      reached = reached && f.r_count > 0;
      lower[kAxes - 1 - i] = static_cast<int>(box.lower);
      upper[kAxes - 1 - i] = static_cast<int>(box.upper);
      step[kAxes - 1 - i] = static_cast<int>(f.p_per_h);
    }
    if (!reached) continue;  // nothing is fetched for it
    const cudaError_t status = EncodeIm2col<T>(
        dy, shape, lower, upper, step, kSwizzleBytes / kSize, pixels, params->dy + id);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

// Of W as it lies.
template <typename T>
cudaError_t EncodeFilter(const Problem& problem, const T* w, CUtensorMap* map) {
  constexpr int64_t kSize = static_cast<int64_t>(sizeof(T));
  TensorShape shape{1, {static_cast<uint64_t>(problem.in_channels)}, {}};
  Append(&shape, problem.groups * problem.out_channels, problem.w.out_channel * kSize);
  for (int i = kAxes - 1; i >= 0; --i) {
    Append(&shape, problem.axis[i].win, problem.w.axis[i] * kSize);
  }
  constexpr uint32_t kRow = kSwizzleBytes / kSize;
  const uint32_t box[kMostDimensions] = {kRow, kRow, 1, 1, 1};
  return EncodeTiled<T>(w, shape, box, map);
}

// Of W repacked as [group][tap][C][K], rows of K in whole chunks.
int64_t RepackedRow(const Problem& problem) {
  return RoundUp(problem.out_channels, kWidestCopy / SizeInBytes(DType::kF32));
}

int64_t RepackedTaps(const Problem& problem) {
  int64_t taps = problem.groups;
  for (const Axis& a : problem.axis) taps *= a.win;
  return taps;
}

cudaError_t EncodeRepacked(const Problem& problem, const float* w, int64_t tile_n,
                           CUtensorMap* map) {
  constexpr int64_t kSize = sizeof(float);
  TensorShape shape{1, {static_cast<uint64_t>(problem.out_channels)}, {}};
  const int64_t row = RepackedRow(problem) * kSize;
  Append(&shape, problem.in_channels, row);
  Append(&shape, RepackedTaps(problem), problem.in_channels * row);
  const uint32_t box[] = {kSwizzleBytes / kSize, static_cast<uint32_t>(tile_n), 1};
  return EncodeTiled<float>(w, shape, box, map);
}

int64_t RepackedBytes(const Problem& problem) {
  if (problem.dtype != DType::kF32) return 0;
  return RepackedTaps(problem) * problem.in_channels * RepackedRow(problem) *
         SizeInBytes(DType::kF32);
}

cudaError_t EnqueueRepack(cudaStream_t stream, const Problem& problem, const float* w,
                          float* to) {
  RepackParams params{};
  params.in_channels = static_cast<int32_t>(problem.in_channels);
  params.out_channels = static_cast<int32_t>(problem.out_channels);
  params.w_group = static_cast<int32_t>(problem.w.group);
  params.w_out_channel = static_cast<int32_t>(problem.w.out_channel);
  params.w_in_channel = static_cast<int32_t>(problem.w.in_channel);
  params.row = static_cast<int32_t>(RepackedRow(problem));
  for (int i = 0; i < kAxes; ++i) {
    params.win[i] = static_cast<int32_t>(problem.axis[i].win);
    params.w_axis[i] = static_cast<int32_t>(problem.w.axis[i]);
  }
  const auto tiles = [](int64_t size) {
    return static_cast<unsigned>(CeilDiv(size, kRepackTile));
  };
  return CU_LAUNCH(WgmmaRepackKernel,
                   dim3(tiles(problem.in_channels), tiles(problem.out_channels),
                        static_cast<unsigned>(RepackedTaps(problem))),
                   dim3(kRepackTile * kRepackRows), 0, stream, params, w, to);
}

// Whether a grid and 32-bit offsets are enough for a repacked W.
bool FitsRepack(const Problem& problem) {
  if (problem.dtype != DType::kF32) return true;
  const int64_t beyond = kWgmmaSlack * RepackedRow(problem) * SizeInBytes(problem.dtype);
  return RepackedTaps(problem) <= 65535 &&
         CeilDiv(problem.out_channels, kRepackTile) <= 65535 &&
         (RepackedBytes(problem) + beyond) / SizeInBytes(problem.dtype) <= INT32_MAX;
}

// ---- tiles ------------------------------------------------------------------------

struct TileChoice {
  int64_t m, n, k, stages, shared_bytes, copies_shared_bytes;
  double efficiency;  // the part of the tensor cores' rate that it reaches: an estimate
};

// A slice's operands come from the L2 cache, which gives a multiprocessor about 46 bytes
// a cycle, while the tensor cores multiply the one before: kCoreProducts a cycle of
// 16-bit types, half as many, of twice the bytes, of TF32.
template <typename T, int kM, int kN, int kGroupsN>
constexpr TileChoice ChoiceOf() {
  using S = WgmmaTile<T, kM, kN, kGroupsN>;
  constexpr double kL2BytesPerCycle = 46, kCoreProducts = 2048;
  constexpr double kCycles = kM * kN * (kSwizzleBytes / 2) / kCoreProducts;
  constexpr double kBytesPerCycle = (kM + kN) * kSwizzleBytes / kCycles;
  return {S::kM,
          S::kN,
          S::kK,
          S::kStages,
          S::kSharedBytes,
          S::kCopiesSharedBytes,
          std::min(1.0, kL2BytesPerCycle / kBytesPerCycle)};
}

template <typename T>
constexpr TileChoice kChoices[] = {
    ChoiceOf<T, 128, 256, 1>(),  // 48 bytes a cycle
    ChoiceOf<T, 128, 128, 1>(),  // 64
    ChoiceOf<T, 256, 64, 1>(),   // 80
    ChoiceOf<T, 64, 128, 2>(),   // 96
};

// Calls launch(tile) with the WgmmaTile of a plan.
template <typename T, typename Launch>
cudaError_t WithTile(int64_t m, int64_t n, Launch launch) {
  if (m == 128 && n == 256) return launch(WgmmaTile<T, 128, 256, 1>{});
  if (m == 128 && n == 128) return launch(WgmmaTile<T, 128, 128, 1>{});
  if (m == 256 && n == 64) return launch(WgmmaTile<T, 256, 64, 1>{});
  if (m == 64 && n == 128) return launch(WgmmaTile<T, 64, 128, 2>{});
  return cudaErrorInvalidValue;
}

// ---- plans ------------------------------------------------------------------------

// The part of the rate that is left where threads copy instead of TMA, by the bytes of a
// copy: an estimate, by the number of instructions. Values that go through registers are
// waited for in every slice.
double RateOfCopies(int width) {
  return width >= 16 ? 0.9 : width == 8 ? 0.85 : width == 4 ? 0.75 : 0.2;
}

// What a problem cut up like this costs: items are dealt out to blocks, one on each
// multiprocessor. What an item costs besides its products are the instructions that find
// its place and store its sums, during which the tensor cores wait.
Cost CostOf(const Problem& problem, const TileChoice& tile, int64_t tiles, int64_t parts,
            const TapCounts& taps, double products_per_us) {
  constexpr double kStartUs = 1.5;  // until the first products
  // Of a warp, for each strip and for each tile besides, counted in the machine code for
  // bfloat16. A multiprocessor starts four a cycle, one of every fourth warp.
  constexpr double kStripInstructions = 150, kTileInstructions = 550;
  constexpr double kInstructionsPerUs = 4 * ReferenceGpu::kCyclesPerUs;
  const double multiprocessors = ReferenceGpu::kMultiprocessors;
  const double rate = products_per_us / multiprocessors * tile.efficiency;
  const double products_of_tap = static_cast<double>(
      tile.m * tile.n * CeilDiv(problem.out_channels, tile.k) * tile.k);
  const double of_parts = static_cast<double>(parts);
  const double rounds =
      static_cast<double>(CeilDiv(tiles * parts, ReferenceGpu::kMultiprocessors));
  // The last round is as long as its longest item, the others take the average.
  const double multiply_us =
      products_of_tap * std::max(rounds * taps.average, taps.most) / of_parts / rate;
  const double strips = static_cast<double>(tile.m * tile.n) / kMmaStripElements;
  const double instructions =
      kWgmmaConsumerWarps * kTileInstructions + strips * kStripInstructions;
  const double copy_rate = ReferenceGpu::kCopyBytesPerUs;
  const double store_us = rounds * instructions / kInstructionsPerUs;
  Cost cost{1, kStartUs, multiply_us + store_us, BytesMoved(problem) / copy_rate, 0};
  if (parts > 1) {
    const double partial_bytes = static_cast<double>(tiles * parts * tile.m * tile.n) * 4;
    cost.launches += 1;
    cost.fixed_us += 2 * partial_bytes / copy_rate;
  }
  if (const double repacked = static_cast<double>(RepackedBytes(problem)); repacked > 0) {
    cost.launches += 1;
    cost.fixed_us += 2 * repacked / copy_rate;
  }
  return cost;
}

template <typename T>
bool PlanTyped(const Problem& given, int64_t shared_bytes, double products_per_us,
               Plan* plan) {
  const Rewritten rewritten = AsPatches(given);
  const Problem& problem = rewritten.problem;
  if (!HasWholeGroups(problem) || !FitsRepack(problem)) return false;
  if (problem.dy.channel != 1 && problem.out_channels > 1) return false;
  if (problem.w.in_channel != 1 && problem.in_channels > 1) return false;
  const bool copies = !FitsTma(rewritten, nullptr, nullptr, nullptr, {});
  if (copies) {
    const int w_width = sizeof(T) == 4 ? kWidestCopy : WidthOfW(problem, nullptr);
    products_per_us *= RateOfCopies(std::min(WidthOfDy(problem, nullptr), w_width));
  }
  const int64_t images = ImagesIn32Bits(problem, kWgmmaSlack);
  if (images == 0) return false;
  const bool whole = images == problem.batch;
  const TapCounts taps = CountTaps(problem);
  const int64_t repacked = RepackedBytes(problem);
  const Correction correction = CorrectionOf("wgmma", problem);
  bool found = false;
  for (const TileChoice& tile : kChoices<T>) {
    if (tile.copies_shared_bytes > shared_bytes) continue;
    const int64_t tiles = CountTiles(problem, tile.m, tile.n);
    const double slices =
        taps.most * static_cast<double>(CeilDiv(problem.out_channels, tile.k));
    for (int64_t parts = 1; parts <= kMaxParts; ++parts) {
      const int64_t bytes = parts == 1 ? 0 : parts * tiles * tile.m * tile.n * 4;
      if (parts > 1 &&
          (!whole || slices < static_cast<double>(parts * kMinSlicesOfPart) ||
           bytes > std::min(kMaxPartialBytes, given.workspace_limit - repacked))) {
        break;
      }
      if (tiles * parts > kMaxBlocks) break;
      const Cost cost = CostOf(problem, tile, tiles, parts, taps, products_per_us);
      const double us = ModelUs(cost, correction);
      if (found && us >= plan->model_us) continue;
      found = true;
      plan->workspace_bytes = bytes + repacked;
      plan->tile_m = tile.m;
      plan->tile_n = tile.n;
      plan->tile_k = tile.k;
      plan->stages = tile.stages;
      plan->split_k = parts;
      plan->blocks = std::min<int64_t>(tiles * parts, ReferenceGpu::kMultiprocessors);
      plan->threads = kWgmmaThreads;
      plan->resident = 1;
      plan->shared_bytes = copies ? tile.copies_shared_bytes : tile.shared_bytes;
      plan->cost = cost;
      plan->model_us = us;
    }
  }
  return found;
}

// ---- launches ---------------------------------------------------------------------

// Of the device that launches: an H100 for PCIe has fewer than the reference GPU.
unsigned Multiprocessors() {
  int device = 0, count = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) {
    status = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  }
  if (ErrorText(status) != nullptr || count < 1) {
    return static_cast<unsigned>(ReferenceGpu::kMultiprocessors);
  }
  return static_cast<unsigned>(count);
}

// One part of the batch.
template <typename T>
cudaError_t EnqueuePart(cudaStream_t stream, const Rewritten& rewritten, const Plan& plan,
                        const T* dy, const T* w, T* dx, const float* repacked,
                        float4* partial, const Epilogue& epilogue) {
  const Problem& problem = rewritten.problem;
  return WithTile<T>(plan.tile_m, plan.tile_n, [&](auto tile) {
    using S = decltype(tile);
    static_assert(sizeof(WgmmaParams) + 4 * sizeof(void*) <= kMaxParameterBytes,
                  "the kernel's parameters must fit in constant memory's 4 KiB");
    WgmmaParams params{};
    params.mma =
        MakeMmaParams(rewritten, S::kM, S::kN, plan.split_k, dy, w, dx, epilogue);
    params.items = params.mma.grid.total * params.mma.parts;
    params.tiles = Divider<int32_t>::Make(params.mma.grid.total);
    for (int i = 0; i < kAxes; ++i) params.win[i] = static_cast<int>(problem.axis[i].win);
    params.repacked = repacked;
    params.repacked_row = static_cast<int32_t>(RepackedRow(problem));
    const auto launch = [&](auto kernel, int shared_bytes) {
      const unsigned blocks = std::min(params.items, Multiprocessors());
      params.blocks = Divider<int32_t>::Make(blocks);
      params.turn = params.mma.grid.channel_tiles.divisor % params.blocks.divisor;
      return CU_LAUNCH(kernel, dim3(blocks), dim3(kWgmmaThreads), shared_bytes, stream,
                       params, dy, w, dx, partial);
    };
    cudaError_t status;
    // A plan assumes aligned arrays. These may not be.
    if (FitsTma(rewritten, dy, w, dx, epilogue)) {
      status = EncodeDy<T>(problem, dy, S::kM, &params);
      if (status != cudaSuccess) return status;
      if constexpr (sizeof(T) == 4) {
        status = EncodeRepacked(problem, repacked, S::kN, &params.w);
      } else {
        status = EncodeFilter<T>(problem, w, &params.w);
      }
      if (status != cudaSuccess) return status;
      status = launch(&WgmmaKernel<T, S::kM, S::kN, S::kGroupsN, false>, S::kSharedBytes);
    } else {
      status =
          launch(&WgmmaKernel<T, S::kM, S::kN, S::kGroupsN, true>, S::kCopiesSharedBytes);
    }
    if (status != cudaSuccess || plan.split_k == 1) return status;
    return EnqueueMmaReduce<T>(stream, params.mma, dy, w, dx, partial);
  });
}

template <typename T>
const char* LaunchTyped(cudaStream_t stream, const Problem& problem, const Plan& plan,
                        const void* dy, const void* w, void* dx, void* workspace,
                        const Epilogue& epilogue) {
  Rewritten rewritten = AsPatches(problem);
  const Problem whole = rewritten.problem;
  float* repacked = nullptr;
  if constexpr (sizeof(T) == 4) {
    const int64_t partial_bytes = plan.workspace_bytes - RepackedBytes(whole);
    repacked = reinterpret_cast<float*>(static_cast<char*>(workspace) + partial_bytes);
    const cudaError_t status =
        EnqueueRepack(stream, whole, static_cast<const float*>(w), repacked);
    if (status != cudaSuccess) return ErrorText(status);
  }
  const auto launch = [&](const Problem& part, const T* dy_part, T* dx_part,
                          const Epilogue& epilogue_part) {
    rewritten.problem = part;
    return EnqueuePart<T>(stream, rewritten, plan, dy_part, static_cast<const T*>(w),
                          dx_part, repacked, static_cast<float4*>(workspace),
                          epilogue_part);
  };
  return ErrorText(LaunchInParts<T>(whole, kWgmmaSlack, dy, dx, epilogue, launch));
}

}  // namespace

bool PlanWgmma(const Problem& problem, int64_t shared_bytes, Plan* plan) {
  switch (problem.dtype) {
    case DType::kF64: return false;
    case DType::kF32:
      return problem.allow_tf32 &&
             PlanTyped<float>(problem, shared_bytes, ReferenceGpu::kWgmmaTf32PerUs, plan);
    case DType::kBF16:
      return PlanTyped<__nv_bfloat16>(problem, shared_bytes, ReferenceGpu::kWgmma16PerUs,
                                      plan);
    case DType::kF16:
      return PlanTyped<__half>(problem, shared_bytes, ReferenceGpu::kWgmma16PerUs, plan);
  }
  return false;
}

const char* LaunchWgmma(CUstream_st* stream, const Problem& problem, const Plan& plan,
                        const void* dy, const void* w, void* dx, void* workspace,
                        const Epilogue& epilogue) {
  switch (problem.dtype) {
    case DType::kF64: break;
    case DType::kF32:
      return LaunchTyped<float>(stream, problem, plan, dy, w, dx, workspace, epilogue);
    case DType::kBF16:
      return LaunchTyped<__nv_bfloat16>(stream, problem, plan, dy, w, dx, workspace,
                                        epilogue);
    case DType::kF16:
      return LaunchTyped<__half>(stream, problem, plan, dy, w, dx, workspace, epilogue);
  }
  return "the wgmma kernel takes no float64";
}

#ifdef CONVGRAD_BOUNDED_WAITS
cudaError_t ReportEndlessWaits(EndlessWait* to) {
  return cudaMemcpyToSymbol(endless_wait, &to, sizeof(to));
}
#endif

}  // namespace convgrad
