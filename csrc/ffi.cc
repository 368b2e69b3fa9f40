// The XLA FFI handlers. One file, compiled once for each module: `_cpu`, and `_cuda`
// with CONVGRAD_CUDA defined. Handlers check, translate and delegate; the arithmetic is
// behind kernel.h, and what Python sees of a module is in bindings.cc.
//
// With CONVGRAD_EMULATED as well, the handler is one for the CPU: the tests run the CUDA
// kernels there (tests/emulator).

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings.h"
#include "cpu/filter/plan.h"
#include "ffi_types.h"
#include "kernel.h"
#include "problem.h"
#include "thread_pool.h"
#include "thread_scratch.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace convgrad {
namespace {

// What the custom call carries, decoded from its backend_config by member name.
struct CallAttributes {
  IntSpan window_strides, padding, lhs_dilation, rhs_dilation;
  IntSpan lhs_spec, rhs_spec, out_spec, lhs_layout, rhs_layout, out_layout;
  int64_t feature_group_count, batch_group_count;
  bool allow_tf32;
  std::string_view kernel;  // "auto", or one by name
};

}  // namespace
}  // namespace convgrad

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    ::convgrad::CallAttributes,
    ::xla::ffi::StructMember<::convgrad::IntSpan>("window_strides"),
    ::xla::ffi::StructMember<::convgrad::IntSpan>("padding"),
    ::xla::ffi::StructMember<::convgrad::IntSpan>("lhs_dilation"),
    ::xla::ffi::StructMember<::convgrad::IntSpan>("rhs_dilation"),
    ::xla::ffi::StructMember<::convgrad::IntSpan>("lhs_spec"),
    ::xla::ffi::StructMember<::convgrad::IntSpan>("rhs_spec"),
    ::xla::ffi::StructMember<::convgrad::IntSpan>("out_spec"),
    ::xla::ffi::StructMember<::convgrad::IntSpan>("lhs_layout"),
    ::xla::ffi::StructMember<::convgrad::IntSpan>("rhs_layout"),
    ::xla::ffi::StructMember<::convgrad::IntSpan>("out_layout"),
    ::xla::ffi::StructMember<int64_t>("feature_group_count"),
    ::xla::ffi::StructMember<int64_t>("batch_group_count"),
    ::xla::ffi::StructMember<bool>("allow_tf32"),
    ::xla::ffi::StructMember<std::string_view>("kernel"));

