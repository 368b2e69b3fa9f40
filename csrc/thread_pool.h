// Loops over the threads that XLA has for a program.

#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <new>

#include "xla/ffi/api/ffi.h"

namespace convgrad {

inline void PauseOfSpin() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// A parallel loop over XLA's own pool. The calling thread takes tasks like every
// other and never only waits: it may itself be a thread of the pool, and the pool
// may be busy (a loop body inside lax.scan), so helpers that start late find the
// counter exhausted and leave.
class PooledLoop {
 public:
  PooledLoop(int64_t count, const std::function<void(int64_t)>& task)
      : count_(count), task_(&task) {}

  void TakeTasks() {
    for (;;) {
      const int64_t i = next_.fetch_add(1, std::memory_order_relaxed);
      if (i >= count_) return;
      (*task_)(i);  // alive: the caller of Wait cannot return before this task is counted
      if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 == count_) {
        std::lock_guard<std::mutex> lock(mutex_);
        all_done_.notify_all();
      }
    }
  }

  void Wait() {
    // The last task is often done sooner than a thread that sleeps would be awake again.
    constexpr int kTurns = 2000;
    for (int i = 0; i < kTurns; ++i) {
      if (done_.load(std::memory_order_acquire) == count_) return;
      PauseOfSpin();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    all_done_.wait(lock,
                   [this] { return done_.load(std::memory_order_acquire) == count_; });
  }

 private:
  const int64_t count_;
  const std::function<void(int64_t)>* task_;
  std::atomic<int64_t> next_{0}, done_{0};
  std::mutex mutex_;
  std::condition_variable all_done_;
};

inline void RunInPool(xla::ffi::ThreadPool& pool, int64_t count,
                      const std::function<void(int64_t)>& task) {
  const int64_t threads = std::min<int64_t>(pool.num_threads(), count);
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  // Shared with the helpers, which may outlive this call.
  auto loop = std::make_shared<PooledLoop>(count, task);
  try {
    for (int64_t i = 1; i < threads; ++i) {
      pool.Schedule([loop] { loop->TakeTasks(); });
    }
  } catch (const std::bad_alloc&) {
    // Fewer helpers then; leaving now would pull `task` from under the helpers that
    // started.
  }
  loop->TakeTasks();
  loop->Wait();
}

}  // namespace convgrad
