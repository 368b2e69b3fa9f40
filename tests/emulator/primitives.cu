// Every primitive of the emulator against a model that shares no code with it: the
// operand layouts as PTX documents them, by their formulas from a lane and a register to
// a row and a column, and conversions against a search through all values of the narrow
// type.
//
// Prints a line for each failure; exit status 1 if there was one.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

#include "cuda/platform.cuh"
#include "cuda/primitives.cuh"

namespace convgrad {
namespace {

int failures = 0;

void Expect(bool holds, const char* what, int at) {
  if (holds) return;
  ++failures;
  std::printf("FAIL %s at %d\n", what, at);
}

template <typename Kernel, typename... Arguments>
void RunWarp(Kernel kernel, int shared_bytes, Arguments... arguments) {
  const cudaError_t status =
      CU_LAUNCH(kernel, dim3(1), dim3(32), shared_bytes, cudaStream_t{}, arguments...);
  if (const char* error = ErrorText(status); error != nullptr) {
    Expect(false, error, 0);
  }
}

// ---- conversions ------------------------------------------------------------------

// The value of a narrow float by IEEE's formula.
double ValueOf(uint32_t bits, int exponent_bits, int fraction_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent =
      static_cast<int>(bits >> fraction_bits) & ((1 << exponent_bits) - 1);
  const int fraction = static_cast<int>(bits) & ((1 << fraction_bits) - 1);
  const double sign = (bits >> (exponent_bits + fraction_bits) & 1) != 0 ? -1.0 : 1.0;
  if (exponent == (1 << exponent_bits) - 1) {
    return fraction != 0 ? std::nan("") : sign * std::numeric_limits<double>::infinity();
  }
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias - fraction_bits);
  return sign *
         std::ldexp(fraction + (1 << fraction_bits), exponent - bias - fraction_bits);
}

// Rounds a finite, non-negative value by the definition: the nearer neighbour, the even
// one of two, where the largest number's upper neighbour counts as a number.
uint16_t Nearest(double value, int exponent_bits, int fraction_bits) {
  const uint32_t infinity = ((1u << exponent_bits) - 1) << fraction_bits;
  uint32_t low = 0, high = infinity;  // value_of(low) <= value, increasing in the bits
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    (ValueOf(middle, exponent_bits, fraction_bits) <= value ? low : high) = middle;
  }
  const double below = ValueOf(low, exponent_bits, fraction_bits);
  const double above = high == infinity ? std::ldexp(1.0, 1 << (exponent_bits - 1))
                                        : ValueOf(high, exponent_bits, fraction_bits);
  if (value - below != above - value) {
    return static_cast<uint16_t>(value - below < above - value ? low : high);
  }
  return static_cast<uint16_t>(low % 2 == 0 ? low : high);
}

bool SameNumber(double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); }

template <typename ToFloat, typename FromFloat>
void TestNarrowType(const char* name, int exponent_bits, int fraction_bits,
                    ToFloat to_float, FromFloat from_float) {
  std::vector<float> interesting = {0.0f, 1e-45f, 1e30f, 3.4e38f, 65519.0f, 65520.0f};
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float value = to_float(static_cast<uint16_t>(bits));
    const double expected = ValueOf(bits, exponent_bits, fraction_bits);
    Expect(SameNumber(value, expected), name, static_cast<int>(bits));
    Expect(std::signbit(value) == (bits >> 15 != 0) || std::isnan(value), name,
           static_cast<int>(bits));
    if (!std::isfinite(value)) {
      Expect(SameNumber(to_float(from_float(value)), value), name,
             static_cast<int>(bits));
      continue;
    }
    Expect(from_float(value) == bits, name, static_cast<int>(bits));
    // The tie with the next number, and what is just beside it.
    const double next = ValueOf(bits + 1, exponent_bits, fraction_bits);
    if (bits < 0x8000 && std::isfinite(next)) {
      const float tie = static_cast<float>((expected + next) / 2);
      interesting.insert(interesting.end(),
                         {tie, std::nextafter(tie, 0.0f), std::nextafter(tie, 1e38f)});
    }
  }
  for (float value : interesting) {
    const uint16_t expected = Nearest(value, exponent_bits, fraction_bits);
    Expect(from_float(value) == expected, name, expected);
    Expect(from_float(-value) == (expected | 0x8000), name, expected);
  }
}

