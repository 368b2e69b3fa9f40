// mbarrier objects in shared memory. The emulator keeps their state beside the block,
// under the address of the 8 bytes that are theirs.

#pragma once

#include <cstdint>

#include "block.h"

namespace cuda_emulator {

constexpr unsigned kMostArrivals = (1u << 20) - 1;
constexpr int64_t kMostBytes = (1 << 20) - 1;

CUDA_EMULATOR_UNWATCHED inline Mbarrier& FindMbarrier(const char* call, void* at,
                                                      const Place& place) {
  auto& barriers = current_block->async.barriers;
  const auto found = barriers.find(at);
  if (found == barriers.end()) {
    current_block->Fail("%s at %s:%d: the barrier is not initialised", call, place.file,
                        place.line);
  }
  return found->second;
}

// Ends the phase if nothing is pending, and wakes those who wait for that.
CUDA_EMULATOR_UNWATCHED inline void EndPhaseIfComplete(Mbarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.pending = barrier.count;
  for (Thread* thread : barrier.waiting) thread->state = Thread::kReady;
  barrier.waiting.clear();
}

CUDA_EMULATOR_UNWATCHED inline void MbarrierInit(uint64_t* at, unsigned arrivals,
                                                 Place place = Place::Here()) {
  const Unwatched unwatched;
  Block& block = *current_block;
  if (reinterpret_cast<uintptr_t>(at) % 8 != 0 || arrivals < 1 ||
      arrivals > kMostArrivals || !block.IsShared(at, 8)) {
    block.Fail("MbarrierInit at %s:%d: %u arrivals, at %p", place.file, place.line,
               arrivals, static_cast<void*>(at));
  }
  Mbarrier barrier;
  barrier.count = barrier.pending = arrivals;
  block.async.barriers[at] = barrier;
}

// Lets TMA see the barriers that this thread has initialised.
CUDA_EMULATOR_UNWATCHED inline void MbarrierFenceInit() {
  const Unwatched unwatched;
  for (auto& entry : current_block->async.barriers) entry.second.announced = true;
}

CUDA_EMULATOR_UNWATCHED inline void ArriveAt(const char* call, uint64_t* at,
                                             unsigned bytes, const Place& place) {
  void* token = nullptr;
  {
    const Unwatched unwatched;
    token = FindMbarrier(call, at, place).token(FindMbarrier(call, at, place).phase);
  }
  Release(token);
  const Unwatched unwatched;
  Mbarrier& barrier = FindMbarrier(call, at, place);
  if (barrier.pending == 0) {
    current_block->Fail("%s at %s:%d: more arrivals than the %u that the barrier counts",
                        call, place.file, place.line, barrier.count);
  }
  barrier.bytes += bytes;
  if (barrier.bytes > kMostBytes) {
    current_block->Fail("%s at %s:%d: %lld bytes are pending", call, place.file,
                        place.line, static_cast<long long>(barrier.bytes));
  }
  --barrier.pending;
  EndPhaseIfComplete(barrier);
}

inline void MbarrierArrive(uint64_t* at, Place place = Place::Here()) {
  ArriveAt("MbarrierArrive", at, 0, place);
}

inline void MbarrierArriveExpect(uint64_t* at, unsigned bytes,
                                 Place place = Place::Here()) {
  ArriveAt("MbarrierArriveExpect", at, bytes, place);
}

// Returns once the phase of this parity has ended: at once if it is not the current one.
CUDA_EMULATOR_UNWATCHED inline void MbarrierWait(uint64_t* at, unsigned parity,
                                                 Place place = Place::Here()) {
  Block& block = *current_block;
  void* token = nullptr;
  for (;;) {
    {
      const Unwatched unwatched;
      Mbarrier& barrier = FindMbarrier("MbarrierWait", at, place);
      token = barrier.token(parity);
      if ((barrier.phase & 1) != (parity & 1)) break;
      barrier.waiting.push_back(block.thread);
    }
    block.Wait("MbarrierWait", place);
  }
  Acquire(token);
}

}  // namespace cuda_emulator
