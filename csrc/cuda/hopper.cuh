// The instructions of sm_90a that CUDA C++ has no word for, one function each, as in
// primitives.cuh: PTX under nvcc, elsewhere the emulator's model (tests/emulator). They
// exist for code compiled for sm_90a alone; CONVGRAD_HOPPER says whether this is that.

#pragma once

#include <cstdint>

#include "platform.cuh"
#include "primitives.cuh"

#ifdef __CUDACC__
#include <cuda.h>
#endif

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define CONVGRAD_HOPPER
#endif

namespace convgrad {

// Rows of an operand have 128 bytes, whose chunks of 16 are permuted: chunk ^ (row % 8).
// A tile begins at a multiple of eight rows.
constexpr int kSwizzleBytes = 128;
constexpr int kSwizzleAtomBytes = 8 * kSwizzleBytes;

constexpr int kWarpgroupThreads = 128;

#ifdef __CUDACC__

// True for one lane of a warp, which all of it asks. The compiler knows that it is one:
// it needs no loop over lanes around what that one tells TMA.
__device__ __forceinline__ bool ElectLane() {
  unsigned elected;
  asm volatile(
      "{\n"
      "  .reg .pred elected;\n"
      "  elect.sync _|elected, 0xffffffff;\n"
      "  selp.u32 %0, 1, 0, elected;\n"
      "}\n"
      : "=r"(elected));
  return elected != 0;
}

// ---- barriers in shared memory ----------------------------------------------------

// An mbarrier is 8 bytes of shared memory. A phase of it ends when `arrivals` threads
// have arrived and all bytes that they expect have come; the first phase has parity 0.
__device__ __forceinline__ void MbarrierInit(uint64_t* barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(SharedAddress(barrier)),
               "r"(arrivals)
               : "memory");
}

// Lets TMA see the barriers that this thread has initialised. Other threads need a
// barrier as well.
__device__ __forceinline__ void MbarrierFenceInit() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void MbarrierArrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(SharedAddress(barrier))
               : "memory");
}

// Arrives, and makes the phase wait for so many bytes that TMA copies.
__device__ __forceinline__ void MbarrierArriveExpect(uint64_t* barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   SharedAddress(barrier)),
               "r"(bytes)
               : "memory");
}

#ifdef CONVGRAD_BOUNDED_WAITS
// In programs that test the kernels a wait that takes so many seconds stops the kernel: a
// copy that never comes must not hang the machine. The wait is described in the host's
// memory, which outlasts that, and not by printf: around a call the products of a
// warpgroup would run one after the other.
struct EndlessWait {
  int found;
  unsigned parity, barrier, block, thread;
};
static __device__ EndlessWait* endless_wait;  // each source has its own

static __device__ __forceinline__ void BoundWait(uint64_t* first, const uint64_t* barrier,
                                                 unsigned parity) {
  constexpr uint64_t kMostNanoseconds = uint64_t{CONVGRAD_BOUNDED_WAITS} * 1000000000;
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  if (*first == 0) *first = now;
  if (now - *first <= kMostNanoseconds) return;
  if (endless_wait != nullptr) {
    *endless_wait = {1, parity, SharedAddress(barrier), blockIdx.x, threadIdx.x};
    __threadfence_system();
  }
  __trap();
}
#endif

// Returns once the phase of this parity has ended: at once if it is not the current one.
__device__ __forceinline__ void MbarrierWait(uint64_t* barrier, unsigned parity) {
#ifdef CONVGRAD_BOUNDED_WAITS
  uint64_t first = 0;
  for (unsigned done = 0;;) {
    asm volatile(
        "{\n"
        "  .reg .pred done;\n"
        "  mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "  selp.u32 %0, 1, 0, done;\n"
        "}\n"
        : "=r"(done)
        : "r"(SharedAddress(barrier)), "r"(parity)
        : "memory");
    if (done != 0) return;
    BoundWait(&first, barrier, parity);
  }
#else
  asm volatile(
      "{\n"
      "  .reg .pred done;\n"
      "again:\n"
      "  mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "  @!done bra again;\n"
      "}\n" ::"r"(SharedAddress(barrier)),
      "r"(parity)
      : "memory");
#endif
}