void TestTf32() {
  std::mt19937 random(3);
  const auto expect = [](float value) {
    // A multiple of one unit in the 10th place: by llround, which takes ties away from
    // zero.
    int exponent = 0;
    std::frexp(value, &exponent);
    const double unit = std::ldexp(1.0, std::max(exponent - 11, -126 - 10));
    const double expected = static_cast<double>(std::llround(value / unit)) * unit;
    const uint32_t bits = RoundToTf32(value);
    Expect((bits & 0x1fff) == 0, "RoundToTf32 leaves low bits", static_cast<int>(bits));
    Expect(__uint_as_float(bits) == static_cast<float>(expected), "RoundToTf32",
           static_cast<int>(bits));
  };
  for (int i = 0; i < 20000; ++i) {
    const uint32_t bits = static_cast<uint32_t>(random());
    const float value = __uint_as_float(i % 2 == 0 ? bits : (bits & 0xffffe000) | 0x1000);
    if (std::isfinite(value) && std::fabs(value) < 3e38f) expect(value);
  }
  Expect(std::isinf(__uint_as_float(RoundToTf32(INFINITY))), "RoundToTf32 infinity", 0);
  Expect(std::isnan(__uint_as_float(RoundToTf32(NAN))), "RoundToTf32 NaN", 0);
}

// ---- matrices ---------------------------------------------------------------------

// PTX, "Matrix Fragments for mma.m16n8k16" and "m16n8k8": element i of a lane's fragment.
struct At {
  int row, column;
};
At PlaceA16(int lane, int i) {
  const bool lower = i < 2 || (4 <= i && i < 6);
  return {lane / 4 + (lower ? 0 : 8), lane % 4 * 2 + i % 2 + (i < 4 ? 0 : 8)};
}
At PlaceB16(int lane, int i) {
  return {lane % 4 * 2 + i % 2 + (i < 2 ? 0 : 8), lane / 4};
}
At PlaceATf32(int lane, int i) {
  return {i == 0 || i == 2 ? lane / 4 : lane / 4 + 8, i < 2 ? lane % 4 : lane % 4 + 4};
}
At PlaceBTf32(int lane, int i) { return {i == 0 ? lane % 4 : lane % 4 + 4, lane / 4}; }
At PlaceD(int lane, int i) {
  return {i < 2 ? lane / 4 : lane / 4 + 8, lane % 4 * 2 + i % 2};
}

struct Fragments {
  uint32_t a[32][4], b[32][2];
  float d[32][4];
};

enum class Kind { kBf16, kF16, kTf32 };

template <Kind kKind>
__global__ void MmaKernel(Fragments* fragments) {
  const int lane = static_cast<int>(threadIdx.x);
  if (kKind == Kind::kBf16) {
    MmaBf16(fragments->d[lane], fragments->a[lane], fragments->b[lane]);
  } else if (kKind == Kind::kF16) {
    MmaF16(fragments->d[lane], fragments->a[lane], fragments->b[lane]);
  } else {
    MmaTf32(fragments->d[lane], fragments->a[lane], fragments->b[lane]);
  }
}

// A small integer, exact in every type, in the encoding of an operand.
uint32_t Encode(Kind kind, int value) {
  const float v = static_cast<float>(value);
  switch (kind) {
    case Kind::kBf16: return __float2bfloat16(v).bits;
    case Kind::kF16: return __float2half(v).bits;
    // With low bits set, which the tensor core does not read.
    case Kind::kTf32: return __float_as_uint(v) | 0x1fff;
  }
  return 0;
}

template <Kind kKind>
void TestMma(const char* name) {
  constexpr bool kWide = kKind == Kind::kTf32;
  constexpr int kDepth = kWide ? 8 : 16;
  std::mt19937 random(4);
  const auto small = [&random] { return static_cast<int>(random() % 15) - 7; };
  int a[16][kDepth], b[kDepth][8], d[16][8];
  for (auto& row : a) std::generate(std::begin(row), std::end(row), small);
  for (auto& row : b) std::generate(std::begin(row), std::end(row), small);
  for (auto& row : d) std::generate(std::begin(row), std::end(row), small);
  Fragments fragments{};
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < (kWide ? 4 : 8); ++i) {
      const At at = kWide ? PlaceATf32(lane, i) : PlaceA16(lane, i);
      const uint32_t value = Encode(kKind, a[at.row][at.column]);
      fragments.a[lane][kWide ? i : i / 2] |= kWide ? value : value << (16 * (i % 2));
    }
    for (int i = 0; i < (kWide ? 2 : 4); ++i) {
      const At at = kWide ? PlaceBTf32(lane, i) : PlaceB16(lane, i);
      const uint32_t value = Encode(kKind, b[at.row][at.column]);
      fragments.b[lane][kWide ? i : i / 2] |= kWide ? value : value << (16 * (i % 2));
    }
    for (int i = 0; i < 4; ++i) {
      const At at = PlaceD(lane, i);
      fragments.d[lane][i] = static_cast<float>(d[at.row][at.column]);
    }
  }
  RunWarp(MmaKernel<kKind>, 0, &fragments);
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const At at = PlaceD(lane, i);
      int expected = d[at.row][at.column];
      for (int k = 0; k < kDepth; ++k) expected += a[at.row][k] * b[k][at.column];
      Expect(fragments.d[lane][i] == static_cast<float>(expected), name, lane);
    }
  }
}

