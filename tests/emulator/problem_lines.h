// The problems that cases.py writes, as programs without Python read them: their lines,
// random operands on memory of exactly their size, and the literal sum in double.
//
// A line is: name dtype kernel special tolerance allow_tf32, then as lists with their
// length in front lhs_shape rhs_shape out_shape window_strides padding lhs_dilation
// rhs_dilation lhs_spec rhs_spec out_spec lhs_layout rhs_layout out_layout, then
// feature_group_count batch_group_count tile_m tile_n apart. The kernel "*" is all of
// them.
// With special = 1 the operands hold NaNs and infinities, and each output must be finite,
// NaN or infinite as the literal sum is.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "kernel.h"
#include "problem.h"

namespace convgrad {

struct Line {
  std::string name, dtype, kernel;
  bool special, allow_tf32;
  double tolerance;
  Ints lhs_shape, rhs_shape, out_shape;
  Attributes attributes;
  int64_t tile_m, tile_n, apart;
};

inline Ints ReadInts(std::istream& from) {
  size_t count = 0;
  from >> count;
  Ints values(count);
  for (int64_t& value : values) from >> value;
  return values;
}

inline bool ReadLine(const std::string& text, Line* line) {
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

inline DType DTypeByName(const std::string& name) {
  return name == "float64"    ? DType::kF64
         : name == "float32"  ? DType::kF32
         : name == "bfloat16" ? DType::kBF16
                              : DType::kF16;
}

// Types of 16 bits by their definition, so that nothing is shared with a kernel.
struct NarrowFormat {
  int fraction_bits, least_exponent;  // of a normal number

  int top_field() const { return 3 - 2 * least_exponent; }  // infinities and NaNs

  uint16_t Encode(double value) const {
    const int infinity = top_field() << fraction_bits;
    const int sign = std::signbit(value) ? 0x8000 : 0;
    if (std::isnan(value)) return static_cast<uint16_t>(sign | (infinity + 1));
    if (std::isinf(value)) return static_cast<uint16_t>(sign | infinity);
    const double magnitude = std::fabs(value);
    int exponent = magnitude == 0 ? least_exponent : std::ilogb(magnitude);
    if (exponent < least_exponent) exponent = least_exponent;
    // In units of the last place, to nearest even. 2^(fraction_bits + 1) carries into the
    // exponent by itself.
    const double units = std::nearbyint(std::ldexp(magnitude, fraction_bits - exponent));
    const int64_t bits =
        static_cast<int64_t>(units) +
        (static_cast<int64_t>(exponent - least_exponent) << fraction_bits);
    return static_cast<uint16_t>(sign | (bits < infinity ? bits : infinity));
  }
  double Decode(uint16_t bits) const {
    const int field = (bits & 0x7fff) >> fraction_bits;
    const int fraction = bits & ((1 << fraction_bits) - 1);
    const double sign = (bits & 0x8000) != 0 ? -1 : 1;
    if (field == top_field()) {
      return fraction != 0 ? std::nan("")
                           : sign * std::numeric_limits<double>::infinity();
    }
    const int exponent = (field == 0 ? 1 : field) - 1 + least_exponent;
    const int units = fraction + (field == 0 ? 0 : 1 << fraction_bits);
    return sign * std::ldexp(units, exponent - fraction_bits);
  }
};
constexpr NarrowFormat kBF16Format = {7, -126}, kF16Format = {10, -14};

// An array in a problem's dtype, on memory of exactly its size.
class Array {
 public:
  // `less` bytes are left out at its end, for programs that must be caught.
  Array(DType dtype, const Ints& shape, int64_t less = 0) : dtype_(dtype) {
    for (int64_t size : shape) count_ *= size;
    bytes_ = static_cast<size_t>(count_ * SizeInBytes(dtype));
    bytes_ -= std::min(bytes_, static_cast<size_t>(less));
    count_ = static_cast<int64_t>(bytes_) / SizeInBytes(dtype);
    void* memory = nullptr;
    constexpr size_t kAlignment = 64;  // XLA's
    if (posix_memalign(&memory, kAlignment, bytes_) != 0) throw std::bad_alloc();
    memory_.reset(memory);
    std::memset(memory, poison, bytes_);
  }

  DType dtype() const { return dtype_; }
  int64_t count() const { return count_; }
  size_t bytes() const { return bytes_; }
  void* data() const { return memory_.get(); }

  double Get(int64_t i) const {
    switch (dtype_) {
      case DType::kF64: return static_cast<double*>(data())[i];
      case DType::kF32: return static_cast<float*>(data())[i];
      case DType::kBF16: return kBF16Format.Decode(static_cast<uint16_t*>(data())[i]);
      case DType::kF16: return kF16Format.Decode(static_cast<uint16_t*>(data())[i]);
    }
    return 0;
  }
  void Set(int64_t i, double value) {
    switch (dtype_) {
      case DType::kF64: static_cast<double*>(data())[i] = value; break;
      case DType::kF32: static_cast<float*>(data())[i] = static_cast<float>(value); break;
      case DType::kBF16:
        static_cast<uint16_t*>(data())[i] = kBF16Format.Encode(value);
        break;
      case DType::kF16:
        static_cast<uint16_t*>(data())[i] = kF16Format.Encode(value);
        break;
    }
  }
  std::vector<double> Values() const {
    std::vector<double> values(static_cast<size_t>(count_));
    for (int64_t i = 0; i < count_; ++i) values[static_cast<size_t>(i)] = Get(i);
    return values;
  }

  // The bytes of memory that was never written.
  inline static int poison = 0xff;

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  DType dtype_;
  int64_t count_ = 1;
  size_t bytes_ = 0;
  std::unique_ptr<void, Free> memory_;
};

inline void Fill(Array* array, bool special, std::mt19937* random) {
  std::normal_distribution<double> normal;
  for (int64_t i = 0; i < array->count(); ++i) array->Set(i, normal(*random));
  if (!special || array->count() == 0) return;
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  for (double value : {std::nan(""), kInfinity, -kInfinity}) {
    array->Set(static_cast<int64_t>((*random)() % static_cast<uint64_t>(array->count())),
               value);
  }
}

// The definition in kernel.h, word for word. dX as its strides lay it out; the filter
// begins w_at elements into w.
inline std::vector<double> LiteralSum(const Problem& p, const std::vector<double>& dy,
                                      const std::vector<double>& w, int64_t count,
                                      int64_t w_at = 0) {
  std::vector<double> dx(static_cast<size_t>(count));
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
          int64_t from_w = w_at + g * p.w.group + c * p.w.in_channel;
          bool inside = true;
          for (int a = 0; a < kAxes; ++a) {
            const int64_t position = reads(a, h[a], r[a]);
            inside = inside && position >= 0;
            from_dy += position * p.dy.axis[a];
            from_w += r[a] * p.w.axis[a];
          }
          if (!inside) continue;
          for (int64_t k = 0; k < p.out_channels; ++k) {
            sum += dy[static_cast<size_t>(from_dy + k * p.dy.channel)] *
                   w[static_cast<size_t>(from_w + k * p.w.out_channel)];
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
              dx[static_cast<size_t>(to)] = sum_at(n, g, c);
            }
          }
        }
      }
    }
  }
  return dx;
}

