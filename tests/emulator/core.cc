// The CUDA kernels without Python or JAX, which sanitizers would have to watch too: under
// the emulator, or on a GPU if nvcc compiles this. Runs every kernel that takes a problem
// on buffers of exact size, and compares with the literal sum in double.
//
//   core FILE [REPEATS]    one problem a line, as cases.py writes them
//
// Exit status 1 on a failure. With REPEATS each kernel runs as often again on each of two
// streams at once, and has to give the same bits.
//
// A line is: name dtype kernel special tolerance allow_tf32, then as lists with their
// length in front lhs_shape rhs_shape out_shape window_strides padding lhs_dilation
// rhs_dilation lhs_spec rhs_spec out_spec lhs_layout rhs_layout out_layout, then
// feature_group_count batch_group_count tile_m tile_n apart. The kernel "*" is all of
// them.
// With special = 1 the operands hold NaNs and infinities, and each output must be finite,
// NaN or infinite as the literal sum is. A tile that is not zero replaces the plan's,
// whose sum is then not split. If `apart` is not zero the images of dX and dY start that
// many elements apart, which takes the emulator, and the batch as the first dimension.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <limits>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "cuda/platform.cuh"
#include "cuda_emulator/environment.h"
#include "device_memory.h"
#include "kernel.h"
#include "problem.h"

#ifndef __CUDACC__
#include <sys/mman.h>
#endif

namespace convgrad {
namespace {

struct Line {
  std::string name, dtype, kernel;
  bool special, allow_tf32;
  double tolerance;
  Ints lhs_shape, rhs_shape, out_shape;
  Attributes attributes;
  int64_t tile_m, tile_n, apart;
};

Ints ReadInts(std::istream& from) {
  size_t count = 0;
  from >> count;
  Ints values(count);
  for (int64_t& value : values) from >> value;
  return values;
}

bool ReadLine(const std::string& text, Line* line) {
  std::istringstream from(text);
  from >> line->name >> line->dtype >> line->kernel >> line->special >> line->tolerance >>
      line->allow_tf32;
  line->lhs_shape = ReadInts(from);
  line->rhs_shape = ReadInts(from);
  line->out_shape = ReadInts(from);
  Attributes& a = line->attributes;
  for (Ints* ints :
       {&a.window_strides, &a.padding, &a.lhs_dilation, &a.rhs_dilation, &a.lhs_spec,
        &a.rhs_spec, &a.out_spec, &a.lhs_layout, &a.rhs_layout, &a.out_layout}) {
    *ints = ReadInts(from);
  }
  from >> a.feature_group_count >> a.batch_group_count >> line->tile_m >> line->tile_n >>
      line->apart;
  return static_cast<bool>(from);
}

// An array in a problem's dtype, on memory of exactly its size.
class Array {
 public:
  Array(DType dtype, const Ints& shape) : dtype_(dtype) {
    for (int64_t size : shape) count_ *= size;
    bytes_ = static_cast<size_t>(count_ * SizeInBytes(dtype));
    void* memory = nullptr;
    constexpr size_t kAlignment = 64;  // XLA's
    if (posix_memalign(&memory, kAlignment, bytes_) != 0) throw std::bad_alloc();
    memory_.reset(memory);
    std::memset(memory, cuda_emulator::PoisonByte(), bytes_);
  }

  int64_t count() const { return count_; }
  size_t bytes() const { return bytes_; }
  void* data() const { return memory_.get(); }

  double Get(int64_t i) const {
    switch (dtype_) {
      case DType::kF64: return static_cast<double*>(data())[i];
      case DType::kF32: return static_cast<float*>(data())[i];
      case DType::kBF16: return __bfloat162float(static_cast<__nv_bfloat16*>(data())[i]);
      case DType::kF16: return __half2float(static_cast<__half*>(data())[i]);
    }
    return 0;
  }
  void Set(int64_t i, double value) {
    const float narrow = static_cast<float>(value);
    switch (dtype_) {
      case DType::kF64: static_cast<double*>(data())[i] = value; break;
      case DType::kF32: static_cast<float*>(data())[i] = narrow; break;
      case DType::kBF16:
        static_cast<__nv_bfloat16*>(data())[i] = __float2bfloat16(narrow);
        break;
      case DType::kF16: static_cast<__half*>(data())[i] = __float2half(narrow); break;
    }
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  DType dtype_;
  int64_t count_ = 1;
  size_t bytes_ = 0;
  std::unique_ptr<void, Free> memory_;
};

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
  void Fetch() const {
    for (size_t n = 0; memory_ != nullptr && n < images_; ++n) {
      std::memcpy(compact() + n * each_, memory_ + n * apart_, each_);
    }
  }

