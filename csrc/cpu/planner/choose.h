// Which kernel of the table computes a problem fastest.

#pragma once

#include "kernel_table.h"

namespace convgrad {

struct Chosen {
  Kernel kernel;
  const char* name;  // as the user sees it, by which it is chosen again
};

// Chooses among the kernels that take the problem: the fastest, by "auto", or the one of
// that name. Returns false if there is none.
bool Choose(const Problem& p, const char* name, Chosen* chosen);

// Whether the gemm kernel clears dX before it visits the phases that a tap reaches.
bool ClearsFirst(const Problem& p);

}  // namespace convgrad
