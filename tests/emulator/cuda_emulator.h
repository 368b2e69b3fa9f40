// Runs CUDA sources on the CPU: what csrc/cuda/platform.cuh and primitives.cuh expect
// from a host compiler (g++ or clang, C++17), which reads the same files as nvcc.
//
// Every thread of a block is a fibre with a stack of its own (fiber.h). A barrier or a
// warp's collective suspends it until the others have arrived (block.h, warp.h), so that
// the order of everything else is free: natural, reversed or shuffled. Blocks run one at
// a time on each of the processor's threads.
//
// What CUDA leaves undefined is an error here, where it can be seen: the launch prints it
// and returns cudaErrorLaunchFailure with the same text.
//   - a barrier that part of a block reaches, lanes of a warp at different collectives,
//     a deadlock, a shuffle from a lane that takes no part;
//   - misaligned or oversized operands of ldmatrix and cp.async;
//   - tensor maps that the driver would not encode; copies of TMA that nobody
//     waited for, bytes that a barrier was told of and that never came; products of a
//     warpgroup without their fence, or of operands that differ between its warps;
//   - products of a warpgroup that read what a thread stored in shared memory, by itself
//     or by cp.async, without that thread's fence for the async proxy in between;
//   - a read of shared memory that was never written gives NaN;
//   - out-of-bounds accesses under AddressSanitizer (dynamic shared memory has its exact
//     size), misaligned vectors under UndefinedBehaviorSanitizer, and missing barriers
//     under ThreadSanitizer, to which two threads are ordered by barriers alone.
// Not seen: races between blocks, an overflow from one static shared array of a template
// into another (GCC gives those no red zones), and whatever depends on the hardware's
// time.
//
// Environment, read at every launch:
// - CUDA_EMULATOR_ORDER: 0 natural (the default), 1 reversed, n shuffled by seed n
// - CUDA_EMULATOR_EAGER: 1 for copies and products that happen when they are issued, else
//   when they are waited for; those of TMA when nothing else can happen
// - CUDA_EMULATOR_POISON: the byte that memory holds before it is written (255: NaNs)
// - CUDA_EMULATOR_SHARED: the bytes of shared memory that a block may have
// - CUDA_EMULATOR_THREADS: blocks in flight; always one under a sanitizer

#pragma once

#include "cuda_emulator/block.h"
#include "cuda_emulator/copy.h"
#include "cuda_emulator/language.h"
#include "cuda_emulator/launch.h"
#include "cuda_emulator/matrix.h"
#include "cuda_emulator/mbarrier.h"
#include "cuda_emulator/numbers.h"
#include "cuda_emulator/runtime.h"
#include "cuda_emulator/tensor_map.h"
#include "cuda_emulator/tma.h"
#include "cuda_emulator/warp.h"
#include "cuda_emulator/wgmma.h"
