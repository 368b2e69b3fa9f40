// The emulator's settings, from environment variables.

#pragma once

#include <cstdlib>

namespace cuda_emulator {

inline unsigned EnvironmentNumber(const char* name, unsigned otherwise) {
  const char* const text = std::getenv(name);
  return text == nullptr ? otherwise : static_cast<unsigned>(std::atoi(text));
}

// What memory holds before it is written: this byte. By default all bits are set, a NaN
// in every floating type. A kernel that computes results again that are not finite
// repairs what such a NaN would show, so there a byte that gives finite garbage (71) says
// more.
inline int PoisonByte() {
  return static_cast<int>(EnvironmentNumber("CUDA_EMULATOR_POISON", 0xff));
}

// Bytes of shared memory that a block may have, by default as on an H100.
inline int MostSharedBytes() {
  return static_cast<int>(EnvironmentNumber("CUDA_EMULATOR_SHARED", 227 * 1024));
}

// Whether the driver is as new as the toolkit: else there is no device.
inline bool HasDriver() { return EnvironmentNumber("CUDA_EMULATOR_DRIVER", 1) != 0; }

// Of the device, by default as on an H100 with NVLink.
inline int Multiprocessors() {
  return static_cast<int>(EnvironmentNumber("CUDA_EMULATOR_MULTIPROCESSORS", 132));
}

}  // namespace cuda_emulator
