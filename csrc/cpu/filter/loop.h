// Nested loops over the positions that a chunk of the filter gradient sums over.

#pragma once

#include "chunk.h"

namespace convgrad {
namespace CONVGRAD_ISA {
namespace {

// Nested loops over images and positions, and how far apart both operands' are.
struct Loop {
  int64_t count[1 + kAxes], x_step[1 + kAxes], y_step[1 + kAxes];
};

// Makes long inner loops of those that walk memory as one would.
CONVGRAD_INLINE void Flatten(Loop* loop) {
  int to = kAxes;
  for (int from = kAxes - 1; from >= 0; --from) {
    if (loop->count[from] == 1) continue;
    if (loop->x_step[from] == loop->count[to] * loop->x_step[to] &&
        loop->y_step[from] == loop->count[to] * loop->y_step[to]) {
      loop->count[to] *= loop->count[from];
      continue;
    }
    if (loop->count[to] > 1) --to;
    loop->count[to] = loop->count[from];
    loop->x_step[to] = loop->x_step[from];
    loop->y_step[to] = loop->y_step[from];
  }
  while (to-- > 0) loop->count[to] = 1;
}

}  // namespace
}  // namespace CONVGRAD_ISA
}  // namespace convgrad
