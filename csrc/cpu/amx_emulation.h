// The instructions of gemm_amx.h in plain C++, by Intel's manual: each thread has its
// tiles, without a configuration they may not be touched, products of even and of odd
// elements are summed apart, and subnormals count as zeros. What gemm_amx.h does not use
// is refused.

#pragma once

#include "gemm_bf16.h"

namespace convgrad {
namespace CONVGRAD_ISA {
namespace {

struct TileConfig;
constexpr int kEmulatedTiles = 8;

struct EmulatedTiles {
  bool configured;
  int rows[kEmulatedTiles], row_bytes[kEmulatedTiles];
  unsigned char data[kEmulatedTiles][16][64];
};
inline EmulatedTiles& Tiles() {
  static thread_local EmulatedTiles tiles;
  return tiles;
}

inline void Demand(bool condition) {
  if (!condition) __builtin_trap();
}

inline void LoadTileConfig(const TileConfig& config) {
  const unsigned char* bytes = reinterpret_cast<const unsigned char*>(&config);
  Demand(bytes[0] == 1 && bytes[1] == 0);
  EmulatedTiles& s = Tiles();
  s.configured = true;
  for (int i = 0; i < kEmulatedTiles; ++i) {
    s.row_bytes[i] = bytes[16 + 2 * i] | bytes[17 + 2 * i] << 8;
    s.rows[i] = bytes[48 + i];
    Demand(s.row_bytes[i] <= 64 && s.row_bytes[i] % 4 == 0 && s.rows[i] <= 16);
    __builtin_memset(s.data[i], 0, sizeof(s.data[i]));
  }
}

inline void ReleaseTiles() { Tiles().configured = false; }

template <int kTile>
inline void ZeroTile() {
  Demand(Tiles().configured);
  __builtin_memset(Tiles().data[kTile], 0, sizeof(Tiles().data[kTile]));
}

template <int kTile>
inline void LoadTile(const void* p, int64_t row_bytes) {
  EmulatedTiles& s = Tiles();
  Demand(s.configured);
  __builtin_memset(s.data[kTile], 0, sizeof(s.data[kTile]));
  for (int i = 0; i < s.rows[kTile]; ++i) {
    __builtin_memcpy(s.data[kTile][i], static_cast<const char*>(p) + i * row_bytes,
                     s.row_bytes[kTile]);
  }
}

template <int kTile>
inline void StoreTile(void* p, int64_t row_bytes) {
  const EmulatedTiles& s = Tiles();
  Demand(s.configured);
  for (int i = 0; i < s.rows[kTile]; ++i) {
    __builtin_memcpy(static_cast<char*>(p) + i * row_bytes, s.data[kTile][i],
                     s.row_bytes[kTile]);
  }
}

inline float Flushed(float x) { return x < 0x1p-126f && x > -0x1p-126f ? 0 * x : x; }

inline float ElementOf(const unsigned char* row, int index) {
  const uint32_t bits = static_cast<uint32_t>(row[2 * index] | row[2 * index + 1] << 8)
                        << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return Flushed(value);
}

template <int kTo, int kA, int kB>
inline void MultiplyTile() {
  EmulatedTiles& s = Tiles();
  Demand(s.configured && s.rows[kTo] == s.rows[kA] &&
         s.row_bytes[kTo] == s.row_bytes[kB]);
  Demand(s.row_bytes[kA] == 4 * s.rows[kB]);
  for (int m = 0; m < s.rows[kTo]; ++m) {
    for (int n = 0; n < s.row_bytes[kTo] / 4; ++n) {
      float even = 0, odd = 0;
      for (int k = 0; k < s.rows[kB]; ++k) {
        const unsigned char *a = s.data[kA][m], *b = s.data[kB][k];
        even = Flushed(even + Flushed(ElementOf(a, 2 * k) * ElementOf(b, 2 * n)));
        odd = Flushed(odd + Flushed(ElementOf(a, 2 * k + 1) * ElementOf(b, 2 * n + 1)));
      }
      float sum;
      __builtin_memcpy(&sum, s.data[kTo][m] + 4 * n, sizeof(sum));
      sum = Flushed(Flushed(sum) + Flushed(even + odd));
      __builtin_memcpy(s.data[kTo][m] + 4 * n, &sum, sizeof(sum));
    }
  }
}

}  // namespace
}  // namespace CONVGRAD_ISA
}  // namespace convgrad
