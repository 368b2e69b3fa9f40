// Kernels with one mistake each, and the same kernels without it: what the emulator and
// the sanitizers have to report, and what they must not.
// Run as planted.h says.

#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>

#include "cuda/platform.cuh"
#include "cuda/primitives.cuh"
#include "planted.h"

namespace convgrad {
namespace {

constexpr int kThreads = 64;

// Each kernel copies `from` to `to`, reversed within the block where threads exchange
// values through shared memory.

template <bool kPlanted>
__global__ void ReadOutOfBounds(const float* from, float* to) {
  const int i = static_cast<int>(threadIdx.x);
  to[kThreads - 1 - i] = from[kPlanted && i == kThreads - 1 ? i + 1 : i];
}

template <bool kPlanted>
__global__ void MissingBarrier(const float* from, float* to) {
  __shared__ float values[kThreads];
  const int i = static_cast<int>(threadIdx.x);
  values[i] = from[i];
  if (!kPlanted) __syncthreads();
  to[i] = values[kThreads - 1 - i];
}

// A double buffer whose trailing barrier is missing: a fast thread refills what a slow
// one still reads.
template <bool kPlanted>
__global__ void MissingTrailingBarrier(const float* from, float* to) {
  CU_DYNAMIC_SHARED(memory);
  float* const values = reinterpret_cast<float*>(memory);
  const int i = static_cast<int>(threadIdx.x);
  float sum = 0;
  for (int round = 0; round < 2; ++round) {
    CopyAsync<4>(values + i, from + i, round == 1 ? 4 : 0);
    CopyAsyncCommit();
    CopyAsyncWait<0>();
    __syncthreads();
    sum += values[kThreads - 1 - i];
    if (!kPlanted) __syncthreads();
  }
  to[i] = sum;
}

template <bool kPlanted>
__global__ void MissingCopyWait(const float* from, float* to) {
  __shared__ float values[kThreads];
  const int i = static_cast<int>(threadIdx.x);
  CopyAsync<4>(values + i, from + i, 4);
  CopyAsyncCommit();
  CopyAsyncWait<kPlanted ? 1 : 0>();
  __syncthreads();
  to[i] = values[kThreads - 1 - i];
}

template <bool kPlanted>
__global__ void DivergentBarrier(const float* from, float* to) {
  __shared__ float values[kThreads];
  const int i = static_cast<int>(threadIdx.x);
  values[i] = from[i];
  if (kPlanted && i % 2 == 0) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  to[i] = values[kThreads - 1 - i];
}

template <bool kPlanted>
__global__ void EarlyExit(const float* from, float* to) {
  __shared__ float values[kThreads];
  const int i = static_cast<int>(threadIdx.x);
  values[i] = from[i];
  if (kPlanted && i == kThreads - 1) return;
  __syncthreads();
  to[i] = values[kThreads - 1 - i];
}

template <bool kPlanted>
__global__ void DivergentWarp(const float* from, float* to) {
  const int i = static_cast<int>(threadIdx.x);
  const float v = from[i];
  if (kPlanted && i % 2 == 0) {
    to[kThreads - 1 - i] = __shfl_xor_sync(0xffffffff, v, 0);
  } else {
    to[kThreads - 1 - i] = __shfl_sync(0xffffffff, v, i % 32);
  }
}

// A shuffle exchanges registers and orders no memory.
template <bool kPlanted>
__global__ void ShuffleForBarrier(const float* from, float* to) {
  __shared__ float values[kThreads];
  const int i = static_cast<int>(threadIdx.x);
  values[i] = from[i];
  const int mirrored = __shfl_sync(0xffffffff, 31 - i % 32, i % 32);
  if (!kPlanted) __syncwarp();
  to[kThreads - 1 - (i / 32 * 32 + mirrored)] = values[i / 32 * 32 + mirrored];
}

template <bool kPlanted>
__global__ void Deadlock(const float* from, float* to) {
  const int i = static_cast<int>(threadIdx.x);
  if (!kPlanted || i % 32 != 5) __syncwarp();
  to[kThreads - 1 - i] = from[i];
}

template <bool kPlanted>
__global__ void ShuffleFromNobody(const float* from, float* to) {
  const int i = static_cast<int>(threadIdx.x);
  float v = from[i];
  if (i % 32 < 16) v = __shfl_sync(0x0000ffff, v, kPlanted && i % 32 == 3 ? 20 : i % 32);
  to[kThreads - 1 - i] = v;
}

template <bool kPlanted>
__global__ void MisalignedVector(const float* from, float* to) {
  const int i = static_cast<int>(threadIdx.x);
  if (i % 4 == 0) {
    const int shift = kPlanted && i == 4 ? 1 : 0;
    const float4 v = *reinterpret_cast<const float4*>(from + i - shift);
    to[kThreads - 1 - i] = v.x;
    to[kThreads - 2 - i] = v.y;
    to[kThreads - 3 - i] = v.z;
    to[kThreads - 4 - i] = v.w;
  }
}

template <bool kPlanted>
__global__ void MisalignedCopy(const float* from, float* to) {
  alignas(16) __shared__ float values[kThreads + 4];
  const int i = static_cast<int>(threadIdx.x);
  if (i % 4 == 0) {
    CopyAsync<16>(values + i + (kPlanted && i == 8 ? 2 : 0), from + i, 16);
    CopyAsyncCommit();
    CopyAsyncWait<0>();
  }
  __syncthreads();
  to[i] = values[kThreads - 1 - i];
}

template <bool kPlanted>
__global__ void MisalignedMatrix(const float* from, float* to) {
  CU_DYNAMIC_SHARED(memory);
  const int i = static_cast<int>(threadIdx.x);
  std::memset(memory + 4 * i, 0, 4);
  __syncthreads();
  uint32_t r[4];
  LoadMatrixX4(r, memory + (kPlanted && i == 7 ? 8 : 0));
  to[kThreads - 1 - i] = from[i] + static_cast<float>(r[0]);
}

template <bool kPlanted>
__global__ void SharedOverflow(const float* from, float* to) {
  CU_DYNAMIC_SHARED(memory);
  float* const values = reinterpret_cast<float*>(memory);
  const int i = static_cast<int>(threadIdx.x);
  values[i] = from[i];
  if (kPlanted && i == 0) values[kThreads] = 0;
  __syncthreads();
  to[i] = values[kThreads - 1 - i];
}

template <bool kPlanted>
__global__ void StaticSharedUnwritten(const float* from, float* to) {
  __shared__ float sum[2];
  const int i = static_cast<int>(threadIdx.x);
  if (i == 0) sum[0] = 0;
  if (i == 0 && !kPlanted) sum[1] = 0;
  __syncthreads();
  to[kThreads - 1 - i] = from[i] + sum[0] + sum[1];
}

template <bool kPlanted>
__global__ void DynamicSharedUnwritten(const float* from, float* to) {
  CU_DYNAMIC_SHARED(memory);
  float* const sum = reinterpret_cast<float*>(memory);
  const int i = static_cast<int>(threadIdx.x);
  if (i == 0 && !kPlanted) sum[1] = 0;
  __syncthreads();
  to[kThreads - 1 - i] = from[i] + sum[1];
}

using Kernel = void(const float*, float*);

cudaError_t Launch(Kernel* kernel, dim3 block, int shared_bytes, const float* from,
                   float* to) {
  return CU_LAUNCH(kernel, dim3(1), block, shared_bytes, cudaStream_t{}, from, to);
}

struct Pair {
  Kernel *planted, *correct;
};
#define PAIR(kernel)                         \
  {                                          \
    #kernel, { kernel<true>, kernel<false> } \
  }
const std::map<std::string, Pair> kKernels = {
    PAIR(ReadOutOfBounds),        PAIR(MissingBarrier),    PAIR(MissingTrailingBarrier),
    PAIR(MissingCopyWait),        PAIR(DivergentBarrier),  PAIR(EarlyExit),
    PAIR(DivergentWarp),          PAIR(ShuffleForBarrier), PAIR(Deadlock),
    PAIR(ShuffleFromNobody),      PAIR(MisalignedVector),  PAIR(MisalignedCopy),
    PAIR(MisalignedMatrix),       PAIR(SharedOverflow),    PAIR(StaticSharedUnwritten),
    PAIR(DynamicSharedUnwritten),
};

// Launches that are wrong before a thread has run.
struct Configuration {
  dim3 block;
  int shared_bytes;
};
const std::map<std::string, std::pair<Configuration, Configuration>> kConfigurations = {
    {"TooManyThreads", {{dim3(1025), 0}, {dim3(kThreads), 0}}},
    {"NoThreads", {{dim3(0), 0}, {dim3(kThreads), 0}}},
    {"TooMuchShared", {{dim3(kThreads), 227 * 1024 + 1}, {dim3(kThreads), 227 * 1024}}},
};

int Main(const std::string& name, bool planted) {
  // On the heap and of exact size, for ASan.
  std::unique_ptr<float[]> from(new float[kThreads]), to(new float[kThreads]());
  for (int i = 0; i < kThreads; ++i) from[i] = static_cast<float>(i + 1);
  cudaError_t status;
  if (const auto found = kKernels.find(name); found != kKernels.end()) {
    const Pair& pair = found->second;
    status = Launch(planted ? pair.planted : pair.correct, dim3(kThreads),
                    kThreads * static_cast<int>(sizeof(float)), from.get(), to.get());
  } else {
    const auto& pair = kConfigurations.at(name);
    const Configuration& c = planted ? pair.first : pair.second;
    status =
        Launch(ReadOutOfBounds<false>, c.block, c.shared_bytes, from.get(), to.get());
  }
  if (HasFailed(status)) return 2;
  for (int i = 0; i < kThreads; ++i) {
    if (IsWrong(i, to[i], from[kThreads - 1 - i])) return 1;
  }
  return 0;
}

}  // namespace
}  // namespace convgrad

int main(int argc, char** argv) {
  return convgrad::RunPlanted(argc, argv, convgrad::Main);
}
