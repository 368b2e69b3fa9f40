// The CUDA side of kernel.h: the planner, which chooses from a table of kernels
// (cuda/kernel_table.h), and the two kernels that take anything, or nearly:
//
// - direct: any problem, by the definition (cuda/direct.cuh);
// - tiled: implicit GEMM on the FP32 and FP64 units (cuda/tiled.cuh).
//
// The specialised ones are in the .cu files of cuda/. They take most of the time that all
// of it takes to compile, and CONVGRAD_SPECIALISED says whether they are in a build:
//
// - mma, mma_3xtf32: implicit GEMM on the tensor cores (cuda/mma.cuh);
// - depthwise: one input channel a group, on the FP32 units (cuda/depthwise.cuh);
// - few_channels, few_channels_3xtf32: few input channels, on the tensor cores
//   (cuda/few_channels.cuh);
// - grouped: groups of few channels, on the tensor cores (cuda/grouped.cuh);
// - wgmma: implicit GEMM on the tensor cores of sm_90a (cuda/wgmma.cuh), where a build
//   compiles for those, too: CONVGRAD_WGMMA.
// "3xtf32" is TF32 with the accuracy of float32.

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

#include "cuda/direct.cuh"
#include "cuda/epilogue.cuh"
#include "cuda/geometry.cuh"
#include "cuda/kernel_table.h"
#include "cuda/planning.h"
#include "cuda/platform.cuh"
#include "cuda/tiled.cuh"
#include "kernel.h"

