// Vectors of the instruction set that this file is compiled for, and the four element
// types: loads that widen to the accumulation type, stores that round from it (to
// nearest even, NaN stays NaN), and an in-register transpose.
//
// GCC/Clang vector extensions: one source for AVX-512, AVX2, SSE2 and NEON. A vector
// wider than the machine's is correct, and split by the compiler.

#pragma once

#include <cstdint>

#include "../phase.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

// Vectors wider than the machine's are passed in memory; nothing here is an interface.
#pragma GCC diagnostic ignored "-Wpsabi"

#define CONVGRAD_INLINE inline __attribute__((always_inline))

// For what is large and called once for many products: one copy serves all callers.
#if defined(__clang__)
#define CONVGRAD_NOINLINE __attribute__((noinline))
#else
#define CONVGRAD_NOINLINE __attribute__((noinline, noclone))
#endif

// Before a loop over registers; its trip count is a constant of at most 16.
#if defined(__clang__)
#define CONVGRAD_UNROLL _Pragma("unroll")
#else
#define CONVGRAD_UNROLL _Pragma("GCC unroll 16")
#endif

namespace convgrad {
namespace CONVGRAD_ISA {
namespace {

#if defined(__AVX512F__) || defined(CONVGRAD_EMULATE_AMX)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kVectorRegisters = 32;
#else
constexpr int kVectorRegisters = 16;
#endif

template <typename A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

// The accumulation type of an element type.
template <typename T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <typename T>
using Acc = typename AccOf<T>::type;

template <typename E, int N>
struct VecOf {
  typedef E type __attribute__((vector_size(N * sizeof(E))));
};
template <typename E, int N>
using Vec = typename VecOf<E, N>::type;

// The integer type of the same width.
template <typename E>
struct IntOf {
  using type = int32_t;
};
template <>
struct IntOf<double> {
  using type = int64_t;
};

template <typename E, int N>
CONVGRAD_INLINE Vec<E, N> LoadRaw(const void* p) {
  Vec<E, N> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

// mask lanes are all ones or all zeros.
template <typename V>
CONVGRAD_INLINE V Select(const V& mask, const V& a, const V& b) {
  return (mask & a) | (~mask & b);
}

// The first `count` lanes, and zeros.
template <typename E, int N>
CONVGRAD_INLINE Vec<E, N> KeepLeading(const Vec<E, N>& v, int64_t count) {
  using I = Vec<typename IntOf<E>::type, N>;
  I lane{};
  CONVGRAD_UNROLL
  for (int i = 0; i < N; ++i) lane[i] = i;
  const auto limit = static_cast<typename IntOf<E>::type>(count);
  return (Vec<E, N>)((I)v & (lane < limit));
}

template <int N>
CONVGRAD_INLINE Vec<float, N> Load(const float* p) {
  return LoadRaw<float, N>(p);
}

template <int N>
CONVGRAD_INLINE Vec<double, N> Load(const double* p) {
  return LoadRaw<double, N>(p);
}

template <int N>
CONVGRAD_INLINE Vec<float, N> Load(const BF16* p) {
  using U = Vec<uint32_t, N>;
  return (Vec<float, N>)(__builtin_convertvector(LoadRaw<uint16_t, N>(p), U) << 16);
}

// No step makes a float32 subnormal: XLA runs with those flushed to zero. The processor's
// own conversions keep subnormal halves whatever it does with those of float32.
template <int N>
CONVGRAD_INLINE Vec<float, N> Load(const F16* p) {
#if defined(__AVX512F__)
  if constexpr (N == 16) {
    // Masked by ones: GCC 12 warns that the plain intrinsic's source is uninitialised.
    return (Vec<float, N>)_mm512_maskz_cvtph_ps(-1, (__m256i)LoadRaw<uint16_t, N>(p));
  }
#endif
#if defined(__F16C__)
  if constexpr (N == 8) {
    return (Vec<float, N>)_mm256_cvtph_ps((__m128i)LoadRaw<uint16_t, N>(p));
  }
  if constexpr (N == 1) return Vec<float, N>{_cvtsh_ss(p->bits)};
#endif
  using I = Vec<int32_t, N>;
  using U = Vec<uint32_t, N>;
  using F = Vec<float, N>;
  const I h = (I) __builtin_convertvector(LoadRaw<uint16_t, N>(p), U);
  const I magnitude = h & 0x7fff;
  const I normal = (magnitude << 13) + ((127 - 15) << 23);
  const I special = (magnitude << 13) | 0x7f800000;
  const I tiny = (I)(__builtin_convertvector(magnitude, F) * 0x1p-24f);
  I bits = Select<I>(magnitude >= 0x7c00, special, normal);
  bits = Select<I>(magnitude < 0x0400, tiny, bits);
  return (F)(bits | ((h & 0x8000) << 16));
}

template <int N>
CONVGRAD_INLINE void Store(float* p, const Vec<float, N>& v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

template <int N>
CONVGRAD_INLINE void Store(double* p, const Vec<double, N>& v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

template <int N>
CONVGRAD_INLINE void Store(BF16* p, const Vec<float, N>& v) {
#if defined(__AVX512BF16__)
  if constexpr (N == 16) {  // the same, but subnormals are flushed
    const auto half = _mm512_cvtneps_pbh((__m512)v);
    __builtin_memcpy(p, &half, sizeof(half));
    return;
  }
#endif
  using I = Vec<int32_t, N>;
  const I bits = (I)v;
  const I rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const I nan = bits | 0x00400000;
  const I out = Select<I>((bits & 0x7fffffff) > 0x7f800000, nan, rounded);
  const auto half =
      __builtin_convertvector((Vec<uint32_t, N>)out >> 16, Vec<uint16_t, N>);
  __builtin_memcpy(p, &half, sizeof(half));
}

template <int N>
CONVGRAD_INLINE void Store(F16* p, const Vec<float, N>& v) {
#if defined(__AVX512F__)
  if constexpr (N == 16) {
    const auto half = _mm512_maskz_cvtps_ph(-1, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
    __builtin_memcpy(p, &half, sizeof(half));
    return;
  }
#endif
#if defined(__F16C__)
  if constexpr (N == 8) {
    const auto half = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
    __builtin_memcpy(p, &half, sizeof(half));
    return;
  }
#endif
  using I = Vec<int32_t, N>;
  using F = Vec<float, N>;
  const I bits = (I)v;
  const I magnitude = bits & 0x7fffffff;
  // Adding 1/2 leaves multiples of 2^-24, a half subnormal's unit, in the low bits.
  const I tiny = (I)((F)magnitude + 0.5f) - 0x3f000000;
  const I normal =
      (magnitude - ((127 - 15) << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  I out = Select<I>(magnitude < ((127 - 14) << 23), tiny, normal);
  // 65520 is the least magnitude that rounds to infinity.
  out = Select<I>(magnitude >= 0x477ff000, I{} + 0x7c00, out);
  out = Select<I>(magnitude > 0x7f800000, 0x7e00 | ((magnitude >> 13) & 0x03ff), out);
  out |= (bits >> 16) & 0x8000;
  const auto half = __builtin_convertvector((Vec<uint32_t, N>)out, Vec<uint16_t, N>);
  __builtin_memcpy(p, &half, sizeof(half));
}

template <typename T>
CONVGRAD_INLINE Acc<T> LoadOne(const T* p) {
  return Load<1>(p)[0];
}
template <>
CONVGRAD_INLINE float LoadOne<float>(const float* p) {
  return *p;
}
template <>
CONVGRAD_INLINE double LoadOne<double>(const double* p) {
  return *p;
}

template <typename T>
CONVGRAD_INLINE void StoreOne(T* p, Acc<T> value) {
  Store<1>(p, Vec<Acc<T>, 1>{value});
}
template <>
CONVGRAD_INLINE void StoreOne<float>(float* p, float value) {
  *p = value;
}
template <>
CONVGRAD_INLINE void StoreOne<double>(double* p, double value) {
  *p = value;
}

// Contiguous elements to values[0 .. count).
template <typename T>
CONVGRAD_INLINE void LoadRun(const T* p, int64_t count, Acc<T>* values) {
  constexpr int N = kLanes<Acc<T>>;
  int64_t i = 0;
  for (; i + N <= count; i += N) Store<N>(values + i, Load<N>(p + i));
  for (; i < count; ++i) values[i] = LoadOne(p + i);
}

// values[0 .. count) to contiguous elements.
template <typename T>
CONVGRAD_INLINE void StoreRun(T* p, const Acc<T>* values, int64_t count) {
  constexpr int N = kLanes<Acc<T>>;
  int64_t i = 0;
  for (; i + N <= count; i += N) Store<N>(p + i, Load<N>(values + i));
  if constexpr (N > 4) {
    for (; i + 4 <= count; i += 4) Store<4>(p + i, Load<4>(values + i));
  }
  for (; i < count; ++i) StoreOne(p + i, values[i]);
}

// a[0] b[0] a[1] b[1] ... : the first N of the 2N values, or the last N.
template <typename E, int N, int kFirst>
CONVGRAD_INLINE Vec<E, N> Interleave(const Vec<E, N>& a, const Vec<E, N>& b) {
  Vec<typename IntOf<E>::type, N> index;
  for (int i = 0; i < N; ++i) index[i] = (i % 2) * N + (i + kFirst) / 2;
#if defined(__clang__)
  Vec<E, N> out;
  for (int i = 0; i < N; ++i) {
    out[i] = (i % 2) ? b[(i + kFirst) / 2] : a[(i + kFirst) / 2];
  }
  return out;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

// Lane i is lane index[i] of the 2N lanes of a and b.
template <typename E, int N>
CONVGRAD_INLINE Vec<E, N> Pick(const Vec<E, N>& a, const Vec<E, N>& b,
                               const Vec<typename IntOf<E>::type, N>& index) {
#if defined(__clang__)
  Vec<E, N> out;
  for (int i = 0; i < N; ++i) out[i] = index[i] < N ? a[index[i]] : b[index[i] - N];
  return out;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

// v[index[i]] in lane i.
template <typename E, int N>
CONVGRAD_INLINE Vec<E, N> Permute(const Vec<E, N>& v,
                                  const Vec<typename IntOf<E>::type, N>& index) {
#if defined(__clang__)
  Vec<E, N> out;
  for (int i = 0; i < N; ++i) out[i] = v[index[i]];
  return out;
#else
  return __builtin_shuffle(v, index);
#endif
}

// Transposes N rows of N lanes: log2(N) rounds, each interleaving row i with row
// i + N/2 (a perfect shuffle of the 2*log2(N) index bits, one bit a round).
template <typename E, int N>
CONVGRAD_INLINE void Transpose(Vec<E, N>* rows) {
  static_assert((N & (N - 1)) == 0, "lanes come in powers of two");
  CONVGRAD_UNROLL
  for (int round = 1; round < N; round *= 2) {
    Vec<E, N> next[N];
    CONVGRAD_UNROLL
    for (int i = 0; i < N / 2; ++i) {
      next[2 * i] = Interleave<E, N, 0>(rows[i], rows[i + N / 2]);
      next[2 * i + 1] = Interleave<E, N, N>(rows[i], rows[i + N / 2]);
    }
    CONVGRAD_UNROLL
    for (int i = 0; i < N; ++i) rows[i] = next[i];
  }
}

// ---- sums across lanes ------------------------------------------------------------

// Lane l holds two lanes' sum, l and l^kStep: of a where kStep is not in l, else of b.
template <typename A, int kStep>
CONVGRAD_INLINE Vec<A, kLanes<A>> AddPair(const Vec<A, kLanes<A>>& a,
                                          const Vec<A, kLanes<A>>& b) {
  constexpr int L = kLanes<A>;
  Vec<typename IntOf<A>::type, L> kept, moved;
  for (int l = 0; l < L; ++l) {
    kept[l] = (l & kStep) != 0 ? L + l : l;
    moved[l] = (l & kStep) != 0 ? L + (l ^ kStep) : l ^ kStep;
  }
  return Pick<A, L>(a, b, kept) + Pick<A, L>(a, b, moved);
}

// The sums of kCount vectors, a power of two and at most L, in the leading lanes.
template <typename A, int kCount, int kStep = 1>
CONVGRAD_INLINE Vec<A, kLanes<A>> AddLanes(const Vec<A, kLanes<A>>* sum) {
  using V = Vec<A, kLanes<A>>;
  if constexpr (kCount > 1) {
    V half[kCount / 2];
    CONVGRAD_UNROLL
    for (int i = 0; i < kCount / 2; ++i) {
      half[i] = AddPair<A, kStep>(sum[2 * i], sum[2 * i + 1]);
    }
    return AddLanes<A, kCount / 2, 2 * kStep>(half);
  } else if constexpr (kStep < kLanes<A>) {
    const V both = AddPair<A, kStep>(sum[0], sum[0]);
    return AddLanes<A, 1, 2 * kStep>(&both);
  } else {
    return sum[0];
  }
}

// ---- geometry ---------------------------------------------------------------------

// Taps t in [lo, hi) of a phase that read inside [0, out) at phase position i.
struct TapRange {
  int64_t lo, hi;
};

CONVGRAD_INLINE TapRange ValidTaps(const Phase& f, int64_t out, int64_t i) {
  const int64_t p = f.p0 + i * f.p_per_h;  // what tap 0 reads; tap t reads p - t*p_per_r
  if (f.r_count == 0 || p < 0) return {0, 0};
  const int64_t d = f.p_per_r;
  int64_t lo, hi;
  if (d == 1) {
    lo = p < out ? 0 : p - out + 1;
    hi = p + 1;
  } else {
    lo = p < out ? 0 : (p - out) / d + 1;
    hi = p / d + 1;
  }
  if (hi > f.r_count) hi = f.r_count;
  if (lo > hi) lo = hi;
  return {lo, hi};
}

// True if the value is an infinity or a NaN; `sum` collected value * 0.
template <typename A>
CONVGRAD_INLINE bool HasNonfinite(A sum) {
  return !(sum == 0);
}

}  // namespace
}  // namespace CONVGRAD_ISA
}  // namespace convgrad
