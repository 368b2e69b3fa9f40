#include "padded_rows.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "../job.h"
#include "canonical.h"

namespace convgrad {
namespace {

constexpr int kRow = kAxes - 1;

// A row's copy is at most so many times as long: padding may be as large as 2^31.
constexpr int64_t kTimesRow = 2;

bool HasChannelsToPad(const Problem& p) {
  constexpr int64_t kMostChannels = 8;   // more are long sums without it
  constexpr int64_t kLeastResults = 16;  // fewer do not pay for the copies
  return p.dtype != DType::kF16 && p.dtype != DType::kBF16 && p.groups == 1 &&
         p.out_channels <= kMostChannels && p.in_channels >= kLeastResults;
}

// Whether an image has so few results that copying the filter outweighs its products, as
// where a window is as large as the image.
bool HasLargeFilter(const Problem& p) {
  constexpr int64_t kTapsForEach = 16;
  return Taps(p) > kTapsForEach * p.axis[0].in * p.axis[1].in * p.axis[kRow].in;
}

int64_t Aligned(int64_t bytes) { return CeilDiv(bytes, 64) * 64; }

// Zeros in front of dY along a row, or less than nothing where it is cropped.
int64_t Before(const Axis& row) { return row.win - 1 - row.pad_lo; }

// One row of dY, at channels-last places.
template <typename T>
void PackRow(const Problem& p, int64_t columns, const T* from, T* to) {
  const Axis& row = p.axis[kRow];
  const int64_t channels = p.out_channels;
  const int64_t before = std::max<int64_t>(0, Before(row));
  const int64_t first = std::max<int64_t>(0, -Before(row));
  const int64_t count = std::max<int64_t>(0, std::min(row.out - first, columns - before));
  const auto clear = [&](int64_t at, int64_t end) {
    if (end > at) std::fill(to + at * channels, to + end * channels, T{0});
  };
  clear(0, std::min(before, columns));
  clear(before + count, columns);
  if (count == 0) return;
  from += first * p.dy.axis[kRow];
  to += before * channels;
  if (p.dy.channel == 1 && p.dy.axis[kRow] == channels) {
    std::memcpy(to, from, static_cast<size_t>(count * channels) * sizeof(T));
    return;
  }
  for (int64_t k = 0; k < channels; ++k) {
    const T* of_channel = from + k * p.dy.channel;
    for (int64_t i = 0; i < count; ++i) {
      to[i * channels + k] = of_channel[i * p.dy.axis[kRow]];
    }
  }
}

// The filter as [r0][r1][r2 backwards][k][c]. Returns whether all of it is finite.
template <typename T>
bool PackFilter(const Problem& p, const T* from, T* to, const ParallelFor& parallel_for) {
  constexpr int64_t kElementsOfTask = 1 << 16, kChecks = 8;
  const int64_t taps_of_row = p.axis[kRow].win, taps = Taps(p);
  const int64_t of_tap = p.out_channels * p.in_channels;
  const int64_t tasks =
      std::clamp<int64_t>(taps * of_tap / kElementsOfTask, 1, std::max<int64_t>(taps, 1));
  std::atomic<bool> finite{true};
  parallel_for(tasks, [&](int64_t task) {
    T check[kChecks] = {};  // several, since each sum waits for the one before
    for (int64_t tap = taps * task / tasks; tap < taps * (task + 1) / tasks; ++tap) {
      const int64_t r2 = taps_of_row - 1 - tap % taps_of_row;
      const int64_t r1 = tap / taps_of_row % p.axis[1].win;
      const int64_t r0 = tap / taps_of_row / p.axis[1].win;
      T* out = to + tap * of_tap;
      for (int64_t k = 0; k < p.out_channels; ++k) {
        const T* row = from + r0 * p.w.axis[0] + r1 * p.w.axis[1] + r2 * p.w.axis[kRow] +
                       k * p.w.out_channel;
        int64_t c = 0;
        if (p.w.in_channel == 1) {
          for (; c + kChecks <= p.in_channels; c += kChecks) {
            T values[kChecks];
            std::memcpy(values, row + c, sizeof(values));
            for (int64_t i = 0; i < kChecks; ++i) check[i] += values[i] * T{0};
            std::memcpy(out + c, values, sizeof(values));
          }
        }
        for (; c < p.in_channels; ++c) {
          out[c] = row[c * p.w.in_channel];
          check[0] += out[c] * T{0};
        }
        out += p.in_channels;
      }
    }
    T sum = 0;
    for (const T value : check) sum += value;
    if (sum != 0) finite.store(false, std::memory_order_relaxed);
  });
  return finite.load(std::memory_order_relaxed);
}

template <typename T>
bool Pack(const Problem& p, const PaddedRows& padded, const T* dy, const T* w, T* to,
          const ParallelFor& parallel_for) {
  T* const filter = to + padded.dy_bytes / static_cast<int64_t>(sizeof(T));
  if (!PackFilter(p, w, filter, parallel_for)) return false;
  if (padded.in_place) return true;
  constexpr int64_t kRowsOfTask = 16;
  const Axis* const x = p.axis;
  const int64_t columns = (x[kRow].in - 1) * x[kRow].lhs_dilation + x[kRow].win;
  const int64_t rows = p.batch * x[0].out * x[1].out;
  parallel_for(CeilDiv(rows, kRowsOfTask), [&](int64_t task) {
    const int64_t end = std::min(rows, (task + 1) * kRowsOfTask);
    for (int64_t row = task * kRowsOfTask; row < end; ++row) {
      const int64_t p1 = row % x[1].out, p0 = row / x[1].out % x[0].out;
      const int64_t n = row / x[1].out / x[0].out;
      PackRow(p, columns, dy + n * p.dy.batch + p0 * p.dy.axis[0] + p1 * p.dy.axis[1],
              to + row * columns * p.out_channels);
    }
  });
  return true;
}

// Whether strips can read dY where it is, rows of `merged` being those of `given` with
// padding around them.
bool ReadsInPlace(const Problem& given, const Problem& merged) {
  const int64_t taps = Taps(merged), depth = merged.out_channels;
  const int64_t of_tile = (kMostStripRows - 1) * merged.dy.axis[kRow] + depth;
  const bool all_cropped = Before(given.axis[kRow]) + given.axis[kRow].out <= 0;
  return given.dy.channel == 1 && given.dy.axis[kRow] == given.out_channels &&
         !all_cropped && merged.axis[kRow].in >= kMostStripRows && taps <= kStripTaps &&
         taps * of_tile <= kStripTileElements;
}

}  // namespace

PaddedRows PadRows(const Problem& given) {
  PaddedRows padded{};
  const Axis& row = given.axis[kRow];
  if (!HasChannelsToPad(given) || row.win < 2 || row.stride != 1 ||
      row.rhs_dilation != 1 || given.batch == 0 || row.in == 0 ||
      given.axis[0].out * given.axis[1].out * row.out == 0) {
    return padded;
  }
  const int64_t columns = (row.in - 1) * row.lhs_dilation + row.win;
  if (columns > kTimesRow * row.out || HasLargeFilter(given)) return padded;
  Problem& p = padded.problem = given;
  const int64_t bytes = AccBytes(given);
  p.axis[kRow].out = columns;
  p.axis[kRow].pad_lo = row.win - 1;
  p.dy.channel = 1;
  p.dy.axis[kRow] = p.out_channels;
  p.dy.axis[1] = columns * p.dy.axis[kRow];
  p.dy.axis[0] = p.axis[1].out * p.dy.axis[1];
  p.dy.batch = p.axis[0].out * p.dy.axis[0];
  p.w.in_channel = 1;
  p.w.out_channel = p.in_channels;
  p.w.axis[kRow] = -p.out_channels * p.in_channels;
  p.w.axis[1] = -row.win * p.w.axis[kRow];
  p.w.axis[0] = p.axis[1].win * p.w.axis[1];
  padded.w_at = (1 - row.win) * p.w.axis[kRow];
  padded.dy_bytes = Aligned(p.batch * p.dy.batch * bytes);
  padded.filter_bytes = Aligned(p.axis[0].win * p.w.axis[0] * bytes);
  MergeTaps(kRow, &p, &padded.w_at);
  padded.serves = p.axis[kRow].win == 1;
  if (padded.serves && ReadsInPlace(given, p)) {
    padded.in_place = true;
    padded.row_first = Before(row) * given.out_channels;
    padded.row_end = padded.row_first + row.out * given.out_channels;
    padded.dy_bytes = 0;
    p.dy.axis[1] = given.dy.axis[1];
    p.dy.axis[0] = given.dy.axis[0];
    p.dy.batch = given.dy.batch;
  }
  return padded;
}

WorkspaceBound BoundPaddedRows(const Problem& p) {
  if (!HasChannelsToPad(p)) return {};
  // The filter's copy, what gemm packs of it, whole panels of in channels, and by the
  // merged channels its zeros and what it notes about the filter.
  const int64_t channels = p.out_channels * Taps(p);
  const int64_t panels = CeilDiv(p.in_channels, kMaxPanelColumns) * kMaxPanelColumns;
  const int64_t bytes = 2 * Aligned(channels * panels * AccBytes(p)) +
                        Aligned(channels * AccBytes(p)) + Aligned(channels * panels);
  return {bytes + 64, kTimesRow * p.out_channels * AccBytes(p)};
}

bool PackPaddedRows(const Problem& problem, const PaddedRows& padded, const void* dy,
                    const void* w, void* to, const ParallelFor& parallel_for) {
  if (problem.dtype == DType::kF64) {
    return Pack(problem, padded, static_cast<const double*>(dy),
                static_cast<const double*>(w), static_cast<double*>(to), parallel_for);
  }
  return Pack(problem, padded, static_cast<const float*>(dy),
              static_cast<const float*>(w), static_cast<float*>(to), parallel_for);
}

}  // namespace convgrad
