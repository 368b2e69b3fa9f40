// The inner part of the gemm kernel on AMX: tdpbf16ps multiplies a tile of 16 rows by 32
// out channels with one of 32 out channels by 16 columns, and adds to 16 x 16 float32.
//
// Tiling: 2 x 2 of the latter, so that a step of 32 out channels loads four tiles for
// four products. Tiles of B come from the packed filter, whose pairs of out channels are
// what the instruction wants. Tiles of A come straight from dY if its rows are equally
// spaced, as they are inside an image; where a tap misses some rows, an image ends, or
// the out channels do not fill a tile, they are copied to the stack, once for all columns
// of the panel.
//
// Estimate, not measured (no AMX at hand): for 32 rows x 64 columns x 256 out channels
//   tdpbf16ps      2 passes x 8 steps x 4, each 16 cycles             1024 cycles
//   loads of A, B  2 x 8 x 4 tiles of 16 rows, 2 rows a cycle          512
//   sums           2 x 4 tiles to load (8 cycles) and store (16)       192
//   staging        2 x 8 tiles of 16 rows, if all have to be copied    256
// so that the products bound it, at 70 % of their peak if neither sums nor staging
// overlap with them, and a block of B from L2 (32 KiB, 48 bytes a cycle) costs 680 cycles
// for every kMaxTileRows / 32 such parts, 17 % more if none of that overlaps.
//
// With CONVGRAD_EMULATE_AMX the instructions are plain C++, for tests anywhere.

#pragma once

#include "gemm_bf16.h"

#if defined(CONVGRAD_TILES)

#if defined(CONVGRAD_EMULATE_AMX)
#include "amx_emulation.h"
#endif

namespace convgrad {
namespace CONVGRAD_ISA {
namespace {

constexpr int kTileRows = 16;
constexpr int64_t kMaxTileDepth = 128;  // operands of a block of B

// The operand of ldtilecfg.
struct TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64, "as the manual has it");

#if !defined(CONVGRAD_EMULATE_AMX)

// Own assembly: the compilers' intrinsics take the tile as a literal, and GCC's do not
// say that they read memory.
CONVGRAD_INLINE void LoadTileConfig(const TileConfig& config) {
  asm volatile("ldtilecfg %0" ::"m"(config));
}
CONVGRAD_INLINE void ReleaseTiles() { asm volatile("tilerelease" ::: "memory"); }

template <int kTile>
CONVGRAD_INLINE void ZeroTile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kTile>
CONVGRAD_INLINE void LoadTile(const void* p, int64_t row_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(row_bytes), "i"(kTile)
               : "memory");
}
template <int kTile>
CONVGRAD_INLINE void StoreTile(void* p, int64_t row_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(row_bytes), "i"(kTile)
               : "memory");
}
// tile kTo += tile kA * tile kB
template <int kTo, int kA, int kB>
CONVGRAD_INLINE void MultiplyTile() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kTo), "i"(kA), "i"(kB));
}

#endif

