// One block: its threads, its scheduler and its barrier.

#pragma once

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <string>
#include <vector>

#include "async.h"
#include "fiber.h"
#include "language.h"

namespace cuda_emulator {

// A place in the kernel's source: as a default argument, that of the call.
struct Place {
  const char* file = "";
  int line = 0;

  static Place Here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
  bool operator!=(const Place& other) const {
    return line != other.line || std::strcmp(file, other.file) != 0;
  }
};

// A copy that cp.async has started: the first `bytes` of `size` are copied, the others
// become zeros.
struct PendingCopy {
  void* to;
  const void* from;
  int bytes, size;
};

struct StoredBytes {
  unsigned char* at;
  size_t count;
};

struct Thread {
  enum State { kReady, kWaiting, kExited };

  Fiber fiber;
  uint3 index{};        // threadIdx
  unsigned number = 0;  // within the block
  State state = kExited;
  const char* waits_in = "";  // the call that it waits in
  Place place;
  std::vector<PendingCopy> open_group;
  std::deque<std::vector<PendingCopy>> groups;
  std::vector<StoredBytes> stored;  // in shared memory since the last proxy fence
};

// Where a number of threads meet. Threads order themselves through a token for TSan: one
// for each parity of the round, since a thread that is late to leave a round must not
// come after those that have arrived for the next.
struct Meeting {
  unsigned round = 0;
  const char* call = "";
  Place place;
  char tokens[2] = {};

  void* token() { return &tokens[round & 1]; }
};

struct Barrier : Meeting {
  unsigned arrived = 0;
  int any = 0;     // of the predicates of those who have arrived
  int result = 0;  // of the last complete round
};

constexpr unsigned kWarpSize = 32;

struct Warp : Meeting {
  uint32_t arrived = 0, mask = 0;
  const void* in[kWarpSize] = {};
  void* out[kWarpSize] = {};
};

class Block;
// The block that this thread of the processor is running.
inline thread_local Block* current_block = nullptr;

class Block {
 public:
  Block(dim3 grid_, dim3 size_, bool eager_, const std::function<void()>& kernel)
      : grid(grid_),
        size(size_),
        eager(eager_),
        kernel_(kernel),
        count_(size_.x * size_.y * size_.z),
        stacks_(count_),
        threads_(count_),
        warps_((count_ + kWarpSize - 1) / kWarpSize) {
    for (unsigned i = 0; i < count_; ++i) {
      Thread& thread = threads_[i];
      thread.number = i;
      thread.index = {i % size.x, i / size.x % size.y, i / size.x / size.y};
      thread.fiber.stack = stacks_.Get(i);
      thread.fiber.stack_bytes = Stacks::Usable();
#ifdef CUDA_EMULATOR_TSAN
      thread.fiber.tsan_fiber = __tsan_create_fiber(0);
#endif
    }
#ifdef CUDA_EMULATOR_TSAN
    scheduler_.tsan_fiber = __tsan_get_current_fiber();
#endif
  }
  ~Block() {
#ifdef CUDA_EMULATOR_TSAN
    for (Thread& thread : threads_) __tsan_destroy_fiber(thread.fiber.tsan_fiber);
#endif
  }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  // Runs the kernel once as block `index_`, its threads in the given order whenever they
  // can run. Returns false if it failed; the block is of no further use then.
  CUDA_EMULATOR_UNWATCHED bool Run(uint3 index_, unsigned char* shared_,
                                   const std::vector<unsigned>& order) {
    index = index_;
    shared = shared_;
    barrier = Barrier{};
    for (Warp& warp : warps_) warp = Warp{};
    async = AsyncState{};
    async.warps.resize(warps_.size());
    async.warpgroups.resize((warps_.size() + 3) / 4);
    for (Thread& thread : threads_) {
      thread.state = Thread::kReady;
      thread.open_group.clear();
      thread.groups.clear();
      thread.stored.clear();
      PrepareContext(&thread.fiber.context, thread.fiber.stack, thread.fiber.stack_bytes,
                     ThreadMain);
    }
    running_ = count_;
    Release(&start_token_);
    while (running_ > 0) {
      bool moved = false;
      for (unsigned i : order) {
        if (threads_[i].state != Thread::kReady) continue;
        moved = true;
        thread = &threads_[i];
        SwitchFiber(&scheduler_, &thread->fiber);
        if (!failure_.empty()) return false;
      }
      if (!moved && !PerformOneCopy(order.front() != 0)) {
        failure_ = DescribeWaiting("deadlock");
        return false;
      }
    }
    Acquire(&end_token_);
    return HasFinishedCopies();
  }

  const std::string& failure() const { return failure_; }

  // Ends the launch; the calling thread never runs again.
  [[noreturn]] __attribute__((format(printf, 2, 3))) CUDA_EMULATOR_UNWATCHED void Fail(
      const char* format, ...) {
    char text[512];
    std::va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof(text), format, arguments);
    va_end(arguments);
    failure_ = Where(*thread) + text;
    SwitchFiber(&thread->fiber, &scheduler_, true);
    std::abort();
  }

  // Suspends the running thread, which somebody else has to make ready again.
  CUDA_EMULATOR_UNWATCHED void Wait(const char* call, const Place& place) {
    thread->state = Thread::kWaiting;
    thread->waits_in = call;
    thread->place = place;
    SwitchFiber(&thread->fiber, &scheduler_);
  }

