// The instructions of csrc/cuda/hopper.cuh and the tensor maps of tensor_map.cuh against
// models that share no code with the emulator: where an element of a copy comes from, by
// division of its number; where an element of an operand lies, by the formulas that PTX
// gives for its layouts. Built by a host compiler this tests the emulator; built by nvcc,
// a GPU of compute capability 9.0, which has to agree.
//
// Prints a line for each failure; exit status 1 if there was one. On a GPU it also says
// on stderr what the hardware and the driver allow beyond their documentation.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "cuda/hopper.cuh"
#include "cuda/tensor_map.cuh"
#include "device_memory.h"
#include "wait_report.h"

namespace convgrad {
namespace {

int failures = 0;

void Expect(bool holds, const char* what, int at) {
  if (holds) return;
  ++failures;
  if (failures < 40) std::printf("FAIL %s at %d\n", what, at);
  std::fflush(stdout);
}

// What the driver's documentation rules out. That is the emulator's model; a driver that
// accepts it does no harm, as the kernels never ask.
void ExpectRefusal(bool refused, const char* what) {
#ifdef __CUDACC__
  if (!refused) std::fprintf(stderr, "note: the driver accepts %s\n", what);
#else
  Expect(refused, what, 0);
#endif
}

std::mt19937 random_bits(11);
int Draw(int low, int high) {  // both included
  return low + static_cast<int>(random_bits() % static_cast<unsigned>(high - low + 1));
}

// What shared memory holds at `address` of rows of 128 bytes with permuted chunks.
uint32_t Permuted(uint32_t address) {
  const uint32_t row = address / 128, chunk = address % 128 / 16;
  return row * 128 + (chunk ^ row % 8) * 16 + address % 16;
}

// ---- copies -----------------------------------------------------------------------

constexpr uint32_t kBarrierAt = 32 << 10;  // behind what is copied
constexpr int kCopyShared = static_cast<int>(kBarrierAt) + 16;

struct CopyArguments {
  int at[kMostDimensions];
  uint16_t offset[kMostDimensions - 2];
  uint32_t bytes;
};

// One thread copies and waits twice, once for each parity; all write out what came.
template <int kRank, bool kIm2col>
__global__ void CopyKernel(const __grid_constant__ CUtensorMap map,
                           const __grid_constant__ CopyArguments arguments,
                           unsigned char* to) {
#ifdef CONVGRAD_HOPPER
  CU_DYNAMIC_SHARED(shared);
  uint64_t* const barrier = reinterpret_cast<uint64_t*>(shared + kBarrierAt);
  if (threadIdx.x == 0) {
    MbarrierInit(barrier, 1);
    MbarrierFenceInit();
  }
  __syncthreads();
  for (unsigned round = 0; round < 2; ++round) {
    if (threadIdx.x == 0) {
      int at[kRank];
      for (int i = 0; i < kRank; ++i) at[i] = arguments.at[i];
      MbarrierArriveExpect(barrier, arguments.bytes);
      if constexpr (kIm2col) {
        uint16_t offset[kRank - 2];
        for (int i = 0; i < kRank - 2; ++i) offset[i] = arguments.offset[i];
        TmaLoadIm2col<kRank>(shared, &map, barrier, at, offset);
      } else {
        TmaLoad<kRank>(shared, &map, barrier, at);
      }
    }
    MbarrierWait(barrier, round);
    __syncthreads();  // nobody may miss a phase
  }
  for (uint32_t i = threadIdx.x; i < arguments.bytes; i += blockDim.x) to[i] = shared[i];
#endif
}

// A tensor of random sizes, each element its own number, padded between rows.
struct Tensor {
  TensorShape shape{};
  std::vector<uint16_t> values;

