// The instructions that CUDA C++ has no word for, one function each: PTX under nvcc, and
// elsewhere the emulator's model of the same instruction (cuda_emulator.h, namespace
// cuda_emulator). Everything below needs sm_80. What these strings do is the only part of
// a kernel that cannot be tested without a GPU, so nothing else belongs here.

#pragma once

#include <cstdint>
#include <cstring>

#include "platform.cuh"

namespace convgrad {

#ifdef __CUDACC__

__device__ __forceinline__ uint32_t SharedAddress(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// d[16][8] += a[16][16] * b[16][8], a by rows and b by columns. With g = lane / 4 and
// t = lane % 4 a lane holds, in pairs of 16-bit values with the lower index in the lower
// half,
//   a: (g, 2t..), (g + 8, 2t..), (g, 2t + 8..), (g + 8, 2t + 8..)     as (row, k)
//   b: (2t.., g), (2t + 8.., g)                                       as (k, column)
//   d: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)             as (row, column)
__device__ __forceinline__ void MmaBf16(float (&d)[4], const uint32_t (&a)[4],
                                        const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void MmaF16(float (&d)[4], const uint32_t (&a)[4],
                                       const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d[16][8] += a[16][8] * b[8][8] in TF32: the tensor core reads the upper 19 bits of f32
// bit patterns. A lane holds
//   a: (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4)     as (row, k)
//   b: (t, g), (t + 4, g)                                 as (k, column)
// and d as above.
__device__ __forceinline__ void MmaTf32(float (&d)[4], const uint32_t (&a)[4],
                                        const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// f32 to the nearest TF32, ties away from zero, as an f32 bit pattern.
__device__ __forceinline__ uint32_t RoundToTf32(float v) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(v));
  return bits;
}

// Four 8x8 matrices of 16-bit values from shared memory: lane l names the 16-byte row
// l % 8 of matrix l / 8, and receives elements (g, 2t) and (g, 2t + 1) of each.
__device__ __forceinline__ void LoadMatrixX4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(SharedAddress(row))
               : "memory");
}

// The same transposed: a lane receives elements (2t, g) and (2t + 1, g).
__device__ __forceinline__ void LoadMatrixX4Transposed(uint32_t (&r)[4],
                                                       const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(SharedAddress(row))
               : "memory");
}

// Starts copying kBytes (4, 8 or 16) from global to shared memory. Only the first
// `bytes` are read, the rest become zeros. Both addresses are multiples of
// kBytes. The source is not read at all if `bytes` is 0, but must be a valid address.
template <int kBytes>
__device__ __forceinline__ void CopyAsync(void* to, const void* from, int bytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async takes 4, 8 or 16");
  if constexpr (kBytes == 16) {  // .cg goes past L1, and exists for 16 bytes only
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(SharedAddress(to)),
                 "l"(from), "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(SharedAddress(to)),
                 "l"(from), "n"(kBytes), "r"(bytes)
                 : "memory");
  }
}

// The same for 16 bytes that either all exist or are all zeros. In the latter case `from`
// may be any address. Costs less: the hardware has a predicate and no number of bytes.
__device__ __forceinline__ void CopyAsyncOrZero(void* to, const void* from,
                                                unsigned exists) {
  asm volatile(
      "{\n"
      "  .reg .pred none;\n"
      "  setp.eq.s32 none, %2, 0;\n"
      "  cp.async.cg.shared.global [%0], [%1], 16, none;\n"
      "}\n" ::"r"(SharedAddress(to)),
      "l"(from), "r"(static_cast<int>(exists))
      : "memory");
}

// Closes the group of this thread's copies since the last call.
__device__ __forceinline__ void CopyAsyncCommit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most kPending of this thread's latest groups are unfinished. Other
// threads see the data after a barrier that follows.
template <int kPending>
__device__ __forceinline__ void CopyAsyncWait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Loads a word of global memory that this kernel does not write, aligned to its size, if
// any bit of `exists` is set, and else leaves the register as it is.
__device__ __forceinline__ void LoadIf(unsigned short& word, const void* from,
                                       unsigned exists) {
  asm("{\n"
      "  .reg .pred some;\n"
      "  setp.ne.s32 some, %2, 0;\n"
      "  @some ld.global.nc.u16 %0, [%1];\n"
      "}\n"
      : "+h"(word)
      : "l"(from), "r"(exists));
}
__device__ __forceinline__ void LoadIf(unsigned& word, const void* from,
                                       unsigned exists) {
  asm("{\n"
      "  .reg .pred some;\n"
      "  setp.ne.s32 some, %2, 0;\n"
      "  @some ld.global.nc.u32 %0, [%1];\n"
      "}\n"
      : "+r"(word)
      : "l"(from), "r"(exists));
}
__device__ __forceinline__ void LoadIf(unsigned long long& word, const void* from,
                                       unsigned exists) {
  asm("{\n"
      "  .reg .pred some;\n"
      "  setp.ne.s32 some, %2, 0;\n"
      "  @some ld.global.nc.u64 %0, [%1];\n"
      "}\n"
      : "+l"(word)
      : "l"(from), "r"(exists));
}

// Makes the compiler forget how a value came about: it then computes what follows from it
// where it is used, one step after the other, rather than keep it all in registers.
__device__ __forceinline__ void Forget(uint32_t& v) { asm("" : "+r"(v)); }
template <typename T>
__device__ __forceinline__ void Forget(T*& p) {
  asm("" : "+l"(p));
  __builtin_assume(__isGlobal(p));
}

#else

template <typename Word>
void LoadIf(Word& word, const void* from, unsigned exists) {
  struct alignas(sizeof(Word)) Bytes {
    unsigned char byte[sizeof(Word)];
  };
  if (exists == 0) return;
  const Bytes bytes = *static_cast<const Bytes*>(from);
  std::memcpy(&word, &bytes, sizeof(word));
}

template <typename T>
void Forget(T&) {}

using cuda_emulator::CopyAsync;
using cuda_emulator::CopyAsyncCommit;
using cuda_emulator::CopyAsyncWait;
using cuda_emulator::LoadMatrixX4;
using cuda_emulator::LoadMatrixX4Transposed;
using cuda_emulator::MmaBf16;
using cuda_emulator::MmaF16;
using cuda_emulator::MmaTf32;
using cuda_emulator::RoundToTf32;

inline void CopyAsyncOrZero(void* to, const void* from, bool exists) {
  CopyAsync<16>(to, from, exists ? 16 : 0);
}

#endif

}  // namespace convgrad