 private:
  char* compact() const { return static_cast<char*>(array_.data()); }
  size_t size() const { return (images_ - 1) * apart_ + each_; }

  const Array& array_;
  size_t images_, apart_, each_;
  char* memory_ = nullptr;
};

// Runs a plan on images that are far apart, and returns what went wrong or null.
const char* LaunchFar(const Problem& problem, const Plan& plan, const Array& dy,
                      const Array& w, const Array& dx, const Array& workspace) {
  const int64_t size = SizeInBytes(problem.dtype);
  const FarImages from(dy, problem.batch, problem.dy.batch * size);
  const FarImages to(dx, problem.batch, problem.dx.batch * size);
  if (to.get() == nullptr) return "images that are far apart take the emulator";
  const char* const error = LaunchCuda(nullptr, problem, plan, from.get(), w.data(),
                                       to.get(), workspace.data());
  to.Fetch();
  return error;
}

void Fill(Array* array, bool special, std::mt19937* random) {
  std::normal_distribution<double> normal;
  for (int64_t i = 0; i < array->count(); ++i) array->Set(i, normal(*random));
  if (!special || array->count() == 0) return;
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  for (double value : {std::nan(""), kInfinity, -kInfinity}) {
    array->Set(static_cast<int64_t>((*random)() % static_cast<uint64_t>(array->count())),
               value);
  }
}

// The definition in kernel.h, word for word: calls visit(dX's offset, sum).
template <typename Visit>
void LiteralSum(const Problem& p, const Array& dy, const Array& w, Visit visit) {
  // The position of dY that tap r of axis a brings to h, or -1.
  const auto reads = [&p](int a, int64_t h, int64_t r) -> int64_t {
    const Axis& axis = p.axis[a];
    const int64_t at = h * axis.lhs_dilation + axis.pad_lo - r * axis.rhs_dilation;
    if (at < 0 || at % axis.stride != 0 || at / axis.stride >= axis.out) return -1;
    return at / axis.stride;
  };
  int64_t h[kAxes], r[kAxes];
  const auto sum_at = [&](int64_t n, int64_t g, int64_t c) {
    double sum = 0;
    for (r[0] = 0; r[0] < p.axis[0].win; ++r[0]) {
      for (r[1] = 0; r[1] < p.axis[1].win; ++r[1]) {
        for (r[2] = 0; r[2] < p.axis[2].win; ++r[2]) {
          int64_t from_dy = n * p.dy.batch + g * p.dy.group;
          int64_t from_w = g * p.w.group + c * p.w.in_channel;
          bool inside = true;
          for (int a = 0; a < kAxes; ++a) {
            const int64_t position = reads(a, h[a], r[a]);
            inside = inside && position >= 0;
            from_dy += position * p.dy.axis[a];
            from_w += r[a] * p.w.axis[a];
          }
          if (!inside) continue;
          for (int64_t k = 0; k < p.out_channels; ++k) {
            sum +=
                dy.Get(from_dy + k * p.dy.channel) * w.Get(from_w + k * p.w.out_channel);
          }
        }
      }
    }
    return sum;
  };
  for (int64_t n = 0; n < p.batch; ++n) {
    for (int64_t g = 0; g < p.groups; ++g) {
      for (int64_t c = 0; c < p.in_channels; ++c) {
        for (h[0] = 0; h[0] < p.axis[0].in; ++h[0]) {
          for (h[1] = 0; h[1] < p.axis[1].in; ++h[1]) {
            for (h[2] = 0; h[2] < p.axis[2].in; ++h[2]) {
              int64_t to = n * p.dx.batch + g * p.dx.group + c * p.dx.channel;
              for (int a = 0; a < kAxes; ++a) to += h[a] * p.dx.axis[a];
              visit(to, sum_at(n, g, c));
            }
          }
        }
      }
    }
  }
}

// The normwise error; infinite if some output is finite, NaN or infinite where it should
// not be.
double Error(const Array& out, const std::vector<double>& expected) {
  double difference = 0, scale = 0;
  for (int64_t i = 0; i < out.count(); ++i) {
    const double is = out.Get(i), should = expected[static_cast<size_t>(i)];
    if (std::isfinite(should)) {
      difference += (is - should) * (is - should);
      scale += should * should;
    } else if (std::isnan(should) ? !std::isnan(is) : is != should) {
      return std::numeric_limits<double>::infinity();
    }
  }
  if (difference == 0) return 0;
  const double error = std::sqrt(difference / scale);
  return std::isnan(error) ? std::numeric_limits<double>::infinity() : error;
}

DType DTypeByName(const std::string& name) {
  return name == "float64"    ? DType::kF64
         : name == "float32"  ? DType::kF32
         : name == "bfloat16" ? DType::kBF16
                              : DType::kF16;
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
                                     workspace_there[i].get());
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

// Runs one line's kernels and prints a line for each. Returns the number of failures.
int RunLine(const Line& line, int repeats) {
  Problem problem{};
  if (const std::string error = MakeProblem(line.lhs_shape, line.rhs_shape,
                                            line.out_shape, line.attributes, &problem);
      !error.empty()) {
    std::printf("FAIL %s %s: %s\n", line.name.c_str(), line.dtype.c_str(), error.c_str());
    return 1;
  }
  problem.dtype = DTypeByName(line.dtype);
  problem.allow_tf32 = line.allow_tf32;
  std::mt19937 random(static_cast<unsigned>(std::hash<std::string>{}(line.name)));
  Array dy(problem.dtype, line.out_shape), w(problem.dtype, line.rhs_shape);
  Fill(&dy, line.special, &random);
  Fill(&w, line.special, &random);
  const DeviceMemory dy_there(dy.data(), dy.bytes()), w_there(w.data(), w.bytes());
  std::vector<double> expected;

  Problem launched = problem;
  if (line.apart != 0) launched.dx.batch = launched.dy.batch = line.apart;

  int failures = 0;
  for (const char* const* kernel = CudaKernelNames(); *kernel != nullptr; ++kernel) {
    Plan plan{};
    if ((line.kernel != "*" && line.kernel != *kernel) ||
        !PlanCuda(launched, *kernel, CurrentGpu(), &plan)) {
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
      expected.resize(static_cast<size_t>(dx.count()));
      LiteralSum(problem, dy, w, [&expected](int64_t to, double sum) {
        expected[static_cast<size_t>(to)] = sum;
      });
    }
    const Array workspace(DType::kF64, {(plan.workspace_bytes + 7) / 8});
    DeviceMemory dx_there(dx.data(), dx.bytes());
    const DeviceMemory workspace_there(workspace.data(), workspace.bytes());
    const char* error =
        line.apart != 0
            ? LaunchFar(launched, plan, dy, w, dx, workspace)
            : LaunchCuda(nullptr, problem, plan, dy_there.get(), w_there.get(),
                         dx_there.get(), workspace_there.get());
    if (error == nullptr) error = ErrorText(dx_there.Fetch());
    if (error == nullptr) {
      error = Repeat(repeats, problem, plan, dy_there.get(), w_there.get(),
                     line.lhs_shape, dx);
    }
    const double off = error == nullptr ? Error(dx, expected) : 0;
    const bool passed = error == nullptr && off <= line.tolerance;
    std::printf("%s %s %s %s error %.2e of %.2e %s\n", passed ? "pass" : "FAIL",
                line.name.c_str(), line.dtype.c_str(), *kernel, off, line.tolerance,
                error == nullptr ? "" : error);
    failures += passed ? 0 : 1;
  }
  return failures;
}

int Main(const char* path, int repeats) {
  std::ifstream file(path);
  int failures = 0, lines = 0;
  for (std::string text; std::getline(file, text); ++lines) {
    Line line;
    if (!ReadLine(text, &line)) {
      std::fprintf(stderr, "malformed line: %s\n", text.c_str());
      return 2;
    }
    failures += RunLine(line, repeats);
  }
  std::printf("%d problems, %d failures\n", lines, failures);
  return lines == 0 ? 2 : failures > 0;
}

}  // namespace
}  // namespace convgrad

int main(int argc, char** argv) {
  if (argc != 2 && argc != 3) {
    std::fprintf(stderr, "usage: core FILE [REPEATS]\n");
    return 2;
  }
  return convgrad::Main(argv[1], argc == 3 ? std::atoi(argv[2]) : 0);
}
