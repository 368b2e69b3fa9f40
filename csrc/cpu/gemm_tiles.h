// The inner part of the gemm kernel (gemm.h): a block of B times what a register tile's
// rows read of dY.

#pragma once

#include "gemm_amx.h"
#include "gemm_pack.h"
#include "gemm_rows.h"

namespace convgrad {
namespace CONVGRAD_ISA {
namespace {

// A block of B stays in L2 while the rows of a task stream past it: a register tile takes
// a vector of B for every kRows multiply-adds, which L2 delivers, and a larger block
// saves accumulators on their way to memory and back.
constexpr int64_t kBlockBytes = (kVectorBytes == 64 ? 128 : 64) * 1024;
constexpr int kBlockTaps = 16;  // pointer tables are on the stack
constexpr int64_t kTileBytes = kMaxTileRows * kVectorBytes * kPanelVectors<float>;
static_assert(kTileBytes <= 44 * 1024, "a task's tile has to leave room on its stack");

// Rows of a block of B of so many bytes, for a panel of so many vectors.
CONVGRAD_INLINE constexpr int64_t BlockRows(int vectors, int64_t bytes) {
  const int64_t rows = bytes / (vectors * kVectorBytes);
#if defined(CONVGRAD_TILES)
  if (rows > kMaxTileDepth) return kMaxTileDepth;
#endif
  return rows;
}

// A block of B: some taps of the phase, channels [k0, k0 + k_count) of each.
struct GemmBlock {
  int taps;
  int64_t k0, k_count;
  int32_t tap[kBlockTaps][kAxes];
  int64_t dy_back[kBlockTaps];  // how far before tap 0 the tap reads
  int64_t w[kBlockTaps];        // the tap's place in the filter
  int64_t filter[kBlockTaps];   // and in the packed panel
};

// out[i][0 .. kVecs vectors) += sum over taps, k of rows[t][i][at + k] * b[t][k][...],
// where fresh rows count as zeros whatever they hold. So many streams at once are more
// than hardware foresees: asks for what the first tap reads `ahead` elements further on,
// unless that is 0, and for fresh rows long before they are stored.
//
// Zeros are stored as +0 (so in gemm_short.h and gemm_strips.h). A sum that underflows
// may be -0, and one more product with the row of zeros would make it +0: whether there
// is one depends on which rows share a tile, on the threads and on the other images.
template <typename O, int kRows, int kVecs>
CONVGRAD_NOINLINE void Multiply(int taps, int64_t k_count, const O* const (*rows)[kRows],
                                int64_t at, int64_t ahead, const O* const* b, bool fresh,
                                Sum<O>* const* out) {
  constexpr int L = kLanes<O>;
  constexpr int64_t kLine = 64 / static_cast<int>(sizeof(O));
  using V = Vec<Sum<O>, L>;
  V sum[kRows][kVecs];
  CONVGRAD_UNROLL
  for (int i = 0; i < kRows; ++i) {
    CONVGRAD_UNROLL
    for (int v = 0; v < kVecs; ++v) {
      if (fresh) __builtin_prefetch(out[i] + v * L, 1);
      sum[i][v] = fresh ? V{} : Load<L>(out[i] + v * L);
    }
  }
  for (int t = 0; t < taps; ++t) {
    const O* row[kRows];
    CONVGRAD_UNROLL
    for (int i = 0; i < kRows; ++i) row[i] = rows[t][i] + at;
    const O* bk = b[t];
    for (int64_t k0 = 0; k0 < k_count; k0 += kLine) {
      const int64_t k1 = k_count - k0 < kLine ? k_count : k0 + kLine;
      if (t == 0 && ahead != 0) {
        for (int i = 0; i < kRows; ++i) __builtin_prefetch(row[i] + ahead + k0);
      }
      for (int64_t k = k0; k < k1; ++k) {
        AddOuterProduct<O>(sum, bk, [&](int i) { return row[i][k]; });
        bk += kVecs * L;
      }
    }
  }
  CONVGRAD_UNROLL
  for (int i = 0; i < kRows; ++i) {
    CONVGRAD_UNROLL
    for (int v = 0; v < kVecs; ++v) Store<L>(out[i] + v * L, sum[i][v] + V{});
  }
}

// What a register tile reads of dY for a block of B: a pointer for each row and tap, to
// zeros where the tap misses dY. Taps that miss it for every row are left out.
template <typename O, int kRows>
struct Indirection {
  const O* row[kBlockTaps][kRows];
  int tap[kBlockTaps];  // in the block
  int taps;
  int live;    // rows that exist; the others read what the last of them does
  bool mixed;  // some tap misses for some row
};

template <typename O, int kRows>
CONVGRAD_INLINE void FillIndirection(const GemmRows& rows, const GemmBlock& block,
                                     int64_t m, const O* dy, const O* zeros,
                                     Indirection<O, kRows>* found) {
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

constexpr int kFewRows = 2;  // that cost less one by one than a register tile does

// Where the sums of a task are kept: its tile, or dX itself. Rows are `step` apart, or,
// if that is 0, where GemmRows has them.
template <typename S>
struct GemmSums {
  S* to;
  int64_t step;

  S* Row(const GemmRows& rows, int64_t m) const {
    return to + (step != 0 ? m * step : rows.dx[m]);
  }
};

// Adds one block of B to rows [m, m + kRows), which read dY `at` elements further on than
// they were found: so do the zeros.
template <typename O, int kVecs>
inline void AddIndirect(const Indirection<O, RowsFor(kVecs)>& found, int64_t at,
                        const GemmBlock& block, const O* panel, const O* zeros,
                        bool mask_taps, bool fresh, const GemmRows& rows, int64_t m,
                        const GemmSums<Sum<O>>& sums) {
  constexpr int kRows = RowsFor(kVecs);
  constexpr int64_t kWidth = kVecs * kLanes<O>;
  Sum<O> spare[kWidth];  // of rows that do not exist
  Sum<O>* out[kRows];
  for (int i = 0; i < kRows; ++i) {
    out[i] = i >= found.live ? spare : sums.Row(rows, m + i);
  }
  const O* filter[kBlockTaps];
  if ((mask_taps && found.mixed) ||
      (found.live <= kFewRows && !kHasTiles)) {  // row by row
    for (int i = 0; i < found.live; ++i) {
      const O* row[kBlockTaps][1];
      int taps = 0;
      for (int t = 0; t < found.taps; ++t) {
        if (found.row[t][i] == zeros) continue;
        row[taps][0] = found.row[t][i];
        filter[taps++] = panel + block.filter[found.tap[t]];
      }
      Multiply<O, 1, kVecs>(taps, block.k_count, row, at, 0, filter, fresh, out + i);
    }
    return;
  }
  for (int t = 0; t < found.taps; ++t) filter[t] = panel + block.filter[found.tap[t]];
#if defined(CONVGRAD_TILES)
  // Pairs are never summed in dX: the sums are in a tile with room for whole AMX tiles.
  MultiplyInTiles<kVecs, kBlockTaps>(found.taps, found.live, block.k_count, found.row, at,
                                     filter, fresh, out[0]);
#else
  if (found.live < kRows) {
    for (int64_t c = 0; c < kWidth; ++c) spare[c] = 0;
  }
  const int64_t ahead =
      rows.first_time && m + kRows < rows.count ? rows.dy[m + kRows] - rows.dy[m] : 0;
  Multiply<O, kRows, kVecs>(found.taps, block.k_count, found.row, at, ahead, filter,
                            fresh, out);
#endif
}

// Adds one block of B to all rows of the task, whose sums are fresh at the first one.
template <typename O, int kVecs>
CONVGRAD_NOINLINE void AddBlock(const GemmRows& rows, const GemmBlock& block, const O* dy,
                                const O* zeros, const O* panel, bool mask_taps,
                                bool fresh, const GemmSums<Sum<O>>& sums) {
  constexpr int kRows = RowsFor(kVecs);
  for (int64_t m = 0; m < rows.count; m += kRows) {
    Indirection<O, kRows> found;
    FillIndirection(rows, block, m, dy, zeros, &found);
    AddIndirect<O, kVecs>(found, 0, block, panel, zeros, mask_taps, fresh, rows, m, sums);
  }
}

// Adds tap t of the phase to a block whose panels are `width` columns wide.
template <typename O>
inline void AppendTap(const ActivationStrides& dy_at, const Problem& p,
                      const Phase* const* phase, const int64_t (&t)[kAxes], int64_t width,
                      GemmBlock* block) {
  int64_t back = 0, w = 0, r = 0;
  for (int x = 0; x < kAxes; ++x) {
    const int64_t r_x = phase[x]->r0 + t[x] * phase[x]->r_step;
    back += t[x] * phase[x]->p_per_r * dy_at.axis[x];
    w += r_x * p.w.axis[x];
    r = r * p.axis[x].win + r_x;
    block->tap[block->taps][x] = static_cast<int32_t>(t[x]);
  }
  block->dy_back[block->taps] = back;
  block->w[block->taps] = w;
  block->filter[block->taps] = (r * PackedDepth<O>(p) + block->k0) * width;
  ++block->taps;
}

}  // namespace
}  // namespace CONVGRAD_ISA
}  // namespace convgrad
