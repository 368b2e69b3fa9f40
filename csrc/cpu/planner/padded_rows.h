// Problems of few out channels whose rows of dY are padded: read as if the padding were
// there, they let taps be merged into channels.
//
// The sum of one tap is then 1 to 8 products long, and one of a row of taps, which reads
// a run of memory if dY lies channels-last and nothing along the row is padding, many
// times that (MergeTaps in canonical.h). So a first layer of a net, whose forward pass is
// read as an input gradient, copies its small filter, and its few channels once, zeros
// included, channels-last. Where they already lie so, gemm's strips read them in place
// and copy only what the register tiles at a row's ends read (gemm_strips.h).
//
// A padding zero times an infinity is no zero: with such a filter the problem is computed
// as it is. Not for 16-bit types, which gemm packs anyway.

#pragma once

#include "../../kernel.h"

namespace convgrad {

struct PaddedRows {
  bool serves;      // whether the problem is one of those
  Problem problem;  // of the copies, its taps merged

  // Whether dY is read where it is, and which elements of a padded row are its own.
  bool in_place;
  int64_t row_first, row_end;

  int64_t w_at;  // where the filter of `problem` begins in its copy, in elements
  int64_t dy_bytes, filter_bytes;  // of the copies, each a multiple of 64
};

// Of a canonical problem.
PaddedRows PadRows(const Problem& problem);

// For problems that differ from a given one in batch and positions alone: bytes of all
// but the copy of dY at most, and for each of its positions.
WorkspaceBound BoundPaddedRows(const Problem& problem);

// Makes both copies, dY's at `to` and the filter's behind it. Returns false if the filter
// has an infinity or a NaN.
bool PackPaddedRows(const Problem& problem, const PaddedRows& padded, const void* dy,
                    const void* w, void* to, const ParallelFor& parallel_for);

}  // namespace convgrad
