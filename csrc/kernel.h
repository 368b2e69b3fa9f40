// The contract between ffi.cc, which knows XLA and Python, and the kernels,
// which know neither. Plain structs, sizes in elements unless a name says bytes.
//
// What is computed (docs/mathematics.md), for every image n, group g, input
// channel c of the group and input position h:
//
//   dX[n,g,c,h] = sum over k, r  dY[n,g,k,p] * W[g,k,c,r]
//   where, on every spatial axis,  h*lhs_dilation = p*stride - pad_lo + r*rhs_dilation
//   has a solution 0 <= p < out.

#pragma once

#include <cstdint>
#include <functional>

namespace convgrad {

enum class DType : int32_t { kF64, kF32, kBF16, kF16 };

constexpr int64_t SizeInBytes(DType t) {
  return t == DType::kF64 ? 8 : t == DType::kF32 ? 4 : 2;
}

// Every problem has three spatial axes; the leading ones of a 1-D or 2-D
// convolution have size one, stride one and no padding.
constexpr int kAxes = 3;

struct Axis {
  int64_t in = 1;   // size of x along this axis
  int64_t out = 1;  // size of y
  int64_t win = 1;  // taps of the filter
  int64_t stride = 1, lhs_dilation = 1, rhs_dilation = 1;
  int64_t pad_lo = 0;  // either sign
};

// Element strides, so that every layout and both kinds of group are the same
// code: with batch groups, `group` is a stride over slices of the batch.
struct ActivationStrides {
  int64_t batch, group, channel, axis[kAxes];
};
struct FilterStrides {
  int64_t group, out_channel, in_channel;
  int64_t axis[kAxes];  // negative on a CPU where a forward convolution is read backwards
};

struct Problem {
  DType dtype;           // of dY, W and dX alike; f16 and bf16 accumulate in f32
  bool allow_tf32;       // CUDA only: precision DEFAULT and HIGH
  int64_t batch;         // images per batch group
  int64_t groups;        // feature groups or batch groups, 1 if none
  int64_t in_channels;   // C of one group
  int64_t out_channels;  // K of one group
  Axis axis[kAxes];
  ActivationStrides dx, dy;
  FilterStrides w;
  // Bytes of workspace that the caller has. A plan wants no more where any does with it;
  // no bound while a program is lowered.
  int64_t workspace_limit = INT64_MAX;
};

// What the planner's model of a CUDA kernel adds up, before a measurement corrects it
// (cuda/kernel_table.h). Arithmetic, whatever unit of a multiprocessor it keeps busy, and
// the traffic of device memory hide behind each other.
struct Cost {
  double launches;  // of kernels, one after the other
  double fixed_us;  // what nothing hides: starts, sums of partial sums
  double arithmetic_us, memory_us;
  double unhidden;  // of the shorter of the two, the part that adds to the longer
};

// A kernel and the scratch bytes that it wants. The bytes depend on the problem
// alone, never on the processor, so that an exported program runs elsewhere.
struct Plan {
  const char* kernel;
  int64_t workspace_bytes;

  // How a CPU kernel takes the problem: dY for the filter and W for dY (kernel_cpu.cc);
  // the taps of a window as large as dY for channels (cpu/planner/canonical.h).
  bool exchanged, merges_windows;

  // How a CUDA kernel cuts the problem up; zero where it does not apply.
  int64_t tile_m, tile_n, tile_k;  // of the matrix product that a block computes
  int64_t box[1 + kAxes];          // images and positions of a phase that are its rows
  int64_t stages;                  // slices of operands in flight
  int64_t split_k;                 // parts of the sum, added up by a second kernel
  int64_t blocks, threads;         // of the grid, of a block
  int64_t resident;                // blocks that a multiprocessor holds at once
  int64_t shared_bytes;            // of a block
  Cost cost;
  double model_us;  // the planner's estimate (cuda/kernel_table.h)
};

// What becomes of dX, element by element, once it is summed and rounded to its dtype:
//
//   dX + residual,  and then zero unless relu > 0
//
// Either array, of dX's dtype and strides, may be absent (null). Each step rounds to that
// dtype, so that the bits are those of the steps one after the other.
struct Epilogue {
  const void* residual = nullptr;
  const void* relu = nullptr;

  bool IsNone() const { return residual == nullptr && relu == nullptr; }
};

// Runs task(0) .. task(count - 1), each exactly once, in any order and on any
// threads, and returns when all have finished.
using ParallelFor =
    std::function<void(int64_t count, const std::function<void(int64_t)>& task)>;

// `kernel` is "auto" or a name that Cpu/CudaKernelNames() lists. Returns false if
// there is no such kernel or if it does not take this problem.
bool PlanCpu(const Problem& problem, const char* kernel, Plan* plan);
const char* const* CpuKernelNames();  // null-terminated

// For programs that are lowered before all sizes are known: workspace for the fastest
// plan of any problem that differs from a given one in the batch and in the positions of
// x and y alone. `bytes`, and `bytes_per_position` for each position of each image of dY.
struct WorkspaceBound {
  int64_t bytes, bytes_per_position;
};
WorkspaceBound BoundCpuWorkspace(const Problem& problem);

// Computes dX and its epilogue. `plan` comes from PlanCpu for the same problem;
// `workspace` holds plan.workspace_bytes bytes, aligned to 64. All of dX is written,
// including the zeros that no tap reaches. dX has at least one element; dY and W may be
// empty. `threads` is how many `parallel_for` is likely to use: the result does not
// depend on it.
void RunCpu(const Problem& problem, const Plan& plan, const void* dy, const void* w,
            void* dx, void* workspace, const Epilogue& epilogue, int64_t threads,
            const ParallelFor& parallel_for);

// Whether one thread is done before another one would have woken up, or, if all threads
// are busy with calls of their own, before it would be free.
bool IsTooSmallToShare(const Problem& problem, bool all_are_busy);

// "amx", "avx512_bf16", "avx512", "avx2" or "portable": what RunCpu uses on this machine.
// Empty if the build has nothing for its processor: RunCpu must not be called.
const char* CpuIsa();

// Those that the build holds, and null.
const char* const* CpuIsas();

// The best for this processor, whether the build holds it or not.
const char* CpuBestIsa();

}  // namespace convgrad

struct CUstream_st;  // cudaStream_t is a pointer to it

namespace convgrad {

// What plans depend on of the GPU that will run them.
struct Gpu {
  int capability;        // times ten: 90 for 9.0
  int64_t shared_bytes;  // that a block may have
};
// Returns null, or CUDA's static text about why there is none.
const char* CurrentGpu(Gpu* gpu);
// CUDA's number for the toolkit of the build, such as 13000 for 13.0; and for the newest
// one that the driver here can serve, 0 if there is no driver.
int CudaToolkitVersion();
int CudaDriverVersion();
Gpu GpuOf(int capability);

bool PlanCuda(const Problem& problem, const char* kernel, const Gpu& gpu, Plan* plan);
// Enough for the plan of any GPU: a program may run on another one than it was lowered
// for.
int64_t CudaWorkspaceBytes(const Problem& problem, const char* kernel);
// Here not a bound: with less, a plan does without splitting its sums.
WorkspaceBound BoundCudaWorkspace(const Problem& problem);
const char* const* CudaKernelNames();  // null-terminated

// Enqueues the kernel on `stream` and returns null, or a static error text. `plan` comes
// from PlanCuda for the same problem and the current device.
const char* LaunchCuda(CUstream_st* stream, const Problem& problem, const Plan& plan,
                       const void* dy, const void* w, void* dx, void* workspace,
                       const Epilogue& epilogue);

}  // namespace convgrad
