// Every primitive against a model that shares no code with it: the operand layouts as PTX
// documents them, by their formulas from a lane and a register to a row and a column, and
// conversions against a search through all values of the narrow type. Built by a host
// compiler this tests the emulator; built by nvcc, the GPU and the PTX in primitives.cuh,
// which have to agree with the same models: bit by bit, except sums of random products on
// the tensor cores, whose order and rounding are not documented.
//
// Prints a line for each failure; exit status 1 if there was one.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <utility>
#include <vector>

#include "cuda/platform.cuh"
#include "cuda/primitives.cuh"
#include "device_memory.h"

namespace convgrad {
namespace {

#ifdef __CUDACC__
constexpr bool kEmulated = false;
#else
constexpr bool kEmulated = true;
#endif

int failures = 0;

void Expect(bool holds, const char* what, int at) {
  if (holds) return;
  ++failures;
  std::printf("FAIL %s at %d\n", what, at);
}

// Host memory that a kernel gets a pointer to.
struct Argument {
  void* data;
  size_t bytes;
};
template <typename T>
Argument All(std::vector<T>& values) {
  return {values.data(), values.size() * sizeof(T)};
}
template <typename T>
Argument All(T& value) {
  return {&value, sizeof(value)};
}

template <typename... Parameters, size_t... kIndex>
void Run(void (*kernel)(Parameters...), dim3 grid, dim3 block, int shared_bytes,
         const Argument* arguments, std::index_sequence<kIndex...>) {
  DeviceMemory memory[] = {{arguments[kIndex].data, arguments[kIndex].bytes}...};
  cudaError_t status = CU_LAUNCH(kernel, grid, block, shared_bytes, cudaStream_t{},
                                 static_cast<Parameters>(memory[kIndex].get())...);
  for (DeviceMemory& each : memory) {
    if (status == cudaSuccess) status = each.Fetch();
  }
  if (const char* error = ErrorText(status); error != nullptr) Expect(false, error, 0);
}

// Each of the kernel's parameters is a pointer to one of the arguments.
template <typename... Parameters, typename... Arguments>
void RunGrid(void (*kernel)(Parameters...), dim3 grid, dim3 block, int shared_bytes,
             Arguments... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments), "one for each parameter");
  const Argument list[] = {arguments...};
  Run(kernel, grid, block, shared_bytes, list, std::index_sequence_for<Parameters...>{});
}

template <typename Kernel, typename... Arguments>
void RunWarp(Kernel kernel, int shared_bytes, Arguments... arguments) {
  RunGrid(kernel, dim3(1), dim3(32), shared_bytes, arguments...);
}

template <typename To, typename From>
To BitsAs(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
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

// Converts all of `from`, a thread for each kEach of them.
constexpr unsigned kConvertThreads = 256, kEach = 16;

template <typename From, typename To, typename Convert>
__device__ void ConvertEach(const From* from, To* to, Convert convert) {
  const unsigned first = (blockIdx.x * kConvertThreads + threadIdx.x) * kEach;
  for (unsigned i = first; i < first + kEach; ++i) to[i] = convert(from[i]);
}
template <typename T>
__global__ void WidenKernel(const T* from, float* to) {
  ConvertEach(from, to, [](T v) { return Widen(v); });
}
template <typename T>
__global__ void NarrowKernel(const float* from, T* to) {
  ConvertEach(from, to, [](float v) { return Narrow(v, T{}); });
}
__global__ void RoundKernel(const float* from, uint32_t* to) {
  ConvertEach(from, to, [](float v) { return RoundToTf32(v); });
}

// `from` grows to whole blocks.
template <typename To, typename Kernel, typename From>
std::vector<To> Convert(Kernel kernel, std::vector<From>* from) {
  constexpr unsigned kBlock = kConvertThreads * kEach;
  const unsigned blocks = (static_cast<unsigned>(from->size()) + kBlock - 1) / kBlock;
  from->resize(size_t{blocks} * kBlock);
  std::vector<To> to(from->size());
  RunGrid(kernel, dim3(blocks), dim3(kConvertThreads), 0, All(*from), All(to));
  return to;
}

// Bit patterns of finite numbers below `most`, every other one a tie of TF32.
std::vector<float> RandomFloats(int count, float most, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<float> values;
  for (int i = 0; i < count; ++i) {
    const uint32_t bits = static_cast<uint32_t>(random());
    const float value = BitsAs<float>(i % 2 == 0 ? bits : (bits & 0xffffe000) | 0x1000);
    if (std::isfinite(value) && std::fabs(value) < most) values.push_back(value);
  }
  return values;
}

template <typename T>
void TestNarrowType(const char* name, int exponent_bits, int fraction_bits) {
  const auto value_of = [=](uint32_t bits) {
    return ValueOf(bits, exponent_bits, fraction_bits);
  };
  std::vector<uint16_t> patterns(0x10000);
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    patterns[bits] = static_cast<uint16_t>(bits);
  }
  std::vector<float> wide = Convert<float>(WidenKernel<T>, &patterns);
  const std::vector<uint16_t> back = Convert<uint16_t>(NarrowKernel<T>, &wide);
  std::vector<float> interesting = RandomFloats(20000, 3.4e38f, 5);
  interesting.insert(interesting.end(),
                     {0.0f, 1e-45f, 1e30f, 3.4e38f, 65519.0f, 65520.0f});
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const int at = static_cast<int>(bits);
    const double expected = value_of(bits);
    Expect(SameNumber(wide[bits], expected), name, at);
    Expect(std::signbit(wide[bits]) == (bits >> 15 != 0) || std::isnan(expected), name,
           at);
    if (!std::isfinite(expected)) {
      Expect(SameNumber(value_of(back[bits]), expected), name, at);
      continue;
    }
    Expect(back[bits] == bits, name, at);
    // The tie with the next number, and what is just beside it.
    const double next = value_of(bits + 1);
    if (bits < 0x8000 && std::isfinite(next)) {
      const float tie = static_cast<float>((expected + next) / 2);
      for (float value : {tie, std::nextafter(tie, 0.0f), std::nextafter(tie, 1e38f)}) {
        interesting.insert(interesting.end(), {value, -value});
      }
    }
  }
  const std::vector<uint16_t> narrow = Convert<uint16_t>(NarrowKernel<T>, &interesting);
  for (size_t i = 0; i < interesting.size(); ++i) {
    const int sign = std::signbit(interesting[i]) ? 0x8000 : 0;
    const int expected =
        Nearest(std::fabs(interesting[i]), exponent_bits, fraction_bits) | sign;
    Expect(narrow[i] == expected, name, expected);
  }
}