  Tensor(int rank, int channels) {
    shape.rank = rank;
    uint64_t stride = static_cast<uint64_t>(channels) * 2 + 16 * random_bits() % 3;
    stride = (stride + 15) / 16 * 16;
    shape.size[0] = static_cast<uint64_t>(channels);
    for (int i = 1; i < rank; ++i) {
      shape.size[i] = static_cast<uint64_t>(Draw(1, rank == 5 ? 4 : 9));
      shape.stride[i - 1] = stride;
      stride = stride * shape.size[i] + 16 * static_cast<uint64_t>(Draw(0, 1));
    }
    values.resize(stride / 2);
    for (size_t i = 0; i < values.size(); ++i) {
      values[i] = static_cast<uint16_t>(i % 65535 + 1);
    }
  }
  uint16_t At(const int64_t* index) const {
    uint64_t offset = 0;
    for (int i = 0; i < shape.rank; ++i) {
      if (index[i] < 0 || index[i] >= static_cast<int64_t>(shape.size[i])) return 0;
      offset += static_cast<uint64_t>(index[i]) * (i == 0 ? 2 : shape.stride[i - 1]);
    }
    return values[offset / 2];
  }
};

template <int kRank, bool kIm2col>
std::vector<unsigned char> RunCopy(const CUtensorMap& map, const CopyArguments& arguments,
                                   const char* name) {
  std::vector<unsigned char> to(arguments.bytes);
  DeviceMemory there(to.data(), to.size());
  cudaError_t status =
      CU_LAUNCH((CopyKernel<kRank, kIm2col>), dim3(1), dim3(32), kCopyShared,
                cudaStream_t{}, map, arguments, static_cast<unsigned char*>(there.get()));
  if (status == cudaSuccess) status = there.Fetch();
  if (const char* error = ErrorText(status); error != nullptr) {
    std::printf("%s\n", error);
    Expect(false, name, kRank);
  }
  return to;
}

uint16_t Get(const std::vector<unsigned char>& bytes, uint32_t at) {
  uint16_t value;
  std::memcpy(&value, bytes.data() + at, sizeof(value));
  return value;
}

template <typename Function>
Function* Find(const char* name, Function*) {
  Function* found = nullptr;
  Expect(FindDriverFunction(name, &found) == cudaSuccess, name, 0);
  return found;
}

// With boxes, steps and places on all sides of the tensor; permuted or not.
template <int kRank>
void TestTiled() {
  for (int turn = 0; turn < 12; ++turn) {
    const bool permuted = turn % 2 == 0;
    Tensor tensor(kRank, Draw(1, 12) * 8);
    DeviceMemory there(tensor.values.data(), tensor.values.size() * 2);
    uint32_t box[kRank], step[kRank], count[kRank];
    CopyArguments arguments{};
    arguments.bytes = 2;
    for (int i = 0; i < kRank; ++i) {
      step[i] = i == 0 ? 1 : static_cast<uint32_t>(Draw(1, 3));
      box[i] = permuted && i == 0 ? 64
               : i == 0           ? 8 * static_cast<uint32_t>(Draw(1, 4))
                                  : static_cast<uint32_t>(Draw(1, 4));
      count[i] = (box[i] + step[i] - 1) / step[i];
      arguments.bytes *= count[i];
      arguments.at[i] = Draw(-3, static_cast<int>(tensor.shape.size[i]));
    }
    CUtensorMap map;
    const CUresult result = Find("cuTensorMapEncodeTiled", &cuTensorMapEncodeTiled)(
        &map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, kRank, there.get(), tensor.shape.size,
        tensor.shape.stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
        permuted ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
        CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    Expect(result == CUDA_SUCCESS, "cuTensorMapEncodeTiled", turn);
    if (result != CUDA_SUCCESS) continue;
    const auto bytes = RunCopy<kRank, false>(map, arguments, "TmaLoad");
    for (uint32_t e = 0; e < arguments.bytes / 2; ++e) {
      int64_t index[kRank];
      uint32_t rest = e;
      for (int i = 0; i < kRank; ++i) {
        index[i] = arguments.at[i] + static_cast<int64_t>(rest % count[i] * step[i]);
        rest /= count[i];
      }
      const uint32_t at = permuted ? Permuted(2 * e) : 2 * e;
      Expect(Get(bytes, at) == tensor.At(index), "TmaLoad", turn);
    }
  }
}

// Bounding boxes that begin and end on either side of the image, steps within them, first
// pixels anywhere, and columns that go on from image to image and beyond the last.
template <int kRank>
void TestIm2col() {
  constexpr int kAxes = kRank - 2;
  for (int turn = 0; turn < 24; ++turn) {
    const bool permuted = turn % 2 == 0;
    Tensor tensor(kRank, Draw(1, 12) * 8);
    DeviceMemory there(tensor.values.data(), tensor.values.size() * 2);
    uint32_t step[kRank];
    int lower[kAxes], upper[kAxes];
    int64_t count[kRank];  // of the box's pixels along each axis
    CopyArguments arguments{};
    step[0] = step[kRank - 1] = 1;
    for (int i = 1; i <= kAxes; ++i) {
      step[i] = static_cast<uint32_t>(turn < 12 ? 1 : Draw(1, 3));
      const int size = static_cast<int>(tensor.shape.size[i]);
      lower[i - 1] = Draw(-5, size + 2);
      upper[i - 1] = Draw(std::max(-5, lower[i - 1] - size + 1), 6);
      count[i] = (size - 1 + upper[i - 1] - lower[i - 1]) / static_cast<int>(step[i]) + 1;
      arguments.at[i] = lower[i - 1] + static_cast<int>(step[i]) *
                                           Draw(0, static_cast<int>(count[i]) - 1);
      arguments.offset[i - 1] = static_cast<uint16_t>(Draw(0, 4));
    }
    const uint32_t channels = permuted ? 64 : 8 * static_cast<uint32_t>(Draw(1, 4));
    const uint32_t pixels = static_cast<uint32_t>(Draw(1, 200));
    arguments.at[0] = Draw(0, 2) * 8;
    arguments.at[kRank - 1] = Draw(0, static_cast<int>(tensor.shape.size[kRank - 1]));
    arguments.bytes = 2 * channels * pixels;
    CUtensorMap map;
    const CUresult result = Find("cuTensorMapEncodeIm2col", &cuTensorMapEncodeIm2col)(
        &map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, kRank, there.get(), tensor.shape.size,
        tensor.shape.stride, lower, upper, channels, pixels, step,
        CU_TENSOR_MAP_INTERLEAVE_NONE,
        permuted ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
        CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    Expect(result == CUDA_SUCCESS, "cuTensorMapEncodeIm2col", turn);
    if (result != CUDA_SUCCESS) continue;
    const auto bytes = RunCopy<kRank, true>(map, arguments, "TmaLoadIm2col");
    int64_t first = arguments.at[kRank - 1];  // the first pixel's number
    for (int i = kAxes; i >= 1; --i) {
      first =
          first * count[i] + (arguments.at[i] - lower[i - 1]) / static_cast<int>(step[i]);
    }
    for (uint32_t e = 0; e < arguments.bytes / 2; ++e) {
      int64_t index[kRank];
      index[0] = arguments.at[0] + static_cast<int64_t>(e % channels);
      int64_t rest = first + static_cast<int64_t>(e / channels);
      for (int i = 1; i <= kAxes; ++i) {
        index[i] = lower[i - 1] + rest % count[i] * static_cast<int64_t>(step[i]) +
                   arguments.offset[i - 1];
        rest /= count[i];
      }
      index[kRank - 1] = rest;
      const uint32_t at = permuted ? Permuted(2 * e) : 2 * e;
      Expect(Get(bytes, at) == tensor.At(index), "TmaLoadIm2col", turn);
    }
  }
}

// What the documentation of the driver's functions rules out, one thing at a time.
void TestRefusals() {
  alignas(64) static unsigned char memory[4096];
  CUtensorMap map;
  const TensorShape good = {4, {64, 5, 4, 2}, {128, 640, 2560}};
  const uint32_t box[] = {64, 1, 1, 1};
  const int zero[] = {0, 0}, low[] = {-128, 0}, too_low[] = {-129, 0},
            too_high[] = {0, 128}, beyond[] = {5, 0};
  int steps[] = {1, 8};
  const auto tiled = [&](const void* base, const TensorShape& shape, uint32_t inner) {
    const uint32_t boxes[] = {inner, 1, 1, 1};
    return EncodeTiled<__half>(base, shape, boxes, &map) == cudaSuccess;
  };
  const auto im2col = [&](const TensorShape& shape, const int* lower, const int* upper,
                          uint32_t channels, uint32_t pixels) {
    return EncodeIm2col<__half>(memory, shape, lower, upper, steps, channels, pixels,
                                &map) == cudaSuccess;
  };
  Expect(EncodeTiled<__half>(memory, good, box, &map) == cudaSuccess, "good box", 0);
  ExpectRefusal(!tiled(memory + 8, good, 64), "a misaligned base");
  ExpectRefusal(!tiled(memory, good, 4), "a row of 8 bytes");
  ExpectRefusal(!tiled(memory, good, 72), "a row beyond the permutation");
  TensorShape odd = good;
  odd.stride[1] = 648;
  ExpectRefusal(!tiled(memory, odd, 64), "a stride of no whole chunks");
  TensorShape empty = good;
  empty.size[2] = 0;
  ExpectRefusal(!tiled(memory, empty, 64), "an empty dimension");
  TensorShape far = good;
  far.stride[2] = uint64_t{1} << 40;
  ExpectRefusal(!tiled(memory, far, 64), "a stride of 2^40");
  const uint32_t wide[] = {64, 257, 1, 1};
  ExpectRefusal(EncodeTiled<__half>(memory, good, wide, &map) != cudaSuccess,
                "a box of 257 rows");
  Expect(im2col(good, low, zero, 64, 1024), "good column", 0);
  steps[1] = 9;
  ExpectRefusal(!im2col(good, low, zero, 64, 1024), "a step of 9");
  steps[1] = 1;
  ExpectRefusal(!im2col(good, too_low, zero, 64, 128), "a lower corner of -129");
  ExpectRefusal(!im2col(good, zero, too_high, 64, 128), "an upper corner of 128");
  ExpectRefusal(!im2col(good, beyond, zero, 64, 128), "an empty bounding box");
  ExpectRefusal(!im2col(good, zero, zero, 64, 1025), "1025 pixels");
  ExpectRefusal(!im2col(good, zero, zero, 72, 128), "channels beyond the permutation");
  ExpectRefusal(!im2col(odd, zero, zero, 64, 128),
                "a column's stride of no whole chunks");
  const TensorShape flat = {2, {64, 5}, {128}};
  ExpectRefusal(!im2col(flat, zero, zero, 64, 128), "an image without axes");
}

// The map that the kernel for 16-bit types gives the filter: channels, output channels,
// and then the taps, which lie between the output channels, so that its strides do not
// ascend.
void TestFilterMap() {
  constexpr int kIn = 64, kOut = 24, kTaps = 3;
  std::vector<uint16_t> values(size_t{kOut} * kTaps * kTaps * kIn);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<uint16_t>(i + 1);
  DeviceMemory there(values.data(), values.size() * 2);
  const TensorShape shape = {5,
                             {kIn, kOut, kTaps, kTaps, 1},
                             {kTaps * kTaps * kIn * 2, kIn * 2, kTaps * kIn * 2,
                              kOut * kTaps * kTaps * kIn * 2}};
  const uint32_t box[] = {64, 64, 1, 1, 1};
  CUtensorMap map;
  const cudaError_t status = EncodeTiled<__half>(there.get(), shape, box, &map);
  Expect(status == cudaSuccess, "a map whose strides do not ascend", 0);
#ifdef __CUDACC__
  std::fprintf(stderr,
               "note: the driver %s the filter's map, whose strides do not ascend\n",
               status == cudaSuccess ? "accepts" : "REFUSES");
#endif
  if (status != cudaSuccess) return;
  CopyArguments arguments{{0, 8, 2, 1, 0}, {}, 64 * 64 * 2};
  const auto bytes = RunCopy<5, false>(map, arguments, "TmaLoad of a filter");
  for (uint32_t row = 0; row < 64; ++row) {
    for (uint32_t c = 0; c < kIn; ++c) {
      const uint32_t k = row + 8;
      const uint16_t expected =
          k < kOut ? values[((k * kTaps + 1) * kTaps + 2) * kIn + c] : uint16_t{0};
      Expect(Get(bytes, Permuted(row * 128 + 2 * c)) == expected, "TmaLoad of a filter",
             static_cast<int>(row));
    }
  }
}

// ---- shared memory ----------------------------------------------------------------

__global__ void LastByteKernel(int bytes, int* to) {
#ifdef CONVGRAD_HOPPER
  CU_DYNAMIC_SHARED(shared);
  if (threadIdx.x == 0) {
    shared[bytes - 1] = 42;
    *to = shared[bytes - 1];
  }
#endif
}

// All that plans may take. Code for sm_90 reserves 1 KB for the system: whether that
// counts as the function's static memory, by which LaunchKernel lowers the limit, is the
// hardware's to say. Then plans of more than 226 KB fail, and nothing else does.
void TestMostSharedMemory() {
  int most = 0, to = 0;
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
  for (const int bytes : {most - 1024, most}) {
    DeviceMemory there(&to, sizeof(to));
    cudaError_t status = CU_LAUNCH(LastByteKernel, dim3(1), dim3(32), bytes,
                                   cudaStream_t{}, bytes, static_cast<int*>(there.get()));
    if (status == cudaSuccess) status = there.Fetch();
    const char* const error = ErrorText(status);
    const bool holds = error == nullptr && to == 42;
#ifdef __CUDACC__
    cudaFuncAttributes attributes{};
    (void)cudaFuncGetAttributes(&attributes,
                                reinterpret_cast<const void*>(&LastByteKernel));
    std::fprintf(stderr,
                 "note: %d bytes of dynamic shared memory: %s; sharedSizeBytes %d\n",
                 bytes, error == nullptr ? "ok" : error,
                 static_cast<int>(attributes.sharedSizeBytes));
    if (bytes == most) continue;
#endif
    Expect(holds, "so much dynamic shared memory", bytes);
  }
}

// ---- products ---------------------------------------------------------------------

enum class Kind { kBf16, kF16, kTf32 };

constexpr uint32_t kPanelBytes = 16 * kSwizzleBytes;  // of B by rows: 16 k, 64 columns
constexpr uint32_t kOperandBAt = 64 * kSwizzleBytes;

// One product over 32 bytes of K, of operands that threads store themselves, every other
// word by cp.async.
template <Kind kKind, int kColumns, bool kByRows>
__global__ void WgmmaKernel(const uint32_t* operands, uint32_t words, uint32_t a_skip,
                            float* to) {
#ifdef CONVGRAD_HOPPER
  CU_DYNAMIC_SHARED_ALIGNED(matrices, kSwizzleAtomBytes);
  for (uint32_t i = threadIdx.x; i < words; i += blockDim.x) {
    if (i % 2 == 0) {
      StoreShared(matrices + 4 * i, operands[i]);
    } else {
      CopyAsync<4>(matrices + 4 * i, operands + i, 4);
    }
  }
  CopyAsyncCommit();
  CopyAsyncWait<0>();
  FenceProxyAsync();
  __syncthreads();
  float d[kColumns / 2];
  for (int i = 0; i < kColumns / 2; ++i) d[i] = static_cast<float>(i % 5);
  const uint64_t a = OperandAlongK(SharedAddress(matrices) + a_skip);
  const uint32_t b_at = SharedAddress(matrices) + kOperandBAt;
  const uint64_t b =
      kByRows ? OperandByRows(b_at, kPanelBytes) : OperandAlongK(b_at + a_skip);
  for (float& sum : d) PinSum(sum);
  WgmmaFence();
  if constexpr (kKind == Kind::kBf16) {
    WgmmaBf16<kColumns, kByRows>(d, a, b);
  } else if constexpr (kKind == Kind::kF16) {
    WgmmaF16<kColumns, kByRows>(d, a, b);
  } else {
    WgmmaTf32<kColumns>(d, a, b);
  }
  WgmmaCommit();
  WgmmaWait<0>();
  for (float& sum : d) PinSum(sum);
  for (int i = 0; i < kColumns / 2; ++i) to[threadIdx.x * (kColumns / 2) + i] = d[i];
#endif
}

template <Kind kKind>
uint32_t Encode(float* value) {
  uint32_t bits = 0;
  if constexpr (kKind == Kind::kBf16) {
    const __nv_bfloat16 narrow = __float2bfloat16(*value);
    *value = __bfloat162float(narrow);
    std::memcpy(&bits, &narrow, sizeof(narrow));
  } else if constexpr (kKind == Kind::kF16) {
    const __half narrow = __float2half(*value);
    *value = __half2float(narrow);
    std::memcpy(&bits, &narrow, sizeof(narrow));
  } else {
    std::memcpy(&bits, value, sizeof(bits));
    const uint32_t read = bits & 0xffffe000;
    std::memcpy(value, &read, sizeof(read));
    bits |= 0x1fff;  // low bits, which the tensor core does not read
  }
  return bits;
}

// Small integers give exact sums; others are within the rounding of an addition for each
// product, and one for what a tensor core cuts off.
template <Kind kKind, int kColumns, bool kByRows>
void TestWgmma(const char* name, bool integers) {
  constexpr uint32_t kSize = kKind == Kind::kTf32 ? 4 : 2;
  constexpr int kDepth = static_cast<int>(32 / kSize);
  std::normal_distribution<float> normal;
  const auto draw = [&] {
    return integers ? static_cast<float>(Draw(-7, 7)) : normal(random_bits);
  };
  // The product reads the third of the four pieces of a row's 128 bytes.
  const uint32_t skip = 64;
  const uint32_t b_bytes =
      kByRows ? kColumns / 64 * kPanelBytes : kColumns * kSwizzleBytes;
  std::vector<unsigned char> memory(kOperandBAt + b_bytes, 0x7f);
  std::vector<float> a(64 * kDepth), b(static_cast<size_t>(kColumns) * kDepth);
  const auto put = [&](uint32_t base, uint32_t at, float* value) {
    const uint32_t bits = Encode<kKind>(value);
    std::memcpy(memory.data() + base + Permuted(at), &bits, kSize);
  };
  for (uint32_t k = 0; k < kDepth; ++k) {
    for (uint32_t i = 0; i < 64; ++i) {
      float& value = a[i * kDepth + k] = draw();
      put(0, i * 128 + skip + k * kSize, &value);
    }
    for (uint32_t j = 0; j < kColumns; ++j) {
      float& value = b[j * kDepth + k] = draw();
      put(kOperandBAt,
          kByRows ? j / 64 * kPanelBytes + k * 128 + j % 64 * kSize
                  : j * 128 + skip + k * kSize,
          &value);
    }
  }
  std::vector<float> to(128 * kColumns / 2);
  DeviceMemory from_there(memory.data(), memory.size());
  DeviceMemory to_there(to.data(), to.size() * sizeof(float));
  cudaError_t status =
      CU_LAUNCH((WgmmaKernel<kKind, kColumns, kByRows>), dim3(1), dim3(kWarpgroupThreads),
                static_cast<int>(memory.size()), cudaStream_t{},
                static_cast<const uint32_t*>(from_there.get()),
                static_cast<uint32_t>(memory.size() / 4), skip,
                static_cast<float*>(to_there.get()));
  if (status == cudaSuccess) status = to_there.Fetch();
  if (const char* error = ErrorText(status); error != nullptr) {
    std::printf("%s\n", error);
    Expect(false, name, kColumns);
    return;
  }
  // PTX, "Register Fragments for wgmma.mma_async": element i of a lane's sums.
  for (int thread = 0; thread < 128; ++thread) {
    for (int i = 0; i < kColumns / 2; ++i) {
      const int row = thread / 32 * 16 + thread % 32 / 4 + (i / 2 % 2) * 8;
      const int column = i / 4 * 8 + thread % 4 * 2 + i % 2;
      double expected = i % 5, size = expected;
      for (int k = 0; k < kDepth; ++k) {
        const double product =
            static_cast<double>(a[static_cast<size_t>(row * kDepth + k)]) *
            b[static_cast<size_t>(column * kDepth + k)];
        expected += product;
        size += std::fabs(product);
      }
      const double allowed = integers ? 0 : (kDepth + 2) * 0x1p-23 * size;
      const double is = to[static_cast<size_t>(thread * kColumns / 2 + i)];
      Expect(std::fabs(is - expected) <= allowed, name, thread);
    }
  }
}

template <int kColumns>
void TestAllWgmma(bool integers) {
  TestWgmma<Kind::kBf16, kColumns, true>("WgmmaBf16 by rows", integers);
  TestWgmma<Kind::kBf16, kColumns, false>("WgmmaBf16", integers);
  TestWgmma<Kind::kF16, kColumns, true>("WgmmaF16 by rows", integers);
  TestWgmma<Kind::kF16, kColumns, false>("WgmmaF16", integers);
  TestWgmma<Kind::kTf32, kColumns, false>("WgmmaTf32", integers);
}

// ---- barriers ---------------------------------------------------------------------

// Two warps hand a value back and forth: each waits for the other's phases only.
__global__ void PingPongKernel(int* to) {
#ifdef CONVGRAD_HOPPER
  CU_DYNAMIC_SHARED(shared);
  uint64_t* const barriers = reinterpret_cast<uint64_t*>(shared);
  volatile int* const value = reinterpret_cast<int*>(shared + 16);
  if (threadIdx.x == 0) {
    MbarrierInit(barriers, 32);
    MbarrierInit(barriers + 1, 32);
    *value = 0;
  }
  __syncthreads();
  const unsigned own = threadIdx.x / 32;
  for (unsigned round = 0; round < 5; ++round) {
    // A wait for the phase before the first one returns at once.
    MbarrierWait(barriers + 1 - own, own == 0 ? 1 - round % 2 : round % 2);
    if (threadIdx.x % 32 == 0) *value = 2 * *value + static_cast<int>(own);
    MbarrierArrive(barriers + own);
  }
  MbarrierWait(barriers + 1, 0);
  if (threadIdx.x == 0) *to = *value;
#endif
}

void TestBarriers() {
  int to = -1, expected = 0;
  DeviceMemory there(&to, sizeof(to));
  cudaError_t status = CU_LAUNCH(PingPongKernel, dim3(1), dim3(64), 32, cudaStream_t{},
                                 static_cast<int*>(there.get()));
  if (status == cudaSuccess) status = there.Fetch();
  Expect(status == cudaSuccess, "PingPongKernel", 0);
  for (int turn = 0; turn < 10; ++turn) expected = 2 * expected + turn % 2;
  Expect(to == expected, "MbarrierWait", to);
}

// ---- one lane of a warp -----------------------------------------------------------

__global__ void ElectKernel(int* to) {
#ifdef CONVGRAD_HOPPER
  to[threadIdx.x] = ElectLane();
#endif
}

void TestElection() {
  constexpr int kWarps = 3;
  std::vector<int> to(kWarps * 32, -1);
  DeviceMemory there(to.data(), to.size() * sizeof(int));
  cudaError_t status = CU_LAUNCH(ElectKernel, dim3(1), dim3(kWarps * 32), 0,
                                 cudaStream_t{}, static_cast<int*>(there.get()));
  if (status == cudaSuccess) status = there.Fetch();
  Expect(status == cudaSuccess, "ElectKernel", 0);
  for (int warp = 0; warp < kWarps; ++warp) {
    const auto first = to.begin() + warp * 32;
    Expect(std::count(first, first + 32, 1) == 1, "ElectLane elects one", warp);
    Expect(std::count(first, first + 32, 0) == 31, "ElectLane elects one alone", warp);
  }
}

int Main() {
  int device = 0, major = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) !=
          cudaSuccess) {
    std::printf("FAIL no device\n");
    return 1;
  }
  if (major != 9) {
    std::printf("0 failures: these instructions are sm_90a's\n");
    return 0;
  }
#ifdef CONVGRAD_BOUNDED_WAITS
  PrintEndlessWaits(
      [](EndlessWait* to) { return cudaMemcpyToSymbol(endless_wait, &to, sizeof(to)); });
#endif
  TestFilterMap();
  TestMostSharedMemory();
  TestBarriers();
  TestElection();
  TestRefusals();
  TestTiled<3>();
  TestTiled<5>();
  TestIm2col<3>();
  TestIm2col<4>();
  TestIm2col<5>();
  for (bool integers : {true, false}) {
    TestAllWgmma<64>(integers);
    TestAllWgmma<128>(integers);
    TestAllWgmma<256>(integers);
  }
  std::printf("%d failures\n", failures);
  return failures > 0;
}

}  // namespace
}  // namespace convgrad

int main() { return convgrad::Main(); }
