// Depthwise convolutions and small groups, channels-last: lanes hold channels.
//
// A vector covers a block of whole groups: lane l is channel l % C of the block's group
// l / C. For one row of dX and one block,
//
//   dX[h, lane] = sum over taps t, k   dY[p(h, t), perm_k(lane)] * W[t][k][lane]
//   where   p(h, t) = h*p_per_h - t*p_per_r
//
// where perm_k picks out channel k of the lane's own group (the identity if K = C = 1).
//
// Tiling: kWidth neighbouring positions of one phase in registers, all taps in turn, so
// a filter vector serves kWidth multiply-adds, and dY, read in place, comes from L1 for
// all but its first tap. The last tile of a row, and the last block of channels, overlap
// the one before.
//
// Memory: a row is hundreds of pixels, each a cache line or some, which no prefetcher
// follows in the order that tiles visit them. So a tile fetches what the tile below it
// will need; without that, most of the time goes to waiting.
//
// Border tiles read zeros where a tap misses dY, which is exact unless the filter has an
// Inf or a NaN; such blocks do border positions one by one, with their own taps only.
//
// Limits: max(C, K) <= kMaxSharedGroup unless C = K = 1; all strides, dilations, types.

#pragma once

#include "epilogue.h"
#include "job.h"
#include "vec.h"

namespace convgrad {
namespace CONVGRAD_ISA {
namespace {

struct DepthwiseState {
  CpuArgs args;
  int64_t lanes;         // of the vectors in use
  int64_t block_groups;  // groups that share one
  int64_t blocks, task_blocks, block_tasks;
  int64_t task_rows, row_tasks;
};

// First group of a block. The last block is moved back to end with the last group.
CONVGRAD_INLINE int64_t FirstGroup(const DepthwiseState& s, int64_t block) {
  const int64_t g = block * s.block_groups;
  const int64_t last = s.args.problem.groups - s.block_groups;
  return g < last ? g : last;
}

// The packed filter is [block][r0][r1][r2][k][lane].
template <typename T>
void DepthwisePackTask(const void* state, int64_t block) {
  using A = Acc<T>;
  const DepthwiseState& s = *static_cast<const DepthwiseState*>(state);
  const Problem& p = s.args.problem;
  const int64_t taps = p.axis[0].win * p.axis[1].win * p.axis[2].win;
  A* to = static_cast<A*>(s.args.filter) + block * taps * p.out_channels * s.lanes;
  const T* w = static_cast<const T*>(s.args.w) + FirstGroup(s, block) * p.w.group;
  A nonfinite = 0;
  for (int64_t l = 0; l < s.lanes; ++l) {
    const bool live = l < s.block_groups * p.in_channels;
    const T* lane =
        w + l / p.in_channels * p.w.group + l % p.in_channels * p.w.in_channel;
    A* out = to + l;
    for (int64_t r0 = 0; r0 < p.axis[0].win; ++r0) {
      for (int64_t r1 = 0; r1 < p.axis[1].win; ++r1) {
        for (int64_t r2 = 0; r2 < p.axis[2].win; ++r2) {
          for (int64_t k = 0; k < p.out_channels; ++k) {
            const int64_t at = r0 * p.w.axis[0] + r1 * p.w.axis[1] + r2 * p.w.axis[2];
            const A value = live ? LoadOne(lane + at + k * p.w.out_channel) : 0;
            nonfinite += value * 0;
            *out = value;
            out += s.lanes;
          }
        }
      }
    }
  }
  s.args.nonfinite[block] = HasNonfinite(nonfinite);
}

// A row of dY that the current row of dX reads, and its row of the packed filter.
template <typename T>
struct ReadRow {
  const T* dy;
  const Acc<T>* filter;
};

// What a tile needs to know of its row, phase and block.
template <typename T, int N>
struct DepthwiseRow {
  using Lanes = Vec<typename IntOf<Acc<T>>::type, N>;

  const ReadRow<T>* rows;  // of channel 0 and block 0
  int64_t row_count;
  int64_t out;                // size of dY along the row
  int64_t p_per_h, p_per_r;   // of the phase
  int64_t dy_step, tap_step;  // elements between positions of dY, taps of the filter
  int64_t tile_step;          // p_per_h*dy_step: between what neighbours read
  int64_t out_channels;
  T* dx;  // phase position 0 of channel 0
  int64_t dx_step;
  int64_t lanes;  // that are stored

  // Rows to prefetch: position 0 of channel 0 of dY's, null if there is none; how far
  // dX's is from the current one.
  const T* next_dy;
  int64_t next_dx;

