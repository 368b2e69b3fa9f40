// Launches: configuration checks, shared memory, and blocks over the processor's threads.

#pragma once

#include <link.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "block.h"
#include "environment.h"
#include "runtime.h"

namespace cuda_emulator {

// What a GPU of capability 9.0 allows.
inline cudaError_t CheckConfiguration(dim3 grid, dim3 block, int shared_bytes) {
  const auto within = [](unsigned size, unsigned most) {
    return 1 <= size && size <= most;
  };
  if (!within(grid.x, 0x7fffffff) || !within(grid.y, 65535) || !within(grid.z, 65535) ||
      !within(block.x, 1024) || !within(block.y, 1024) || !within(block.z, 64) ||
      block.x * block.y * block.z > 1024) {
    return cudaErrorInvalidConfiguration;
  }
  if (shared_bytes < 0 || shared_bytes > MostSharedBytes()) return cudaErrorInvalidValue;
  return cudaSuccess;
}

// Static shared memory is thread-local data of the program or library that holds the
// kernels. The emulator's one such variable survives; nothing else may be in there.
inline void PoisonStaticShared() {
#ifndef CUDA_EMULATOR_ASAN
  Block* const block = current_block;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* own) {
        char* const data = static_cast<char*>(info->dlpi_tls_data);
        for (int i = 0; data != nullptr && i < info->dlpi_phnum; ++i) {
          const auto& header = info->dlpi_phdr[i];
          if (header.p_type != PT_TLS) continue;
          if (own < data || own >= data + header.p_memsz) continue;
          std::memset(data, PoisonByte(), header.p_memsz);
          return 1;
        }
        return 0;
      },
      &current_block);
  current_block = block;
#endif
}

class SharedMemory {
 public:
  static constexpr size_t kAlignment = 1024;

  // Of exactly this size, so that ASan's red zone begins right behind it.
  explicit SharedMemory(int bytes) : bytes_(static_cast<size_t>(bytes)) {
    void* memory = nullptr;
    if (bytes_ > 0 && posix_memalign(&memory, kAlignment, bytes_) != 0) {
      throw std::bad_alloc();
    }
    memory_ = static_cast<unsigned char*>(memory);
    if (bytes_ > 0) std::memset(memory_, PoisonByte(), bytes_);
  }
  ~SharedMemory() { std::free(memory_); }
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  unsigned char* get() const { return memory_; }

 private:
  size_t bytes_;
  unsigned char* memory_;
};

inline std::vector<unsigned> ThreadOrder(unsigned count, unsigned seed) {
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0u);
  if (seed == 1) std::reverse(order.begin(), order.end());
  if (seed > 1) std::shuffle(order.begin(), order.end(), std::mt19937(seed));
  return order;
}

inline cudaError_t RunGrid(dim3 grid, dim3 size, int shared_bytes,
                           const std::function<void()>& kernel) {
  if (const cudaError_t status = CheckConfiguration(grid, size, shared_bytes);
      status != cudaSuccess) {
    return status;
  }
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  const bool eager = EnvironmentNumber("CUDA_EMULATOR_EAGER", 0) != 0;
  const std::vector<unsigned> order =
      ThreadOrder(size.x * size.y * size.z, EnvironmentNumber("CUDA_EMULATOR_ORDER", 0));
  std::atomic<uint64_t> next{0};
  std::atomic<bool> failed{false};

  const auto run_blocks = [&] {
    Block block(grid, size, eager, kernel);
    current_block = &block;
    while (!failed) {
      const uint64_t i = next++;
      if (i >= blocks) break;
      const SharedMemory shared(shared_bytes);
      block.shared_bytes = static_cast<size_t>(shared_bytes);
      PoisonStaticShared();
      const uint3 index{static_cast<unsigned>(i % grid.x),
                        static_cast<unsigned>(i / grid.x % grid.y),
                        static_cast<unsigned>(i / grid.x / grid.y)};
      if (!block.Run(index, shared.get(), order) && !failed.exchange(true)) {
        std::fprintf(stderr, "cuda_emulator: %s\n", block.failure().c_str());
        LastFailure::Set("cuda_emulator: " + block.failure());
      }
    }
    current_block = nullptr;
  };

#if defined(CUDA_EMULATOR_ASAN) || defined(CUDA_EMULATOR_TSAN)
  const uint64_t threads = 1;
  static std::mutex one_launch;  // static shared memory is not thread-local under ASan
  const std::lock_guard<std::mutex> lock(one_launch);
#else
  const uint64_t threads = std::min<uint64_t>(
      blocks,
      EnvironmentNumber("CUDA_EMULATOR_THREADS", std::thread::hardware_concurrency()));
#endif
  std::vector<std::thread> helpers;
  for (uint64_t i = 1; i < threads; ++i) helpers.emplace_back(run_blocks);
  run_blocks();
  for (std::thread& helper : helpers) helper.join();
  return failed ? cudaErrorLaunchFailure : cudaSuccess;
}

template <typename... Parameters>
cudaError_t LaunchKernel(void (*kernel)(Parameters...), dim3 grid, dim3 block,
                         int shared_bytes, cudaStream_t, Parameters... arguments) {
  return RunGrid(grid, block, shared_bytes, [=] { kernel(arguments...); });
}

}  // namespace cuda_emulator

#define CU_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                    \
  ::cuda_emulator::LaunchKernel((kernel), (grid), (block), (shared_bytes), (stream), \
                                __VA_ARGS__)

#define CU_DYNAMIC_SHARED(name) \
  unsigned char* const name = ::cuda_emulator::current_block->shared
#define CU_DYNAMIC_SHARED_ALIGNED(name, bytes)                                          \
  static_assert((bytes) <= ::cuda_emulator::SharedMemory::kAlignment, "its alignment"); \
  CU_DYNAMIC_SHARED(name)
