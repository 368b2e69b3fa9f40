// TMA: boxes of a tensor, and columns of pixels of an image (im2col), from global to
// shared memory. A copy happens when it is issued, or, as late as CUDA allows, when no
// thread can go on without it; in the order of issue or backwards, as CUDA promises none.

#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "block.h"
#include "environment.h"
#include "mbarrier.h"
#include "tensor_map.h"

namespace cuda_emulator {

// Shared memory in the async proxy's eyes, which at first is memory never written.
CUDA_EMULATOR_UNWATCHED inline std::vector<unsigned char>& AsyncView() {
  Block& block = *current_block;
  auto& view = block.async.view;
  if (view.empty()) {
    view.assign(block.shared_bytes, static_cast<unsigned char>(PoisonByte()));
  }
  return view;
}

// As a pointer into dynamic shared memory, which begins at 0 here.
inline uint32_t SharedAddress(const void* p) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(p) -
                               current_block->shared);
}

// A store that the async proxy is to see. One that does not come this way never does.
template <typename T>
void StoreShared(void* to, const T& value, Place place = Place::Here()) {
  Block& block = *current_block;
  if (reinterpret_cast<uintptr_t>(to) % sizeof(T) != 0 ||
      !block.IsShared(to, sizeof(T))) {
    block.Fail("StoreShared at %s:%d: %zu bytes at %p", place.file, place.line, sizeof(T),
               to);
  }
  unsigned char bytes[sizeof(T)];
  std::memcpy(bytes, &value, sizeof(T));
  for (size_t i = 0; i < sizeof(T); ++i) static_cast<unsigned char*>(to)[i] = bytes[i];
  block.Stored(to, sizeof(T));
}

// Shows this thread's stores to shared memory to TMA and the tensor cores: those of
// StoreShared, and copies of cp.async that have been waited for.
CUDA_EMULATOR_UNWATCHED inline void FenceProxyAsync() {
  const Unwatched unwatched;
  Block& block = *current_block;
  auto& view = AsyncView();
  for (const StoredBytes& stored : block.thread->stored) {
    std::memcpy(&view[SharedAddress(stored.at)], stored.at, stored.count);
  }
  block.thread->stored.clear();
}

// The permutation of 16-byte chunks: 0 none, then within rows of 32, 64, 128 bytes.
inline uint32_t Swizzle(uint32_t address, unsigned mode) {
  return address ^ ((address >> 7 & ((1u << mode) - 1)) << 4);
}

struct TmaCopy {
  TensorMap map;
  uint32_t to;  // within shared memory
  int64_t at[kMostDimensions];
  unsigned offset[kMostDimensions - 2];
  uint64_t* barrier;
};

// Byte by byte, so that a sanitizer sees reads of global memory as a kernel's own.
inline void CopyElement(const TmaCopy& copy, uint32_t to,
                        const int64_t (&index)[kMostDimensions]) {
  const TensorMap& map = copy.map;
  const unsigned char* from = map.base;
  bool inside = true;
  for (unsigned i = 0; i < map.rank; ++i) {
    inside = inside && 0 <= index[i] && index[i] < int64_t{map.size[i]};
    if (!inside) break;
    from += static_cast<uint64_t>(index[i]) *
            (i == 0 ? map.element_bytes : map.stride[i - 1]);
  }
  Block& block = *current_block;
  const uint32_t at = Swizzle(to, map.swizzle);
  for (unsigned byte = 0; byte < map.element_bytes; ++byte) {
    const unsigned char value = inside ? from[byte] : 0;
    block.shared[at + byte] = value;
    block.async.view[at + byte] = value;
  }
}

inline unsigned BoxOf(const TensorMap& map, unsigned dimension) {
  return (map.box[dimension] + map.step[dimension] - 1u) / map.step[dimension];
}

inline uint32_t BytesOf(const TensorMap& map) {
  uint32_t elements = map.box[0];
  if (map.im2col != 0) return elements * map.box[1] * map.element_bytes;
  for (unsigned i = 1; i < map.rank; ++i) elements *= BoxOf(map, i);
  return elements * map.element_bytes;
}

inline void CopyBox(const TmaCopy& copy) {
  const TensorMap& map = copy.map;
  const uint32_t elements = BytesOf(map) / map.element_bytes;
  for (uint32_t e = 0; e < elements; ++e) {
    int64_t index[kMostDimensions];
    uint32_t rest = e;
    for (unsigned i = 0; i < map.rank; ++i) {
      const unsigned box = BoxOf(map, i);
      index[i] = copy.at[i] + int64_t{rest % box} * map.step[i];
      rest /= box;
    }
    CopyElement(copy, copy.to + e * map.element_bytes, index);
  }
}

