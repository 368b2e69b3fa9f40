// What the gemm kernel multiplies: an operand holds the values of one element of dY or of
// the filter, widened to the accumulation type, or those of two neighbouring out channels
// in bfloat16, as AVX512-BF16 (vdpbf16ps) and AMX (tdpbf16ps, gemm_amx.h) take them. With
// pairs a sum over K out channels has CeilDiv(K, 2) operands. If K is odd, half of the
// last one is zero. Nothing else of the kernel differs.
//
// Those instructions take subnormal bfloat16 values as zeros and flush subnormal sums, as
// XLA does. A channels-last dY with an even K is an array of pairs as it stands.

#pragma once

#include "job.h"
#include "vec.h"

// The emulation of AMX (gemm_amx.h) runs on any processor.
#if defined(__AVX512BF16__) || defined(CONVGRAD_EMULATE_AMX)
#define CONVGRAD_PAIRS
#endif
#if defined(__AMX_BF16__) || defined(CONVGRAD_EMULATE_AMX)
#define CONVGRAD_TILES
#endif

namespace convgrad {
namespace CONVGRAD_ISA {
namespace {

#if defined(CONVGRAD_TILES)
constexpr bool kHasTiles = true;
#else
constexpr bool kHasTiles = false;
#endif
constexpr int64_t kDepthStep = kHasTiles ? kTileChannels / 2 : 1;  // in operands

using Pair = int32_t;  // the first of two bfloat16 in the low half

// The operand of an element type.
template <typename T>
struct OperandOf {
  using type = Acc<T>;
};
#if defined(CONVGRAD_PAIRS)
template <>
struct OperandOf<BF16> {
  using type = Pair;
};
#endif
template <typename T>
using Operand = typename OperandOf<T>::type;

// What sums of their products are kept in: of the same size.
template <typename O>
struct SumOf {
  using type = O;
};
template <>
struct SumOf<Pair> {
  using type = float;
};
template <typename O>
using Sum = typename SumOf<O>::type;

template <typename O>
constexpr int kPerOperand = 1;  // out channels
template <>
constexpr int kPerOperand<Pair> = 2;

// Operands that hold all out channels of a group.
template <typename O>
CONVGRAD_INLINE int64_t Depth(const Problem& p) {
  return CeilDiv(p.out_channels, kPerOperand<O>);
}

// Operands [0, N) along the out channels, which lie side by side: all pairs are full.
template <typename O, int N, typename T>
CONVGRAD_INLINE Vec<O, N> LoadAlong(const T* p) {
  if constexpr (kPerOperand<O> == 2) {
    return LoadRaw<O, N>(p);
  } else {
    return Load<N>(p);
  }
}

// One operand of each of N neighbours; the second out channel of a pair is k_step on, or
// there is none.
template <typename O, int N, typename T>
CONVGRAD_INLINE Vec<O, N> LoadAcross(const T* p, int64_t k_step, bool half) {
  if constexpr (kPerOperand<O> == 2) {
    using U = Vec<uint32_t, N>;
    U pairs = __builtin_convertvector(LoadRaw<uint16_t, N>(p), U);
    if (!half)
      pairs |= __builtin_convertvector(LoadRaw<uint16_t, N>(p + k_step), U) << 16;
    return (Vec<O, N>)pairs;
  } else {
    return Load<N>(p);
  }
}

template <typename O, typename T>
CONVGRAD_INLINE O LoadOperand(const T* p, int64_t k_step, bool half) {
  if constexpr (kPerOperand<O> == 2) {
    const uint32_t second = half ? 0 : p[k_step].bits;
    return static_cast<O>(p->bits | second << 16);
  } else {
    return LoadOne(p);
  }
}

template <int N>
CONVGRAD_INLINE Vec<Pair, N> Load(const Pair* p) {
  return LoadRaw<Pair, N>(p);
}
template <int N>
CONVGRAD_INLINE void Store(Pair* p, const Vec<Pair, N>& v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

// sum += column * row, each lane's one or two products.
template <int N, typename O>
CONVGRAD_INLINE void AddProducts(Vec<Sum<O>, N>* sum, const Vec<O, N>& column, O row) {
  if constexpr (kPerOperand<O> == 1) {
    *sum += column * row;
  } else {
#if defined(__AVX512BF16__)
    if constexpr (N == 16) {
      *sum = (Vec<float, N>)_mm512_dpbf16_ps((__m512)*sum, (__m512bh)column,
                                             (__m512bh)_mm512_set1_epi32(row));
      return;
    }
#endif
    const Vec<Pair, N> rows = Vec<Pair, N>{} + row;
    *sum += (Vec<float, N>)(column << 16) * (Vec<float, N>)(rows << 16);
    *sum += (Vec<float, N>)(column & -65536) * (Vec<float, N>)(rows & -65536);
  }
}

// sum[i][v] += b[v] * a(i): a row of a packed panel times one operand of each row.
template <typename O, int kRows, int kVecs, typename OperandOfRow>
CONVGRAD_INLINE void AddOuterProduct(Vec<Sum<O>, kLanes<O>> (&sum)[kRows][kVecs],
                                     const O* b, const OperandOfRow& a) {
  constexpr int L = kLanes<O>;
  Vec<O, L> column[kVecs];
  CONVGRAD_UNROLL
  for (int v = 0; v < kVecs; ++v) column[v] = Load<L>(b + v * L);
  CONVGRAD_UNROLL
  for (int i = 0; i < kRows; ++i) {
    CONVGRAD_UNROLL
    for (int v = 0; v < kVecs; ++v) AddProducts<L, O>(&sum[i][v], column[v], a(i));
  }
}

// Keeps a sum zero unless an operand holds an Inf or a NaN.
template <int N, typename O>
CONVGRAD_INLINE void NoteNonfinite(Vec<Sum<O>, N>* sum, const Vec<O, N>& operands) {
  AddProducts<N, O>(sum, operands, 0);
}
template <typename O>
CONVGRAD_INLINE void NoteNonfinite(Sum<O>* sum, O operand) {
  Vec<Sum<O>, 1> one{*sum};
  AddProducts<1, O>(&one, Vec<O, 1>{operand}, 0);
  *sum = one[0];
}

}  // namespace
}  // namespace CONVGRAD_ISA
}  // namespace convgrad
