// "tiled": implicit GEMM through shared memory, without tensor cores: exact products for
// f32 and f64, and a plain path for bf16 and f16.
//
// For one group and one phase (phase.h; i and t count positions and taps of the phase),
//
//   dX[m, c] = sum over t, k  dY[m - t, k] * W[t][k, c],      m = (n, i0, i1, i2)
//
// is a product of M x (taps*K) and (taps*K) x C whose left matrix is read in place: row
// m, tap t is the pixel p(i) - t*p_per_r of dY, and its channels are the columns. All
// phases and all groups run in one launch.
//
// Tiling. A block computes kM rows by kN channels and walks through the taps, and for
// each tap through K in slices of kK. A slice of dY and one of W are fetched into
// registers while the slice before is multiplied out of shared memory, where there is
// room for two: one barrier a slice. A thread holds kThreadM x kThreadN sums.
//
// Taps that see nothing but padding from every row of the tile are left out. Rows for
// which only this tap falls outside dY are filled with zeros, and 0*W adds nothing
// unless W is infinite or NaN. Such a W must still not reach those rows, so every thread
// tests what it fetches of W, the barrier that publishes a slice also combines the
// verdicts, and a slice with a non-finite W is multiplied row by row under a mask. The
// test costs about one instruction in a hundred; masking always would cost far more.
//
// Limits: any Problem with fewer than 2^31 tiles whose images can each be addressed by
// 32-bit indices (the host launches part after part of the batch). Worth it only where C
// and K fill a good part of kN and kK. Fetches are scalar, so that any stride, size and
// alignment will do.

#pragma once

#include "epilogue.cuh"
#include "geometry.cuh"
#include "tiles.cuh"

namespace convgrad {

// Shared memory holds accumulators, so the tile depends on their size only.
template <typename Acc>
struct TileShape;
template <>
struct TileShape<float> {
  static constexpr int kM = 128, kN = 64, kK = 8;
  static constexpr int kThreadM = 8, kThreadN = 8;
};
template <>
struct TileShape<double> {
  static constexpr int kM = 64, kN = 64, kK = 8;
  static constexpr int kThreadM = 4, kThreadN = 8;
};

template <typename Acc>
struct Tile : TileShape<Acc> {
  using Shape = TileShape<Acc>;
  using Shape::kK, Shape::kM, Shape::kN, Shape::kThreadM, Shape::kThreadN;
  static constexpr int kThreads = (kM / kThreadM) * (kN / kThreadN);
  static constexpr int kFetchesM = kM * kK / kThreads;  // of dY, by each thread
  static constexpr int kFetchesN = kN * kK / kThreads;  // of W
  // Shared memory is read 16 bytes at a time. One such vector pads each slice row, so
  // that writing along k does not hit a single bank.
  static constexpr int kVector = 16 / static_cast<int>(sizeof(Acc));
  static constexpr int kPitchM = kM + kVector;
  static constexpr int kPitchN = kN + kVector;
  // A thread's rows (channels) are kThreadM / kVector vectors this far apart, which
  // makes the vectors that a warp reads adjacent.
  static constexpr int kSpreadM = kM / (kThreadM / kVector);
  static constexpr int kSpreadN = kN / (kThreadN / kVector);

  static constexpr int kSharedBytes =
      2 * kK * (kPitchM + kPitchN) * static_cast<int>(sizeof(Acc));  // the slices