namespace convgrad {
namespace {

#ifdef CONVGRAD_CUDA
constexpr auto& KernelNames = CudaKernelNames;
bool MakePlan(Map, const Problem& problem, const char* kernel, const Gpu& gpu,
              Plan* plan) {
  return PlanCuda(problem, kernel, gpu, plan);
}
constexpr auto& BoundWorkspace = BoundCudaWorkspace;
constexpr int64_t kScratchBytes = 0;
constexpr auto& FindGpu = CurrentGpu;
int64_t WorkspaceBytes(const Problem& problem, const Plan&, const std::string& kernel) {
  return CudaWorkspaceBytes(problem, kernel.c_str());
}
#else
constexpr auto& KernelNames = CpuKernelNames;
constexpr auto& BoundWorkspace = BoundCpuWorkspace;
constexpr int64_t kScratchBytes = kThreadScratchBytes;
bool MakePlan(Map map, const Problem& problem, const char* kernel, const Gpu&,
              Plan* plan) {
  return map == Map::kFilterGrad ? PlanCpuFilterGrad(problem, kernel, plan)
                                 : PlanCpu(problem, kernel, plan);
}
int64_t WorkspaceBytes(const Problem&, const Plan& plan, const std::string&) {
  return plan.workspace_bytes;
}
constexpr auto FindGpu = [](Gpu*) -> const char* { return nullptr; };
Gpu GpuOf(int) { return {}; }
#endif

std::string PlanProblem(Map map, const Problem& problem, const std::string& kernel,
                        const Gpu& gpu, Plan* plan) {
  if (MakePlan(map, problem, kernel.c_str(), gpu, plan)) return "";
  return "kernel must be 'auto' or the name of a kernel that takes this geometry, got '" +
         kernel + "'";
}

// An array, which is a gradient if it is not an operand of the convolution itself.
const char* NameOf(Map map, Role role) {
  constexpr const char* kNames[] = {"x", "w", "y"};
  constexpr const char* kGradients[] = {"dx", "dw", "dy"};
  const bool gradient =
      map != Map::kForward && (role == kOut || role == RolesOf(map).result);
  return (gradient ? kGradients : kNames)[role];
}

// The operands after the first two.
struct OptionalOperands {
  std::optional<ffi::AnyBuffer> residual, relu, padding;
};

std::string ReadOptionalOperands(Map map, const ffi::RemainingArgs& args, bool fused,
                                 OptionalOperands* optional) {
  std::vector<std::optional<ffi::AnyBuffer>*> places;
  if (fused) places = {&optional->residual, &optional->relu};
  const size_t least = places.size();
  places.push_back(&optional->padding);
  if (args.size() < least || args.size() > places.size()) {
    const Roles roles = RolesOf(map);
    return std::string("operands must be ") + NameOf(map, roles.operand[0]) + ", " +
           NameOf(map, roles.operand[1]) + (fused ? ", residual, relu" : "") +
           " and at most one for the padding, got " + std::to_string(2 + args.size());
  }
  for (size_t i = 0; i < args.size(); ++i) {
    const ffi::ErrorOr<ffi::AnyBuffer> operand = args.get<ffi::AnyBuffer>(i);
    if (operand.has_error()) return operand.error().message();
    *places[i] = *operand;
  }
  return "";
}

// What a call is for, once everything is checked.
struct Call {
  Problem problem;
  Plan plan;
  Epilogue epilogue;
  int64_t w_at;     // where the filter begins, in elements
  void* workspace;  // null if the call brings none
};

// The workspace that a call brings, null and of no bytes if it brings none.
std::string ReadWorkspace(const ffi::RemainingRets& results, void** workspace,
                          int64_t* bytes) {
  *workspace = nullptr;
  *bytes = 0;
  if (results.size() == 0) return "";
  if (results.size() > 1) {
    return "results must be an array and at most a workspace, got " +
           std::to_string(1 + results.size());
  }
  auto given = results.get<ffi::Buffer<ffi::U8>>(0);
  if (given.has_error()) return given.error().message();
  *bytes = static_cast<int64_t>(given.value()->element_count());
  if (*bytes > 0) *workspace = given.value()->untyped_data();
  return "";
}

// Everything that both platforms check before a kernel sees a pointer.
std::string Prepare(Map map, const CallAttributes& call, const ffi::AnyBuffer& first,
                    const ffi::AnyBuffer& second, const ffi::RemainingArgs& args,
                    bool fused, const ffi::AnyBuffer& to,
                    const ffi::RemainingRets& results, Call* made) {
  const Roles roles = RolesOf(map);
  Ints shape[3];
  shape[roles.operand[0]] = ToInts(first.dimensions());
  shape[roles.operand[1]] = ToInts(second.dimensions());
  shape[roles.result] = ToInts(to.dimensions());
  const auto shapes = [&] { return ShowShapes(shape[kLhs], shape[kRhs], shape[kOut]); };
  const std::optional<DType> dtype = ToDType(to.element_type());
  if (!dtype || first.element_type() != to.element_type() ||
      second.element_type() != to.element_type()) {
    std::ostringstream message;
    message << NameOf(map, roles.operand[0]) << ", " << NameOf(map, roles.operand[1])
            << " and " << NameOf(map, roles.result)
            << " must share one dtype of F64, F32, BF16 and F16, got "
            << first.element_type() << ", " << second.element_type() << " and "
            << to.element_type() << " for " << shapes();
    return message.str();
  }
  Attributes attributes{
      ToInts(call.window_strides), ToInts(call.padding),     ToInts(call.lhs_dilation),
      ToInts(call.rhs_dilation),   ToInts(call.lhs_spec),    ToInts(call.rhs_spec),
      ToInts(call.out_spec),       ToInts(call.lhs_layout),  ToInts(call.rhs_layout),
      ToInts(call.out_layout),     call.feature_group_count, call.batch_group_count};
  OptionalOperands optional;
  if (std::string error = ReadOptionalOperands(map, args, fused, &optional);
      !error.empty()) {
    return error + " for " + shapes();
  }
  for (const auto& [name, operand, pointer] :
       {std::tuple{"residual", optional.residual, &made->epilogue.residual},
        std::tuple{"relu", optional.relu, &made->epilogue.relu}}) {
    if (!operand || operand->element_count() == 0) continue;
    if (operand->element_type() != to.element_type() ||
        ToInts(operand->dimensions()) != shape[roles.result]) {
      return std::string(name) + " must have dx's dtype and shape, or no element, for " +
             shapes();
    }
    *pointer = operand->untyped_data();
  }
  if (optional.padding) {
    if (std::string error =
            AddPadding(ToInts(optional.padding->dimensions()), &attributes.padding);
        !error.empty()) {
      return error + " for " + shapes();
    }
  }
  int64_t workspace_bytes;
  if (std::string error = ReadWorkspace(results, &made->workspace, &workspace_bytes);
      !error.empty()) {
    return error + " for " + shapes();
  }
  Problem& problem = made->problem;
  if (std::string error =
          MakeProblem(shape[kLhs], shape[kRhs], shape[kOut], attributes, &problem);
      !error.empty()) {
    return error;
  }
  made->w_at = 0;
  if (map == Map::kForward) problem = ForwardAsInputGrad(problem, &made->w_at);
  problem.dtype = *dtype;
  problem.allow_tf32 = call.allow_tf32;
  problem.workspace_limit = workspace_bytes > 0 ? workspace_bytes : kScratchBytes;
  Gpu gpu{};
  if (const char* error = FindGpu(&gpu); error != nullptr) {
    return std::string("no GPU can be used: ") + error;
  }
  if (std::string error =
          PlanProblem(map, problem, std::string(call.kernel), gpu, &made->plan);
      !error.empty()) {
    return error + " for " + shapes();
  }
  if (problem.workspace_limit < made->plan.workspace_bytes) {
    return "workspace must have " + std::to_string(made->plan.workspace_bytes) +
           " bytes, got " + std::to_string(workspace_bytes) + " for " + shapes();
  }
  return "";
}

std::string Message(Map map, const std::string& what) {
  return std::string("convgrad_") + NameOf(map) + ": " + what;
}

ffi::Error Invalid(Map map, const std::string& what) {
  return ffi::Error::InvalidArgument(Message(map, what));
}

// Also for exceptions, such as that of no memory: none may reach XLA.
ffi::Error Failed(Map map, const char* what) {
  return ffi::Error(ffi::ErrorCode::kInternal, Message(map, what));
}

#ifdef CONVGRAD_CUDA

template <bool kFused>
ffi::Error InputGrad(CUstream_st* stream, CallAttributes call, ffi::AnyBuffer dy,
                     ffi::AnyBuffer w, ffi::RemainingArgs args,
                     ffi::Result<ffi::AnyBuffer> dx, ffi::RemainingRets rest) try {
  Call made{};
  if (std::string error =
          Prepare(Map::kInputGrad, call, dy, w, args, kFused, *dx, rest, &made);
      !error.empty()) {
    return Invalid(Map::kInputGrad, error);
  }
  if (dx->element_count() == 0) return ffi::Error::Success();
  const char* error =
      LaunchCuda(stream, made.problem, made.plan, dy.untyped_data(), w.untyped_data(),
                 dx->untyped_data(), made.workspace, made.epilogue);
  return error == nullptr ? ffi::Error::Success() : Failed(Map::kInputGrad, error);
} catch (const std::exception& e) {
  return Failed(Map::kInputGrad, e.what());
}

#ifdef CONVGRAD_EMULATED
template <bool kFused>
ffi::Error InputGradEmulated(CallAttributes call, ffi::AnyBuffer dy, ffi::AnyBuffer w,
                             ffi::RemainingArgs args, ffi::Result<ffi::AnyBuffer> dx,
                             ffi::RemainingRets rest) {
  // NaNs, so that a test sees what a kernel leaves unwritten.
  std::memset(dx->untyped_data(), 0xff, dx->size_bytes());
  void* workspace;
  int64_t bytes;
  if (ReadWorkspace(rest, &workspace, &bytes).empty() && bytes > 0) {
    std::memset(workspace, 0xff, static_cast<size_t>(bytes));
  }
  return InputGrad<kFused>(nullptr, call, dy, w, args, dx, rest);
}
#endif

#else

// Counts the calls that run, in all programs of the process.
class RunningCall {
 public:
  RunningCall() : count_(running_.fetch_add(1, std::memory_order_relaxed) + 1) {}
  ~RunningCall() { running_.fetch_sub(1, std::memory_order_relaxed); }
  RunningCall(const RunningCall&) = delete;
  RunningCall& operator=(const RunningCall&) = delete;
  int64_t count() const { return count_; }  // when this one began, with it

