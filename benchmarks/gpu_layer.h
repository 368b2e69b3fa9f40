// A layer of benchmarks/gpu_layers.cu: its operands on the device, and whether a result
// is right.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cuda/planning.h"
#include "cuda/platform.cuh"
#include "gpu_device.h"
#include "kernel.h"
#include "problem.h"
#include "problem_lines.h"

namespace convgrad {
namespace {

// ---- operands and checks on the device --------------------------------------------

// Element i of an operand, before it is rounded to its type: uniform in [-1, 1).
__host__ __device__ inline float ValueAt(uint64_t i, uint32_t seed) {
  uint64_t bits = i * 0x9e3779b97f4a7c15u + seed;
  bits = (bits ^ bits >> 30) * 0xbf58476d1ce4e5b9u;
  bits = (bits ^ bits >> 27) * 0x94d049bb133111ebu;
  return static_cast<float>(bits >> 40) * 0x1p-23f - 1;
}

constexpr unsigned kBlocks = 528, kThreads = 256;

template <typename T>
__global__ void FillKernel(T* to, int64_t count, uint32_t seed) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += step) {
    to[i] =
        Narrow(static_cast<Accumulator<T>>(ValueAt(static_cast<uint64_t>(i), seed)), T{});
  }
}

// What a thread saw of two arrays. NaNs and infinities make `largest` infinite.
struct Difference {
  double squares, scale, largest;
};

template <typename T>
__global__ void CompareKernel(const T* a, const T* b, int64_t count, Difference* to) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  const int64_t thread = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  Difference seen = {0, 0, 0};
  for (int64_t i = thread; i < count; i += step) {
    const double is = Widen(a[i]), should = Widen(b[i]), off = fabs(is - should);
    seen.squares += off * off;
    seen.scale += should * should;
    if (!(off <= seen.largest)) seen.largest = off <= 1e300 ? off : 1e301;
  }
  to[thread] = seen;
}

template <typename Use>
cudaError_t WithType(DType dtype, Use use) {
  switch (dtype) {
    case DType::kF64: return use(double{});
    case DType::kF32: return use(float{});
    case DType::kBF16: return use(__nv_bfloat16{});
    case DType::kF16: return use(__half{});
  }
  return cudaErrorInvalidValue;
}

// Few of them where the emulator runs them one after the other.
unsigned BlocksFor(int64_t count) {
  const int64_t enough = CeilDiv(count, kThreads);
  return static_cast<unsigned>(std::clamp<int64_t>(enough, 1, kBlocks));
}

void FillOnDevice(DType dtype, void* to, int64_t count, uint32_t seed) {
  Require(WithType(dtype,
                   [&](auto t) {
                     using T = decltype(t);
                     return CU_LAUNCH((&FillKernel<T>), dim3(BlocksFor(count)),
                                      dim3(kThreads), 0, cudaStream_t{},
                                      static_cast<T*>(to), count, seed);
                   }),
          "FillKernel");
}

// Errors of an array, both relative to the expected one's: norm over norm, and the
// largest element's over the root of the mean square.
struct Errors {
  double norm = 0, largest = 0;
};
// Rounding leaves an element a few times the norm's error away. One wrong tile of a large
// dX hardly shows in the norm.
constexpr double kLargestOverNorm = 16;

Errors ErrorsOf(const Difference& total, double count) {
  const double scale = std::sqrt(total.scale);
  return {std::sqrt(total.squares) / scale, total.largest / (scale / std::sqrt(count))};
}

Errors CompareOnDevice(DType dtype, const void* a, const void* b, int64_t count) {
  const unsigned blocks = BlocksFor(count);
  std::vector<Difference> parts(size_t{blocks} * kThreads);
  const Memory there(parts.size() * sizeof(Difference));
  Require(WithType(dtype,
                   [&](auto t) {
                     using T = decltype(t);
                     return CU_LAUNCH((&CompareKernel<T>), dim3(blocks), dim3(kThreads),
                                      0, cudaStream_t{}, static_cast<const T*>(a),
                                      static_cast<const T*>(b), count,
                                      reinterpret_cast<Difference*>(there.get()));
                   }),
          "CompareKernel");
  Memory::Fetch(parts.data(), there.get(), parts.size() * sizeof(Difference));
  Difference total = {0, 0, 0};
  for (const Difference& part : parts) {
    total.squares += part.squares;
    total.scale += part.scale;
    total.largest = std::max(total.largest, part.largest);
  }
  return ErrorsOf(total, static_cast<double>(count));
}

// ---- a layer ----------------------------------------------------------------------

