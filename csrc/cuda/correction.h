// What the planner's models are corrected by. The numbers are in rates.h.

#pragma once

namespace convgrad {

// What a kernel multiplies: float32 as it is, or rounded to TF32.
enum class Operands { kF64, kF32, kTf32, k16Bit };

// Factors of what a kernel's model gives to arithmetic and to the traffic of device
// memory, and how many measurements each of them fits: those of none are 1, an estimate.
struct Correction {
  const char* kernel;
  Operands operands;
  double arithmetic, memory;
  int arithmetic_rows, memory_rows;
};

}  // namespace convgrad