 private:
  static inline std::atomic<int64_t> running_{0};
  const int64_t count_;
};

// The pool, or for what is too small this thread alone.
ParallelFor LoopFor(const Problem& problem, const RunningCall& call,
                    ffi::ThreadPool& pool) {
  const bool all_are_busy = call.count() >= pool.num_threads();
  if (!IsTooSmallToShare(problem, all_are_busy)) {
    return [&pool](int64_t count, const std::function<void(int64_t)>& task) {
      RunInPool(pool, count, task);
    };
  }
  return [](int64_t count, const std::function<void(int64_t)>& task) {
    for (int64_t i = 0; i < count; ++i) task(i);
  };
}

template <Map kMap, bool kFused>
ffi::Error Compute(ffi::ThreadPool pool, CallAttributes call, ffi::AnyBuffer first,
                   ffi::AnyBuffer second, ffi::RemainingArgs args,
                   ffi::Result<ffi::AnyBuffer> to, ffi::RemainingRets rest) try {
  Call made{};
  if (std::string error =
          Prepare(kMap, call, first, second, args, kFused, *to, rest, &made);
      !error.empty()) {
    return Invalid(kMap, error);
  }
  if (to->element_count() == 0) return ffi::Error::Success();
  void* const workspace = made.workspace != nullptr
                              ? made.workspace
                              : ThreadScratch(made.plan.workspace_bytes);
  const RunningCall running;
  const ParallelFor loop = LoopFor(made.problem, running, pool);
  if constexpr (kMap == Map::kFilterGrad) {
    RunCpuFilterGrad(made.problem, made.plan, first.untyped_data(), second.untyped_data(),
                     to->untyped_data(), workspace, loop);
  } else {
    const unsigned char* filter =
        static_cast<const unsigned char*>(second.untyped_data()) +
        made.w_at * SizeInBytes(made.problem.dtype);
    RunCpu(made.problem, made.plan, first.untyped_data(), filter, to->untyped_data(),
           workspace, made.epilogue, std::max<int64_t>(1, pool.num_threads()), loop);
  }
  return ffi::Error::Success();
} catch (const std::exception& e) {
  return Failed(kMap, e.what());
}

#endif

#ifdef CONVGRAD_EMULATED
template <bool kFused>
constexpr auto kInputGradOf = InputGradEmulated<kFused>;
#elif defined(CONVGRAD_CUDA)
template <bool kFused>
constexpr auto kInputGradOf = InputGrad<kFused>;
#else
template <bool kFused>
constexpr auto kInputGradOf = Compute<Map::kInputGrad, kFused>;
#endif

auto Binding() {
  return ffi::Ffi::Bind()
#ifndef CONVGRAD_EMULATED
#ifdef CONVGRAD_CUDA
      .Ctx<ffi::PlatformStream<CUstream_st*>>()
#else
      .Ctx<ffi::ThreadPool>()
#endif
#endif
      .Attrs<CallAttributes>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .RemainingArgs()
      .Ret<ffi::AnyBuffer>()
      .RemainingRets();
}

constexpr std::initializer_list<ffi::Traits> kTraits = {
#if defined(CONVGRAD_CUDA) && !defined(CONVGRAD_EMULATED)
    ffi::Traits::kCmdBufferCompatible
#endif
};
XLA_FFI_DEFINE_HANDLER(kInputGrad, kInputGradOf<false>, Binding(), kTraits);
XLA_FFI_DEFINE_HANDLER(kInputGradFused, kInputGradOf<true>, Binding(), kTraits);
#ifndef CONVGRAD_CUDA
constexpr auto kForwardOf = Compute<Map::kForward, false>;
XLA_FFI_DEFINE_HANDLER(kForward, kForwardOf, Binding());
constexpr auto kFilterGradOf = Compute<Map::kFilterGrad, false>;
XLA_FFI_DEFINE_HANDLER(kFilterGrad, kFilterGradOf, Binding());
#endif

std::string PlanFor(Map map, const Problem& problem, const std::string& kernel,
                    int capability, Plan* plan) {
  return PlanProblem(map, problem, kernel, GpuOf(capability), plan);
}

}  // namespace

const ModuleParts& Parts() {
  static const ModuleParts parts = [] {
    ModuleParts p{};
    p.ffi_api_major = XLA_FFI_API_MAJOR;
    p.ffi_api_minor = XLA_FFI_API_MINOR;
    p.input_grad = reinterpret_cast<void*>(kInputGrad);
    p.input_grad_fused = reinterpret_cast<void*>(kInputGradFused);
#ifndef CONVGRAD_CUDA
    p.forward = reinterpret_cast<void*>(kForward);
    p.filter_grad = reinterpret_cast<void*>(kFilterGrad);
    p.filter_kernel_names = CpuFilterKernelNames;
    AddMaxPoolGrad(&p);
#endif
    p.kernel_names = KernelNames;
    p.plan = PlanFor;
    p.workspace_bytes = WorkspaceBytes;
    p.bound_workspace = BoundWorkspace;
    p.scratch_bytes = kScratchBytes > 0 ? kScratchBytes : -1;
#ifdef CONVGRAD_CUDA
    p.cuda_code = CONVGRAD_CUDA_CODE;
    p.cuda_toolkit_version = CudaToolkitVersion();
    p.cuda_driver_version = CudaDriverVersion;
#else
    p.cpu_isa = CpuIsa;
    p.cpu_isas = CpuIsas;
    p.cpu_best_isa = CpuBestIsa;
#endif
    return p;
  }();
  return parts;
}

}  // namespace convgrad
