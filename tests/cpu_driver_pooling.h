// The gradient of max pooling for cpu_driver.cc, with the definition beside it.
//
// A line is: pool name dtype special, then as lists with their length in front x_shape
// window_dimensions window_strides padding. Values are few, so that windows have ties.

#pragma once

#include <cmath>
#include <cstdio>
#include <functional>
#include <limits>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "cpu/pooling/plan.h"
#include "problem_lines.h"

namespace convgrad {

struct PoolLine {
  std::string name, dtype;
  bool special;
  Ints x_shape, dy_shape;
  PoolAttributes attributes;
};

inline bool ReadPoolLine(const std::string& text, PoolLine* line) {
  std::istringstream from(text);
  std::string word;
  from >> word >> line->name >> line->dtype >> line->special;
  line->x_shape = ReadInts(from);
  PoolAttributes& a = line->attributes;
  for (Ints* ints : {&a.window_dimensions, &a.window_strides, &a.padding}) {
    *ints = ReadInts(from);
  }
  line->dy_shape.clear();
  for (size_t i = 0; i < line->x_shape.size(); ++i) {
    const int64_t padded = line->x_shape[i] + a.padding[2 * i] + a.padding[2 * i + 1];
    line->dy_shape.push_back((padded - a.window_dimensions[i]) / a.window_strides[i] + 1);
  }
  return static_cast<bool>(from);
}

// A sum as the dtype rounds it.
inline double RoundedTo(DType dtype, double value) {
  switch (dtype) {
    case DType::kF64: return value;
    case DType::kF32: return static_cast<float>(value);
    case DType::kBF16: return kBF16Format.Decode(kBF16Format.Encode(value));
    case DType::kF16: return kF16Format.Decode(kF16Format.Encode(value));
  }
  return 0;
}

// Calls visit with each index of an array of that shape, in the order of memory.
inline void ForEachIndex(const Ints& shape,
                         const std::function<void(const Ints&)>& visit) {
  Ints index(shape.size());
  int64_t count = 1;
  for (int64_t size : shape) count *= size;
  for (int64_t i = 0; i < count; ++i) {
    visit(index);
    for (size_t d = shape.size(); d-- > 0;) {
      if (++index[d] < shape[d]) break;
      index[d] = 0;
    }
  }
}

// Window by window: its first largest element, among the padding's -Inf, gets its dY. A
// NaN beats what comes before it and loses against what follows.
inline std::vector<double> LiteralPoolGrad(const PoolLine& line, DType dtype,
                                           const std::vector<double>& x,
                                           const std::vector<double>& dy) {
  std::vector<double> dx(x.size());
  const PoolAttributes& a = line.attributes;
  int64_t window = 0;
  ForEachIndex(line.dy_shape, [&](const Ints& p) {
    double best = 0;
    int64_t winner = -1;
    bool first = true;
    ForEachIndex(a.window_dimensions, [&](const Ints& r) {
      int64_t at = 0;
      for (size_t d = 0; d < p.size(); ++d) {
        const int64_t h = p[d] * a.window_strides[d] + r[d] - a.padding[2 * d];
        at = at < 0 || h < 0 || h >= line.x_shape[d] ? -1 : at * line.x_shape[d] + h;
      }
      const double value =
          at < 0 ? -std::numeric_limits<double>::infinity() : x[static_cast<size_t>(at)];
      if (!first && best >= value) return;
      first = false;
      best = value;
      winner = at;
    });
    if (winner >= 0) {
      double& sum = dx[static_cast<size_t>(winner)];
      sum = RoundedTo(dtype, sum + dy[static_cast<size_t>(window)]);
    }
    ++window;
  });
  return dx;
}

}  // namespace convgrad
