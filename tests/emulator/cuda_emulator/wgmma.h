// Products of a warpgroup, wgmma.mma_async, with both operands in shared memory: 64 rows
// of A by 8*n columns of B by 32 bytes of K. They happen when they are issued, or when
// they are waited for. Sums are formed in f32.

#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "numbers.h"
#include "tma.h"
#include "warp.h"

namespace cuda_emulator {

constexpr unsigned kWarpsOfWarpgroup = 4;

// An operand as its descriptor lays it out, permuted within 128 bytes.
class WgmmaOperand {
 public:
  WgmmaOperand(uint64_t descriptor, WgmmaKind kind, bool by_rows)
      : start_(static_cast<uint32_t>(descriptor & 0x3fff) << 4),
        leading_(static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4),
        stride_(static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4),
        kind_(kind),
        by_rows_(by_rows) {}

  // Element k of row or column `i`.
  float At(uint32_t i, uint32_t k) const {
    const uint32_t size = kind_ == WgmmaKind::kTf32 ? 4 : 2;
    const uint32_t plain = by_rows_ ? start_ + i / 64 * leading_ + i % 64 * size +
                                          k / 8 * stride_ + k % 8 * 128
                                    : start_ + i / 8 * stride_ + i % 8 * 128 + k * size;
    const uint32_t at = Swizzle(plain, CU_TENSOR_MAP_SWIZZLE_128B);
    const auto& view = current_block->async.view;
    if (at + size > view.size()) {
      current_block->Fail("wgmma reads at %u of %zu bytes of shared memory", at,
                          view.size());
    }
    if (std::memcmp(view.data() + at, current_block->shared + at, size) != 0) {
      current_block->Fail(
          "wgmma reads at %u a store that no FenceProxyAsync has shown it", at);
    }
    uint32_t bits = 0;
    std::memcpy(&bits, view.data() + at, size);
    switch (kind_) {
      case WgmmaKind::kBf16: return __bfloat162float({static_cast<uint16_t>(bits)});
      case WgmmaKind::kF16: return __half2float({static_cast<uint16_t>(bits)});
      case WgmmaKind::kTf32: break;
    }
    return __uint_as_float(bits & 0xffffe000);  // the upper 19 bits
  }