template <bool kTransposed>
__global__ void LoadMatrixKernel(uint32_t (*r)[4]) {
  CU_DYNAMIC_SHARED(memory);
  uint16_t* const values = reinterpret_cast<uint16_t*>(memory);
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = 0; i < 8; ++i) values[8 * lane + i] = static_cast<uint16_t>(8 * lane + i);
  __syncthreads();
  // Rows in an order of their own, which is the point of giving an address for each.
  const uint16_t* const row = values + 8 * (lane ^ 5);
  if (kTransposed) {
    LoadMatrixX4Transposed(r[lane], row);
  } else {
    LoadMatrixX4(r[lane], row);
  }
}

template <bool kTransposed>
void TestLoadMatrix(const char* name) {
  uint32_t r[32][4] = {};
  RunWarp(LoadMatrixKernel<kTransposed>, 32 * 16, r);
  for (int lane = 0; lane < 32; ++lane) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      for (int i = 0; i < 2; ++i) {
        const int minor = lane % 4 * 2 + i, major = lane / 4;
        const int row = kTransposed ? minor : major, column = kTransposed ? major : minor;
        const uint32_t expected =
            static_cast<uint32_t>(8 * ((8 * matrix + row) ^ 5) + column);
        Expect((r[lane][matrix] >> (16 * i) & 0xffff) == expected, name, lane);
      }
    }
  }
}

// ---- warps, barriers, copies ------------------------------------------------------

struct WarpResults {
  int indexed[32], segment[32], up[32], down[32], exchanged[32];
  unsigned ballot[32];
  int any[32], all[32];
};

__global__ void WarpKernel(WarpResults* out) {
  constexpr unsigned kAll = 0xffffffff;
  const int lane = static_cast<int>(threadIdx.x);
  out->indexed[lane] = __shfl_sync(kAll, 10 * lane, 31 - lane);
  out->segment[lane] = __shfl_sync(kAll, 10 * lane, 9, 8);
  out->up[lane] = __shfl_up_sync(kAll, 10 * lane, 3);
  out->down[lane] = __shfl_down_sync(kAll, 10 * lane, 5, 16);
  out->exchanged[lane] = __shfl_xor_sync(kAll, 10 * lane, 6);
  out->ballot[lane] = __ballot_sync(kAll, lane % 3 == 0);
  out->any[lane] = __any_sync(kAll, lane == 7);
  out->all[lane] = __all_sync(kAll, lane != 7);
}

void TestWarp() {
  WarpResults out{};
  RunWarp(WarpKernel, 0, &out);
  unsigned ballot = 0;
  for (int lane = 0; lane < 32; ++lane) ballot += lane % 3 == 0 ? 1u << lane : 0;
  for (int lane = 0; lane < 32; ++lane) {
    Expect(out.indexed[lane] == 10 * (31 - lane), "__shfl_sync", lane);
    Expect(out.segment[lane] == 10 * (lane / 8 * 8 + 1), "__shfl_sync of 8", lane);
    Expect(out.up[lane] == 10 * (lane < 3 ? lane : lane - 3), "__shfl_up_sync", lane);
    Expect(out.down[lane] == 10 * (lane % 16 < 11 ? lane + 5 : lane),
           "__shfl_down_sync of 16", lane);
    Expect(out.exchanged[lane] == 10 * (lane ^ 6), "__shfl_xor_sync", lane);
    Expect(out.ballot[lane] == ballot, "__ballot_sync", lane);
    Expect(out.any[lane] == 1 && out.all[lane] == 0, "__any_sync, __all_sync", lane);
  }
}

__global__ void OrKernel(int* out) {
  const int i = static_cast<int>(threadIdx.x);
  out[3 * i] = __syncthreads_or(i == 17);
  out[3 * i + 1] = __syncthreads_or(0);
  out[3 * i + 2] = __syncthreads_or(i % 2);
}