constexpr uint32_t kSeedOfDy = 1, kSeedOfW = 2;

int64_t CountOf(const Ints& shape) {
  int64_t count = 1;
  for (int64_t size : shape) count *= size;
  return count;
}

// What an operand's element is in its type.
double Rounded(DType dtype, double value) {
  switch (dtype) {
    case DType::kBF16: return kBF16Format.Decode(kBF16Format.Encode(value));
    case DType::kF16: return kF16Format.Decode(kF16Format.Encode(value));
    case DType::kF32: break;
    case DType::kF64: break;
  }
  return value;
}

// kernel.h's definition for one output.
double Definition(const Problem& p, int64_t n, int64_t g, int64_t c, const int64_t* h) {
  double sum = 0;
  int64_t r[kAxes];
  for (r[0] = 0; r[0] < p.axis[0].win; ++r[0]) {
    for (r[1] = 0; r[1] < p.axis[1].win; ++r[1]) {
      for (r[2] = 0; r[2] < p.axis[2].win; ++r[2]) {
        int64_t dy = n * p.dy.batch + g * p.dy.group,
                w = g * p.w.group + c * p.w.in_channel;
        bool inside = true;
        for (int a = 0; a < kAxes; ++a) {
          const Axis& axis = p.axis[a];
          const int64_t at =
              h[a] * axis.lhs_dilation + axis.pad_lo - r[a] * axis.rhs_dilation;
          inside =
              inside && at >= 0 && at % axis.stride == 0 && at / axis.stride < axis.out;
          dy += at / axis.stride * p.dy.axis[a];
          w += r[a] * p.w.axis[a];
        }
        for (int64_t k = 0; inside && k < p.out_channels; ++k) {
          const auto dy_at = static_cast<uint64_t>(dy + k * p.dy.channel);
          const auto w_at = static_cast<uint64_t>(w + k * p.w.out_channel);
          sum += Rounded(p.dtype, ValueAt(dy_at, kSeedOfDy)) *
                 Rounded(p.dtype, ValueAt(w_at, kSeedOfW));
        }
      }
    }
  }
  return sum;
}

// As many sets of operands as the L2 cache holds several times over, in a layer's dtype.
class Layer {
 public:
  Layer(const Line& line, const Problem& problem, int l2_bytes)
      : name(line.name),
        dtype(line.dtype),
        allow_tf32(line.allow_tf32),
        tolerance(line.tolerance),
        problem_(problem),
        size_(SizeInBytes(problem.dtype)),
        count_(CountOf(line.lhs_shape)),
        dy_bytes_(Padded(CountOf(line.out_shape))),
        w_bytes_(Padded(CountOf(line.rhs_shape))),
        dx_bytes_(Padded(count_)),
        set_bytes_(dy_bytes_ + w_bytes_ + dx_bytes_),
        sets_(SetsFor(l2_bytes, set_bytes_)),
        cold_(l2_bytes > 0 && sets_ * set_bytes_ > 2 * int64_t{l2_bytes}),
        memory_(static_cast<size_t>(sets_ * set_bytes_)),
        reference_(static_cast<size_t>(dx_bytes_)) {
    Fill();
  }

  bool Is(const Line& line) const {
    return line.name == name && line.dtype == dtype && line.allow_tf32 == allow_tf32;
  }
  const Problem& problem() const { return problem_; }
  int sets() const { return sets_; }
  bool cold() const { return cold_; }
  double flops() const {
    double products = static_cast<double>(problem_.batch * problem_.groups) *
                      static_cast<double>(problem_.in_channels * problem_.out_channels);
    for (const Axis& a : problem_.axis) products *= static_cast<double>(a.out * a.win);
    return 2 * products;
  }

  // Computes dX of a set.
  const char* Enqueue(cudaStream_t stream, int set, const Plan& plan, void* workspace) {
    return LaunchCuda(stream, problem_, plan, Dy(set), W(set), Dx(set), workspace, {});
  }

