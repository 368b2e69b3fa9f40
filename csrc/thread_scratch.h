// Small workspaces, of the thread that runs a call.
//
// XLA lays the workspaces of a program's calls into the same memory, and then runs the
// calls one after another, each waiting for the threads of the one before. Calls that
// bring no workspace can run at once. What is small is cheap to keep for each thread.

#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace convgrad {

// At most. Never less in a later version: stored programs bring no workspace up to here.
constexpr int64_t kThreadScratchBytes = 1 << 20;

// `bytes` bytes, aligned to 64, until the thread asks for the next ones. Throws
// std::bad_alloc.
inline void* ThreadScratch(int64_t bytes) {
  constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(void* memory) const { ::operator delete(memory, kAlignment); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local int64_t size = 0;
  if (bytes > size) {
    memory.reset();
    size = 0;
    memory.reset(::operator new(static_cast<size_t>(bytes), kAlignment));
    size = bytes;
  }
  return memory.get();
}

}  // namespace convgrad
