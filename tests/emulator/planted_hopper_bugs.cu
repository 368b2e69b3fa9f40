// A small matrix product as sm_90a computes one, with one mistake at a time and without:
// what the emulator has to report, and what it must not.
// Run as planted.h says.

#include <cstdint>
#include <map>
#include <memory>
#include <string>

#include "cuda/hopper.cuh"
#include "cuda/tensor_map.cuh"
#include "planted.h"

namespace convgrad {
namespace {

constexpr int kSize = 64;    // rows of A, and of B, which is transposed
constexpr int kDepth = 320;  // five slices
constexpr int kSlice = 64, kStages = 2;
constexpr int kTileBytes = kSize * kSlice * 2;
constexpr int kStageBytes = 2 * kTileBytes;
constexpr int kBarriersAt = kStages * kStageBytes;
constexpr int kSharedBytes = kBarriersAt + (2 * kStages + 1) * 8;
constexpr int kThreads = kWarpgroupThreads + 32;

enum class Bug {
  kNone,
  kTooFewBytes,
  kTooManyBytes,
  kWrongParity,
  kNoWaitForData,
  kNoWaitForSpace,
  kEarlyRelease,
  kNoWaitForSums,
  kNoProductFence,
  kNoInitFence,
  kNoBarrierAfterInit,
  kTooSmallCount,
  kMisalignedBox,
  kOtherRows,
  kLeftCopy,
  kNoProxyFence,
  kNoProxyFenceAfterCopy,
  kProxyFenceBeforeWait,
  kOneThreadFences,
};

// How the last slice of B comes: by TMA, by the threads' own stores, by their cp.async.
enum class By { kTma, kStores, kCopies };

// The threads themselves store an operand, permuted as TMA does.
__device__ void StoreOperand(unsigned char* to, const __nv_bfloat16* from, int k0) {
  for (int i = static_cast<int>(threadIdx.x); i < kSize * kSlice;
       i += kWarpgroupThreads) {
    const int row = i / kSlice, k = i % kSlice;
    const int at = row * kSwizzleBytes + ((k / 8) ^ (row % 8)) * 16 + k % 8 * 2;
    StoreShared(to + at, from[row * kDepth + k0 + k]);
  }
}

__device__ void CopyOperand(unsigned char* to, const __nv_bfloat16* from, int k0) {
  for (int i = static_cast<int>(threadIdx.x); i < kSize * kSlice / 8;
       i += kWarpgroupThreads) {
    const int row = i / (kSlice / 8), chunk = i % (kSlice / 8);
    CopyAsync<16>(to + row * kSwizzleBytes + (chunk ^ (row % 8)) * 16,
                  from + row * kDepth + k0 + chunk * 8, 16);
  }
  CopyAsyncCommit();
}

// One warp fills a ring of stages, a warpgroup multiplies. A is copied by TMA.
template <Bug kBug, By kBy>
__global__ void Multiply(const __grid_constant__ CUtensorMap map_a,
                         const __grid_constant__ CUtensorMap map_b,
                         const __nv_bfloat16* b, float* c) {
  CU_DYNAMIC_SHARED_ALIGNED(ring, kSwizzleAtomBytes);
  uint64_t* const full = reinterpret_cast<uint64_t*>(ring + kBarriersAt);
  uint64_t* const empty = full + kStages;
  uint64_t* const stored_all = empty + kStages;
  const int thread = static_cast<int>(threadIdx.x);
  constexpr int kSlices = kDepth / kSlice;
  if (thread == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      MbarrierInit(full + stage, 1);
      MbarrierInit(empty + stage, kBug == Bug::kTooSmallCount ? 2 : 4);
    }
    MbarrierInit(stored_all, kWarpgroupThreads);
    if (kBug != Bug::kNoInitFence) MbarrierFenceInit();
  }
  if (kBug != Bug::kNoBarrierAfterInit) __syncthreads();
  if (thread >= kWarpgroupThreads) {
    if (thread != kWarpgroupThreads) return;
    for (int slice = 0; slice < kSlices; ++slice) {
      const int stage = slice % kStages;
      const unsigned round = static_cast<unsigned>(slice / kStages);
      const bool stored = kBy != By::kTma && slice == kSlices - 1;
      if (kBug != Bug::kNoWaitForSpace) MbarrierWait(empty + stage, ~round & 1);
      unsigned bytes = stored ? kTileBytes : kStageBytes;
      if (kBug == Bug::kTooFewBytes) bytes -= kTileBytes;
      if (kBug == Bug::kTooManyBytes && slice == 2) bytes += 16;
      MbarrierArriveExpect(full + stage, bytes);
      unsigned char* const to = ring + stage * kStageBytes;
      const int at[3] = {slice * kSlice, 0, 0};
      TmaLoad<3>(to + (kBug == Bug::kMisalignedBox && slice == 1 ? 64 : 0), &map_a,
                 full + stage, at);
      if (!stored) TmaLoad<3>(to + kTileBytes, &map_b, full + stage, at);
    }
    if (kBug == Bug::kLeftCopy) {
      const int at[3] = {0, 0, 0};
      MbarrierWait(empty, kSlices / kStages & 1);
      MbarrierArriveExpect(full + 1, kTileBytes);
      TmaLoad<3>(ring + kStageBytes, &map_a, full + 1, at);
    }
    return;
  }
  float d[kSize / 2] = {};
  for (int slice = 0; slice < kSlices; ++slice) {
    const int stage = slice % kStages;
    const unsigned round = static_cast<unsigned>(slice / kStages);
    if (kBug != Bug::kNoWaitForData) {
      MbarrierWait(full + stage, (kBug == Bug::kWrongParity ? ~round : round) & 1);
    }
    unsigned char* const at = ring + stage * kStageBytes;
    if (kBy != By::kTma && slice == kSlices - 1) {
      if constexpr (kBy == By::kStores) {
        StoreOperand(at + kTileBytes, b, slice * kSlice);
      } else {
        CopyOperand(at + kTileBytes, b, slice * kSlice);
        if (kBug == Bug::kProxyFenceBeforeWait) FenceProxyAsync();
        CopyAsyncWait<0>();
      }
      constexpr bool kFences = kBug != Bug::kNoProxyFence &&
                               kBug != Bug::kNoProxyFenceAfterCopy &&
                               kBug != Bug::kProxyFenceBeforeWait;
      if (kFences && (kBug != Bug::kOneThreadFences || thread == 0)) FenceProxyAsync();
      MbarrierArrive(stored_all);
      MbarrierWait(stored_all, 0);
    }
    const uint32_t a_at = SharedAddress(at);
    if (kBug != Bug::kNoProductFence) WgmmaFence();
    for (uint32_t k = 0; k < kSlice * 2; k += 32) {
      const uint32_t other = kBug == Bug::kOtherRows && thread >= 96 ? 32 : 0;
      WgmmaBf16<kSize, false>(d, OperandAlongK(a_at + (k ^ other)),
                              OperandAlongK(a_at + kTileBytes + k));
    }
    WgmmaCommit();
    if (kBug != Bug::kEarlyRelease && kBug != Bug::kNoWaitForSums) WgmmaWait<0>();
    if (kBug == Bug::kEarlyRelease) WgmmaWait<1>();
    if (thread % 32 == 0) MbarrierArrive(empty + stage);
  }
  if (kBug == Bug::kEarlyRelease) WgmmaWait<0>();
  for (int i = 0; i < kSize / 2; ++i) {
    const int row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
    c[row * kSize + i / 4 * 8 + thread % 4 * 2 + i % 2] = d[i];
  }
}

using Kernel = void(CUtensorMap, CUtensorMap, const __nv_bfloat16*, float*);

struct Pair {
  Kernel *planted, *correct;
};
#define PAIR_BY(bug, by)                                                        \
  {                                                                             \
    #bug, { Multiply<Bug::k##bug, By::k##by>, Multiply<Bug::kNone, By::k##by> } \
  }
#define PAIR(bug) PAIR_BY(bug, Tma)
const std::map<std::string, Pair> kKernels = {
    PAIR(TooFewBytes),
    PAIR(TooManyBytes),
    PAIR(WrongParity),
    PAIR(NoWaitForData),
    PAIR(NoWaitForSpace),
    PAIR(EarlyRelease),
    PAIR(NoWaitForSums),
    PAIR(NoProductFence),
    PAIR(NoInitFence),
    PAIR(NoBarrierAfterInit),
    PAIR(MisalignedBox),
    PAIR(TooSmallCount),
    PAIR(OtherRows),
    PAIR(LeftCopy),
    PAIR_BY(NoProxyFence, Stores),
    PAIR_BY(NoProxyFenceAfterCopy, Copies),
    PAIR_BY(ProxyFenceBeforeWait, Copies),
    PAIR_BY(OneThreadFences, Stores),
};

int Main(const std::string& name, bool planted) {
  struct Operands {
    alignas(64) __nv_bfloat16 a[kSize][kDepth], b[kSize][kDepth];
    float c[kSize][kSize];
  };
  const std::unique_ptr<Operands> memory(new Operands);
  const auto value = [](int i) { return static_cast<float>(i * 37 % 17 - 8); };
  for (int i = 0; i < kSize; ++i) {
    for (int k = 0; k < kDepth; ++k) {
      memory->a[i][k] = __float2bfloat16(value(i * 5 + k * 3));
      memory->b[i][k] = __float2bfloat16(value(i * 7 + k));
    }
  }
  const TensorShape shape = {3, {kDepth, kSize, 1}, {kDepth * 2, kSize * kDepth * 2}};
  const uint32_t box[3] = {kSlice, kSize, 1};
  CUtensorMap map_a, map_b;
  cudaError_t status = EncodeTiled<__nv_bfloat16>(memory->a, shape, box, &map_a);
  if (status == cudaSuccess) {
    status = EncodeTiled<__nv_bfloat16>(memory->b, shape, box, &map_b);
  }
  if (status == cudaSuccess) {
    const Pair& pair = kKernels.at(name);
    status =
        CU_LAUNCH(planted ? pair.planted : pair.correct, dim3(1), dim3(kThreads),
                  kSharedBytes, cudaStream_t{}, map_a, map_b,
                  static_cast<const __nv_bfloat16*>(&memory->b[0][0]), &memory->c[0][0]);
  }
  if (HasFailed(status)) return 2;
  for (int i = 0; i < kSize; ++i) {
    for (int j = 0; j < kSize; ++j) {
      float expected = 0;
      for (int k = 0; k < kDepth; ++k)
        expected += value(i * 5 + k * 3) * value(j * 7 + k);
      if (IsWrong(i * kSize + j, memory->c[i][j], expected)) return 1;
    }
  }
  return 0;
}

}  // namespace
}  // namespace convgrad

int main(int argc, char** argv) {
  return convgrad::RunPlanted(argc, argv, convgrad::Main);
}
