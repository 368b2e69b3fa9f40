// What a block keeps of the instructions of sm_90 that work by themselves: barriers in
// shared memory that count bytes, bulk copies, and products of warpgroups.

#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <vector>

#include "fiber.h"

namespace cuda_emulator {

struct Thread;

// An mbarrier object: its phase ends when no arrival and no byte is pending.
struct Mbarrier {
  unsigned count = 0, pending = 0;
  int64_t bytes = 0;       // expected less those that came
  unsigned phase = 0;      // completed ones
  bool announced = false;  // to TMA, by fence.mbarrier_init
  std::vector<Thread*> waiting;
  char tokens[2] = {};  // for TSan, by the phase's parity

  void* token(unsigned of_phase) { return &tokens[of_phase & 1]; }
};

enum class WgmmaKind { kBf16, kF16, kTf32 };

// A product of a warpgroup as one of its warps issued it.
struct WgmmaOperation {
  uint64_t a = 0, b = 0;  // descriptors of the operands in shared memory
  WgmmaKind kind = WgmmaKind::kBf16;
  int columns = 0;
  bool b_by_rows = false;  // B is MN-major
  float* d[32] = {};       // each lane's sums

  bool operator==(const WgmmaOperation& other) const {
    return a == other.a && b == other.b && kind == other.kind &&
           columns == other.columns && b_by_rows == other.b_by_rows;
  }
};

struct WarpProducts {
  bool fenced = false;  // since the last group was closed
  std::vector<WgmmaOperation> open;
  std::deque<std::vector<WgmmaOperation>> groups;
  size_t issued = 0;
};

// Copies and tensor cores see shared memory through the async proxy: what threads have
// stored there by ordinary instructions, or by cp.async, appears to them only after that
// thread's fence.
struct AsyncState {
  std::map<void*, Mbarrier> barriers;
  std::deque<std::function<void()>> copies;  // issued and not yet performed
  std::vector<unsigned char> view;           // shared memory in the async proxy's eyes
  std::vector<WarpProducts> warps;
  std::vector<std::vector<WgmmaOperation>> warpgroups;  // all that its first warp issued
};

}  // namespace cuda_emulator
