// The CUDA kernels without Python or JAX, which sanitizers would have to watch too: under
// the emulator, or on a GPU if nvcc compiles this. Runs every kernel that takes a problem
// on buffers of exact size, and compares with the literal sum in double; and three times
// in four once more with an epilogue, and compares with its steps one after the other,
// bit by bit.
//
//   core FILE [REPEATS]    one problem a line, see problem_lines.h
//   core --taken FILE      no run: the lines whose kernel takes the problem on sm_90a
//   core --kernels         the kernels' names
//
// Exit status 1 on a failure, 3 when a kernel broke the GPU's context, which ends the
// run. With REPEATS each kernel runs as often again on each of two streams at once, and
// has to give the same bits. Who runs is written before, how it ended after: whatever
// stops the program, the last line names the case.
//
// A line's tile that is not zero replaces the plan's, whose sum is then not split. If
// `apart` is positive the images of dX and dY start that many elements apart, which takes
// the emulator, and the batch as the first dimension. If it is negative all three arrays
// begin an element later than aligned ones would, which takes the emulator too.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "cuda/platform.cuh"
#include "cuda_emulator/environment.h"
#include "device_memory.h"
#include "kernel.h"
#include "problem.h"
#include "problem_lines.h"
#include "wait_report.h"

#ifndef __CUDACC__
#include <sys/mman.h>
#endif

namespace convgrad {
namespace {

// An array's images far apart, in memory that exists only where it is touched.
class FarImages {
 public:
  FarImages(const Array& array, int64_t images, int64_t apart_bytes)
      : array_(array),
        images_(static_cast<size_t>(images)),
        apart_(static_cast<size_t>(apart_bytes)),
        each_(array.bytes() / images_) {
#ifndef __CUDACC__
    void* const memory = mmap(nullptr, size(), PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<char*>(memory);
    for (size_t n = 0; n < images_; ++n) {
      std::memcpy(memory_ + n * apart_, compact() + n * each_, each_);
    }
#endif
  }
  FarImages(const FarImages&) = delete;
  FarImages& operator=(const FarImages&) = delete;
#ifndef __CUDACC__
  ~FarImages() { munmap(memory_, size()); }
#endif

  void* get() const { return memory_; }
  cudaError_t Fetch() {
    for (size_t n = 0; memory_ != nullptr && n < images_; ++n) {
      std::memcpy(compact() + n * each_, memory_ + n * apart_, each_);
    }
    return cudaSuccess;
  }

 private:
  char* compact() const { return static_cast<char*>(array_.data()); }
  size_t size() const { return (images_ - 1) * apart_ + each_; }

  const Array& array_;
  size_t images_, apart_, each_;
  char* memory_ = nullptr;
};

// An array that begins an element later than an aligned one.
class Shifted {
 public:
  Shifted(const Array& array, int64_t size)
      : array_(array),
        shift_(static_cast<size_t>(size)),
        memory_(new char[array.bytes() + shift_]) {
    std::memcpy(get(), array_.data(), array_.bytes());
  }
  void* get() const { return memory_.get() + shift_; }
  cudaError_t Fetch() {
    std::memcpy(array_.data(), get(), array_.bytes());
    return cudaSuccess;
  }

