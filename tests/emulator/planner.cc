// The planner alone, on the problems of cases.py: usage planner FILE. For every problem a
// line for each kernel that takes it, and one of what is planned:
//
//   name kernel launches fixed_us arithmetic_us memory_us unhidden model_us

#include <cstdio>
#include <fstream>
#include <string>

#include "kernel.h"
#include "problem.h"
#include "problem_lines.h"

namespace convgrad {
namespace {

void Print(const std::string& name, const Plan& plan) {
  std::printf("%s %s %.17g %.17g %.17g %.17g %.17g %.17g\n", name.c_str(), plan.kernel,
              plan.cost.launches, plan.cost.fixed_us, plan.cost.arithmetic_us,
              plan.cost.memory_us, plan.cost.unhidden, plan.model_us);
}

int Main(const char* path) {
  std::ifstream file(path);
  for (std::string text; std::getline(file, text);) {
    Line line;
    Problem problem{};
    if (!ReadLine(text, &line) || !MakeProblem(line.lhs_shape, line.rhs_shape,
                                               line.out_shape, line.attributes, &problem)
                                       .empty()) {
      std::fprintf(stderr, "malformed line: %s\n", text.c_str());
      return 2;
    }
    problem.dtype = DTypeByName(line.dtype);
    problem.allow_tf32 = line.allow_tf32;
    const Gpu hopper = GpuOf(90);
    for (const char* const* kernel = CudaKernelNames(); *kernel != nullptr; ++kernel) {
      Plan plan{};
      if (PlanCuda(problem, *kernel, hopper, &plan)) Print(line.name, plan);
    }
    Plan planned{};
    if (!PlanCuda(problem, "auto", hopper, &planned)) return 1;
    Print(line.name + "=planned", planned);
  }
  return 0;
}

}  // namespace
}  // namespace convgrad

int main(int argc, char** argv) { return argc == 2 ? convgrad::Main(argv[1]) : 2; }
