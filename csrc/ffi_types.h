// XLA's words for types and attributes, in this library's.

#pragma once

#include <cstdint>
#include <optional>

#include "problem.h"
#include "xla/ffi/api/ffi.h"

namespace convgrad {

using IntSpan = xla::ffi::Span<const int64_t>;

inline Ints ToInts(IntSpan span) { return Ints(span.begin(), span.end()); }

inline std::optional<DType> ToDType(xla::ffi::DataType type) {
  switch (type) {
    case xla::ffi::DataType::F64: return DType::kF64;
    case xla::ffi::DataType::F32: return DType::kF32;
    case xla::ffi::DataType::BF16: return DType::kBF16;
    case xla::ffi::DataType::F16: return DType::kF16;
    default: return std::nullopt;
  }
}

}  // namespace convgrad