// Tiles are this thread's while the object lives. All of them are whole: what is missing
// of a matrix is zero in memory.
class TileScope {
 public:
  CONVGRAD_INLINE TileScope() {
    TileConfig config{};
    config.palette = 1;
    for (int i = 0; i < 8; ++i) {
      config.rows[i] = kTileRows;
      config.row_bytes[i] = 64;
    }
    LoadTileConfig(config);
  }
  CONVGRAD_INLINE ~TileScope() { ReleaseTiles(); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

// The tiles of A of one tap and 16 rows.
struct TilesOfA {
  const Pair* at;     // of the first 32 out channels
  int64_t row_bytes;  // from a row to the next
  int64_t step;       // operands to the next 32 out channels
};

// Takes the rows in place if it can, else copies them to `staged`.
CONVGRAD_INLINE TilesOfA TilesOf(const Pair* const* rows, int64_t at, int64_t k_count,
                                 Pair* staged) {
  const int64_t apart = rows[1] - rows[0];
  bool in_place = k_count % kDepthStep == 0;
  for (int i = 2; i < kTileRows; ++i) in_place &= rows[i] - rows[i - 1] == apart;
  if (in_place) {
    return {rows[0] + at, apart * static_cast<int64_t>(sizeof(Pair)), kDepthStep};
  }
  constexpr int64_t kTileSize = kTileRows * kDepthStep;
  for (int i = 0; i < kTileRows; ++i) {
    const Pair* from = rows[i] + at;
    Pair* to = staged + i * kDepthStep;
    int64_t k = 0;
    for (; k + kDepthStep <= k_count; k += kDepthStep) {
      Store<kDepthStep>(to, Load<kDepthStep>(from + k));
      to += kTileSize;
    }
    if (k == k_count) continue;
#if defined(__AVX512F__)
    const __mmask16 rest = static_cast<__mmask16>((1u << (k_count - k)) - 1);
    _mm512_storeu_si512(to, _mm512_maskz_loadu_epi32(rest, from + k));
#else
    for (int64_t j = 0; j < kDepthStep; ++j) to[j] = k + j < k_count ? from[k + j] : 0;
#endif
  }
  return {staged, kDepthStep * static_cast<int64_t>(sizeof(Pair)), kTileSize};
}

// One pass: 16 or 32 rows by 16 or 32 columns, all of the block. `b` is `column` columns
// into each row of the panel, which is b_bytes long.
template <bool kTwoRows, bool kTwoColumns, int64_t kWidth>
CONVGRAD_INLINE void TilePass(int taps, const TilesOfA (*a)[2], int64_t k_count,
                              const Pair* const* b, int64_t column, bool fresh,
                              float* out) {
  constexpr int64_t kRowBytes = kWidth * sizeof(float);
  float* const below = out + kTileRows * kWidth;
  if (fresh) {
    ZeroTile<0>();
    if constexpr (kTwoColumns) ZeroTile<1>();
    if constexpr (kTwoRows) ZeroTile<2>();
    if constexpr (kTwoRows && kTwoColumns) ZeroTile<3>();
  } else {
    LoadTile<0>(out, kRowBytes);
    if constexpr (kTwoColumns) LoadTile<1>(out + kTileRows, kRowBytes);
    if constexpr (kTwoRows) LoadTile<2>(below, kRowBytes);
    if constexpr (kTwoRows && kTwoColumns) LoadTile<3>(below + kTileRows, kRowBytes);
  }
  for (int t = 0; t < taps; ++t) {
    const TilesOfA upper = a[t][0], lower = a[t][kTwoRows ? 1 : 0];
    const Pair* a0 = upper.at;
    const Pair* a1 = lower.at;
    const Pair* bk = b[t] + column;
    for (int64_t k = 0; k < k_count; k += kDepthStep) {
      LoadTile<6>(bk, kRowBytes);
      LoadTile<4>(a0, upper.row_bytes);
      MultiplyTile<0, 4, 6>();
      if constexpr (kTwoColumns) {
        LoadTile<7>(bk + kTileRows, kRowBytes);
        MultiplyTile<1, 4, 7>();
      }
      if constexpr (kTwoRows) {
        LoadTile<5>(a1, lower.row_bytes);
        MultiplyTile<2, 5, 6>();
        if constexpr (kTwoColumns) MultiplyTile<3, 5, 7>();
      }
      a0 += upper.step;
      a1 += lower.step;
      bk += kDepthStep * kWidth;
    }
  }
  StoreTile<0>(out, kRowBytes);
  if constexpr (kTwoColumns) StoreTile<1>(out + kTileRows, kRowBytes);
  if constexpr (kTwoRows) StoreTile<2>(below, kRowBytes);
  if constexpr (kTwoRows && kTwoColumns) StoreTile<3>(below + kTileRows, kRowBytes);
}

template <bool kTwoRows, int kVecs>
inline void TilePasses(int taps, const TilesOfA (*a)[2], int64_t k_count,
                       const Pair* const* b, bool fresh, float* out) {
  constexpr int64_t kWidth = kVecs * kTileRows;
  for (int64_t c = 0; c + 1 < kVecs; c += 2) {
    TilePass<kTwoRows, true, kWidth>(taps, a, k_count, b, c * kTileRows, fresh,
                                     out + c * kTileRows);
  }
  if constexpr (kVecs % 2 == 1) {
    constexpr int64_t kLast = (kVecs - 1) * kTileRows;
    TilePass<kTwoRows, false, kWidth>(taps, a, k_count, b, kLast, fresh, out + kLast);
  }
}

// As Multiply (gemm_tiles.h) for the first `live` of 32 rows; the others of the same 16
// may hold anything afterwards. k_count operands of b's rows are followed by zeros up to
// a whole tile.
template <int kVecs, int kMaxTaps>
CONVGRAD_NOINLINE void MultiplyInTiles(int taps, int live, int64_t k_count,
                                       const Pair* const (*rows)[2 * kTileRows],
                                       int64_t at, const Pair* const* b, bool fresh,
                                       float* out) {
  TilesOfA a[kMaxTaps][2];
  alignas(64) Pair staged[2 * kTileRows * kMaxTileDepth];
  Pair* stage = staged;
  const bool two = live > kTileRows;
  const int64_t stage_size = CeilDiv(k_count, kDepthStep) * kDepthStep * kTileRows;
  for (int t = 0; t < taps; ++t) {
    for (int half = 0; half < (two ? 2 : 1); ++half) {
      a[t][half] = TilesOf(rows[t] + half * kTileRows, at, k_count, stage);
      stage += stage_size;
    }
  }
  if (two) {
    TilePasses<true, kVecs>(taps, a, k_count, b, fresh, out);
  } else {
    TilePasses<false, kVecs>(taps, a, k_count, b, fresh, out);
  }
}

}  // namespace
}  // namespace CONVGRAD_ISA
}  // namespace convgrad

#else

namespace convgrad {
namespace CONVGRAD_ISA {
namespace {

struct TileScope {};

}  // namespace
}  // namespace CONVGRAD_ISA
}  // namespace convgrad

#endif