// ---- copies of a tensor map's box -------------------------------------------------

// Stores to shared memory what TMA or the tensor cores will read. `to` is aligned to the
// value's size.
template <typename T>
__device__ __forceinline__ void StoreShared(void* to, const T& value) {
  *reinterpret_cast<T*>(to) = value;
}

// Shows this thread's stores to shared memory to TMA and the tensor cores; their readers
// need a barrier after it. Copies of cp.async, unlike those of TMA, are such stores too,
// once they have been waited for (PTX ISA, "Async proxy").
__device__ __forceinline__ void FenceProxyAsync() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Has TMA read a map ahead of the first copy by it.
__device__ __forceinline__ void PrefetchTensorMap(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Starts copying the box at `at`, innermost dimension first, to shared memory; what lies
// outside the tensor becomes zero. The bytes count for the current phase of `barrier`.
// The map is a kernel's __grid_constant__ parameter.
template <int kRank>
__device__ __forceinline__ void TmaLoad(void* to, const CUtensorMap* map,
                                        uint64_t* barrier, const int (&at)[kRank]) {
  static_assert(kRank == 3 || kRank == 5, "of the dimensions that a filter is given");
  if constexpr (kRank == 3) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(SharedAddress(to)),
        "l"(map), "r"(SharedAddress(barrier)), "r"(at[0]), "r"(at[1]), "r"(at[2])
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(SharedAddress(to)),
        "l"(map), "r"(SharedAddress(barrier)), "r"(at[0]), "r"(at[1]), "r"(at[2]),
        "r"(at[3]), "r"(at[4])
        : "memory");
  }
}

// The same for a column of pixels of an image (channels, axes from the innermost,
// images). `at` is the first pixel, within the map's bounding box; the next one follows
// within that box, and after the last axis in the next image. What is copied lies
// `offset` beyond each pixel, the innermost axis first.
template <int kRank>
__device__ __forceinline__ void TmaLoadIm2col(void* to, const CUtensorMap* map,
                                              uint64_t* barrier, const int (&at)[kRank],
                                              const uint16_t (&offset)[kRank - 2]) {
  static_assert(3 <= kRank && kRank <= 5, "one to three axes");
  if constexpr (kRank == 3) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.im2col.mbarrier::complete_tx"
        "::bytes [%0], [%1, {%3, %4, %5}], [%2], {%6};" ::"r"(SharedAddress(to)),
        "l"(map), "r"(SharedAddress(barrier)), "r"(at[0]), "r"(at[1]), "r"(at[2]),
        "h"(offset[0])
        : "memory");
  } else if constexpr (kRank == 4) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx"
        "::bytes [%0], [%1, {%3, %4, %5, %6}], [%2], {%7, %8};" ::"r"(SharedAddress(to)),
        "l"(map), "r"(SharedAddress(barrier)), "r"(at[0]), "r"(at[1]), "r"(at[2]),
        "r"(at[3]), "h"(offset[0]), "h"(offset[1])
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.im2col.mbarrier::complete_tx"
        "::bytes [%0], [%1, {%3, %4, %5, %6, %7}], [%2], {%8, %9, %10};" ::"r"(
            SharedAddress(to)),
        "l"(map), "r"(SharedAddress(barrier)), "r"(at[0]), "r"(at[1]), "r"(at[2]),
        "r"(at[3]), "r"(at[4]), "h"(offset[0]), "h"(offset[1]), "h"(offset[2])
        : "memory");
  }
}

// ---- products of a warpgroup ------------------------------------------------------