// Pixels follow each other within the bounding box, innermost axis first, then from image
// to image, by the map's steps; what is copied lies `offset` beyond each.
inline void CopyColumn(const TmaCopy& copy) {
  const TensorMap& map = copy.map;
  const unsigned axes = map.rank - 2u;
  int64_t pixel[kMostDimensions];
  for (unsigned i = 0; i < map.rank; ++i) pixel[i] = copy.at[i];
  uint32_t to = copy.to;
  for (unsigned p = 0; p < map.box[1]; ++p) {
    int64_t index[kMostDimensions];
    for (unsigned i = 0; i < map.rank; ++i) index[i] = pixel[i];
    for (unsigned i = 0; i < axes; ++i) index[i + 1] += copy.offset[i];
    for (unsigned c = 0; c < map.box[0]; ++c, to += map.element_bytes) {
      index[0] = copy.at[0] + c;
      CopyElement(copy, to, index);
    }
    unsigned i = 0;
    for (; i < axes; ++i) {
      pixel[i + 1] += map.step[i + 1];
      if (pixel[i + 1] <= int64_t{map.size[i + 1]} - 1 + map.upper[i]) break;
      pixel[i + 1] = map.lower[i];
    }
    if (i == axes) pixel[map.rank - 1] += map.step[map.rank - 1];
  }
}

CUDA_EMULATOR_UNWATCHED inline void PerformTma(const TmaCopy& copy) {
  const Unwatched unwatched;
  AsyncView();
  copy.map.im2col != 0 ? CopyColumn(copy) : CopyBox(copy);
  Mbarrier& barrier = current_block->async.barriers.at(copy.barrier);
  barrier.bytes -= BytesOf(copy.map);
  EndPhaseIfComplete(barrier);
}

CUDA_EMULATOR_UNWATCHED inline void IssueTma(const char* call, void* to,
                                             const CUtensorMap* encoded,
                                             uint64_t* barrier, int rank, const int* at,
                                             const uint16_t* offset, const Place& place) {
  const Unwatched unwatched;
  Block& block = *current_block;
  TmaCopy copy{};
  std::memcpy(&copy.map, encoded, sizeof(copy.map));
  const auto wrong = [&](const char* what) {
    block.Fail("%s at %s:%d: %s", call, place.file, place.line, what);
  };
  if (copy.map.magic != kTensorMapMagic) wrong("no tensor map was encoded there");
  if (reinterpret_cast<uintptr_t>(encoded) % alignof(CUtensorMap) != 0) {
    wrong("the map is not aligned");
  }
  if (copy.map.rank != rank) wrong("the map has another number of dimensions");
  if ((copy.map.im2col != 0) != (offset != nullptr))
    wrong("the map is of the other kind");
  if (!block.IsShared(to, BytesOf(copy.map))) wrong("not within dynamic shared memory");
  if (!FindMbarrier(call, barrier, place).announced) {
    wrong("the barrier's initialisation has not been fenced");
  }
  copy.to = static_cast<uint32_t>(static_cast<unsigned char*>(to) - block.shared);
  if (copy.to % 128 != 0) wrong("the address is not aligned to 128 bytes");
  copy.barrier = barrier;
  for (int i = 0; i < rank; ++i) copy.at[i] = at[i];
  const unsigned limit = rank == 3 ? 1u << 16 : rank == 4 ? 1u << 8 : 1u << 5;
  for (int i = 0; offset != nullptr && i < rank - 2; ++i) {
    if (offset[i] >= limit) wrong("the offset has too many bits");
    copy.offset[i] = offset[i];
  }
  if (block.eager) {
    PerformTma(copy);
  } else {
    block.async.copies.push_back([copy] { PerformTma(copy); });
  }
}

template <int kRank>
void TmaLoad(void* to, const CUtensorMap* map, uint64_t* barrier, const int (&at)[kRank],
             Place place = Place::Here()) {
  IssueTma("TmaLoad", to, map, barrier, kRank, at, nullptr, place);
}

template <int kRank>
void TmaLoadIm2col(void* to, const CUtensorMap* map, uint64_t* barrier,
                   const int (&at)[kRank], const uint16_t (&offset)[kRank - 2],
                   Place place = Place::Here()) {
  IssueTma("TmaLoadIm2col", to, map, barrier, kRank, at, offset, place);
}

}  // namespace cuda_emulator
