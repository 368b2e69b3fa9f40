// Memory and clocks of benchmarks/gpu_layers.cu: a GPU's under nvcc; under a host
// compiler the emulator's, where times mean nothing.

#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cuda/platform.cuh"

namespace convgrad {

// Ends the program: a GPU that fails here gives no more results.
inline void Require(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::printf("stopped: %s: %s\n", what, cudaGetErrorString(status));
  std::exit(3);
}

class Memory {
 public:
  explicit Memory(size_t bytes) : bytes_(std::max<size_t>(bytes, 1)) {
#ifdef __CUDACC__
    Require(cudaMalloc(&data_, bytes_), "cudaMalloc");
#else
    constexpr size_t kAlignment = 256;
    data_ = std::aligned_alloc(kAlignment,
                               (bytes_ + kAlignment - 1) / kAlignment * kAlignment);
#endif
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() {
#ifdef __CUDACC__
    cudaFree(data_);
#else
    std::free(data_);
#endif
  }

  char* get() const { return static_cast<char*>(data_); }

  // Every byte of a part, so that what a kernel leaves out is NaN in every type.
  static void Poison(void* from, size_t bytes) {
#ifdef __CUDACC__
    Require(cudaMemset(from, 0xff, bytes), "cudaMemset");
#else
    std::memset(from, 0xff, bytes);
#endif
  }
  static void Fetch(void* to, const void* from, size_t bytes) {
#ifdef __CUDACC__
    Require(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost), "cudaMemcpy");
#else
    std::memcpy(to, from, bytes);
#endif
  }

 private:
  void* data_ = nullptr;
  size_t bytes_;
};

inline const char* EnqueueCopy(cudaStream_t stream, void* to, const void* from,
                               size_t bytes) {
#ifdef __CUDACC__
  return ErrorText(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream));
#else
  (void)stream;
  std::memcpy(to, from, bytes);
  return nullptr;
#endif
}

struct Times {
  double median = 0, least = 0, q1 = 0, q3 = 0;  // us of one call
  int rounds = 0;
};

inline Times TimesOf(std::vector<double> us) {
  std::sort(us.begin(), us.end());
  const auto at = [&](double part) {
    return us[static_cast<size_t>(part * static_cast<double>(us.size() - 1) + 0.5)];
  };
  return {at(0.5), us.front(), at(0.25), at(0.75), static_cast<int>(us.size())};
}

constexpr int kMostRounds = 25, kLeastRounds = 3;

// Times enqueue(stream, i) for i = 0 .. calls - 1 as one CUDA graph, so that small
// kernels do not wait for the host, about `seconds` long. Returns null, or what went
// wrong.
template <typename Enqueue>
const char* Measure(int calls, double seconds, Enqueue enqueue, Times* times) {
  std::vector<double> us;
  const auto rounds_of = [&](double first_us) {
    const double fit = seconds * 1e6 / std::max(first_us, 1.0);
    return std::clamp(static_cast<int>(std::min(fit, 1e6)), kLeastRounds, kMostRounds);
  };
#ifdef __CUDACC__
  static cudaStream_t stream = [] {
    cudaStream_t made{};
    Require(cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking), "cudaStreamCreate");
    return made;
  }();
  static cudaEvent_t begin = nullptr, end = nullptr;
  if (begin == nullptr) {
    Require(cudaEventCreate(&begin), "cudaEventCreate");
    Require(cudaEventCreate(&end), "cudaEventCreate");
  }
  Require(cudaDeviceSynchronize(), "before a measurement");
  // What a library loads at its first call it cannot load into a graph.
  const char* error = enqueue(stream, 0);
  Require(cudaDeviceSynchronize(), "a first call");
  if (error != nullptr) return error;
  Require(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  for (int i = 0; i < calls && error == nullptr; ++i) error = enqueue(stream, i);
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t replay = nullptr;
  const cudaError_t captured = cudaStreamEndCapture(stream, &graph);
  if (error == nullptr) error = ErrorText(captured);
  if (error == nullptr) error = ErrorText(cudaGraphInstantiate(&replay, graph, 0));
  if (graph != nullptr) cudaGraphDestroy(graph);
  if (error != nullptr) return error;
  int rounds = 1;
  for (int round = -1; round < rounds; ++round) {
    Require(cudaEventRecord(begin, stream), "cudaEventRecord");
    Require(cudaGraphLaunch(replay, stream), "cudaGraphLaunch");
    Require(cudaEventRecord(end, stream), "cudaEventRecord");
    Require(cudaEventSynchronize(end), "a timed kernel");
    float ms = 0;
    Require(cudaEventElapsedTime(&ms, begin, end), "cudaEventElapsedTime");
    if (round < 0) {  // what loads and warms up
      rounds = rounds_of(1e3 * ms);
    } else {
      us.push_back(1e3 * ms / calls);
    }
  }
  cudaGraphExecDestroy(replay);
#else
  int rounds = 1;
  for (int round = 0; round < rounds; ++round) {
    const auto begin = std::chrono::steady_clock::now();
    for (int i = 0; i < calls; ++i) {
      if (const char* error = enqueue(cudaStream_t{}, i); error != nullptr) return error;
    }
    const std::chrono::duration<double, std::micro> taken =
        std::chrono::steady_clock::now() - begin;
    us.push_back(taken.count() / calls);
    rounds = std::min(2, rounds_of(taken.count()));  // they mean nothing
  }
#endif
  *times = TimesOf(us);
  return nullptr;
}

struct DeviceFacts {
  char name[256] = "emulated";
  int multiprocessors = 132, l2_bytes = 0;
};

inline DeviceFacts FactsOfDevice() {
  DeviceFacts facts;
#ifdef __CUDACC__
  cudaDeviceProp properties{};
  Require(cudaGetDeviceProperties(&properties, 0), "no GPU");
  std::snprintf(facts.name, sizeof(facts.name), "%s", properties.name);
  facts.multiprocessors = properties.multiProcessorCount;
  facts.l2_bytes = properties.l2CacheSize;
#endif
  return facts;
}

}  // namespace convgrad
