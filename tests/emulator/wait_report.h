// Prints where a kernel waited for an mbarrier in vain (hopper.cuh), when a program ends.

#pragma once

#include <cstdio>
#include <cstdlib>

#include "cuda/hopper.cuh"

namespace convgrad {

#ifdef CONVGRAD_BOUNDED_WAITS

cudaError_t ReportEndlessWaits(EndlessWait* to);  // of the kernels in wgmma.cu

// `tell` gives the address to a source's kernels.
inline void PrintEndlessWaits(cudaError_t (*tell)(EndlessWait*)) {
  static EndlessWait* wait = nullptr;
  if (cudaHostAlloc(reinterpret_cast<void**>(&wait), sizeof(*wait),
                    cudaHostAllocMapped) != cudaSuccess) {
    return;  // the first array will say what is wrong
  }
  *wait = {};
  (void)tell(wait);
  std::atexit([] {
    if (wait->found == 0) return;
    std::printf("no end to phase %u of the mbarrier at %u: block %u, thread %u\n",
                wait->parity, wait->barrier, wait->block, wait->thread);
  });
}

#endif

}  // namespace convgrad
