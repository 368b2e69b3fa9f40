// The inner part of the gemm kernel (gemm.h): a block of B times what a register tile's
// rows read of dY.

#pragma once

#include "gemm_amx.h"
#include "gemm_pack.h"
#include "gemm_rows.h"

namespace convgrad {
namespace CONVGRAD_ISA {
namespace {

constexpr int64_t kBlockBytes = 32 * 1024;
constexpr int kBlockTaps = 16;  // pointer tables are on the stack

// Rows of a block of B for a panel of so many vectors.
template <typename O>
CONVGRAD_INLINE constexpr int64_t BlockRows(int vectors) {
  const int64_t rows = kBlockBytes / (vectors * kVectorBytes);
#if defined(CONVGRAD_TILES)
  if (rows > kMaxTileDepth) return kMaxTileDepth;
#endif
  return rows;
}
static_assert(kMaxTaskRows * kVectorBytes * kPanelVectors<float> <= 48 * 1024,
              "a task's tile has to leave room on a 64 KiB stack");

// A block of B: some taps of the phase, channels [k0, k0 + k_count) of each.
struct GemmBlock {
  int taps;
  int64_t k0, k_count;
  int32_t tap[kBlockTaps][kAxes];
  int64_t dy_back[kBlockTaps];  // how far before tap 0 the tap reads
  int64_t filter[kBlockTaps];   // the tap's place in the packed panel
};

// tile[kRows][kVecs vectors] += sum over taps, k of rows[t][i][at + k] * b[t][k][...],
// where a fresh tile counts as zeros whatever it holds.
template <typename O, int kRows, int kVecs>
CONVGRAD_NOINLINE void Multiply(int taps, int64_t k_count, const O* const (*rows)[kRows],
                                int64_t at, const O* const* b, bool fresh, Sum<O>* tile,
                                int64_t tile_step) {
  constexpr int L = kLanes<O>;
  using V = Vec<Sum<O>, L>;
  V sum[kRows][kVecs];
  CONVGRAD_UNROLL
  for (int i = 0; i < kRows; ++i) {
    CONVGRAD_UNROLL
    for (int v = 0; v < kVecs; ++v) {
      sum[i][v] = fresh ? V{} : Load<L>(tile + i * tile_step + v * L);
    }
  }
  for (int t = 0; t < taps; ++t) {
    const O* row[kRows];
    CONVGRAD_UNROLL
    for (int i = 0; i < kRows; ++i) row[i] = rows[t][i] + at;
    const O* bk = b[t];
    for (int64_t k = 0; k < k_count; ++k) {
      Vec<O, L> column[kVecs];
      CONVGRAD_UNROLL
      for (int v = 0; v < kVecs; ++v) column[v] = Load<L>(bk + v * L);
      CONVGRAD_UNROLL
      for (int i = 0; i < kRows; ++i) {
        CONVGRAD_UNROLL
        for (int v = 0; v < kVecs; ++v) {
          AddProducts<L, O>(&sum[i][v], column[v], row[i][k]);
        }
      }
      bk += kVecs * L;
    }
  }
  CONVGRAD_UNROLL
  for (int i = 0; i < kRows; ++i) {
    CONVGRAD_UNROLL
    for (int v = 0; v < kVecs; ++v) Store<L>(tile + i * tile_step + v * L, sum[i][v]);
  }
}

// What a register tile reads of dY for a block of B: a pointer for each row and tap, to
// zeros where the tap misses dY. Taps that miss it for every row are left out.
template <typename O, int kRows>
struct TapRows {
  const O* row[kBlockTaps][kRows];
  int tap[kBlockTaps];  // in the block
  int taps;
  int live;    // rows that exist; the others read what the last of them does
  bool mixed;  // some tap misses for some row
};

template <typename O, int kRows>
CONVGRAD_INLINE void FindTapRows(const GemmRows& rows, const GemmBlock& block, int64_t m,
                                 const O* dy, const O* zeros, TapRows<O, kRows>* found) {
  found->taps = 0;
  found->mixed = false;
  found->live = rows.count - m < kRows ? static_cast<int>(rows.count - m) : kRows;
  int32_t lo[kAxes], hi[kAxes];  // of the taps that every row has
  for (int x = 0; x < kAxes; ++x) {
    lo[x] = 0;
    hi[x] = rows.hi[x][m];
    for (int i = 0; i < kRows; ++i) {
      lo[x] = rows.lo[x][m + i] > lo[x] ? rows.lo[x][m + i] : lo[x];
      hi[x] = rows.hi[x][m + i] < hi[x] ? rows.hi[x][m + i] : hi[x];
    }
  }
  for (int t = 0; t < block.taps; ++t) {
    const int32_t t0 = block.tap[t][0], t1 = block.tap[t][1], t2 = block.tap[t][2];
    const int64_t at = block.k0 - block.dy_back[t];
    const O** row = found->row[found->taps];
    if ((t0 >= lo[0]) & (t0 < hi[0]) & (t1 >= lo[1]) & (t1 < hi[1]) & (t2 >= lo[2]) &
        (t2 < hi[2])) {
      for (int i = 0; i < kRows; ++i) row[i] = dy + (rows.dy[m + i] + at);
    } else {
      int hits = 0;
      for (int i = 0; i < kRows; ++i) {
        const int64_t r = m + i;
        const bool hit = (t0 >= rows.lo[0][r]) & (t0 < rows.hi[0][r]) &
                         (t1 >= rows.lo[1][r]) & (t1 < rows.hi[1][r]) &
                         (t2 >= rows.lo[2][r]) & (t2 < rows.hi[2][r]);
        row[i] = hit ? dy + (rows.dy[r] + at) : zeros;
        hits += hit;
      }
      if (hits == 0) continue;
      found->mixed = true;
    }
    found->tap[found->taps++] = t;
  }
}

// Adds one block of B to a register tile, whose rows read dY `at` elements further on
// than they were found: so do the zeros. All of its rows have room in `out`.
template <typename O, int kVecs>
inline void AddTapRows(const TapRows<O, RowsFor(kVecs)>& found, int64_t at,
                       const GemmBlock& block, const O* panel, const O* zeros, bool exact,
                       bool fresh, Sum<O>* out) {
  constexpr int kRows = RowsFor(kVecs);
  constexpr int64_t kStep = kVecs * kLanes<O>;
  const O* filter[kBlockTaps];
  for (int t = 0; t < found.taps; ++t) filter[t] = panel + block.filter[found.tap[t]];
  const bool one_by_one = exact && found.mixed;
  if (fresh && (found.taps == 0 || one_by_one)) {
    __builtin_memset(out, 0, sizeof(*out) * kRows * kStep);
  }
  if (found.taps == 0) return;
  if (one_by_one) {
    for (int i = 0; i < found.live; ++i) {
      for (int t = 0; t < found.taps; ++t) {
        if (found.row[t][i] == zeros) continue;
        const O* const one[1][1] = {{found.row[t][i]}};
        Multiply<O, 1, kVecs>(1, block.k_count, one, at, filter + t, false,
                              out + i * kStep, kStep);
      }
    }
  } else {
#if defined(CONVGRAD_TILES)
    MultiplyInTiles<kVecs, kBlockTaps>(found.taps, found.live, block.k_count, found.row,
                                       at, filter, fresh, out);
#else
    Multiply<O, kRows, kVecs>(found.taps, block.k_count, found.row, at, filter, fresh,
                              out, kStep);
#endif
  }
}

// Adds one block of B to all rows of the task's tile, which is fresh at the first one.
template <typename O, int kVecs>
CONVGRAD_NOINLINE void AddBlock(const GemmRows& rows, const GemmBlock& block, const O* dy,
                                const O* zeros, const O* panel, bool exact, bool fresh,
                                Sum<O>* tile) {
  constexpr int kRows = RowsFor(kVecs);
  for (int64_t m = 0; m < rows.count; m += kRows) {
    TapRows<O, kRows> found;
    FindTapRows(rows, block, m, dy, zeros, &found);
    if (kVecs <= 2 && block.taps == 1 && m + kRows < rows.count) {
      // Rows that are new to the cache and serve few columns: too many, and too short,
      // for the processor to see where they go on.
      constexpr int kLine = 64 / sizeof(O);
      for (int i = 0; i < kRows; ++i) {
        const O* next = dy + (rows.dy[m + kRows + i] + block.k0 - block.dy_back[0]);
        for (int64_t k = 0; k < block.k_count; k += kLine) __builtin_prefetch(next + k);
      }
    }
    AddTapRows<O, kVecs>(found, 0, block, panel, zeros, exact, fresh,
                         tile + m * kVecs * kLanes<O>);
  }
}

// Adds tap t of the phase to a block whose panels are `width` columns wide.
template <typename O>
inline void AppendTap(const ActivationStrides& dy_at, const Problem& p,
                      const Phase* const* phase, const int64_t (&t)[kAxes], int64_t width,
                      GemmBlock* block) {
  int64_t back = 0, r = 0;
  for (int x = 0; x < kAxes; ++x) {
    back += t[x] * phase[x]->p_per_r * dy_at.axis[x];
    r = r * p.axis[x].win + phase[x]->r0 + t[x] * phase[x]->r_step;
    block->tap[block->taps][x] = static_cast<int32_t>(t[x]);
  }
  block->dy_back[block->taps] = back;
  block->filter[block->taps] = (r * PackedDepth<O>(p) + block->k0) * width;
  ++block->taps;
}

}  // namespace
}  // namespace CONVGRAD_ISA
}  // namespace convgrad