// The arrays of an epilogue: `which` asks for the residual (1), for the ReLU's (2) or for
// both (3).
class EpilogueArrays {
 public:
  EpilogueArrays(int which, DType dtype, const Ints& shape, bool special,
                 std::mt19937* random)
      : which_(which), residual_(dtype, shape), relu_(dtype, shape) {
    Fill(&residual_, special, random);
    Fill(&relu_, special, random);
    // As a ReLU's result has them: many zeros.
    for (int64_t i = 0; i < relu_.count(); i += 3) relu_.Set(i, 0);
  }

  Epilogue Pointers() const {
    return {residual() ? residual_.data() : nullptr, relu() ? relu_.data() : nullptr};
  }

  // Whether `out` is what kernel.h says becomes of `plain`, bit for bit.
  bool Holds(const Array& plain, const Array& out) const {
    for (int64_t i = 0; i < out.count(); ++i) {
      Array expected(out.dtype(), {1});
      expected.Set(0, plain.Get(i));
      if (residual()) expected.Set(0, plain.Get(i) + residual_.Get(i));
      if (relu() && !(relu_.Get(i) > 0)) expected.Set(0, 0);
      const double is = out.Get(i), should = expected.Get(0);
      if (std::isnan(should) ? !std::isnan(is)
                             : is != should || std::signbit(is) != std::signbit(should)) {
        return false;
      }
    }
    return true;
  }

 private:
  bool residual() const { return (which_ & 1) != 0; }
  bool relu() const { return (which_ & 2) != 0; }

  int which_;
  Array residual_, relu_;
};

// The normwise error; infinite if some output is finite, NaN or infinite where it should
// not be.
inline double Error(const Array& out, const std::vector<double>& expected) {
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

}  // namespace convgrad