 private:
  uint32_t start_, leading_, stride_;
  WgmmaKind kind_;
  bool by_rows_;
};

// A warp's 16 of the 64 rows.
CUDA_EMULATOR_UNWATCHED inline void Multiply(const WgmmaOperation& op, unsigned warp) {
  const Unwatched unwatched;
  AsyncView();
  constexpr int kRows = 16, kMostColumns = 256, kMostDepth = 16;
  constexpr int kAtOnce = 64;
  const int depth = op.kind == WgmmaKind::kTf32 ? 8 : 16;
  const WgmmaOperand a(op.a, op.kind, false), b(op.b, op.kind, op.b_by_rows);
  static thread_local float of_b[kMostDepth][kMostColumns];
  for (int k = 0; k < depth; ++k) {
    for (int j = 0; j < op.columns; ++j) {
      of_b[k][j] = b.At(static_cast<uint32_t>(j), static_cast<uint32_t>(k));
    }
  }
  for (int i = 0; i < kRows; ++i) {
    float sum[kMostColumns] = {};
    for (int k = 0; k < depth; ++k) {
      const float of_a = a.At(warp % kWarpsOfWarpgroup * kRows + static_cast<uint32_t>(i),
                              static_cast<uint32_t>(k));
      for (int first = 0; first < op.columns; first += kAtOnce) {
        for (int j = first; j < first + kAtOnce; ++j) sum[j] += of_a * of_b[k][j];
      }
    }
    for (int j = 0; j < op.columns; ++j) {
      op.d[i % 8 * 4 + j % 8 / 2][j / 8 * 4 + i / 8 * 2 + j % 2] += sum[j];
    }
  }
}

struct WgmmaIn {
  WgmmaOperation operation;
  float* d;
};

CUDA_EMULATOR_UNWATCHED inline WarpProducts& ProductsOf(Block& block) {
  return block.async.warps.at(block.thread->number / kWarpSize);
}

CUDA_EMULATOR_UNWATCHED inline void CombineWgmma(Block& block, const Warp& warp) {
  const Unwatched unwatched;
  const auto wrong = [&](const char* what) {
    block.Fail("%s at %s:%d: %s", warp.call, warp.place.file, warp.place.line, what);
  };
  WgmmaOperation op = static_cast<const WgmmaIn*>(warp.in[0])->operation;
  for (unsigned i = 0; i < kWarpSize; ++i) {
    const auto* in = static_cast<const WgmmaIn*>(warp.in[i]);
    if (!(in->operation == op)) wrong("the lanes' operands differ");
    op.d[i] = in->d;
  }
  if (op.a >> 62 != 1 || op.b >> 62 != 1) wrong("only 128-byte swizzling is emulated");
  WarpProducts& products = ProductsOf(block);
  if (!products.fenced) wrong("no WgmmaFence since the last group");
  // All four warps take part in the same product.
  const unsigned number = block.thread->number / kWarpSize;
  auto& of_group = block.async.warpgroups.at(number / kWarpsOfWarpgroup);
  if (products.issued < of_group.size()) {
    if (!(of_group[products.issued] == op)) wrong("the warps' operands differ");
  } else {
    of_group.push_back(op);
  }
  ++products.issued;
  if (block.eager) {
    Multiply(op, number);
  } else {
    products.open.push_back(op);
  }
}

template <int kColumns>
void Wgmma(const char* call, WgmmaKind kind, bool b_by_rows, float* d, uint64_t a,
           uint64_t b, const Place& place) {
  static_assert(kColumns % 8 == 0 && 8 <= kColumns && kColumns <= 256, "a wgmma's n");
  WgmmaIn in;
  in.operation.a = a;
  in.operation.b = b;
  in.operation.kind = kind;
  in.operation.columns = kColumns;
  in.operation.b_by_rows = b_by_rows;
  in.d = d;
  Collective(call, kWholeWarp, &in, nullptr, CombineWgmma, false, place);
}

template <int kColumns, bool kByRows>
void WgmmaBf16(float (&d)[kColumns / 2], uint64_t a, uint64_t b,
               Place place = Place::Here()) {
  Wgmma<kColumns>("WgmmaBf16", WgmmaKind::kBf16, kByRows, d, a, b, place);
}
template <int kColumns, bool kByRows>
void WgmmaF16(float (&d)[kColumns / 2], uint64_t a, uint64_t b,
              Place place = Place::Here()) {
  Wgmma<kColumns>("WgmmaF16", WgmmaKind::kF16, kByRows, d, a, b, place);
}
template <int kColumns>
void WgmmaTf32(float (&d)[kColumns / 2], uint64_t a, uint64_t b,
               Place place = Place::Here()) {
  Wgmma<kColumns>("WgmmaTf32", WgmmaKind::kTf32, false, d, a, b, place);
}

inline void WgmmaFence(Place place = Place::Here()) {
  Collective(
      "WgmmaFence", kWholeWarp, nullptr, nullptr,
      [](Block& block, const Warp&)
          CUDA_EMULATOR_UNWATCHED { ProductsOf(block).fenced = true; },
      false, place);
}

inline void WgmmaCommit(Place place = Place::Here()) {
  Collective(
      "WgmmaCommit", kWholeWarp, nullptr, nullptr,
      [](Block& block, const Warp&) CUDA_EMULATOR_UNWATCHED {
        const Unwatched unwatched;
        WarpProducts& products = ProductsOf(block);
        products.fenced = false;
        products.groups.push_back(std::exchange(products.open, {}));
      },
      false, place);
}

template <int kPending>
void WgmmaWait(Place place = Place::Here()) {
  Collective(
      "WgmmaWait", kWholeWarp, nullptr, nullptr,
      [](Block& block, const Warp&) CUDA_EMULATOR_UNWATCHED {
        const Unwatched unwatched;
        auto& groups = ProductsOf(block).groups;
        while (groups.size() > size_t{kPending}) {
          for (const WgmmaOperation& op : groups.front()) {
            Multiply(op, block.thread->number / kWarpSize);
          }
          groups.pop_front();
        }
      },
      false, place);
}

// setmaxnreg: all of a warp have to come by.
template <int kRegisters>
void TakeRegisters(Place place = Place::Here()) {
  static_assert(24 <= kRegisters && kRegisters <= 256 && kRegisters % 8 == 0,
                "what setmaxnreg takes");
  Collective(
      "TakeRegisters", kWholeWarp, nullptr, nullptr, [](Block&, const Warp&) {}, false,
      place);
}
template <int kRegisters>
void GiveRegisters(Place place = Place::Here()) {
  TakeRegisters<kRegisters>(place);
}

}  // namespace cuda_emulator
