// What the programs of planted mistakes share.
//
//   PROGRAM NAME planted|correct
//
// Exit status 0 if the result is right, 1 if it is wrong, 2 if the launch returned an
// error (printed), 64 if the arguments are wrong.

#pragma once

#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>

#include "cuda/platform.cuh"

namespace convgrad {

// Whether a launch failed, which is printed.
inline bool HasFailed(cudaError_t status) {
  const char* const error = ErrorText(status);
  if (error != nullptr) std::printf("error: %s\n", error);
  return error != nullptr;
}

// Whether an element is wrong, which is printed. What a NaN's sign is nobody promises.
inline bool IsWrong(int element, float is, float should) {
  if (is == should) return false;
  std::printf("wrong: element %d is %g, not %g\n", element, std::isnan(is) ? NAN : is,
              should);
  return true;
}

// run(name, planted) returns the exit status.
template <typename Run>
int RunPlanted(int argc, char** argv, Run run) {
  if (argc != 3) return 64;
  return run(argv[1], std::strcmp(argv[2], "planted") == 0);
}

}  // namespace convgrad
