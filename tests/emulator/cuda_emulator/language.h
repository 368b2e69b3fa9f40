// CUDA C++ for a host compiler: qualifiers, vector types, small functions; and which
// sanitizer is watching.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__SANITIZE_ADDRESS__)
#define CUDA_EMULATOR_ASAN
#elif defined(__SANITIZE_THREAD__)
#define CUDA_EMULATOR_TSAN
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define CUDA_EMULATOR_ASAN
#elif __has_feature(thread_sanitizer)
#define CUDA_EMULATOR_TSAN
#endif
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#ifdef CUDA_EMULATOR_ASAN
#define __shared__ static  // thread-local data has no red zones
#else
#define __shared__ static thread_local
#endif

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1)
      : x(x_), y(y_), z(z_) {}
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
constexpr int2 make_int2(int x, int y) { return {x, y}; }
constexpr int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
constexpr uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
constexpr uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}
constexpr float2 make_float2(float x, float y) { return {x, y}; }
constexpr float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
constexpr double2 make_double2(double x, double y) { return {x, y}; }

namespace cuda_emulator {
template <typename To, typename From>
To BitCast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
}  // namespace cuda_emulator

using std::fma;
using std::fmaf;
using std::max;
using std::min;

template <typename T>
T __ldg(const T* p) {
  return *p;
}
inline float __uint_as_float(unsigned v) { return cuda_emulator::BitCast<float>(v); }
inline unsigned __float_as_uint(float v) { return cuda_emulator::BitCast<unsigned>(v); }
inline float __int_as_float(int v) { return cuda_emulator::BitCast<float>(v); }
inline int __float_as_int(float v) { return cuda_emulator::BitCast<int>(v); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(static_cast<unsigned>(v)); }