  static_assert(kThreadM % kVector == 0 && kThreadN % kVector == 0,
                "a thread reads whole vectors");
  static_assert(kThreads % kM == 0 && kThreads % kN == 0 && kThreads % kK == 0,
                "fetching along any dimension keeps every thread in its row or column");
  static_assert(kM * kK % kThreads == 0 && kN * kK % kThreads == 0,
                "threads share the fetches evenly");
  static_assert(kFetchesM <= 32 && kThreadM <= 32, "row masks have 32 bits");
};

// Blocks that a multiprocessor should hold. Three leave 168 registers to a thread, which
// 64-bit sums would spill.
template <typename Acc>
constexpr int kTiledMinBlocks = sizeof(Acc) == 4 ? 3 : 2;

// Counts beyond a channel dimension that a block may form but never reads.
constexpr int kTiledSlack = 64;
static_assert(Tile<float>::kN <= kTiledSlack && Tile<double>::kN <= kTiledSlack &&
                  Tile<float>::kK <= kTiledSlack && Tile<double>::kK <= kTiledSlack,
              "offsets are formed up to the end of a tile");

// How the threads of a block share the fetches of a slice, which is `width` rows or
// channels (x) by kK: consecutive threads along k or along x, whichever is contiguous
// in memory. These are the steps from one fetch of a thread to its next. They come as
// parameters, since operands from constant memory cost no registers.
struct FetchSteps {
  bool along_k;
  int x, k;
  int slice;  // in the slice in shared memory
};

template <typename Acc>
FetchSteps MakeFetchSteps(bool along_k, int width, int pitch) {
  using S = Tile<Acc>;
  const int x = along_k ? S::kThreads / S::kK : 0;
  const int k = along_k ? 0 : S::kThreads / width;
  return {along_k, x, k, k * pitch + x};
}

struct TiledParams {
  Geometry<int32_t> geometry;
  TileGrid grid;
  FetchSteps dy_step, w_step;
  int32_t dy_per_fetch;  // the step along k, in dY
  int32_t w_per_fetch;   // both steps, in W
  bool vector_store;     // dX takes aligned vectors of kVector channels
  Epilogue epilogue;
};

template <typename Acc>
struct alignas(16) Vector {
  Acc element[Tile<Acc>::kVector];
};

// Adds the product of two slices to a thread's sums. Bit i of `rows` allows row i, if
// kMasked.
template <bool kMasked, typename Acc>
__device__ __forceinline__ void Multiply(
    const Acc (&dy)[Tile<Acc>::kK][Tile<Acc>::kPitchM],
    const Acc (&w)[Tile<Acc>::kK][Tile<Acc>::kPitchN], int m, int n, unsigned rows,
    Acc (&sum)[Tile<Acc>::kThreadM][Tile<Acc>::kThreadN]) {
  using S = Tile<Acc>;
#pragma unroll(kMasked ? 1 : S::kK)
  for (int k = 0; k < S::kK; ++k) {
    Vector<Acc> a[S::kThreadM / S::kVector], b[S::kThreadN / S::kVector];
#pragma unroll
    for (int v = 0; v < S::kThreadM / S::kVector; ++v) {
      a[v] = reinterpret_cast<const Vector<Acc>&>(dy[k][m + v * S::kSpreadM]);
    }
#pragma unroll
    for (int v = 0; v < S::kThreadN / S::kVector; ++v) {
      b[v] = reinterpret_cast<const Vector<Acc>&>(w[k][n + v * S::kSpreadN]);
    }
#pragma unroll
    for (int i = 0; i < S::kThreadM; ++i) {
      if (kMasked && (rows >> i & 1) == 0) continue;
#pragma unroll
      for (int j = 0; j < S::kThreadN; ++j) {
        sum[i][j] += a[i / S::kVector].element[i % S::kVector] *
                     b[j / S::kVector].element[j % S::kVector];
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(Tile<Accumulator<T>>::kThreads,
                                  kTiledMinBlocks<Accumulator<T>>)
    TiledKernel(const __grid_constant__ TiledParams params, const T* __restrict__ dy,
                const T* __restrict__ w, T* __restrict__ dx) {
  using Acc = Accumulator<T>;
  using S = Tile<Acc>;
  alignas(16) __shared__ Acc dy_slices[2][S::kK][S::kPitchM];
  alignas(16) __shared__ Acc w_slices[2][S::kK][S::kPitchN];
  // Needed rarely, so not worth their registers.
  __shared__ TileRow<int32_t> rows[S::kM];
  __shared__ TapSpan<int32_t> spans[kAxes];
  static_assert(
      sizeof(dy_slices) + sizeof(w_slices) + sizeof(rows) + sizeof(spans) <= 48 * 1024,
      "static shared memory ends at 48 KiB");

  const Geometry<int32_t>& g = params.geometry;
  const int thread = static_cast<int>(threadIdx.x);

  const TilePlace<int32_t> at = PlaceTile(g, params.grid, blockIdx.x);
  if (at.m0 >= at.row_count) return;
  for (int r = thread; r < S::kM; r += S::kThreads) {
    rows[r] = MakeTileRow(g, at, at.m0 + r);
  }
  __syncthreads();
  const int32_t taps = FindLiveTaps(g, at, rows, S::kM, thread == 0, spans);
  __syncthreads();
  const int32_t slices_per_tap = (g.out_channels + S::kK - 1) / S::kK;
  const int32_t slices = taps * slices_per_tap;

  // This thread's first fetches of a slice, and their offsets for tap zero and k = 0.
  const FetchSteps& dy_step = params.dy_step;
  const FetchSteps& w_step = params.w_step;
  const int dy_x = dy_step.along_k ? thread / S::kK : thread % S::kM;
  const int dy_k = dy_step.along_k ? thread % S::kK : thread / S::kM;
  const int w_x = w_step.along_k ? thread / S::kK : thread % S::kN;
  const int w_k = w_step.along_k ? thread % S::kK : thread / S::kN;
  const int32_t dy_from = dy_k * g.dy_channel;  // a row's own offset stays in `rows`
  const int32_t w_from =
      at.group * g.w_group + (at.c0 + w_x) * g.w_in_channel + w_k * g.w_out_channel;
  unsigned w_inside = 0;  // bit j: fetch j of W is a channel that exists
#pragma unroll
  for (int j = 0; j < S::kFetchesN; ++j) {
    w_inside |= static_cast<unsigned>(at.c0 + w_x + j * w_step.x < g.in_channels) << j;
  }

  // How far back on each axis, and how far along the filter, live tap number `tap` is.
  int32_t shift[kAxes];
  const auto locate_tap = [&](int32_t tap) {
    int32_t w_tap = 0;
#pragma unroll
    for (int a = kAxes - 1; a >= 0; --a) {
      const AxisGeometry<int32_t>& axis = g.axis[a];
      const int32_t t = tap % spans[a].count;
      tap /= spans[a].count;
      shift[a] = spans[a].shift + t * axis.p_per_r.divisor;
      w_tap += (spans[a].r + t * axis.r_step) * axis.w_stride;
    }
    return w_tap;
  };

  // The slice being fetched.
  int32_t tap = -1, k0 = 0, dy_slice = 0, w_slice = 0;
  unsigned dy_inside = 0;  // bit j: fetch j of dY is inside for this tap
  Acc dy_fetched[S::kFetchesM], w_fetched[S::kFetchesN];

  const auto fetch = [&] {
    k0 += S::kK;
    if (tap < 0 || k0 >= g.out_channels) {
      k0 = 0;
      w_slice = locate_tap(++tap);
      dy_slice = 0;
#pragma unroll
      for (int a = 0; a < kAxes; ++a) dy_slice -= shift[a] * g.axis[a].dy_stride;
      dy_inside = 0;
#pragma unroll
      for (int j = 0; j < S::kFetchesM; ++j) {
        const bool inside = Reaches(g, rows[dy_x + j * dy_step.x], shift);
        dy_inside |= static_cast<unsigned>(inside) << j;
      }
    } else {
      dy_slice += S::kK * g.dy_channel;
      w_slice += S::kK * g.w_out_channel;
    }
    const int32_t k_left = g.out_channels - k0;
#pragma unroll
    for (int j = 0; j < S::kFetchesM; ++j) {
      const bool inside = (dy_inside >> j & 1) && dy_k + j * dy_step.k < k_left;
      const int32_t from =
          rows[dy_x + j * dy_step.x].dy + dy_from + dy_slice + j * params.dy_per_fetch;
      dy_fetched[j] = inside ? Widen(dy[from]) : Acc{0};
    }
#pragma unroll
    for (int j = 0; j < S::kFetchesN; ++j) {
      const bool inside = (w_inside >> j & 1) && w_k + j * w_step.k < k_left;
      const int32_t from = w_from + w_slice + j * params.w_per_fetch;
      w_fetched[j] = inside ? Widen(w[from]) : Acc{0};
    }
  };

  // Returns whether a fetched W is not finite: v - v is then NaN.
  const auto publish = [&](int buffer) {
    Acc* const dy_to = &dy_slices[buffer][dy_k][dy_x];
    Acc* const w_to = &w_slices[buffer][w_k][w_x];
#pragma unroll
    for (int j = 0; j < S::kFetchesM; ++j) dy_to[j * dy_step.slice] = dy_fetched[j];
    bool special = false;
#pragma unroll
    for (int j = 0; j < S::kFetchesN; ++j) {
      w_to[j * w_step.slice] = w_fetched[j];
      special = special || !(w_fetched[j] - w_fetched[j] == Acc{0});
    }
    return special;
  };

  constexpr int kAcross = S::kN / S::kThreadN;  // threads along the channels
  const int n = thread % kAcross * S::kVector;
  const int m = thread / kAcross * S::kVector;
  const auto row_of = [m](int i) {
    return m + i / S::kVector * S::kSpreadM + i % S::kVector;
  };

  Acc sum[S::kThreadM][S::kThreadN] = {};
  bool special = false;
  if (slices > 0) {
    fetch();
    special = publish(0);
  }
  for (int32_t slice = 0; slice < slices; ++slice) {
    const int buffer = static_cast<int>(slice & 1);
    // Publishes this slice. It also means that nobody still reads the one before, so
    // that the other buffer is free.
    const bool masked = __syncthreads_or(special) != 0;
    const bool more = slice + 1 < slices;
    if (more) fetch();
    if (!masked) {
      Multiply<false>(dy_slices[buffer], w_slices[buffer], m, n, 0, sum);
    } else {
      // `fetch` may be at the next tap already; its `shift` is not needed any more.
      locate_tap(slice / slices_per_tap);
      unsigned inside = 0;
#pragma unroll
      for (int i = 0; i < S::kThreadM; ++i) {
        inside |= static_cast<unsigned>(Reaches(g, rows[row_of(i)], shift)) << i;
      }
      Multiply<true>(dy_slices[buffer], w_slices[buffer], m, n, inside, sum);
    }
    if (more) special = publish(buffer ^ 1);
  }

#pragma unroll
  for (int i = 0; i < S::kThreadM; ++i) {
    if (at.m0 + row_of(i) >= at.row_count) continue;
    const int32_t dx_row = rows[row_of(i)].dx;
#pragma unroll
    for (int v = 0; v < S::kThreadN / S::kVector; ++v) {
      Adjacent<T, S::kVector> packed;
#pragma unroll
      for (int j = 0; j < S::kVector; ++j) {
        packed.element[j] = Narrow(sum[i][v * S::kVector + j], T{});
      }
      const int32_t c = at.c0 + n + v * S::kSpreadN;
      if (params.vector_store && c + S::kVector <= g.in_channels) {
        ApplyEpilogue(params.epilogue, packed.element, dx_row + c);
        *reinterpret_cast<decltype(packed)*>(dx + dx_row + c) = packed;
      } else {
#pragma unroll
        for (int j = 0; j < S::kVector; ++j) {
          if (c + j < g.in_channels) {
            const int32_t dx_at = dx_row + (c + j) * g.dx_channel;
            dx[dx_at] = ApplyEpilogue(params.epilogue, packed.element[j], dx_at);
          }
        }
      }
    }
  }
}

template <typename T>
cudaError_t EnqueueTiled(cudaStream_t stream, const Problem& problem, const T* dy,
                         const T* w, T* dx, const Epilogue& epilogue) {
  using Acc = Accumulator<T>;
  using S = Tile<Acc>;
  static_assert(sizeof(TiledParams) + 3 * sizeof(void*) <= kMaxParameterBytes,
                "the kernel's parameters must fit in constant memory's 4 KiB");
  TiledParams params{};
  params.geometry = MakeGeometry<int32_t>(problem);
  params.grid = MakeTileGrid(problem, S::kM, S::kN);
  params.epilogue = epilogue;
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(dx) |
                              reinterpret_cast<uintptr_t>(epilogue.residual) |
                              reinterpret_cast<uintptr_t>(epilogue.relu);
  params.vector_store = problem.dx.channel == 1 && problem.dx.batch % S::kVector == 0 &&
                        problem.dx.group % S::kVector == 0 &&
                        addresses % (S::kVector * sizeof(T)) == 0;
  bool dy_along_k = true;
  for (int i = 0; i < kAxes; ++i) {
    if (problem.axis[i].out > 1 &&
        std::llabs(problem.dy.axis[i]) < std::llabs(problem.dy.channel)) {
      dy_along_k = false;
    }
    if (problem.dx.axis[i] % S::kVector != 0) params.vector_store = false;
  }
  params.dy_step = MakeFetchSteps<Acc>(dy_along_k, S::kM, S::kPitchM);
  params.w_step = MakeFetchSteps<Acc>(
      std::llabs(problem.w.out_channel) < std::llabs(problem.w.in_channel), S::kN,
      S::kPitchN);
  params.dy_per_fetch =
      static_cast<int32_t>(params.dy_step.k) * params.geometry.dy_channel;
  params.w_per_fetch =
      static_cast<int32_t>(params.w_step.x) * params.geometry.w_in_channel +
      static_cast<int32_t>(params.w_step.k) * params.geometry.w_out_channel;
  return CU_LAUNCH((TiledKernel<T>), dim3(params.grid.total), dim3(S::kThreads), 0,
                   stream, params, dy, w, dx);
}

}  // namespace convgrad