void TestTf32() {
  std::vector<float> values = RandomFloats(20000, 3e38f, 3);
  values.insert(values.end(), {INFINITY, -INFINITY, NAN});
  const std::vector<uint32_t> rounded = Convert<uint32_t>(RoundKernel, &values);
  for (size_t i = 0; i < values.size(); ++i) {
    const int at = static_cast<int>(rounded[i]);
    const float result = BitsAs<float>(rounded[i]);
    if (!std::isfinite(values[i])) {
      Expect(SameNumber(result, values[i]), "RoundToTf32 not finite", at);
      continue;
    }
    // A multiple of one unit in the 10th place: by llround, which takes ties away from
    // zero.
    int exponent = 0;
    std::frexp(values[i], &exponent);
    const double unit = std::ldexp(1.0, std::max(exponent - 11, -126 - 10));
    const double expected = static_cast<double>(std::llround(values[i] / unit)) * unit;
    Expect((rounded[i] & 0x1fff) == 0, "RoundToTf32 leaves low bits", at);
    Expect(result == static_cast<float>(expected), "RoundToTf32", at);
  }
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

// Rounds a value to an operand's type, whose encoding is returned.
uint32_t Encode(Kind kind, float* value) {
  switch (kind) {
    case Kind::kBf16: {
      const __nv_bfloat16 narrow = __float2bfloat16(*value);
      *value = __bfloat162float(narrow);
      return BitsAs<uint16_t>(narrow);
    }
    case Kind::kF16: {
      const __half narrow = __float2half(*value);
      *value = __half2float(narrow);
      return BitsAs<uint16_t>(narrow);
    }
    case Kind::kTf32: break;
  }
  const uint32_t bits = BitsAs<uint32_t>(*value);
  *value = BitsAs<float>(bits & 0xffffe000);
  return bits | 0x1fff;  // low bits, which the tensor core does not read
}

// Small integers give exact sums. Others are within the rounding of one addition for each
// product, and one for what a tensor core cuts off.
template <Kind kKind>
void TestMma(const char* name, bool integers) {
  constexpr bool kWide = kKind == Kind::kTf32;
  constexpr int kDepth = kWide ? 8 : 16;
  std::mt19937 random(4);
  std::normal_distribution<float> normal;
  const auto draw = [&] {
    return integers ? static_cast<float>(static_cast<int>(random() % 15) - 7)
                    : normal(random);
  };
  float a[16][kDepth], b[kDepth][8], d[16][8];
  uint32_t a_bits[16][kDepth], b_bits[kDepth][8];
  for (auto& row : a) std::generate(std::begin(row), std::end(row), draw);
  for (auto& row : b) std::generate(std::begin(row), std::end(row), draw);
  for (auto& row : d) std::generate(std::begin(row), std::end(row), draw);
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < kDepth; ++k) a_bits[i][k] = Encode(kKind, &a[i][k]);
  }
  for (int k = 0; k < kDepth; ++k) {
    for (int j = 0; j < 8; ++j) b_bits[k][j] = Encode(kKind, &b[k][j]);
  }
  Fragments fragments{};
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < (kWide ? 4 : 8); ++i) {
      const At at = kWide ? PlaceATf32(lane, i) : PlaceA16(lane, i);
      const uint32_t value = a_bits[at.row][at.column];
      fragments.a[lane][kWide ? i : i / 2] |= kWide ? value : value << (16 * (i % 2));
    }
    for (int i = 0; i < (kWide ? 2 : 4); ++i) {
      const At at = kWide ? PlaceBTf32(lane, i) : PlaceB16(lane, i);
      const uint32_t value = b_bits[at.row][at.column];
      fragments.b[lane][kWide ? i : i / 2] |= kWide ? value : value << (16 * (i % 2));
    }
    for (int i = 0; i < 4; ++i) {
      const At at = PlaceD(lane, i);
      fragments.d[lane][i] = d[at.row][at.column];
    }
  }
  RunWarp(MmaKernel<kKind>, 0, All(fragments));
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const At at = PlaceD(lane, i);
      double expected = d[at.row][at.column], size = std::fabs(expected);
      for (int k = 0; k < kDepth; ++k) {
        const double product = static_cast<double>(a[at.row][k]) * b[k][at.column];
        expected += product;
        size += std::fabs(product);
      }
      const double allowed = integers ? 0 : (kDepth + 2) * 0x1p-23 * size;
      Expect(std::fabs(fragments.d[lane][i] - expected) <= allowed, name, lane);
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
  RunWarp(LoadMatrixKernel<kTransposed>, 32 * 16, All(r));
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
  RunWarp(WarpKernel, 0, All(out));
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
  int out[3 * 32] = {};
  RunWarp(OrKernel, 0, All(out));
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

