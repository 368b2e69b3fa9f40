// Asynchronous copies from global to shared memory, cp.async. A copy happens when its
// group is waited for, which is as late as CUDA allows and makes a missing wait show; or,
// with CUDA_EMULATOR_EAGER=1, when it is issued, which is as early as CUDA allows and
// makes a buffer show that is overwritten while it is still read.

#pragma once

#include <cstdint>
#include <utility>

#include "block.h"

namespace cuda_emulator {

// Byte by byte rather than by memcpy, so that sanitizers see accesses of the kernel's
// own.
inline void PerformCopy(const PendingCopy& copy) {
  char* const to = static_cast<char*>(copy.to);
  const char* const from = static_cast<const char*>(copy.from);
  for (int i = 0; i < copy.size; ++i) to[i] = i < copy.bytes ? from[i] : 0;
  current_block->Stored(to, static_cast<size_t>(copy.size));
}

template <int kBytes>
void CopyAsync(void* to, const void* from, int bytes, Place place = Place::Here()) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async takes 4, 8 or 16");
  Block& block = *current_block;
  if (reinterpret_cast<uintptr_t>(to) % kBytes != 0 ||
      reinterpret_cast<uintptr_t>(from) % kBytes != 0) {
    block.Fail("CopyAsync at %s:%d: misaligned, to %p from %p by %d bytes", place.file,
               place.line, to, from, kBytes);
  }
  if (bytes < 0 || bytes > kBytes) {
    block.Fail("CopyAsync at %s:%d: %d of %d bytes", place.file, place.line, bytes,
               kBytes);
  }
  const PendingCopy copy{to, from, bytes, kBytes};
  if (block.eager) {
    PerformCopy(copy);
  } else {
    block.thread->open_group.push_back(copy);
  }
}

inline void CopyAsyncCommit() {
  Thread& thread = *current_block->thread;
  thread.groups.push_back(std::exchange(thread.open_group, {}));
}

template <int kPending>
void CopyAsyncWait() {
  static_assert(kPending >= 0, "a number of groups");
  auto& groups = current_block->thread->groups;
  while (groups.size() > size_t{kPending}) {
    for (const PendingCopy& copy : groups.front()) PerformCopy(copy);
    groups.pop_front();
  }
}

}  // namespace cuda_emulator
