// What Python sees of a compiled module: the handlers to register, and the planner. The
// one object serves both modules, `_cpu` and `_cuda`, because pybind11 takes long to
// compile; bindings.h says what differs.

#include "bindings.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cuda/kernel_table.h"
#include "kernel.h"
#include "problem.h"

namespace py = pybind11;

namespace convgrad {
namespace {

// Names that end with null.
std::vector<std::string> ListOf(const char* const* name) {
  std::vector<std::string> names;
  for (; *name != nullptr; ++name) names.emplace_back(*name);
  return names;
}

DType DTypeByName(const std::string& name) {
  if (name == "float64") return DType::kF64;
  if (name == "float32") return DType::kF32;
  if (name == "bfloat16") return DType::kBF16;
  if (name == "float16") return DType::kF16;
  throw py::value_error("dtype must be float64, float32, bfloat16 or float16, got " +
                        name);
}

Map MapByName(const std::string& name) {
  const ModuleParts& parts = Parts();
  if (name == NameOf(Map::kInputGrad)) return Map::kInputGrad;
  if (name == NameOf(Map::kForward) && parts.forward != nullptr) return Map::kForward;
  if (name == NameOf(Map::kFilterGrad) && parts.filter_grad != nullptr) {
    return Map::kFilterGrad;
  }
  throw py::value_error("map must be one that the module computes, got " + name);
}

// A problem that dispatch.py describes by the same words as the custom call.
Problem ProblemByAttributes(const std::string& dtype, const Ints& lhs_shape,
                            const Ints& rhs_shape, const Ints& out_shape,
                            const py::dict& call, Map map = Map::kInputGrad) {
  const auto ints = [&call](const char* name) { return call[name].cast<Ints>(); };
  const Attributes attributes{ints("window_strides"),
                              ints("padding"),
                              ints("lhs_dilation"),
                              ints("rhs_dilation"),
                              ints("lhs_spec"),
                              ints("rhs_spec"),
                              ints("out_spec"),
                              ints("lhs_layout"),
                              ints("rhs_layout"),
                              ints("out_layout"),
                              call["feature_group_count"].cast<int64_t>(),
                              call["batch_group_count"].cast<int64_t>()};
  Problem problem;
  const std::string error =
      MakeProblem(lhs_shape, rhs_shape, out_shape, attributes, &problem);
  if (!error.empty()) throw py::value_error(error);
  if (map == Map::kForward) {
    int64_t w_at;
    problem = ForwardAsInputGrad(problem, &w_at);
  }
  problem.dtype = DTypeByName(dtype);
  problem.allow_tf32 = call["allow_tf32"].cast<bool>();
  return problem;
}

Plan PlanOf(const Problem& problem, const py::dict& call, int capability,
            Map map = Map::kInputGrad) {
  Plan plan{};
  const std::string error =
      Parts().plan(map, problem, call["kernel"].cast<std::string>(), capability, &plan);
  if (!error.empty()) throw py::value_error(error);
  return plan;
}

// The planner: what runs a request.
py::dict PlanByAttributes(const std::string& dtype, const Ints& lhs_shape,
                          const Ints& rhs_shape, const Ints& out_shape,
                          const py::dict& call, int capability,
                          const std::string& map_name) {
  const Map map = MapByName(map_name);
  const Problem problem =
      ProblemByAttributes(dtype, lhs_shape, rhs_shape, out_shape, call, map);
  const Plan plan = PlanOf(problem, call, capability, map);
  py::dict result;
  result["kernel"] = plan.kernel;
  result["workspace_bytes"] =
      Parts().workspace_bytes(problem, plan, call["kernel"].cast<std::string>());
  result["exchanged"] = plan.exchanged;
  result["tile"] = py::make_tuple(plan.tile_m, plan.tile_n, plan.tile_k);
  result["stages"] = plan.stages;
  result["split_k"] = plan.split_k;
  result["blocks"] = plan.blocks;
  result["threads"] = plan.threads;
  result["resident"] = plan.resident;
  result["shared_bytes"] = plan.shared_bytes;
  result["model_us"] = plan.model_us;
  return result;
}

const char* NameOf(Operands operands) {
  switch (operands) {
    case Operands::kF64: return "f64";
    case Operands::kF32: return "f32";
    case Operands::kTf32: return "tf32";
    case Operands::k16Bit: break;
  }
  return "16bit";
}

// What a plan's estimate is made of, for jax_convgrad/tools/calibrate.py.
py::dict CostByAttributes(const std::string& dtype, const Ints& lhs_shape,
                          const Ints& rhs_shape, const Ints& out_shape,
                          const py::dict& call, int capability) {
  const Problem problem =
      ProblemByAttributes(dtype, lhs_shape, rhs_shape, out_shape, call);
  const Plan plan = PlanOf(problem, call, capability);
  py::dict result;
  result["operands"] = NameOf(CorrectionOf(plan.kernel, problem).operands);
  result["launches"] = plan.cost.launches;
  result["fixed_us"] = plan.cost.fixed_us;
  result["arithmetic_us"] = plan.cost.arithmetic_us;
  result["memory_us"] = plan.cost.memory_us;
  result["unhidden"] = plan.cost.unhidden;
  return result;
}

py::dict RatesAsDict() {
  py::list corrections;
  for (const Correction& c : kCorrections) {
    corrections.append(py::make_tuple(c.kernel, NameOf(c.operands), c.arithmetic,
                                      c.memory, c.arithmetic_rows, c.memory_rows));
  }
  py::dict result;
  result["gpu"] = kRatesGpu;
  result["source"] = kRatesSource;
  result["launch_us"] = kRatesLaunchUs;
  result["copy_bytes_per_us"] = kRatesCopyBytesPerUs;
  result["corrections"] = corrections;
  return result;
}

void Define(py::module_& m) {
  const ModuleParts& parts = Parts();
  m.doc() = "FFI handlers of jax_convgrad. Private: use the jax_convgrad package.";
  m.attr("version") = CONVGRAD_VERSION;
  m.attr("ffi_api_version") = py::make_tuple(parts.ffi_api_major, parts.ffi_api_minor);
  m.attr("scratch_bytes") = parts.scratch_bytes;
  m.def("targets", [] {
    py::dict targets;
    targets["convgrad_input_grad"] = py::capsule(Parts().input_grad);
    targets["convgrad_input_grad_fused"] = py::capsule(Parts().input_grad_fused);
    if (Parts().forward != nullptr) {
      targets["convgrad_forward"] = py::capsule(Parts().forward);
      targets["convgrad_filter_grad"] = py::capsule(Parts().filter_grad);
      targets["convgrad_max_pool_grad"] = py::capsule(Parts().max_pool_grad);
    }
    return targets;
  });
  m.def("plan", &PlanByAttributes, py::arg("dtype"), py::arg("lhs_shape"),
        py::arg("rhs_shape"), py::arg("out_shape"), py::arg("attributes"),
        py::arg("capability") = 90, py::arg("map_name") = "input_grad");
  m.def(
      "workspace_bound",
      [](const std::string& dtype, const Ints& lhs_shape, const Ints& rhs_shape,
         const Ints& out_shape, const py::dict& call, const std::string& map_name) {
        const Map map = MapByName(map_name);
        if (map == Map::kFilterGrad) {
          throw py::value_error("map must be one that takes symbolic sizes, got " +
                                map_name);
        }
        const WorkspaceBound bound = Parts().bound_workspace(
            ProblemByAttributes(dtype, lhs_shape, rhs_shape, out_shape, call, map));
        return py::make_tuple(bound.bytes, bound.bytes_per_position);
      },
      py::arg("dtype"), py::arg("lhs_shape"), py::arg("rhs_shape"), py::arg("out_shape"),
      py::arg("attributes"), py::arg("map_name") = "input_grad");
  m.def(
      "kernel_names",
      [](const std::string& map) {
        return ListOf(MapByName(map) == Map::kFilterGrad ? Parts().filter_kernel_names()
                                                         : Parts().kernel_names());
      },
      py::arg("map_name") = "input_grad");
  if (parts.cpu_isa != nullptr) {
    m.def("isa", parts.cpu_isa);
    m.def("best_isa", parts.cpu_best_isa);
    m.def("isas", [] { return ListOf(Parts().cpu_isas()); });
    m.def("max_pool_grad_obstacle", parts.max_pool_grad_obstacle, py::arg("x_shape"),
          py::arg("dy_shape"), py::arg("window_dimensions"), py::arg("window_strides"),
          py::arg("padding"), py::arg("itemsize"));
    return;
  }
  m.def(
      "reference_gpu",
      [](const std::string& dtype, bool allow_tf32) {
        py::dict result;
        result["name"] = ReferenceGpu::kName;
        result["multiprocessors"] = ReferenceGpu::kMultiprocessors;
        const double peak = ReferenceGpu::PeakPerUs(DTypeByName(dtype), allow_tf32);
        result["flops_per_s"] = 2e6 * peak;
        result["bytes_per_s"] = 1e6 * ReferenceGpu::kCopyBytesPerUs;
        return result;
      },
      py::arg("dtype"), py::arg("allow_tf32"));
  m.attr("code") = parts.cuda_code;
  m.attr("toolkit_version") = parts.cuda_toolkit_version;
  m.def("driver_version", parts.cuda_driver_version);
  m.def("rates", &RatesAsDict);
  m.def("cost", &CostByAttributes, py::arg("dtype"), py::arg("lhs_shape"),
        py::arg("rhs_shape"), py::arg("out_shape"), py::arg("attributes"),
        py::arg("capability") = 90);
}

}  // namespace
}  // namespace convgrad

// A module takes the one of its own name.
#ifdef CONVGRAD_MODULE
PYBIND11_MODULE(CONVGRAD_MODULE, m) { convgrad::Define(m); }
#else
PYBIND11_MODULE(_cpu, m) { convgrad::Define(m); }
PYBIND11_MODULE(_cuda, m) { convgrad::Define(m); }
#endif