 private:
  const Array& array_;
  size_t shift_;
  std::unique_ptr<char[]> memory_;
};

// What a run takes, and which of the last two arrays its epilogue uses.
struct Arrays {
  const Array &dy, &w, &residual, &relu;
  bool adds_residual, undoes_relu;
};

// Runs a plan, and returns what went wrong or null. Where arrays are in memory the others
// say, as DeviceMemory does: of dX place_dx(array), of the filter place_w(array), of the
// others, which have images too, place(array).
template <typename Place, typename PlaceDx, typename PlaceW>
const char* LaunchAt(const Problem& problem, const Plan& plan, const Arrays& arrays,
                     const Array& dx, Place place, PlaceDx place_dx, PlaceW place_w) {
  const auto dy = place(arrays.dy), residual = place(arrays.residual),
             relu = place(arrays.relu);
  auto to = place_dx(dx);
  const auto w = place_w(arrays.w);
  if (to.get() == nullptr) return "such arrays take the emulator";
  const Array scratch(DType::kF64, {(plan.workspace_bytes + 7) / 8});
  const DeviceMemory workspace(scratch.data(), scratch.bytes());
  const Epilogue epilogue = {arrays.adds_residual ? residual.get() : nullptr,
                             arrays.undoes_relu ? relu.get() : nullptr};
  const char* const error = LaunchCuda(nullptr, problem, plan, dy.get(), w.get(),
                                       to.get(), workspace.get(), epilogue);
  return error != nullptr ? error : ErrorText(to.Fetch());
}

const char* Launch(const Line& line, const Problem& problem, const Plan& plan,
                   const Arrays& arrays, const Array& dx) {
  const int64_t size = SizeInBytes(problem.dtype);
  const auto on_device = [](const Array& array) {
    return DeviceMemory(array.data(), array.bytes());
  };
  if (line.apart > 0) {
    const auto far = [&](const Array& array) {
      return FarImages(array, problem.batch, problem.dx.batch * size);
    };
    return LaunchAt(problem, plan, arrays, dx, far, far, on_device);
  }
  if (line.apart < 0) {
    const auto shifted = [&](const Array& array) { return Shifted(array, size); };
    // dX is stored in vectors only if the epilogue's arrays are aligned too.
    return arrays.adds_residual || arrays.undoes_relu
               ? LaunchAt(problem, plan, arrays, dx, shifted, on_device, shifted)
               : LaunchAt(problem, plan, arrays, dx, shifted, shifted, shifted);
  }
  return LaunchAt(problem, plan, arrays, dx, on_device, on_device, on_device);
}

// The steps of kernel.h one after the other, on a dX without them.
void ApplySteps(const Problem& problem, const Arrays& arrays, Array* dx) {
  for (int64_t i = 0; i < dx->count(); ++i) {
    const double value = dx->Get(i), residual = arrays.residual.Get(i);
    if (arrays.adds_residual) {
      dx->Set(i, problem.dtype == DType::kF64
                     ? value + residual
                     : static_cast<float>(value) + static_cast<float>(residual));
    }
    if (arrays.undoes_relu && !(arrays.relu.Get(i) > 0)) dx->Set(i, 0);
  }
}

// Whether two arrays have the same bits, except where both have a NaN.
bool Agree(const Array& a, const Array& b) {
  for (int64_t i = 0; i < a.count(); ++i) {
    const double x = a.Get(i), y = b.Get(i);
    if (std::isnan(x) ? !std::isnan(y) : x != y || std::signbit(x) != std::signbit(y)) {
      return false;
    }
  }
  return true;
}

// Two streams, in the emulator no streams.
class Streams {
 public:
#ifdef __CUDACC__
  Streams() {
    for (cudaStream_t& stream : streams_) cudaStreamCreate(&stream);
  }
  ~Streams() {
    for (cudaStream_t stream : streams_) cudaStreamDestroy(stream);
  }
#else
  Streams() = default;
#endif
  Streams(const Streams&) = delete;
  Streams& operator=(const Streams&) = delete;
  cudaStream_t operator[](int i) const { return streams_[i]; }