namespace convgrad {
namespace {

// ---- the planner ------------------------------------------------------------------

struct KernelRow {
  const char* name;
  PlanFunction* plan;
  LaunchFunction* launch;
  bool fuses;   // applies an epilogue on its way out
  bool splits;  // deals out the terms of a sum to several blocks, given a workspace
  // The compute capabilities, times ten, for which its machine code is shipped.
  // Code for one chip alone (sm_90a) has both ends there.
  int lowest, highest;
};

constexpr int kAnyLater = 1 << 30;
constexpr KernelRow kKernels[] = {
    {"direct", PlanDirect, LaunchDirect, true, false, 80, kAnyLater},
    {"tiled", PlanTiled, LaunchTiled, true, false, 80, kAnyLater},
#if defined(CONVGRAD_SPECIALISED)
    {"mma", PlanMma, LaunchMma, true, true, 80, kAnyLater},
    {"mma_3xtf32", PlanMma3xTf32, LaunchMma3xTf32, true, true, 80, kAnyLater},
    {"depthwise", PlanDepthwise, LaunchDepthwise, false, false, 80, kAnyLater},
    {"few_channels", PlanFewChannels, LaunchFewChannels, true, false, 80, kAnyLater},
    {"few_channels_3xtf32", PlanFewChannels3xTf32, LaunchFewChannels3xTf32, true, false,
     80, kAnyLater},
    {"grouped", PlanGrouped, LaunchGrouped, true, false, 80, kAnyLater},
#endif
#if defined(CONVGRAD_WGMMA)
    {"wgmma", PlanWgmma, LaunchWgmma, true, false, 90, 90},
#endif
};
// The kinds of GPU that plans are made for: each up to the next. From CUDA's table of
// technical specifications by compute capability.
constexpr Gpu kGpus[] = {
    {80, 163 << 10}, {86, 99 << 10},  {87, 163 << 10},
    {89, 99 << 10},  {90, 227 << 10}, {120, 99 << 10},
};

constexpr int kKernelCount = sizeof(kKernels) / sizeof(kKernels[0]);

bool Runs(const KernelRow& row, int capability) {
  return row.lowest <= capability && capability <= row.highest;
}

// The kernels that JAX_CONVGRAD_CUDA_EXCLUDE names, with commas between; read once. No
// plan is theirs, so that a kernel that fails on a GPU can be left out of everything.
bool IsExcluded(const KernelRow& row) {
  static const std::array<bool, kKernelCount> excluded = [] {
    std::array<bool, kKernelCount> found{};
    const char* const text = std::getenv("JAX_CONVGRAD_CUDA_EXCLUDE");
    const std::string names = text == nullptr ? "" : text;
    constexpr const char* kBetween = ", ";
    for (size_t at = names.find_first_not_of(kBetween); at != std::string::npos;) {
      const size_t end = std::min(names.find_first_of(kBetween, at), names.size());
      for (int i = 0; i < kKernelCount; ++i) {
        found[static_cast<size_t>(i)] |=
            names.compare(at, end - at, kKernels[i].name) == 0;
      }
      at = names.find_first_not_of(kBetween, end);
    }
    return found;
  }();
  return excluded[static_cast<size_t>(&row - kKernels)];
}

// Whether every sum is empty, or there is none.
bool IsEmpty(const Problem& problem) {
  int64_t least = std::min(
      {problem.batch, problem.groups, problem.in_channels, problem.out_channels});
  for (const Axis& a : problem.axis) least = std::min({least, a.in, a.out, a.win});
  return least == 0;
}

// ---- the kernels that take anything -----------------------------------------------

// The function's products, inserted zeros left out.
double Products(const Problem& problem) {
  double products = static_cast<double>(problem.batch * problem.groups) *
                    static_cast<double>(problem.in_channels * problem.out_channels);
  for (const Axis& a : problem.axis) products *= static_cast<double>(a.out * a.win);
  return products;
}

double FmaPerUs(const Problem& problem) {
  return problem.dtype == DType::kF64 ? ReferenceGpu::kFmaF64PerUs
                                      : ReferenceGpu::kFmaF32PerUs;
}

template <typename Launch>
const char* ByDType(const Problem& problem, const void* dy, const void* w, void* dx,
                    Launch launch) {
  const auto typed = [&](auto t) {
    using T = decltype(t);
    return launch(static_cast<const T*>(dy), static_cast<const T*>(w),
                  static_cast<T*>(dx));
  };
  cudaError_t status = cudaErrorInvalidValue;
  switch (problem.dtype) {
    case DType::kF64: status = typed(double{}); break;
    case DType::kF32: status = typed(float{}); break;
    case DType::kBF16: status = typed(__nv_bfloat16{}); break;
    case DType::kF16: status = typed(__half{}); break;
  }
  return ErrorText(status);
}

}  // namespace

bool PlanDirect(const Problem& problem, int64_t, Plan* plan) {
  plan->threads = kDirectThreads;
  plan->blocks = DirectBlocks(problem);
  plan->resident =
      FitsIn32Bits(problem, 0) ? kDirectMinBlocks<int32_t> : kDirectMinBlocks<int64_t>;
  // A product costs two loads, and a multiprocessor starts a quarter as many loads as
  // multiply-adds. Some 100 instructions find out where an output lies. Memory: half the
  // rate of a copy, an estimate.
  double outputs = static_cast<double>(problem.batch * problem.groups) *
                   static_cast<double>(problem.in_channels);
  for (const Axis& a : problem.axis) outputs *= static_cast<double>(a.in);
  plan->cost = {1, 0,
                (8 * Products(problem) + 100 * outputs) / ReferenceGpu::kFmaF32PerUs,
                2 * BytesMoved(problem) / ReferenceGpu::kCopyBytesPerUs, 0};
  plan->model_us = ModelUs(plan->cost, CorrectionOf("direct", problem));
  return true;
}

const char* LaunchDirect(CUstream_st* stream, const Problem& problem, const Plan&,
                         const void* dy, const void* w, void* dx, void*,
                         const Epilogue& epilogue) {
  const bool small = FitsIn32Bits(problem, 0);
  return ByDType(problem, dy, w, dx, [&](auto* y, auto* f, auto* x) {
    using T = std::remove_pointer_t<decltype(x)>;
    return small ? EnqueueDirect<T, int32_t>(stream, problem, y, f, x, epilogue)
                 : EnqueueDirect<T, int64_t>(stream, problem, y, f, x, epilogue);
  });
}

bool PlanTiled(const Problem& problem, int64_t, Plan* plan) {
  const auto fill = [&](auto shape) {
    using S = decltype(shape);
    plan->tile_m = S::kM;
    plan->tile_n = S::kN;
    plan->tile_k = S::kK;
    plan->threads = S::kThreads;
    plan->shared_bytes = S::kSharedBytes;
  };
  problem.dtype == DType::kF64 ? fill(Tile<double>{}) : fill(Tile<float>{});
  const int64_t tiles = CountTiles(problem, plan->tile_m, plan->tile_n);
  if (tiles > kMaxBlocks || ImagesIn32Bits(problem, kTiledSlack) == 0) return false;
  plan->stages = 2;
  plan->blocks = tiles;
  plan->resident =
      problem.dtype == DType::kF64 ? kTiledMinBlocks<double> : kTiledMinBlocks<float>;
  // A wave of blocks takes as long as its slowest one: the taps of the phase that may
  // have the most, K padded to whole slices. Two thirds of the arithmetic rate, by count
  // of the instructions in the inner loop.
  double products = static_cast<double>(plan->tile_m * plan->tile_n) *
                    static_cast<double>((problem.out_channels + plan->tile_k - 1) /
                                        plan->tile_k * plan->tile_k);
  for (const Axis& a : problem.axis) {
    const int64_t step = MakePhase(a, 0).r_step;
    products *= static_cast<double>((a.win + step - 1) / step);
  }
  constexpr int64_t kResident = 2 * ReferenceGpu::kMultiprocessors;
  const int64_t waves = (tiles + kResident - 1) / kResident;
  plan->cost = {
      1, 0, static_cast<double>(waves * kResident) * products * 1.5 / FmaPerUs(problem),
      BytesMoved(problem) / ReferenceGpu::kCopyBytesPerUs, 0};
  plan->model_us = ModelUs(plan->cost, CorrectionOf("tiled", problem));
  return true;
}

const char* LaunchTiled(CUstream_st* stream, const Problem& problem, const Plan&,
                        const void* dy, const void* w, void* dx, void*,
                        const Epilogue& epilogue) {
  return ByDType(problem, dy, w, dx, [&](auto* y, auto* f, auto* x) {
    using T = std::remove_pointer_t<decltype(x)>;
    return LaunchInParts<T>(problem, kTiledSlack, y, x, epilogue,
                            [&](const Problem& part, const T* part_dy, T* part_dx,
                                const Epilogue& part_epilogue) {
                              return EnqueueTiled<T>(stream, part, part_dy, f, part_dx,
                                                     part_epilogue);
                            });
  });
}

// ---- kernel.h ---------------------------------------------------------------------

const char* const* CudaKernelNames() {
  static const char* names[kKernelCount + 1];
  static const bool filled = [] {
    std::transform(std::begin(kKernels), std::end(kKernels), names,
                   [](const KernelRow& row) { return row.name; });
    return true;
  }();
  (void)filled;
  return names;
}

// The fastest kernel by the models; the first of equals. Only the first one takes what is
// empty, so that the others may divide by sizes.
bool PlanCuda(const Problem& problem, const char* kernel, const Gpu& gpu, Plan* plan) {
  const bool any = std::strcmp(kernel, "auto") == 0;
  bool found = false;
  for (const KernelRow& row : kKernels) {
    if (!any && std::strcmp(kernel, row.name) != 0) continue;
    if (IsExcluded(row)) continue;
    if (!Runs(row, gpu.capability) || (IsEmpty(problem) && &row != kKernels)) continue;
    Plan candidate{};
    if (!row.plan(problem, gpu.shared_bytes, &candidate)) continue;
    if (candidate.shared_bytes > gpu.shared_bytes) continue;
    candidate.kernel = row.name;
    if (any && candidate.workspace_bytes > problem.workspace_limit) continue;
    if (!found || candidate.model_us < plan->model_us) *plan = candidate;
    found = true;
  }
  return found;
}

int64_t CudaWorkspaceBytes(const Problem& problem, const char* kernel) {
  int64_t bytes = 0;
  for (const Gpu& gpu : kGpus) {
    Plan plan{};
    if (PlanCuda(problem, kernel, gpu, &plan)) {
      bytes = std::max(bytes, plan.workspace_bytes);
    }
  }
  return bytes;
}

// What a split that fills the reference GPU with two blocks a multiprocessor takes,
// about.
constexpr int64_t kSplitWorkspaceBytes = int64_t{16} << 20;

WorkspaceBound BoundCudaWorkspace(const Problem& problem) {
  for (const KernelRow& row : kKernels) {
    Plan plan{};
    if (row.splits && !IsEmpty(problem) &&
        row.plan(problem, kGpus[0].shared_bytes, &plan)) {
      return {kSplitWorkspaceBytes, 0};
    }
  }
  return {};
}

Gpu GpuOf(int capability) {
  Gpu gpu = {capability, 0};
  for (const Gpu& known : kGpus) {
    if (known.capability <= capability) gpu.shared_bytes = known.shared_bytes;
  }
  return gpu;
}

const char* CurrentGpu(Gpu* gpu) {
  int device = 0, major = 0, minor = 0, shared_bytes = 0;
  cudaError_t status = cudaGetDevice(&device);
  const auto ask = [&](cudaDeviceAttr attribute, int* value) {
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(value, attribute, device);
  };
  ask(cudaDevAttrComputeCapabilityMajor, &major);
  ask(cudaDevAttrComputeCapabilityMinor, &minor);
  ask(cudaDevAttrMaxSharedMemoryPerBlockOptin, &shared_bytes);
  *gpu = {10 * major + minor, shared_bytes};
  return ErrorText(status);
}

int CudaToolkitVersion() { return CUDART_VERSION; }

int CudaDriverVersion() {
  int version = 0;
  if (cudaDriverGetVersion(&version) != cudaSuccess) {
    (void)cudaGetLastError();
    return 0;
  }
  return version;
}

const char* LaunchCuda(CUstream_st* stream, const Problem& problem, const Plan& plan,
                       const void* dy, const void* w, void* dx, void* workspace,
                       const Epilogue& epilogue) {
  for (const KernelRow& row : kKernels) {
    if (std::strcmp(plan.kernel, row.name) != 0) continue;
    const char* const error =
        row.launch(stream, problem, plan, dy, w, dx, workspace, epilogue);
    if (error != nullptr || epilogue.IsNone() || row.fuses) return error;
    return ByDType(problem, dy, w, dx, [&](auto*, auto*, auto* x) {
      return EnqueueEpilogue(stream, problem, epilogue, x);
    });
  }
  return "no such CUDA kernel";
}

}  // namespace convgrad