// Orders the threads' accesses to the sums before the products that follow. Needed before
// the first product of a group.
__device__ __forceinline__ void WgmmaFence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// Closes the group of the products since the last call.
__device__ __forceinline__ void WgmmaCommit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most kPending of the latest groups are unfinished. Sums and operands are
// the products' until then.
template <int kPending>
__device__ __forceinline__ void WgmmaWait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps what is computed from a sum behind a wait before this, and what it is set to
// before a fence after this: the compiler does not know that products go on by
// themselves.
__device__ __forceinline__ void PinSum(float& sum) {
  asm volatile("" : "+f"(sum)::"memory");
}

// d[64][kColumns] += a * b by the four warps of a warpgroup, over 32 bytes of K. Operands
// are descriptors (below). With r = 16*warp + lane/4 and c = 2*(lane%4), d[4*j + 2*i + e]
// of a lane is the sum of row r + 8*i and column c + 8*j + e.
#define WGMMA_D0                                           \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
  "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define WGMMA_D32                                                    \
  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47," \
  "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define WGMMA_D64                                                                \
  "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,"             \
  "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,"             \
  "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111," \
  "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define WGMMA_SUMS0                                                                   \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), \
      "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]),      \
      "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]),   \
      "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),   \
      "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]),   \
      "+f"(d[31])
#define WGMMA_SUMS32                                                                \
  "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]),     \
      "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), \
      "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]), \
      "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), \
      "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), \
      "+f"(d[62]), "+f"(d[63])
#define WGMMA_SUMS64                                                                \
  "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]),     \
      "+f"(d[70]), "+f"(d[71]), "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), \
      "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]), "+f"(d[80]), "+f"(d[81]), \
      "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), \
      "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), \
      "+f"(d[94]), "+f"(d[95]), "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), \
      "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103]), "+f"(d[104]),         \
      "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]),         \
      "+f"(d[110]), "+f"(d[111]), "+f"(d[112]), "+f"(d[113]), "+f"(d[114]),         \
      "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]),         \
      "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]),         \
      "+f"(d[125]), "+f"(d[126]), "+f"(d[127])

// `a_at`, `b_at` and `by_rows` are the numbers of the operands after the sums.
#define WGMMA_16(columns, type, registers, sums, a_at, b_at, by_rows)               \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type \
               " {" registers "}, " a_at ", " b_at ", 1, 1, 1, 0, " by_rows ";"     \
               : sums                                                               \
               : "l"(a), "l"(b), "n"(static_cast<int>(kByRows)))
#define WGMMA_TF32(columns, registers, sums, a_at, b_at)                        \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" columns                      \
               "k8.f32.tf32.tf32 {" registers "}, " a_at ", " b_at ", 1, 1, 1;" \
               : sums                                                           \
               : "l"(a), "l"(b))
#define WGMMA_COMMA ,
#define WGMMA_16_BY_COLUMNS(type)                                                       \
  static_assert(kColumns == 64 || kColumns == 128 || kColumns == 256, "n of a tile");   \
  if constexpr (kColumns == 64) {                                                       \
    WGMMA_16("64", type, WGMMA_D0, WGMMA_SUMS0, "%32", "%33", "%34");                   \
  } else if constexpr (kColumns == 128) {                                               \
    WGMMA_16("128", type, WGMMA_D0 "," WGMMA_D32, WGMMA_SUMS0 WGMMA_COMMA WGMMA_SUMS32, \
             "%64", "%65", "%66");                                                      \
  } else {                                                                              \
    WGMMA_16("256", type, WGMMA_D0 "," WGMMA_D32 "," WGMMA_D64,                         \
             WGMMA_SUMS0 WGMMA_COMMA WGMMA_SUMS32 WGMMA_COMMA WGMMA_SUMS64, "%128",     \
             "%129", "%130");                                                           \
  }

// kByRows: K runs from row to row of B, as it lies in memory, rather than along the rows.
template <int kColumns, bool kByRows>
__device__ __forceinline__ void WgmmaBf16(float (&d)[kColumns / 2], uint64_t a,
                                          uint64_t b) {
  WGMMA_16_BY_COLUMNS("bf16")
}

