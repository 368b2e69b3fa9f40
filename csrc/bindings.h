// What a module's handlers (ffi.cc, ffi_pooling.cc) give to its Python bindings
// (bindings.cc).

#pragma once

#include <cstdint>
#include <string>

#include "kernel.h"
#include "problem.h"

namespace convgrad {

struct ModuleParts {
  int ffi_api_major, ffi_api_minor;  // of the headers that the handlers were built with
  // The handlers, null where there is none.
  void *input_grad, *input_grad_fused, *forward, *filter_grad, *max_pool_grad;

  // Null-terminated. The forward map's are those of the input gradient.
  const char* const* (*kernel_names)();
  const char* const* (*filter_kernel_names)();
  // Returns an error, empty if there is none.
  std::string (*plan)(Map map, const Problem& problem, const std::string& kernel,
                      int capability, Plan* plan);
  int64_t (*workspace_bytes)(const Problem& problem, const Plan& plan,
                             const std::string& kernel);
  WorkspaceBound (*bound_workspace)(const Problem& problem);
  // A call with a workspace of so many bytes, or fewer, need not bring it. -1 if all
  // must.
  int64_t scratch_bytes;

  // What keeps the gradient of max pooling from the kernel, empty if nothing does: of x,
  // dY and the attributes in lax's order and an element's bytes.
  std::string (*max_pool_grad_obstacle)(const Ints& x_shape, const Ints& dy_shape,
                                        const Ints& window_dimensions,
                                        const Ints& window_strides, const Ints& padding,
                                        int64_t itemsize);

  const char* const* (*cpu_isas)();
  const char* (*cpu_best_isa)();
  const char* (*cpu_isa)();  // null for CUDA, and what follows is empty for the CPU

  const char* cuda_code;  // "sm_80 compute_80": what the kernels were compiled for
  int cuda_toolkit_version;
  int (*cuda_driver_version)();
};

// Of the module that this is linked into.
const ModuleParts& Parts();

// Fills in what ffi_pooling.cc has, of the CPU module alone.
void AddMaxPoolGrad(ModuleParts* parts);

}  // namespace convgrad
