// The inner part of the gemm kernel (gemm.h): a block of B times what a register tile's
// rows read of dY.

#pragma once

#include "gemm_pack.h"
#include "gemm_rows.h"

namespace convgrad {
namespace CONVGRAD_ISA {
namespace {

constexpr int64_t kBlockBytes = 32 * 1024;
constexpr int kBlockTaps = 16;  // pointer tables are on the stack
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
template <typename A, int kRows, int kVecs>
__attribute__((noinline)) void Multiply(int taps, int64_t k_count,
                                        const A* const (*rows)[kRows], int64_t at,
                                        const A* const* b, bool fresh, A* tile,
                                        int64_t tile_step) {
  constexpr int L = kLanes<A>;
  using V = Vec<A, L>;
  V sum[kRows][kVecs];
  CONVGRAD_UNROLL
  for (int i = 0; i < kRows; ++i) {
    CONVGRAD_UNROLL
    for (int v = 0; v < kVecs; ++v) {
      sum[i][v] = fresh ? V{} : Load<L>(tile + i * tile_step + v * L);
    }
  }
  for (int t = 0; t < taps; ++t) {
    const A* row[kRows];
    CONVGRAD_UNROLL
    for (int i = 0; i < kRows; ++i) row[i] = rows[t][i] + at;
    const A* bk = b[t];
    for (int64_t k = 0; k < k_count; ++k) {
      V column[kVecs];
      CONVGRAD_UNROLL
      for (int v = 0; v < kVecs; ++v) column[v] = Load<L>(bk + v * L);
      CONVGRAD_UNROLL
      for (int i = 0; i < kRows; ++i) {
        CONVGRAD_UNROLL
        for (int v = 0; v < kVecs; ++v) sum[i][v] += column[v] * row[i][k];
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
template <typename A, int kRows>
struct TapRows {
  const A* row[kBlockTaps][kRows];
  int tap[kBlockTaps];  // in the block
  int taps;
  int live;    // rows that exist
  bool mixed;  // some tap misses for some row
};

template <typename A, int kRows>
CONVGRAD_INLINE void FindTapRows(const GemmRows& rows, const GemmBlock& block, int64_t m,
                                 const A* dy, const A* zeros, TapRows<A, kRows>* found) {
  found->taps = 0;
  found->mixed = false;
  found->live = rows.count - m < kRows ? static_cast<int>(rows.count - m) : kRows;
  for (int t = 0; t < block.taps; ++t) {
    const int32_t t0 = block.tap[t][0], t1 = block.tap[t][1], t2 = block.tap[t][2];
    int hits = 0;
    for (int i = 0; i < kRows; ++i) {
      const int64_t r = m + (i < found->live ? i : 0);
      const bool hit = (t0 >= rows.lo[0][r]) & (t0 < rows.hi[0][r]) &
                       (t1 >= rows.lo[1][r]) & (t1 < rows.hi[1][r]) &
                       (t2 >= rows.lo[2][r]) & (t2 < rows.hi[2][r]);
      found->row[found->taps][i] =
          hit ? dy + (rows.dy[r] - block.dy_back[t] + block.k0) : zeros;
      hits += hit;
    }
    if (hits == 0) continue;
    found->mixed |= hits != kRows;
    found->tap[found->taps++] = t;
  }
}

// Adds one block of B to a register tile, whose rows read dY `at` elements further on
// than they were found: so do the zeros.
template <typename A, int kVecs>
inline void AddTapRows(const TapRows<A, RowsFor(kVecs)>& found, int64_t at,
                       const GemmBlock& block, const A* panel, const A* zeros, bool exact,
                       bool fresh, A* out) {
  constexpr int kRows = RowsFor(kVecs);
  constexpr int64_t kStep = kVecs * kLanes<A>;
  const A* filter[kBlockTaps];
  for (int t = 0; t < found.taps; ++t) filter[t] = panel + block.filter[found.tap[t]];
  const bool one_by_one = exact && found.mixed;
  if (fresh && (found.taps == 0 || one_by_one)) {
    for (int64_t i = 0; i < found.live * kStep; ++i) out[i] = 0;
  }
  if (found.taps == 0) return;
  if (one_by_one) {
    for (int i = 0; i < found.live; ++i) {
      for (int t = 0; t < found.taps; ++t) {
        if (found.row[t][i] == zeros) continue;
        const A* const one[1][1] = {{found.row[t][i]}};
        Multiply<A, 1, kVecs>(1, block.k_count, one, at, filter + t, false,
                              out + i * kStep, kStep);
      }
    }
  } else if (found.live == kRows) {
    Multiply<A, kRows, kVecs>(found.taps, block.k_count, found.row, at, filter, fresh,
                              out, kStep);
  } else {
    A spare[kRows * kStep];  // the tile ends before the register tile does
    for (int64_t i = 0; i < kRows * kStep; ++i) {
      spare[i] = !fresh && i < found.live * kStep ? out[i] : 0;
    }
    Multiply<A, kRows, kVecs>(found.taps, block.k_count, found.row, at, filter, false,
                              spare, kStep);
    for (int64_t i = 0; i < found.live * kStep; ++i) out[i] = spare[i];
  }
}

// Adds one block of B to all rows of the task's tile, which is fresh at the first one.
template <typename A, int kVecs>
inline void AddBlock(const GemmRows& rows, const GemmBlock& block, const A* dy,
                     const A* zeros, const A* panel, bool exact, bool fresh, A* tile) {
  constexpr int kRows = RowsFor(kVecs);
  for (int64_t m = 0; m < rows.count; m += kRows) {
    TapRows<A, kRows> found;
    FindTapRows(rows, block, m, dy, zeros, &found);
    AddTapRows<A, kVecs>(found, 0, block, panel, zeros, exact, fresh,
                         tile + m * kVecs * kLanes<A>);
  }
}

// Adds tap t of the phase to a block whose panels are `width` columns wide.
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
  block->filter[block->taps] = (r * p.out_channels + block->k0) * width;
  ++block->taps;
}

}  // namespace
}  // namespace CONVGRAD_ISA
}  // namespace convgrad
