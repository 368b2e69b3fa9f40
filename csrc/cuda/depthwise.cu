// The plan and launch of "depthwise" (depthwise.cuh).

#include "depthwise.cuh"

#include <algorithm>
#include <cstdint>
#include <utility>

#include "../kernel.h"
#include "geometry.cuh"
#include "kernel_table.h"
#include "planning.h"
#include "platform.cuh"

namespace convgrad {
namespace {

// ---- which problems ---------------------------------------------------------------

// The problem with its longer axis last, if the last one is none: a column becomes a row.
Problem Orient(Problem problem) {
  if (problem.axis[2].in == 1 && problem.axis[2].win == 1 && problem.axis[1].in > 1) {
    std::swap(problem.axis[1], problem.axis[2]);
    std::swap(problem.dx.axis[1], problem.dx.axis[2]);
    std::swap(problem.dy.axis[1], problem.dy.axis[2]);
    std::swap(problem.w.axis[1], problem.w.axis[2]);
  }
  return problem;
}

bool Takes(const Problem& problem) {
  const Axis& across = problem.axis[2];
  if (problem.in_channels != 1 || across.lhs_dilation != 1) return false;
  if (across.rhs_dilation / Gcd(across.stride, across.rhs_dilation) > kMostLattices) {
    return false;
  }
  return problem.groups == 1 ||
         (problem.dx.group == 1 && problem.dy.group == problem.out_channels);
}

// Whether vectors of `bytes` are aligned in dX and dY. The stride of a dimension of size
// one says nothing.
bool Aligned(const Problem& problem, int64_t bytes, const void* dy, const void* dx) {
  uintptr_t bits = reinterpret_cast<uintptr_t>(dy) | reinterpret_cast<uintptr_t>(dx);
  const auto add = [&](int64_t size, int64_t stride) {
    if (size > 1) {
      bits |= static_cast<uintptr_t>(stride) *
              static_cast<uintptr_t>(SizeInBytes(problem.dtype));
    }
  };
  add(problem.batch, problem.dx.batch);
  add(problem.batch, problem.dy.batch);
  for (int i = 0; i < kAxes; ++i) {
    add(problem.axis[i].in, problem.dx.axis[i]);
    add(problem.axis[i].out, problem.dy.axis[i]);
  }
  return bits % static_cast<uintptr_t>(bytes) == 0;
}

// Whether two channels may be loaded and stored as one.
bool TakesPairs(const Problem& problem, const void* dy, const void* dx) {
  return problem.out_channels == 1 && problem.groups % 2 == 0 &&
         Aligned(problem, 2 * SizeInBytes(problem.dtype), dy, dx);
}

int64_t DenseStride(const Axis& a) { return a.stride / Gcd(a.stride, a.rhs_dilation); }

// Lattices that hold a position of dX, and the most i of one of them.
int64_t Lattices(const Axis& a) { return std::min(a.rhs_dilation, a.in); }
int64_t MostRows(const Axis& a) {
  const int64_t step = DenseStride(a), most = CeilDiv(a.in, a.rhs_dilation);
  if (a.rhs_dilation > 1 && step > 1) return (most - 1) / step + 2;
  const int64_t offset = ((a.pad_lo % step) + step) % step;
  return (offset + most - 1) / step + 1;
}

// ---- the time ---------------------------------------------------------------------

// Pairs of a tap and a position of dY that reach dX.
double LivePairs(const Axis& a) {
  if (a.lhs_dilation != 1 || a.win > 4096) {
    return static_cast<double>(a.out * a.win) / static_cast<double>(a.lhs_dilation);
  }
  int64_t pairs = 0;
  for (int64_t r = 0; r < a.win; ++r) {
    const int64_t at = a.pad_lo - r * a.rhs_dilation;  // p*stride - at is in [0, in)
    const int64_t low = at <= 0 ? 0 : CeilDiv(at, a.stride);
    const int64_t high =
        std::min(a.out, CeilDiv(std::max<int64_t>(at + a.in, 0), a.stride));
    pairs += std::max<int64_t>(high - low, 0);
  }
  return static_cast<double>(pairs);
}

// Estimates: the part of the copy bandwidth, and of the rate at which instructions start,
// that a full multiprocessor reaches; the warps that make it full for either, in flight
// all the time; and what a block takes until its first multiplication.
constexpr double kCopyEfficiency = 0.9;
constexpr double kIssueEfficiency = 0.85;
constexpr double kWarpsToCopy = 12;
constexpr double kWarpsToIssue = 8;
constexpr double kStartUs = 1.0;

// What blocks cost whose threads execute that many instructions each: as many start in
// a microsecond as multiply-adds of float32 do.
Cost CostOf(const Problem& problem, int64_t blocks, int64_t threads, int64_t resident,
            double instructions) {
  const int64_t rounds = CeilDiv(blocks, ReferenceGpu::kMultiprocessors);
  const double warps = static_cast<double>(std::min(rounds, resident) * threads / 32);
  const double rate = ReferenceGpu::kFmaF32PerUs / ReferenceGpu::kMultiprocessors *
                      kIssueEfficiency * std::min(1.0, warps / kWarpsToIssue);
  const double issue_us = static_cast<double>(rounds * threads) * instructions / rate;
  const double copy_us =
      BytesMoved(problem) / (ReferenceGpu::kCopyBytesPerUs * kCopyEfficiency *
                             std::min(1.0, warps / kWarpsToCopy));
  return {1, kStartUs, issue_us, copy_us, 0};
}

// ---- configurations ---------------------------------------------------------------

// How a problem is launched: `ring` is an index of kRings, or -1 for the window.
struct Configuration {
  int ring;
  int vector, run;
  int64_t channels, runs;  // vectors of channels, runs of a row
  int64_t strip, strips;   // ring: i of a strip, strips of an image
  int64_t lanes, chunks, block_items, tap_rows, staged_rows;  // window
  int64_t items, blocks, threads, resident;
  int64_t static_bytes, dynamic_bytes;  // of shared memory
  Cost cost;
  double us;  // by the model
};

template <int kIndex, int kFilterRows, int kFilterCols, int kStepDown, int kStepAcross>
struct RingFilter {
  static constexpr int index = kIndex;
  template <typename T>
  using Shape = RingShape<T, kFilterRows, kFilterCols, kStepDown, kStepAcross>;
};

// Calls visit with every filter that is known when compiled.
template <typename Visit>
void ForEachRing(Visit visit) {
  visit(RingFilter<0, 3, 3, 1, 1>{});
  visit(RingFilter<1, 3, 3, 2, 2>{});
  visit(RingFilter<2, 5, 5, 1, 1>{});
  visit(RingFilter<3, 5, 5, 2, 2>{});
  visit(RingFilter<4, 7, 7, 1, 1>{});
  visit(RingFilter<5, 1, 3, 1, 1>{});
}

template <typename S>
bool TakesRing(const Problem& problem, bool pairs) {
  const Axis &deep = problem.axis[0], &down = problem.axis[1], &across = problem.axis[2];
  return (S::kVector == 1 || pairs) && problem.out_channels == 1 && deep.in == 1 &&
         deep.out == 1 && deep.win == 1 && deep.pad_lo == 0 && down.lhs_dilation == 1 &&
         down.rhs_dilation / Gcd(down.stride, down.rhs_dilation) <= kMostLattices &&
         down.win == S::kRows && across.win == S::kCols &&
         DenseStride(down) == S::kStepH && DenseStride(across) == S::kStepW &&
         (down.win == 1 || problem.w.axis[1] == across.win * problem.w.axis[2]);
}

constexpr int64_t kMostItems = (int64_t{1} << 31) - (1 << 20);

template <typename S>
void ConfigureRing(const Problem& problem, int index, Configuration* best) {
  const Axis &down = problem.axis[1], &across = problem.axis[2];
  const int64_t rows = MostRows(down);
  Configuration c{};
  c.ring = index;
  c.vector = S::kVector;
  c.run = S::kRun;
  c.channels = problem.groups / S::kVector;
  c.runs = CeilDiv(MostRows(across), S::kRun);
  c.threads = kRingThreads;
  c.resident = S::kMinBlocks;
  c.static_bytes = static_cast<int64_t>(sizeof(typename S::Type[S::kTaps][S::kPitch]) +
                                        sizeof(RingPlace[kRingThreads]));
  const int64_t columns = problem.batch * Lattices(down) * Lattices(across);
  const int64_t spacing = down.rhs_dilation / Gcd(down.stride, down.rhs_dilation);
  const Correction correction = CorrectionOf("depthwise", problem);
  constexpr int64_t kMostStrips = 64;
  for (int64_t parts = 1; parts <= std::min(rows, kMostStrips); ++parts) {
    c.strip = CeilDiv(rows, parts);
    c.strips = CeilDiv(rows, c.strip);
    if (c.strips != parts) continue;
    if (parts > 1 && c.strip < S::kRows) break;  // most of the work would be halo
    if (static_cast<double>(columns) * static_cast<double>(c.channels) *
            static_cast<double>(c.runs * c.strips) >=
        static_cast<double>(kMostItems)) {
      break;
    }
    c.items = columns * c.channels * c.runs * c.strips;
    c.blocks = CeilDiv(c.items, kRingThreads);
    // Counted in the source, about: what a thread does once, for a row of dY that exists,
    // and for a row of dX.
    constexpr double kOnce = 250 + 13 * S::kTaps * S::kVector;
    constexpr double kRow =
        S::kTaps * S::kVector * S::kRun + S::kReads * (5 + S::kVector);
    constexpr double kStore = S::kWrites * (4 + 2 * S::kVector) + 20;
    const double halo = S::kHaloH * (1 - 1 / static_cast<double>(parts));
    const double used = std::min(static_cast<double>(c.strip) + halo,
                                 static_cast<double>(CeilDiv(down.out, spacing)));
    c.cost =
        CostOf(problem, c.blocks, kRingThreads, S::kMinBlocks,
               kOnce + kRow * used + kStore * static_cast<double>(c.strip * S::kStepH));
    c.us = ModelUs(c.cost, correction);
    if (c.us < best->us) *best = c;
  }
}

void ConfigureWindow(const Problem& problem, int vector, int run, Configuration* best) {
  const Axis &deep = problem.axis[0], &down = problem.axis[1], &across = problem.axis[2];
  const int64_t step = DenseStride(across);
  const int64_t sum_bytes = problem.dtype == DType::kF64 ? 8 : 4;
  const auto row_bytes = [&](int64_t lanes) {
    return across.win * (lanes | 1) * vector * sum_bytes;
  };
  Configuration c{};
  c.ring = -1;
  c.vector = vector;
  c.run = run;
  c.channels = problem.groups / vector;
  c.chunks = CeilDiv(c.channels, kWindowLanes);
  c.lanes = CeilDiv(c.channels, c.chunks);
  while (c.lanes > 1 && row_bytes(c.lanes) > kWindowSharedBytes) --c.lanes;
  if (row_bytes(c.lanes) > kWindowSharedBytes) return;
  c.chunks = CeilDiv(c.channels, c.lanes);
  c.runs = CeilDiv(MostRows(across), run);
  const double items = static_cast<double>(problem.batch * deep.in) *
                       static_cast<double>(down.in * Lattices(across)) *
                       static_cast<double>(step * c.runs);
  if (items >= static_cast<double>(kMostItems)) return;
  c.items = problem.batch * deep.in * down.in * Lattices(across) * step * c.runs;
  c.threads = kWindowThreads;
  c.resident = kWindowMinBlocks;
  c.block_items = kWindowThreads / c.lanes;
  const double blocks = static_cast<double>(c.chunks) *
                        static_cast<double>(CeilDiv(c.items, c.block_items));
  if (blocks >= static_cast<double>(kMostItems)) return;
  c.blocks = c.chunks * CeilDiv(c.items, c.block_items);
  c.tap_rows = deep.win * down.win * problem.out_channels;
  c.staged_rows =
      std::max<int64_t>(1, std::min(c.tap_rows, kWindowSharedBytes / row_bytes(c.lanes)));
  c.static_bytes = sizeof(WindowPlace[kWindowThreads]);
  c.dynamic_bytes = c.staged_rows * row_bytes(c.lanes);

  // Counted in the source, about: what a thread does once, for a row of taps, for one of
  // them that sees some dY, and for each tap of this one. The loads of a channel
  // multiplier are as many lines of L1 as there are lanes.
  const auto live = [](const Axis& a) {
    return std::max(LivePairs(a) / static_cast<double>(a.in), 1e-3);
  };
  const double live_rows =
      live(deep) * live(down) * static_cast<double>(problem.out_channels);
  const double row_taps = static_cast<double>(across.win) / static_cast<double>(step);
  const double live_taps = std::min(row_taps, live(across) * 1.1 + run / 2.0);
  const double load =
      static_cast<double>(std::min<int64_t>(problem.out_channels, kWindowLanes));
  const double once = 400 + run * (6 + 2 * vector) +
                      static_cast<double>(c.tap_rows * across.win * c.lanes * vector) /
                          kWindowThreads * 7;
  const double instructions =
      once + 25 * static_cast<double>(c.tap_rows) +
      live_rows * (30 + run * (4 + vector + load) +
                   live_taps * (run * vector + vector + 5 + load));
  c.cost = CostOf(problem, c.blocks, kWindowThreads, kWindowMinBlocks,
                  instructions * (problem.dtype == DType::kF64 ? 2 : 1));
  c.us = ModelUs(c.cost, CorrectionOf("depthwise", problem));
  if (c.us < best->us) *best = c;
}

// Calls visit(T{}, vector, run) with every window kernel of a type, the latter two as
// integral constants.
template <typename T, typename Visit>
void ForEachWindow(Visit visit) {
  const auto one = [&](auto vector, auto run) { visit(T{}, vector, run); };
  using Single = std::integral_constant<int, 1>;
  using Pair = std::integral_constant<int, 2>;
  if constexpr (sizeof(T) == 8) {
    one(Single{}, std::integral_constant<int, 7>{});
  } else {
    one(Single{}, std::integral_constant<int, 7>{});
    one(Single{}, std::integral_constant<int, 14>{});
    one(Pair{}, std::integral_constant<int, 7>{});
    one(Pair{}, std::integral_constant<int, 8>{});
    one(Pair{}, std::integral_constant<int, 14>{});
  }
}

template <typename T>
bool Configure(const Problem& problem, const void* dy, const void* dx,
               Configuration* best) {
  constexpr double kNone = 1e300;
  best->us = kNone;
  const bool pairs = TakesPairs(problem, dy, dx);
  if constexpr (sizeof(T) <= 4) {
    ForEachRing([&](auto filter) {
      using S = typename decltype(filter)::template Shape<T>;
      if (TakesRing<S>(problem, pairs)) ConfigureRing<S>(problem, filter.index, best);
    });
  }
  if (best->us == kNone) {
    ForEachWindow<T>([&](auto, auto vector, auto run) {
      if (vector == 1 || pairs) ConfigureWindow(problem, vector, run, best);
    });
  }
  return best->us != kNone;
}

// ---- launches ---------------------------------------------------------------------

DepthwiseAxis MakeAxis(const Problem& problem, int i) {
  const auto index = [](int64_t v) { return static_cast<int32_t>(v); };
  const Axis& a = problem.axis[i];
  const int64_t common = Gcd(a.stride, a.rhs_dilation);
  const int64_t step = a.stride / common, spacing = a.rhs_dilation / common;
  int64_t inverse = 0;
  // Wanted only where there are lattices (Takes, TakesRing).
  while (spacing <= kMostLattices && inverse < spacing &&
         inverse * step % spacing != 1 % spacing) {
    ++inverse;
  }
  return {index(a.in),
          index(a.out),
          index(a.pad_lo),
          index(a.stride),
          index(a.rhs_dilation),
          index(common),
          index(step),
          index(spacing),
          index(inverse),
          index(problem.dx.axis[i]),
          index(problem.dy.axis[i]),
          index(problem.w.axis[i])};
}

DepthwiseParams MakeDepthwiseParams(const Problem& problem, const Configuration& c) {
  const auto divider = [](int64_t divisor) {
    return Divider<int32_t>::Make(std::max<int64_t>(divisor, 1));
  };
  const bool ring = c.ring >= 0;
  DepthwiseParams params{};
  params.geometry = MakeGeometry<int32_t>(problem);
  for (int i = 1; i < kAxes; ++i) {
    const DepthwiseAxis& axis = params.axis[i] = MakeAxis(problem, i);
    params.dy_step[i] = SizeInBytes(problem.dtype) * axis.spacing * axis.dy_stride;
    params.dx_step[i] = SizeInBytes(problem.dtype) * axis.dilation * axis.dx_stride;
  }
  params.channels = divider(c.channels);
  params.runs = divider(c.runs);
  params.phases = divider(ring ? 1 : DenseStride(problem.axis[2]));
  params.residues_w = divider(Lattices(problem.axis[2]));
  params.rows = divider(ring ? c.strips : problem.axis[1].in);
  params.residues_h = divider(ring ? Lattices(problem.axis[1]) : 1);
  params.depth = divider(problem.axis[0].in);
  params.items = static_cast<int32_t>(c.items);
  params.groups = static_cast<int32_t>(problem.groups);
  params.strip = static_cast<int32_t>(c.strip);
  params.lanes = divider(c.lanes);
  params.chunks = divider(c.chunks);
  params.block_items = static_cast<int32_t>(c.block_items);
  params.staged_rows = static_cast<int32_t>(c.staged_rows);
  params.tap_rows = static_cast<int32_t>(c.tap_rows);
  params.window_cols = divider(problem.axis[2].win);
  params.window_rows = divider(problem.axis[1].win);
  params.multiplier = divider(problem.out_channels);
  return params;
}

// One part of the batch.
template <typename T>
cudaError_t EnqueuePart(cudaStream_t stream, const Problem& problem, const T* dy,
                        const T* w, T* dx) {
  static_assert(sizeof(DepthwiseParams) + 3 * sizeof(void*) <= kMaxParameterBytes,
                "the kernel's parameters must fit in constant memory's 4 KiB");
  Configuration c;
  if (!Configure<T>(problem, dy, dx, &c)) return cudaErrorInvalidValue;
  const DepthwiseParams params = MakeDepthwiseParams(problem, c);
  const dim3 grid(static_cast<unsigned>(c.blocks));
  cudaError_t status = cudaErrorInvalidValue;
  if constexpr (sizeof(T) <= 4) {
    ForEachRing([&](auto filter) {
      using S = typename decltype(filter)::template Shape<T>;
      if (c.ring != filter.index) return;
      status = CU_LAUNCH((DepthwiseRingKernel<S>), grid, dim3(kRingThreads), 0, stream,
                         params, dy, w, dx);
    });
  }
  if (c.ring < 0) {
    ForEachWindow<T>([&](auto, auto vector, auto run) {
      if (c.vector != vector || c.run != run) return;
      status =
          CU_LAUNCH((DepthwiseWindowKernel<T, vector, run>), grid, dim3(kWindowThreads),
                    static_cast<int>(c.dynamic_bytes), stream, params, dy, w, dx);
    });
  }
  return status;
}

template <typename T>
const char* LaunchTyped(cudaStream_t stream, const Problem& problem, const void* dy,
                        const void* w, void* dx) {
  const auto launch = [&](const Problem& part, const T* dy_part, T* dx_part,
                          const Epilogue&) {
    return EnqueuePart<T>(stream, part, dy_part, static_cast<const T*>(w), dx_part);
  };
  return ErrorText(LaunchInParts<T>(problem, 0, dy, dx, {}, launch));
}

bool ConfigureAny(const Problem& problem, Configuration* c) {
  switch (problem.dtype) {
    case DType::kF64: return Configure<double>(problem, nullptr, nullptr, c);
    case DType::kF32: return Configure<float>(problem, nullptr, nullptr, c);
    case DType::kBF16: return Configure<__nv_bfloat16>(problem, nullptr, nullptr, c);
    case DType::kF16: return Configure<__half>(problem, nullptr, nullptr, c);
  }
  return false;
}

}  // namespace

bool PlanDepthwise(const Problem& given, int64_t, Plan* plan) {
  Problem problem = Orient(given);
  if (!Takes(problem)) return false;
  const int64_t images = ImagesIn32Bits(problem, 0);
  if (images == 0) return false;
  const int64_t parts = CeilDiv(problem.batch, images);
  problem.batch = images;
  Configuration c;
  if (!ConfigureAny(problem, &c)) return false;
  plan->tile_m = c.run;
  plan->tile_n = c.vector;
  plan->blocks = c.blocks;
  plan->threads = c.threads;
  plan->resident = c.resident;
  plan->shared_bytes = c.static_bytes + c.dynamic_bytes;
  plan->cost = Repeated(c.cost, parts);
  plan->model_us = ModelUs(plan->cost, CorrectionOf("depthwise", problem));
  return true;
}

const char* LaunchDepthwise(CUstream_st* stream, const Problem& given, const Plan&,
                            const void* dy, const void* w, void* dx, void*,
                            const Epilogue&) {
  const Problem problem = Orient(given);
  switch (problem.dtype) {
    case DType::kF64: return LaunchTyped<double>(stream, problem, dy, w, dx);
    case DType::kF32: return LaunchTyped<float>(stream, problem, dy, w, dx);
    case DType::kBF16: return LaunchTyped<__nv_bfloat16>(stream, problem, dy, w, dx);
    case DType::kF16: return LaunchTyped<__half>(stream, problem, dy, w, dx);
  }
  return "the depthwise kernel does not take this type";
}

}  // namespace convgrad