void TestBarrierOr() {
  int out[3 * 32];
  RunWarp(OrKernel, 0, out);
  for (int i = 0; i < 32; ++i) {
    Expect(out[3 * i] != 0 && out[3 * i + 1] == 0 && out[3 * i + 2] != 0,
           "__syncthreads_or", i);
  }
}

template <int kBytes>
__global__ void CopyKernel(const char* from, char* to) {
  CU_DYNAMIC_SHARED(memory);
  const int i = static_cast<int>(threadIdx.x);
  CopyAsync<kBytes>(memory + i * kBytes, from + i * kBytes, i % (kBytes + 1));
  CopyAsyncCommit();
  CopyAsyncWait<0>();
  __syncthreads();
  for (int j = 0; j < kBytes; ++j) {
    to[i * kBytes + j] = static_cast<char>(memory[i * kBytes + j]);
  }
}

template <int kBytes>
void TestCopy() {
  alignas(16) char from[32 * kBytes], to[32 * kBytes];
  for (int i = 0; i < 32 * kBytes; ++i) from[i] = static_cast<char>(i % 100 + 1);
  RunWarp(CopyKernel<kBytes>, 32 * kBytes, static_cast<const char*>(from),
          static_cast<char*>(to));
  for (int i = 0; i < 32 * kBytes; ++i) {
    const bool copied = i % kBytes < i / kBytes % (kBytes + 1);
    Expect(to[i] == (copied ? from[i] : 0), "CopyAsync", i);
  }
}

// Two groups in flight: waiting for all but one finishes the first, and without eager
// copies leaves the second undone.
__global__ void GroupsKernel(const float* from, float* to) {
  CU_DYNAMIC_SHARED(memory);
  float* const values = reinterpret_cast<float*>(memory);
  const int i = static_cast<int>(threadIdx.x);
  for (int group = 0; group < 2; ++group) {
    CopyAsync<4>(values + 32 * group + i, from + i, 4);
    CopyAsyncCommit();
  }
  CopyAsyncWait<1>();
  to[2 * i] = values[i];
  to[2 * i + 1] = values[32 + i];
}

void TestGroups() {
  float from[32], to[64];
  for (int i = 0; i < 32; ++i) from[i] = static_cast<float>(i);
  const char* const text = std::getenv("CUDA_EMULATOR_EAGER");
  const bool eager = text != nullptr && std::atoi(text) != 0;
  RunWarp(GroupsKernel, 2 * 32 * 4, static_cast<const float*>(from),
          static_cast<float*>(to));
  for (int i = 0; i < 32; ++i) {
    Expect(to[2 * i] == from[i], "CopyAsyncWait<1>, first group", i);
    Expect(eager ? to[2 * i + 1] == from[i] : std::isnan(to[2 * i + 1]),
           "CopyAsyncWait<1>, second group", i);
  }
}

__global__ void IndexKernel(int* out) {
  CU_DYNAMIC_SHARED(memory);
  const unsigned thread =
      threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const bool aligned = reinterpret_cast<uintptr_t>(memory) % 128 == 0;
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] += aligned ? 1 : 100;
}

void TestIndices() {
  constexpr int kCount = 2 * 3 * 4 * 5 * 6 * 7;
  std::vector<int> out(kCount);
  const cudaError_t status = CU_LAUNCH(IndexKernel, dim3(2, 3, 4), dim3(5, 6, 7), 16,
                                       cudaStream_t{}, out.data());
  Expect(status == cudaSuccess, "launch", 0);
  for (int i = 0; i < kCount; ++i) {
    Expect(out[static_cast<size_t>(i)] == 1, "threadIdx, blockIdx", i);
  }
}

int Main() {
  TestNarrowType(
      "float16", 5, 10, [](uint16_t bits) { return __half2float({bits}); },
      [](float value) { return __float2half(value).bits; });
  TestNarrowType(
      "bfloat16", 8, 7, [](uint16_t bits) { return __bfloat162float({bits}); },
      [](float value) { return __float2bfloat16(value).bits; });
  TestTf32();
  TestMma<Kind::kBf16>("MmaBf16");
  TestMma<Kind::kF16>("MmaF16");
  TestMma<Kind::kTf32>("MmaTf32");
  TestLoadMatrix<false>("LoadMatrixX4");
  TestLoadMatrix<true>("LoadMatrixX4Transposed");
  TestWarp();
  TestBarrierOr();
  TestCopy<4>();
  TestCopy<8>();
  TestCopy<16>();
  TestGroups();
  TestIndices();
  std::printf("%d failures\n", failures);
  return failures > 0;
}

}  // namespace
}  // namespace convgrad

int main() { return convgrad::Main(); }
