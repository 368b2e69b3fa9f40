// What the planner counts with that only a GPU can tell (docs/cuda.md, "The planner's
// model"). Written by `python -m jax_convgrad calibrate`; a test catches edits.

#pragma once

#include "correction.h"

namespace convgrad {

// clang-format off
constexpr const char* kRatesGpu = "H200 SXM";
constexpr const char* kRatesSource = "estimates: not measured yet";
constexpr double kRatesLaunchUs = 2.5;  // a kernel that does nothing
constexpr double kRatesCopyBytesPerUs = 4.3e6;  // a large copy, read and written

constexpr Correction kCorrections[] = {
    // kernel, operands, factors of arithmetic and memory, measurements of each
    {"direct", Operands::kF64, 1, 1, 0, 0},
    {"direct", Operands::kF32, 1, 1, 0, 0},
    {"direct", Operands::k16Bit, 1, 1, 0, 0},
    {"tiled", Operands::kF64, 1, 1, 0, 0},
    {"tiled", Operands::kF32, 1, 1, 0, 0},
    {"tiled", Operands::k16Bit, 1, 1, 0, 0},
    {"mma", Operands::kTf32, 1, 1, 0, 0},
    {"mma", Operands::k16Bit, 1, 1, 0, 0},
    {"mma_3xtf32", Operands::kF32, 1, 1, 0, 0},
    {"depthwise", Operands::kF64, 1, 1, 0, 0},
    {"depthwise", Operands::kF32, 1, 1, 0, 0},
    {"depthwise", Operands::k16Bit, 1, 1, 0, 0},
    {"few_channels", Operands::kTf32, 1, 1, 0, 0},
    {"few_channels", Operands::k16Bit, 1, 1, 0, 0},
    {"few_channels_3xtf32", Operands::kF32, 1, 1, 0, 0},
    {"grouped", Operands::kF32, 1, 1, 0, 0},
    {"grouped", Operands::kTf32, 1, 1, 0, 0},
    {"grouped", Operands::k16Bit, 1, 1, 0, 0},
    {"wgmma", Operands::kTf32, 1, 1, 0, 0},
    {"wgmma", Operands::k16Bit, 1, 1, 0, 0},
};
// clang-format on

}  // namespace convgrad