// Where nothing exists the address is one that nobody may read.
__global__ void CopyOrZeroKernel(const char* from, char* to) {
  CU_DYNAMIC_SHARED(memory);
  const int i = static_cast<int>(threadIdx.x);
  const bool exists = i % 3 != 0;
  CopyAsyncOrZero(memory + i * 16, exists ? from + i * 16 : nullptr, exists);
  CopyAsyncCommit();
  CopyAsyncWait<0>();
  __syncthreads();
  for (int j = 0; j < 16; ++j) {
    to[i * 16 + j] = static_cast<char>(memory[i * 16 + j]);
  }
}

template <int kBytes, typename Kernel, typename Copied>
void TestCopy(const char* name, Kernel kernel, Copied copied_bytes) {
  std::vector<char> from(32 * kBytes), to(32 * kBytes);
  for (int i = 0; i < 32 * kBytes; ++i) {
    from[static_cast<size_t>(i)] = static_cast<char>(i % 100 + 1);
  }
  RunWarp(kernel, 32 * kBytes, All(from), All(to));
  for (int i = 0; i < 32 * kBytes; ++i) {
    const size_t at = static_cast<size_t>(i);
    const bool copied = i % kBytes < copied_bytes(i / kBytes);
    Expect(to[at] == (copied ? from[at] : 0), name, i);
  }
}

template <int kBytes>
void TestCopyAsync() {
  TestCopy<kBytes>("CopyAsync", CopyKernel<kBytes>,
                   [](int lane) { return lane % (kBytes + 1); });
}

// Two groups in flight: waiting for all but one finishes the first. Whether it leaves the
// second undone only the emulator knows.
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
  to[2 * i + 1] = kEmulated ? values[32 + i] : 0.0f;
  CopyAsyncWait<0>();
}

void TestGroups() {
  float from[32], to[64] = {};
  for (int i = 0; i < 32; ++i) from[i] = static_cast<float>(i);
  const char* const text = std::getenv("CUDA_EMULATOR_EAGER");
  const bool eager = text != nullptr && std::atoi(text) != 0;
  RunWarp(GroupsKernel, 2 * 32 * 4, All(from), All(to));
  for (int i = 0; i < 32; ++i) {
    Expect(to[2 * i] == from[i], "CopyAsyncWait<1>, first group", i);
    if (!kEmulated) continue;
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
  RunGrid(IndexKernel, dim3(2, 3, 4), dim3(5, 6, 7), 16, All(out));
  for (int i = 0; i < kCount; ++i) {
    Expect(out[static_cast<size_t>(i)] == 1, "threadIdx, blockIdx", i);
  }
}

int Main() {
  TestNarrowType<__half>("float16", 5, 10);
  TestNarrowType<__nv_bfloat16>("bfloat16", 8, 7);
  TestTf32();
  for (bool integers : {true, false}) {
    TestMma<Kind::kBf16>("MmaBf16", integers);
    TestMma<Kind::kF16>("MmaF16", integers);
    TestMma<Kind::kTf32>("MmaTf32", integers);
  }
  TestLoadMatrix<false>("LoadMatrixX4");
  TestLoadMatrix<true>("LoadMatrixX4Transposed");
  TestWarp();
  TestBarrierOr();
  TestCopyAsync<4>();
  TestCopyAsync<8>();
  TestCopyAsync<16>();
  TestCopy<16>("CopyAsyncOrZero", CopyOrZeroKernel,
               [](int lane) { return lane % 3 != 0 ? 16 : 0; });
  TestGroups();
  TestIndices();
  std::printf("%d failures\n", failures);
  return failures > 0;
}

}  // namespace
}  // namespace convgrad

int main() { return convgrad::Main(); }
