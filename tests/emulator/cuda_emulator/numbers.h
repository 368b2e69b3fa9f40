// bfloat16 and float16: bit patterns with conversions that round to nearest even, as the
// GPU's do.

#pragma once

#include <cmath>
#include <cstdint>

#include "language.h"

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
struct alignas(4) __half2 {
  __half x, y;
};
using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;
using half = __half;
using half2 = __half2;

inline float __bfloat162float(__nv_bfloat16 v) {
  return __uint_as_float(static_cast<uint32_t>(v.bits) << 16);
}

inline __nv_bfloat16 __float2bfloat16(float v) {
  if (v != v) return {0x7fff};  // CUDA's NaN, whatever came in
  const uint32_t bits = __float_as_uint(v);
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline float __half2float(__half v) {
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000) << 16;
  const uint32_t exponent = v.bits >> 10 & 0x1f, fraction = v.bits & 0x3ff;
  if (exponent == 0) {  // zero or subnormal: fraction * 2^-24, exact
    return __uint_as_float(sign |
                           __float_as_uint(static_cast<float>(fraction) / (1 << 24)));
  }
  const uint32_t widened = exponent == 0x1f ? 0xff : exponent + 127 - 15;
  return __uint_as_float(sign | widened << 23 | fraction << 13);
}

inline __half __float2half(float v) {
  if (v != v) return {0x7fff};
  const uint32_t sign = __float_as_uint(v) >> 16 & 0x8000;
  const float size = std::fabs(v);
  uint32_t bits = __float_as_uint(size);
  if (size >= 65520.0f) {  // halfway between the largest number and the next, 2^16
    bits = 0x7c00;
  } else if (size < 6.103515625e-5f) {  // below 2^-14: a multiple of 2^-24
    bits = static_cast<uint32_t>(std::nearbyint(size * (1 << 24)));
  } else {
    bits = (bits + 0xfff + (bits >> 13 & 1) - ((127u - 15u) << 23)) >> 13;
  }
  return {static_cast<uint16_t>(sign | bits)};
}

inline __nv_bfloat16 __float2bfloat16_rn(float v) { return __float2bfloat16(v); }
inline __half __float2half_rn(float v) { return __float2half(v); }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16(x), __float2bfloat16(y)};
}
inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half(x), __float2half(y)};
}
inline float2 __bfloat1622float2(__nv_bfloat162 v) {
  return {__bfloat162float(v.x), __bfloat162float(v.y)};
}
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }

namespace cuda_emulator {

// f32 to the nearest TF32, ties away from zero, as an f32 bit pattern.
inline uint32_t RoundToTf32(float v) {
  const uint32_t bits = __float_as_uint(v);
  if (v != v) return 0x7fffffff;
  if (std::isinf(v)) return bits;
  return (bits + 0x1000) & 0xffffe000;
}

}  // namespace cuda_emulator