template <int kColumns, bool kByRows>
__device__ __forceinline__ void WgmmaF16(float (&d)[kColumns / 2], uint64_t a,
                                         uint64_t b) {
  WGMMA_16_BY_COLUMNS("f16")
}

// f32 bit patterns. The tensor core reads their upper 19 bits.
template <int kColumns>
__device__ __forceinline__ void WgmmaTf32(float (&d)[kColumns / 2], uint64_t a,
                                          uint64_t b) {
  static_assert(kColumns == 64 || kColumns == 128 || kColumns == 256, "n of a tile");
  if constexpr (kColumns == 64) {
    WGMMA_TF32("64", WGMMA_D0, WGMMA_SUMS0, "%32", "%33");
  } else if constexpr (kColumns == 128) {
    WGMMA_TF32("128", WGMMA_D0 "," WGMMA_D32, WGMMA_SUMS0 WGMMA_COMMA WGMMA_SUMS32, "%64",
               "%65");
  } else {
    WGMMA_TF32("256", WGMMA_D0 "," WGMMA_D32 "," WGMMA_D64,
               WGMMA_SUMS0 WGMMA_COMMA WGMMA_SUMS32 WGMMA_COMMA WGMMA_SUMS64, "%128",
               "%129");
  }
}

#undef WGMMA_D0
#undef WGMMA_D32
#undef WGMMA_D64
#undef WGMMA_SUMS0
#undef WGMMA_SUMS32
#undef WGMMA_SUMS64
#undef WGMMA_16
#undef WGMMA_TF32
#undef WGMMA_COMMA
#undef WGMMA_16_BY_COLUMNS

// Sets the registers of each of the warpgroup's threads, to more or to fewer than it has.
template <int kRegisters>
__device__ __forceinline__ void TakeRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void GiveRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

#else

inline void PinSum(float&) {}
inline void PrefetchTensorMap(const CUtensorMap*) {}

using cuda_emulator::ElectLane;
using cuda_emulator::FenceProxyAsync;
using cuda_emulator::GiveRegisters;
using cuda_emulator::MbarrierArrive;
using cuda_emulator::MbarrierArriveExpect;
using cuda_emulator::MbarrierFenceInit;
using cuda_emulator::MbarrierInit;
using cuda_emulator::MbarrierWait;
using cuda_emulator::SharedAddress;
using cuda_emulator::StoreShared;
using cuda_emulator::TakeRegisters;
using cuda_emulator::TmaLoad;
using cuda_emulator::TmaLoadIm2col;
using cuda_emulator::WgmmaBf16;
using cuda_emulator::WgmmaCommit;
using cuda_emulator::WgmmaF16;
using cuda_emulator::WgmmaFence;
using cuda_emulator::WgmmaTf32;
using cuda_emulator::WgmmaWait;

#endif

// ---- descriptors of operands ------------------------------------------------------

// `address` is that of the first row in shared memory, plus the bytes of K that products
// before have used; distances are in bytes.
__device__ __forceinline__ uint64_t OperandDescriptor(uint32_t address, uint32_t leading,
                                                      uint32_t stride) {
  constexpr uint64_t kSwizzle128 = 1;
  return uint64_t{address >> 4 & 0x3fff} | uint64_t{leading >> 4} << 16 |
         uint64_t{stride >> 4} << 32 | kSwizzle128 << 62;
}

// Each row or column has its K along 128 bytes.
__device__ __forceinline__ uint64_t OperandAlongK(uint32_t address) {
  return OperandDescriptor(address, 16, kSwizzleAtomBytes);  // the first is not used
}

// Each k has 64 columns of 16-bit values along 128 bytes; the next 64 columns lie
// `panel_bytes` further.
__device__ __forceinline__ uint64_t OperandByRows(uint32_t address,
                                                  uint32_t panel_bytes) {
  return OperandDescriptor(address, panel_bytes, kSwizzleAtomBytes);
}

}  // namespace convgrad
