// Collectives of a warp: every lane of a mask brings operands, and the last one to arrive
// computes for all. Only __syncwarp also orders the lanes' accesses to memory; the others
// exchange registers, and TSan reports who relies on more.

#pragma once

#include <cstdint>
#include <cstring>

#include "block.h"

namespace cuda_emulator {

// Computes every lane's output from all lanes' inputs.
using Combine = void(Block& block, const Warp& warp);

CUDA_EMULATOR_UNWATCHED inline void Collective(const char* call, uint32_t mask,
                                               const void* in, void* out,
                                               Combine* combine, bool orders_memory,
                                               const Place& place) {
  Block& block = *current_block;
  Warp& warp = block.warp();
  const unsigned lane = block.thread->number % kWarpSize;
  if ((mask >> lane & 1) == 0) {
    block.Fail("%s at %s:%d: lane %u is not in its own mask %08x", call, place.file,
               place.line, lane, mask);
  }
  if (warp.arrived != 0) {
    if (std::strcmp(warp.call, call) != 0 || warp.place != place) {
      block.Fail("divergent warp: %s at %s:%d, other lanes are in %s at %s:%d", call,
                 place.file, place.line, warp.call, warp.place.file, warp.place.line);
    }
    if (warp.mask != mask) {
      block.Fail("%s at %s:%d: lanes disagree about the mask, %08x and %08x", call,
                 place.file, place.line, mask, warp.mask);
    }
  }
  void* const token = warp.token();
  if (orders_memory) Release(token);
  warp.call = call;
  warp.place = place;
  warp.mask = mask;
  warp.in[lane] = in;
  warp.out[lane] = out;
  warp.arrived |= 1u << lane;
  if (warp.arrived != mask) {
    block.Wait(call, place);
  } else {
    combine(block, warp);
    warp.arrived = 0;
    ++warp.round;
    for (unsigned i = 0; i < kWarpSize; ++i) {
      if (mask >> i & 1) block.lane(i).state = Thread::kReady;
    }
  }
  if (orders_memory) Acquire(token);
}

constexpr uint32_t kWholeWarp = 0xffffffff;

enum class ShuffleMode { kIndexed, kUp, kDown, kXor };

template <typename T>
struct ShuffleOperands {
  T value;
  int argument, width;
};

template <ShuffleMode kMode, typename T>
CUDA_EMULATOR_UNWATCHED void CombineShuffle(Block& block, const Warp& warp) {
  for (unsigned i = 0; i < kWarpSize; ++i) {
    if ((warp.mask >> i & 1) == 0) continue;
    const auto& operands = *static_cast<const ShuffleOperands<T>*>(warp.in[i]);
    const int lane = static_cast<int>(i);
    const int argument = operands.argument;
    const int first = lane & ~(operands.width - 1), end = first + operands.width;
    int from = lane;
    switch (kMode) {
      case ShuffleMode::kIndexed: from = first + (argument & (operands.width - 1)); break;
      case ShuffleMode::kUp:
        from = lane - argument < first ? lane : lane - argument;
        break;
      case ShuffleMode::kDown:
        from = lane + argument >= end ? lane : lane + argument;
        break;
      case ShuffleMode::kXor:
        from = (lane ^ argument) >= end ? lane : lane ^ argument;
        break;
    }
    if ((warp.mask >> from & 1) == 0) {
      block.Fail("%s at %s:%d: lane %d reads lane %d, which takes no part", warp.call,
                 warp.place.file, warp.place.line, lane, from);
    }
    *static_cast<T*>(warp.out[i]) =
        static_cast<const ShuffleOperands<T>*>(warp.in[from])->value;
  }
}

template <ShuffleMode kMode, typename T>
T Shuffle(const char* call, uint32_t mask, T value, int argument, int width,
          const Place& place) {
  const ShuffleOperands<T> operands{value, argument, width};
  T result{};
  Collective(call, mask, &operands, &result, CombineShuffle<kMode, T>, false, place);
  return result;
}

}  // namespace cuda_emulator

inline void __syncwarp(uint32_t mask = cuda_emulator::kWholeWarp,
                       cuda_emulator::Place place = cuda_emulator::Place::Here()) {
  cuda_emulator::Collective(
      "__syncwarp", mask, nullptr, nullptr,
      [](cuda_emulator::Block&, const cuda_emulator::Warp&) {}, true, place);
}
template <typename T>
T __shfl_sync(uint32_t mask, T value, int lane, int width = cuda_emulator::kWarpSize,
              cuda_emulator::Place place = cuda_emulator::Place::Here()) {
  return cuda_emulator::Shuffle<cuda_emulator::ShuffleMode::kIndexed>(
      "__shfl_sync", mask, value, lane, width, place);
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta,
                 int width = cuda_emulator::kWarpSize,
                 cuda_emulator::Place place = cuda_emulator::Place::Here()) {
  return cuda_emulator::Shuffle<cuda_emulator::ShuffleMode::kUp>(
      "__shfl_up_sync", mask, value, static_cast<int>(delta), width, place);
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta,
                   int width = cuda_emulator::kWarpSize,
                   cuda_emulator::Place place = cuda_emulator::Place::Here()) {
  return cuda_emulator::Shuffle<cuda_emulator::ShuffleMode::kDown>(
      "__shfl_down_sync", mask, value, static_cast<int>(delta), width, place);
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes, int width = cuda_emulator::kWarpSize,
                  cuda_emulator::Place place = cuda_emulator::Place::Here()) {
  return cuda_emulator::Shuffle<cuda_emulator::ShuffleMode::kXor>(
      "__shfl_xor_sync", mask, value, lanes, width, place);
}

namespace cuda_emulator {

CUDA_EMULATOR_UNWATCHED inline void CombineBallot(Block&, const Warp& warp) {
  uint32_t ballot = 0;
  for (unsigned i = 0; i < kWarpSize; ++i) {
    if (warp.mask >> i & 1) {
      ballot |= static_cast<uint32_t>(*static_cast<const bool*>(warp.in[i])) << i;
    }
  }
  for (unsigned i = 0; i < kWarpSize; ++i) {
    if (warp.mask >> i & 1) *static_cast<uint32_t*>(warp.out[i]) = ballot;
  }
}

}  // namespace cuda_emulator

inline unsigned __ballot_sync(uint32_t mask, int predicate,
                              cuda_emulator::Place place = cuda_emulator::Place::Here()) {
  const bool bit = predicate != 0;
  uint32_t ballot = 0;
  cuda_emulator::Collective("__ballot_sync", mask, &bit, &ballot,
                            cuda_emulator::CombineBallot, false, place);
  return ballot;
}
namespace cuda_emulator {

// CUDA does not say which lane it is.
inline bool ElectLane(Place place = Place::Here()) {
  constexpr unsigned kElected = 5;
  Collective(
      "ElectLane", kWholeWarp, nullptr, nullptr, [](Block&, const Warp&) {}, false,
      place);
  return current_block->thread->number % kWarpSize == kElected;
}

}  // namespace cuda_emulator

inline int __any_sync(uint32_t mask, int predicate,
                      cuda_emulator::Place place = cuda_emulator::Place::Here()) {
  return __ballot_sync(mask, predicate, place) != 0;
}
inline int __all_sync(uint32_t mask, int predicate,
                      cuda_emulator::Place place = cuda_emulator::Place::Here()) {
  return __ballot_sync(mask, predicate, place) == mask;
}