  // Runs a plan and says what is wrong, null if nothing. `spoil` changes an output.
  const char* Check(const Plan& plan, void* workspace, bool spoil, Errors* errors) {
    Memory::Poison(Dx(0), static_cast<size_t>(dx_bytes_));
    if (const char* error = Enqueue(cudaStream_t{}, 0, plan, workspace)) return error;
    if (spoil) Memory::Poison(Dx(0) + count_ / 2 * size_, static_cast<size_t>(size_));
    const bool direct = std::strcmp(plan.kernel, "direct") == 0;
    if (direct) {
      std::vector<char> dx(static_cast<size_t>(dx_bytes_));
      Memory::Fetch(dx.data(), Dx(0), dx.size());
      *errors = ErrorsOfSome(dx.data());
      EnqueueCopy(cudaStream_t{}, reference_.get(), Dx(0),
                  static_cast<size_t>(dx_bytes_));
      checked_ = true;
    } else if (!checked_) {
      return "no result of direct to compare with";
    } else {
      *errors = CompareOnDevice(problem_.dtype, Dx(0), reference_.get(), count_);
    }
    // Two results that are both within the bound are within twice of it.
    const double bound = direct ? tolerance : 2 * tolerance;
    if (!(errors->norm <= bound)) return "wrong";
    return errors->largest <= kLargestOverNorm * bound ? nullptr : "wrong in places";
  }

  // Copies half of the least bytes, which reads and writes as many.
  const char* TimeCopy(double seconds, Times* times) {
    const auto half = static_cast<size_t>(BytesMoved(problem_) / 2);
    const auto copy = [&](cudaStream_t stream, int set) {
      char* const from = memory_.get() + set * set_bytes_;
      return EnqueueCopy(stream, from + half, from, half);
    };
    const char* const error = Measure(sets_, seconds, copy, times);
    Fill();  // it wrote over the operands
    return error;
  }

  // Rows, columns and depth of the product of the same arithmetic, of a dense layer.
  bool AsProduct(int64_t* m, int64_t* n, int64_t* k) const {
    *m = problem_.batch;
    *n = problem_.in_channels;
    *k = problem_.out_channels;
    for (const Axis& a : problem_.axis) {
      *m *= a.out;
      *k *= a.win;
    }
    return problem_.groups == 1;
  }

  const std::string name, dtype;
  const bool allow_tf32;
  const double tolerance;

 private:
  static constexpr int kMostSets = 256, kTimesBeyondCache = 4;
  static int SetsFor(int64_t l2_bytes, int64_t set_bytes) {
    return static_cast<int>(std::clamp<int64_t>(
        CeilDiv(kTimesBeyondCache * l2_bytes, set_bytes), 2, kMostSets));
  }
  int64_t Padded(int64_t count) const { return RoundUp(count * size_, 256); }
  void Fill() const {
    for (int set = 0; set < sets_; ++set) {
      FillOnDevice(problem_.dtype, Dy(set), dy_bytes_ / size_, kSeedOfDy);
      FillOnDevice(problem_.dtype, W(set), w_bytes_ / size_, kSeedOfW);
    }
  }
  char* Dy(int set) const { return memory_.get() + set * set_bytes_; }
  char* W(int set) const { return Dy(set) + dy_bytes_; }
  char* Dx(int set) const { return W(set) + w_bytes_; }

  double At(const char* dx, int64_t i) const {
    uint16_t bits = 0;
    switch (problem_.dtype) {
      case DType::kF64: return reinterpret_cast<const double*>(dx)[i];
      case DType::kF32: return reinterpret_cast<const float*>(dx)[i];
      case DType::kBF16: break;
      case DType::kF16: break;
    }
    std::memcpy(&bits, dx + 2 * i, sizeof(bits));
    return (problem_.dtype == DType::kBF16 ? kBF16Format : kF16Format).Decode(bits);
  }

  // Of outputs drawn from all of dX, against the definition.
  Errors ErrorsOfSome(const char* dx) const {
    constexpr int kSome = 256;
    std::mt19937_64 random(7);
    const auto draw = [&](int64_t below) {
      return static_cast<int64_t>(random() % static_cast<uint64_t>(below));
    };
    Difference total = {0, 0, 0};
    for (int i = 0; i < kSome; ++i) {
      const int64_t n = draw(problem_.batch), g = draw(problem_.groups),
                    c = draw(problem_.in_channels);
      int64_t h[kAxes], at = n * problem_.dx.batch + g * problem_.dx.group;
      at += c * problem_.dx.channel;
      for (int a = 0; a < kAxes; ++a) {
        h[a] = draw(problem_.axis[a].in);
        at += h[a] * problem_.dx.axis[a];
      }
      const double should = Definition(problem_, n, g, c, h), is = At(dx, at);
      const double off = std::fabs(is - should);
      total.squares += off * off;
      total.scale += should * should;
      total.largest = off <= total.largest ? total.largest : off;
    }
    return ErrorsOf(total, kSome);
  }

  const Problem problem_;
  const int64_t size_, count_, dy_bytes_, w_bytes_, dx_bytes_, set_bytes_;
  const int sets_;
  const bool cold_;
  Memory memory_, reference_;
  bool checked_ = false;
};

}  // namespace
}  // namespace convgrad