 private:
  cudaStream_t streams_[2] = {};
};

// Runs a plan again, and returns what went wrong or null.
const char* Repeat(int repeats, const Problem& problem, const Plan& plan, const void* dy,
                   const void* w, const Ints& shape, const Array& expected) {
  const Streams streams;
  const Array to[2] = {{problem.dtype, shape}, {problem.dtype, shape}};
  const Ints scratch = {(plan.workspace_bytes + 7) / 8};
  const Array workspace[2] = {{DType::kF64, scratch}, {DType::kF64, scratch}};
  for (int repeat = 0; repeat < repeats; ++repeat) {
    DeviceMemory to_there[2] = {{to[0].data(), to[0].bytes()},
                                {to[1].data(), to[1].bytes()}};
    const DeviceMemory workspace_there[2] = {{workspace[0].data(), workspace[0].bytes()},
                                             {workspace[1].data(), workspace[1].bytes()}};
    for (int i = 0; i < 2; ++i) {
      const char* error = LaunchCuda(streams[i], problem, plan, dy, w, to_there[i].get(),
                                     workspace_there[i].get(), {});
      if (error != nullptr) return error;
    }
    for (int i = 0; i < 2; ++i) {
      if (const char* error = ErrorText(to_there[i].Fetch()); error != nullptr) {
        return error;
      }
      if (std::memcmp(to[i].data(), expected.data(), expected.bytes()) != 0) {
        return "other bits when repeated";
      }
    }
  }
  return nullptr;
}

// Whether nothing can run any more: a kernel trapped, or reached beyond its memory.
bool ContextIsLost() {
#ifdef __CUDACC__
  return cudaDeviceSynchronize() != cudaSuccess;
#else
  return false;
#endif
}

// The line's problem, or what is wrong with it.
std::string ProblemOf(const Line& line, Problem* problem) {
  *problem = {};
  const std::string error = MakeProblem(line.lhs_shape, line.rhs_shape, line.out_shape,
                                        line.attributes, problem);
  problem->dtype = DTypeByName(line.dtype);
  problem->allow_tf32 = line.allow_tf32;
  return error;
}

// Runs the kernels of a line, which is the file's `number`-th, and prints a line for
// each. Returns the number of failures.
int RunLine(const Line& line, size_t number, int repeats) {
  Problem problem;
  if (const std::string error = ProblemOf(line, &problem); !error.empty()) {
    std::printf("%s %s: FAIL %s\n", line.name.c_str(), line.dtype.c_str(), error.c_str());
    return 1;
  }
  std::mt19937 random(static_cast<unsigned>(std::hash<std::string>{}(line.name)));
  Array dy(problem.dtype, line.out_shape), w(problem.dtype, line.rhs_shape);
  Fill(&dy, line.special, &random);
  Fill(&w, line.special, &random);
  Array residual(problem.dtype, line.lhs_shape), relu(problem.dtype, line.lhs_shape);
  Fill(&residual, line.special, &random);
  Fill(&relu, line.special, &random);
  for (int64_t i = 0; i < relu.count(); ++i) {
    if (relu.Get(i) < 0) relu.Set(i, 0);
  }
  const DeviceMemory dy_there(dy.data(), dy.bytes()), w_there(w.data(), w.bytes());
  std::vector<double> expected;

  Problem launched = problem;
  if (line.apart > 0) launched.dx.batch = launched.dy.batch = line.apart;

  Gpu gpu{};
  if (const char* error = CurrentGpu(&gpu); error != nullptr) {
    std::printf("%s\n", error);
    return 1;
  }
  int failures = 0;
  for (const char* const* kernel = CudaKernelNames(); *kernel != nullptr; ++kernel) {
    Plan plan{};
    if ((line.kernel != "*" && line.kernel != *kernel) ||
        !PlanCuda(launched, *kernel, gpu, &plan)) {
      continue;
    }
    if (line.tile_m != 0) {
      plan.tile_m = line.tile_m;
      plan.tile_n = line.tile_n;
      plan.split_k = 1;
    }
    Array dx(problem.dtype, line.lhs_shape);
    if (dx.count() == 0) continue;
    if (expected.empty()) {
      expected = LiteralSum(problem, dy.Values(), w.Values(), dx.count());
    }
    std::printf("%s %s %s %dx%d: ", line.name.c_str(), line.dtype.c_str(), *kernel,
                static_cast<int>(plan.tile_m), static_cast<int>(plan.tile_n));
    std::fflush(stdout);
    const Arrays plain = {dy, w, residual, relu, false, false};
    const char* error = Launch(line, launched, plan, plain, dx);
    if (error == nullptr) {
      error = Repeat(repeats, problem, plan, dy_there.get(), w_there.get(),
                     line.lhs_shape, dx);
    }
    const double off = error == nullptr ? Error(dx, expected) : 0;
    // The pass of a kernel that does not apply it by itself wants dX without gaps.
    const bool gaps = line.apart > 0 && std::string(*kernel) == "depthwise";
    // One of the three epilogues or none. Drawn, since lines repeat in fours: in turn
    // some dtypes or tiles would never see one.
    const size_t run = 64 * number + static_cast<size_t>(kernel - CudaKernelNames());
    const unsigned turn = std::mt19937(static_cast<unsigned>(run))() % 4;
    if (error == nullptr && !gaps && turn != 3) {
      const Arrays fused = {dy, w, residual, relu, turn != 1, turn != 0};
      Array with_epilogue(problem.dtype, line.lhs_shape);
      error = Launch(line, launched, plan, fused, with_epilogue);
      ApplySteps(problem, fused, &dx);
      if (error == nullptr && !Agree(with_epilogue, dx)) {
        error = turn == 0   ? "other bits with a residual"
                : turn == 1 ? "other bits with a ReLU"
                            : "other bits with a residual and a ReLU";
      }
    }
    const bool passed = error == nullptr && off <= line.tolerance;
    std::printf("%s error %.2e of %.2e %s\n", passed ? "pass" : "FAIL", off,
                line.tolerance, error == nullptr ? "" : error);
    failures += passed ? 0 : 1;
    if (!passed && ContextIsLost()) {
      std::printf("stopped: nothing runs after this\n");
      std::exit(3);
    }
  }
  return failures;
}

// Reads a file and gives each line, its text and number to `use`. Returns their number,
// or -1 if one is malformed.
template <typename Use>
int ForEachLine(const char* path, Use use) {
  std::ifstream file(path);
  int lines = 0;
  for (std::string text; std::getline(file, text); ++lines) {
    Line line;
    if (!ReadLine(text, &line)) {
      std::fprintf(stderr, "malformed line: %s\n", text.c_str());
      return -1;
    }
    use(line, text, static_cast<size_t>(lines));
  }
  return lines;
}

int PrintTaken(const char* path) {
  const int lines = ForEachLine(path, [](const Line& line, const auto& text, size_t) {
    Problem problem;
    Plan plan{};
    if (ProblemOf(line, &problem).empty() &&
        PlanCuda(problem, line.kernel.c_str(), GpuOf(90), &plan)) {
      std::printf("%s\n", text.c_str());
    }
  });
  return lines < 0 ? 2 : 0;
}

int PrintKernels() {
  for (const char* const* kernel = CudaKernelNames(); *kernel != nullptr; ++kernel) {
    std::printf("%s\n", *kernel);
  }
  return 0;
}

int Main(const char* path, int repeats) {
  Array::poison = cuda_emulator::PoisonByte();
#ifdef CONVGRAD_BOUNDED_WAITS
  PrintEndlessWaits(&ReportEndlessWaits);
#endif
  int failures = 0;
  const int lines =
      ForEachLine(path, [&](const Line& line, const std::string&, size_t number) {
        failures += RunLine(line, number, repeats);
      });
  if (lines < 0) return 2;
  std::printf("%d problems, %d failures\n", lines, failures);
  return lines == 0 ? 2 : failures > 0;
}

}  // namespace
}  // namespace convgrad

int main(int argc, char** argv) {
  const std::string first = argc > 1 ? argv[1] : "";
  if (argc == 2 && first == "--kernels") return convgrad::PrintKernels();
  if (argc == 3 && first == "--taken") return convgrad::PrintTaken(argv[2]);
  if (argc != 2 && argc != 3) {
    std::fprintf(stderr, "usage: core FILE [REPEATS] | --taken FILE | --kernels\n");
    return 2;
  }
  return convgrad::Main(argv[1], argc == 3 ? std::atoi(argv[2]) : 0);
}
