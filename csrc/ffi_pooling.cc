// The XLA FFI handler of the gradient of max pooling, of the CPU module alone. It checks,
// translates and delegates, as those of the convolutions in ffi.cc do.

#include <cstdint>
#include <exception>
#include <functional>
#include <optional>
#include <sstream>
#include <string>

#include "bindings.h"
#include "cpu/pooling/plan.h"
#include "ffi_types.h"
#include "thread_pool.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace convgrad {
namespace {

constexpr char kTarget[] = "convgrad_max_pool_grad: ";

ffi::Error Invalid(const std::string& what) {
  return ffi::Error::InvalidArgument(kTarget + what);
}

ffi::Error MaxPoolGrad(ffi::ThreadPool pool, IntSpan window_dimensions,
                       IntSpan window_strides, IntSpan padding, ffi::AnyBuffer dy,
                       ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> dx) try {
  const Ints x_shape = ToInts(x.dimensions()), dy_shape = ToInts(dy.dimensions());
  const std::string shapes = " for x " + Show(x_shape) + ", dy " + Show(dy_shape);
  const std::optional<DType> dtype = ToDType(dx->element_type());
  if (!dtype || x.element_type() != dx->element_type() ||
      dy.element_type() != dx->element_type()) {
    std::ostringstream message;
    message << "dy, x and dx must share one dtype of F64, F32, BF16 and F16, got "
            << dy.element_type() << ", " << x.element_type() << " and "
            << dx->element_type() << shapes;
    return Invalid(message.str());
  }
  if (ToInts(dx->dimensions()) != x_shape) {
    return Invalid("dx must have the shape of x, got " + Show(ToInts(dx->dimensions())) +
                   shapes);
  }
  PoolArgs args{};
  const PoolAttributes attributes{ToInts(window_dimensions), ToInts(window_strides),
                                  ToInts(padding)};
  if (std::string error = MakePool(x_shape, dy_shape, attributes, *dtype, &args);
      !error.empty()) {
    return Invalid(error + shapes);
  }
  args.x = x.untyped_data();
  args.dy = dy.untyped_data();
  args.dx = dx->untyped_data();
  RunCpuMaxPoolGrad(args,
                    [&pool](int64_t count, const std::function<void(int64_t)>& task) {
                      RunInPool(pool, count, task);
                    });
  return ffi::Error::Success();
} catch (const std::exception& e) {  // such as that of no memory: none may reach XLA
  return ffi::Error(ffi::ErrorCode::kInternal, std::string(kTarget) + e.what());
}

XLA_FFI_DEFINE_HANDLER(kMaxPoolGrad, MaxPoolGrad,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Attr<IntSpan>("window_dimensions")
                           .Attr<IntSpan>("window_strides")
                           .Attr<IntSpan>("padding")
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Ret<ffi::AnyBuffer>());

std::string Obstacle(const Ints& x_shape, const Ints& dy_shape,
                     const Ints& window_dimensions, const Ints& window_strides,
                     const Ints& padding, int64_t itemsize) {
  constexpr double kMostLooks = 3;  // with 4 and more, XLA's one thread was as fast
  PoolArgs args{};
  const PoolAttributes attributes{window_dimensions, window_strides, padding};
  const DType dtype = itemsize == 8 ? DType::kF64 : DType::kF32;
  std::string error = MakePool(x_shape, dy_shape, attributes, dtype, &args);
  if (!error.empty() || LooksAtWindow(args) <= kMostLooks) return error;
  return "windows overlap so much that tiles share most of them";
}

}  // namespace

void AddMaxPoolGrad(ModuleParts* parts) {
  parts->max_pool_grad = reinterpret_cast<void*>(kMaxPoolGrad);
  parts->max_pool_grad_obstacle = Obstacle;
}

}  // namespace convgrad