  // A barrier of all threads. Returns whether any of them brought a predicate.
  CUDA_EMULATOR_UNWATCHED int Synchronize(const char* call, bool predicate,
                                          const Place& place) {
    if (running_ < count_) {
      Fail("divergent barrier: %s at %s:%d, but %u of %u threads have exited", call,
           place.file, place.line, count_ - running_, count_);
    }
    if (barrier.arrived > 0 &&
        (barrier.place != place || std::strcmp(barrier.call, call) != 0)) {
      Fail("divergent barrier: %s at %s:%d, others are in %s at %s:%d", call, place.file,
           place.line, barrier.call, barrier.place.file, barrier.place.line);
    }
    void* const token = barrier.token();
    Release(token);
    barrier.call = call;
    barrier.place = place;
    barrier.any |= static_cast<int>(predicate);
    if (++barrier.arrived < count_) {
      Wait(call, place);
    } else {
      barrier.result = barrier.any;
      barrier.any = 0;
      barrier.arrived = 0;
      ++barrier.round;
      for (Thread& other : threads_) other.state = Thread::kReady;
    }
    Acquire(token);
    return barrier.result;
  }

  // Whether so many bytes lie in dynamic shared memory.
  bool IsShared(const void* at, size_t bytes) const {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(shared);
    const uintptr_t from = reinterpret_cast<uintptr_t>(at);
    return begin <= from && from + bytes <= begin + shared_bytes;
  }

  // Remembers what the running thread has stored in shared memory, until it fences it.
  CUDA_EMULATOR_UNWATCHED void Stored(void* at, size_t bytes) {
    const Unwatched unwatched;
    thread->stored.push_back({static_cast<unsigned char*>(at), bytes});
  }

  Warp& warp() { return warps_[thread->number / kWarpSize]; }
  Thread& lane(unsigned i) {
    return threads_[thread->number / kWarpSize * kWarpSize + i];
  }

  dim3 grid, size;
  uint3 index{};
  unsigned char* shared = nullptr;  // dynamic shared memory
  size_t shared_bytes = 0;
  AsyncState async;
  const bool eager;          // cp.async copies at once
  Thread* thread = nullptr;  // the one that runs
  Barrier barrier;

 private:
  CUDA_EMULATOR_UNWATCHED static void ThreadMain() {
    Block* const block = current_block;
    Thread* const self = block->thread;
    EnterFiber(&block->scheduler_);
    Acquire(&block->start_token_);
    block->kernel_();
    Release(&block->end_token_);
    self->state = Thread::kExited;
    --block->running_;
    if (block->barrier.arrived > 0) {
      block->Fail("divergent barrier: the thread exited, others are in %s at %s:%d",
                  block->barrier.call, block->barrier.place.file,
                  block->barrier.place.line);
    }
    SwitchFiber(&self->fiber, &block->scheduler_, true);
    std::abort();
  }

  // The oldest copy that is still to be performed, or the newest.
  CUDA_EMULATOR_UNWATCHED bool PerformOneCopy(bool newest) {
    if (async.copies.empty()) return false;
    const std::function<void()> copy =
        newest ? async.copies.back() : async.copies.front();
    newest ? async.copies.pop_back() : async.copies.pop_front();
    copy();
    return true;
  }

  // What a block must not leave behind when it ends.
  bool HasFinishedCopies() {
    if (!async.copies.empty()) {
      failure_ = Where(threads_[0]) + "the block ended before its bulk copies";
    }
    for (const auto& entry : async.barriers) {
      if (entry.second.bytes == 0) continue;
      failure_ = Where(threads_[0]) + "the block ended with a barrier that lacks " +
                 std::to_string(entry.second.bytes) + " bytes";
    }
    return failure_.empty();
  }

  std::string Where(const Thread& t) const {
    char text[128];
    std::snprintf(text, sizeof(text), "block (%u,%u,%u) thread (%u,%u,%u): ", index.x,
                  index.y, index.z, t.index.x, t.index.y, t.index.z);
    return text;
  }

  // Says where the threads wait, neighbours at the same place together.
  std::string DescribeWaiting(const char* what) const {
    std::string text = Where(threads_[0]) + what;
    for (unsigned i = 0; i < count_; ++i) {
      const Thread& t = threads_[i];
      if (i > 0 && t.state == threads_[i - 1].state &&
          !(t.place != threads_[i - 1].place)) {
        continue;
      }
      text += "; from thread " + std::to_string(i) + " on ";
      text += t.state == Thread::kExited
                  ? "exited"
                  : std::string("in ") + t.waits_in + " at " + t.place.file + ":" +
                        std::to_string(t.place.line);
    }
    return text;
  }

  const std::function<void()>& kernel_;
  const unsigned count_;
  Stacks stacks_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  unsigned running_ = 0;  // threads that have not exited
  Fiber scheduler_;
  std::string failure_;
  char start_token_ = 0, end_token_ = 0;
};

}  // namespace cuda_emulator

#define threadIdx (::cuda_emulator::current_block->thread->index)
#define blockIdx (::cuda_emulator::current_block->index)
#define blockDim (::cuda_emulator::current_block->size)
#define gridDim (::cuda_emulator::current_block->grid)

inline void __syncthreads(cuda_emulator::Place place = cuda_emulator::Place::Here()) {
  cuda_emulator::current_block->Synchronize("__syncthreads", false, place);
}
inline int __syncthreads_or(int predicate,
                            cuda_emulator::Place place = cuda_emulator::Place::Here()) {
  return cuda_emulator::current_block->Synchronize("__syncthreads_or", predicate != 0,
                                                   place);
}