  // Of the block: how far on its channels and its filter are, its permutations.
  int64_t dy_at, dx_at, filter_at;
  const Lanes* perm;
};

alignas(64) constexpr unsigned char kZeroLanes[64] = {};

// Keeps the compiler from seeing where a pointer, or an integer, came from. It would turn
// one that takes a step after each use into as many hoisted products as there are uses.
template <typename V>
CONVGRAD_INLINE void Opaque(V& value) {
  asm("" : "+r"(value));
}

// One tap for all positions of a tile: position j reads at q + j*p_per_h, which x points
// to for j = 0. In a border tap some of these are outside of dY; they count as zeros.
template <typename T, int N, int kWidth, bool kShared, bool kBorder>
CONVGRAD_INLINE void AddTap(const T* x, int64_t q, const Acc<T>* filter,
                            const DepthwiseRow<T, N>& c, Vec<Acc<T>, N>* sum) {
  using V = Vec<Acc<T>, N>;
  const int64_t step = c.tile_step;
  const T* zeros = reinterpret_cast<const T*>(kZeroLanes);
  for (int64_t k = 0; k < (kShared ? c.out_channels : 1); ++k) {
    const V w = Load<N>(filter + k * N);
    const T* at = x;
    int64_t position = q;
    CONVGRAD_UNROLL
    for (int j = 0; j < kWidth; ++j) {
      const T* from = at;
      if constexpr (kBorder) {
        if (static_cast<uint64_t>(position) >= static_cast<uint64_t>(c.out)) from = zeros;
        position += c.p_per_h;
        Opaque(position);
      }
      V value = Load<N>(from);
      if constexpr (kShared) value = Permute<Acc<T>, N>(value, c.perm[k]);
      sum[j] += value * w;
      at += step;
      Opaque(at);
    }
  }
}

// Positions [i, i + kWidth) of the phase, taps [t_lo, t_hi); tap 0 of i reads p.
template <typename T, int N, int kWidth, bool kShared>
__attribute__((noinline)) void DepthwiseTile(const DepthwiseRow<T, N>& c, int64_t i,
                                             int64_t p, int64_t t_lo, int64_t t_hi) {
  using A = Acc<T>;
  using V = Vec<A, N>;
  V sum[kWidth] = {};
  T* dx = c.dx + c.dx_at + i * c.dx_step;
  const int64_t span = (kWidth - 1) * c.p_per_h;
  if (c.next_dy != nullptr) {
    const T* next = c.next_dy + c.dy_at + p * c.dy_step;
    CONVGRAD_UNROLL
    for (int j = 0; j < kWidth; ++j) {
      __builtin_prefetch(next, 0);
      next += c.tile_step;
      Opaque(next);
    }
  }
  T* next = dx + c.next_dx;
  CONVGRAD_UNROLL
  for (int j = 0; j < kWidth; ++j) {
    __builtin_prefetch(next, 1);
    next += c.dx_step;
    Opaque(next);
  }
  for (int64_t r = 0; r < c.row_count; ++r) {
    int64_t q = p - t_lo * c.p_per_r;
    const T* x = c.rows[r].dy + c.dy_at + q * c.dy_step;
    const A* filter = c.rows[r].filter + c.filter_at + t_lo * c.tap_step;
    for (int64_t t = t_lo; t < t_hi; ++t) {
      // Even in a border tile most taps are inside for every position.
      if (q >= 0 && q + span < c.out) {
        AddTap<T, N, kWidth, kShared, false>(x, q, filter, c, sum);
      } else if (q < c.out && q + span >= 0) {
        AddTap<T, N, kWidth, kShared, true>(x, q, filter, c, sum);
      }
      q -= c.p_per_r;
      x -= c.p_per_r * c.dy_step;
      filter += c.tap_step;
    }
  }
  if (c.lanes == N) {
    CONVGRAD_UNROLL
    for (int j = 0; j < kWidth; ++j) {
      Store<N>(dx, sum[j]);
      dx += c.dx_step;
      Opaque(dx);
    }
  } else {
    A lanes[kWidth * N];
    CONVGRAD_UNROLL
    for (int j = 0; j < kWidth; ++j) Store<N>(lanes + j * N, sum[j]);
    for (int j = 0; j < kWidth; ++j) {
      for (int64_t l = 0; l < c.lanes; ++l) {
        StoreOne(dx + j * c.dx_step + l, lanes[j * N + l]);
      }
    }
  }
}

// The tiles, widest first, of the vectors in use.
template <typename T, int N>
struct WidthTile {
  int64_t width;
  void (*tile)(const DepthwiseRow<T, N>&, int64_t, int64_t, int64_t, int64_t);
};

template <typename T, int N, int kWidth, bool kShared>
constexpr WidthTile<T, N> kTile = {kWidth, DepthwiseTile<T, N, kWidth, kShared>};

// Fewer widths where they matter less: rare types, narrow vectors, shared groups.
template <typename T, int N, bool kShared>
struct WidthTiles {
  static constexpr WidthTile<T, N> tiles[] = {kTile<T, N, 7, kShared>,
                                              kTile<T, N, 1, kShared>};
};
template <>
struct WidthTiles<float, kLanes<float>, false> {
  static constexpr WidthTile<float, kLanes<float>> tiles[] = {
      kTile < float,
      kLanes<float>,
      kVectorRegisters == 32 ? 14 : 8,
      false >,
      kTile<float, kLanes<float>, 7, false>,
      kTile<float, kLanes<float>, 3, false>,
      kTile<float, kLanes<float>, 1, false>};
};
template <>
struct WidthTiles<BF16, kLanes<float>, false> {
  static constexpr WidthTile<BF16, kLanes<float>> tiles[] = {
      kTile < BF16,
      kLanes<float>,
      kVectorRegisters == 32 ? 14 : 8,
      false >,
      kTile<BF16, kLanes<float>, 7, false>,
      kTile<BF16, kLanes<float>, 3, false>,
      kTile<BF16, kLanes<float>, 1, false>};
};

// The blocks of a task, and how their vectors of dY are permuted.
template <typename T, int N>
struct DepthwiseBlocks {
  const DepthwiseState& state;
  int64_t first, end, block_size;
  typename DepthwiseRow<T, N>::Lanes perm[kMaxSharedGroup];
};

// All positions of a phase in tiles. The blocks are innermost, so that dX is written, and
// dY read, nearly in the order of memory.
template <typename T, int N, bool kShared>
__attribute__((noinline)) void DepthwisePhase(const DepthwiseBlocks<T, N>& blocks,
                                              const Phase& f, DepthwiseRow<T, N>& c) {
  const Problem& problem = blocks.state.args.problem;
  constexpr auto& tiles = WidthTiles<T, N, kShared>::tiles;
  constexpr int kTiles = sizeof(tiles) / sizeof(tiles[0]);
  typename DepthwiseRow<T, N>::Lanes late_perm[kMaxSharedGroup];
  int64_t width = 0;
  for (int64_t start = 0; start < f.h_count; start += width) {
    // The widest tile that fits, or the narrowest one that covers the rest of the row,
    // moved back to end with it.
    int pick = kTiles - 1;
    const int64_t rest = f.h_count - start;
    while (pick > 0 && tiles[pick].width < rest && tiles[pick - 1].width <= f.h_count) {
      --pick;
    }
    width = tiles[pick].width;
    const int64_t i = width <= rest ? start : f.h_count - width;
    const int64_t p = f.p0 + i * f.p_per_h;
    const int64_t least = p - (f.r_count - 1) * f.p_per_r;
    const bool inside = least >= 0 && p + (width - 1) * f.p_per_h < c.out;
    for (int64_t block = blocks.first; block < blocks.end; ++block) {
      const int64_t g = FirstGroup(blocks.state, block);
      c.dx_at = g * problem.dx.group;
      c.dy_at = g * problem.out_channels;
      c.filter_at = block * blocks.block_size;
      if constexpr (kShared) {
        // A full vector is read, so near the last channel it starts earlier.
        const int64_t last = problem.groups * problem.out_channels - N;
        const int64_t early = c.dy_at > last ? c.dy_at - last : 0;
        c.dy_at -= early;
        for (int64_t k = 0; early > 0 && k < problem.out_channels; ++k) {
          late_perm[k] = blocks.perm[k] + static_cast<int32_t>(early);
        }
        c.perm = early > 0 ? late_perm : blocks.perm;
      }
      if (inside || blocks.state.args.nonfinite[block] == 0) {
        tiles[pick].tile(c, i, p, 0, f.r_count);
        continue;
      }
      for (int64_t j = i; j < i + width; ++j) {
        const TapRange taps = ValidTaps(f, c.out, j);
        tiles[kTiles - 1].tile(c, j, f.p0 + j * f.p_per_h, taps.lo, taps.hi);
      }
    }
  }
}

// A task makes some rows of dX, along axis 1, for some blocks of channels.
template <typename T, int N, bool kShared>
void DepthwiseTask(const void* state, int64_t index) {
  using A = Acc<T>;
  const DepthwiseState& s = *static_cast<const DepthwiseState*>(state);
  const CpuArgs& a = s.args;
  const Problem& p = a.problem;
  const int64_t block_task = index % s.block_tasks;
  index /= s.block_tasks;
  const int64_t row_task = index % s.row_tasks;
  index /= s.row_tasks;
  const int64_t h0 = index % p.axis[0].in;
  const int64_t n = index / p.axis[0].in;

  const Phase& f0 = a.phase[0][h0 % a.phase_count[0]];
  const int64_t i0 = h0 / a.phase_count[0];
  const TapRange taps0 = ValidTaps(f0, p.axis[0].out, i0);
  const int64_t p0 = f0.p0 + i0 * f0.p_per_h;
  const int64_t win2 = p.axis[2].win;
  const int64_t tap_size = p.out_channels * N;
  const int64_t block_size = p.axis[0].win * p.axis[1].win * win2 * tap_size;

  ReadRow<T> rows[kMaxFilterRows];
  DepthwiseRow<T, N> c;
  c.rows = rows;
  c.out = p.axis[2].out;
  c.dy_step = p.dy.axis[2];
  c.out_channels = p.out_channels;
  c.lanes = s.block_groups * p.in_channels;

  const int64_t first = block_task * s.task_blocks;
  const int64_t end = first + s.task_blocks < s.blocks ? first + s.task_blocks : s.blocks;
  DepthwiseBlocks<T, N> blocks = {s, first, end, block_size, {}};
  for (int64_t k = 0; kShared && k < p.out_channels; ++k) {
    for (int l = 0; l < N; ++l) {
      const int64_t lane = l < c.lanes ? l / p.in_channels * p.out_channels : 0;
      blocks.perm[k][l] = static_cast<int32_t>(lane + k);
    }
  }

  const T* dy = static_cast<const T*>(a.dy) + n * p.dy.batch;
  const A* filter = static_cast<const A*>(a.filter);
  int64_t fetched = -1;  // row of dY
  const int64_t row_end = (row_task + 1) * s.task_rows;
  for (int64_t h1 = row_task * s.task_rows; h1 < row_end && h1 < p.axis[1].in; ++h1) {
    const Phase& f1 = a.phase[1][h1 % a.phase_count[1]];
    const int64_t i1 = h1 / a.phase_count[1];
    const TapRange taps1 = ValidTaps(f1, p.axis[1].out, i1);
    const int64_t p1 = f1.p0 + i1 * f1.p_per_h;
    int64_t count = 0;
    for (int64_t t0 = taps0.lo; t0 < taps0.hi; ++t0) {
      for (int64_t t1 = taps1.lo; t1 < taps1.hi; ++t1) {
        const int64_t r0 = f0.r0 + t0 * f0.r_step, r1 = f1.r0 + t1 * f1.r_step;
        rows[count++] = {dy + (p0 - t0 * f0.p_per_r) * p.dy.axis[0] +
                             (p1 - t1 * f1.p_per_r) * p.dy.axis[1],
                         filter + (r0 * p.axis[1].win + r1) * win2 * tap_size};
      }
    }
    T* dx =
        static_cast<T*>(a.dx) + n * p.dx.batch + h0 * p.dx.axis[0] + h1 * p.dx.axis[1];
    c.row_count = count;
    // While a row is made, the next one's dX and what that reads first of dY are fetched.
    c.next_dx = 0;
    c.next_dy = nullptr;
    if (h1 + 1 < row_end && h1 + 1 < p.axis[1].in) {
      c.next_dx = p.dx.axis[1];
      const Phase& next = a.phase[1][(h1 + 1) % a.phase_count[1]];
      const int64_t next_i = (h1 + 1) / a.phase_count[1];
      const TapRange taps = ValidTaps(next, p.axis[1].out, next_i);
      const int64_t top = next.p0 + next_i * next.p_per_h - taps.lo * next.p_per_r;
      if (taps.lo < taps.hi && top > fetched && count > 0) {
        fetched = top;
        c.next_dy = dy + (p0 - taps0.lo * f0.p_per_r) * p.dy.axis[0] + top * p.dy.axis[1];
      }
    }
    for (int64_t x = 0; x < a.phase_count[2]; ++x) {
      const Phase& f = a.phase[2][x];
      c.p_per_h = f.p_per_h;
      c.p_per_r = f.p_per_r;
      c.tile_step = f.p_per_h * c.dy_step;
      c.tap_step = f.r_step * tap_size;
      c.dx = dx + f.h0 * p.dx.axis[2];
      c.dx_step = f.h_step * p.dx.axis[2];
      for (int64_t r = 0; r < count; ++r) rows[r].filter += f.r0 * tap_size;
      DepthwisePhase<T, N, kShared>(blocks, f, c);
      c.next_dy = nullptr;
      for (int64_t r = 0; r < count; ++r) rows[r].filter -= f.r0 * tap_size;
    }
    const int64_t first_group = FirstGroup(s, first);
    const int64_t groups = FirstGroup(s, end - 1) + s.block_groups - first_group;
    ApplyEpilogueToBox<T>(a, dx - static_cast<T*>(a.dx) + first_group * p.dx.group,
                          p.axis[2].in, p.dx.axis[2], groups * p.in_channels, 1);
  }
}

template <typename T, int N, bool kShared>
inline void PrepareLanes(const CpuArgs& a, CpuJob* job) {
  constexpr int64_t kEnoughTasks = 192;
  constexpr int64_t kLeastWork = 100000;  // multiply-adds of vectors
  constexpr int64_t kTaskRows = 8;
  const Problem& p = a.problem;
  DepthwiseState s{};
  s.args = a;
  s.lanes = N;
  s.block_groups = N / (p.in_channels > p.out_channels ? p.in_channels : p.out_channels);
  if (s.block_groups > p.groups) s.block_groups = p.groups;
  s.blocks = CeilDiv(p.groups, s.block_groups);
  s.task_blocks = s.blocks;
  s.task_rows = p.axis[1].in < kTaskRows ? p.axis[1].in : kTaskRows;
  const int64_t taps = p.axis[0].win * p.axis[1].win * p.axis[2].win;
  while (true) {
    s.row_tasks = CeilDiv(p.axis[1].in, s.task_rows);
    s.block_tasks = CeilDiv(s.blocks, s.task_blocks);
    const int64_t tasks = p.batch * p.axis[0].in * s.row_tasks * s.block_tasks;
    const int64_t work = s.task_rows * s.task_blocks * p.axis[2].in * p.out_channels *
                         (4 + taps / a.phase_count[2] / a.phase_count[1]);
    if (tasks >= kEnoughTasks || work < 2 * kLeastWork) break;
    if (s.task_blocks > 2) {
      s.task_blocks = CeilDiv(s.task_blocks, 2);
    } else if (s.task_rows > 1) {
      s.task_rows = CeilDiv(s.task_rows, 2);
    } else {
      break;
    }
  }
  // The last block overlaps its predecessor, so they belong in one task.
  if (s.task_blocks == 1 && s.blocks > 1 && p.groups % s.block_groups != 0) {
    s.task_blocks = 2;
  }
  if (s.task_blocks > 1 && s.blocks % s.task_blocks == 1 &&
      p.groups % s.block_groups != 0) {
    s.task_blocks = s.blocks;
  }
  s.block_tasks = CeilDiv(s.blocks, s.task_blocks);
  s.row_tasks = CeilDiv(p.axis[1].in, s.task_rows);
  SetState(job, s);
  job->stages = 2;
  job->stage[0] = {s.blocks, DepthwisePackTask<T>};
  job->stage[1] = {p.batch * p.axis[0].in * s.row_tasks * s.block_tasks,
                   DepthwiseTask<T, N, kShared>};
}

// The widest vectors that the problem can fill; the planner has made sure of one.
template <typename T>
void PrepareDepthwise(const CpuArgs& a, CpuJob* job) {
  using A = Acc<T>;
  const Problem& p = a.problem;
  constexpr int kNative = kLanes<A>;
  if (p.in_channels == 1 && p.out_channels == 1) {
    if (p.groups >= kNative) return PrepareLanes<T, kNative, false>(a, job);
    if constexpr (kNative > 4) {
      if (p.groups >= 4) return PrepareLanes<T, 4, false>(a, job);
    }
    return PrepareLanes<T, 1, false>(a, job);
  }
  // A vector has to hold a whole group.
  constexpr int kWide = kNative < kMaxSharedGroup ? kMaxSharedGroup : kNative;
  if (p.groups * p.out_channels >= kWide) return PrepareLanes<T, kWide, true>(a, job);
  PrepareLanes<T, 4, true>(a, job);
}

}  // namespace
}  // namespace CONVGRAD_ISA
}  // namespace convgrad
