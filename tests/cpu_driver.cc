// The CPU kernels without Python or JAX: for sanitizers, which would have to watch those
// too, and for other processors under an emulator. Runs every kernel that takes a problem
// on buffers of exactly their size and on threads of its own, and compares with the
// literal sum in double: dX, the forward map as "forward:" and the kernel, and the filter
// gradient as "filter:" and its kernel.
//
//   cpu_driver FILE THREADS[,THREADS...] [FAULT]    one problem a line, see
//   problem_lines.h, and cpu_driver_pooling.h for the gradient of max pooling
//
// Prints the instruction set, then a line for each kernel. The first number of threads is
// compared with the literal sum, the others must give its bits. Once more with an
// epilogue the bits must be its steps applied to those. Exit status 1 on a failure. A
// FAULT is there to be caught by a sanitizer:
//
//   short_dy short_w short_dx short_workspace    the buffer lacks 64 bytes, the longest
//   short_x short_filter_dy short_dw             vector, at its end; the second line
//   those
//                                                of the filter gradient
//   twice    every task runs on two threads at once
//   early    a stage starts while the first task of the one before it still runs

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cpu/filter/plan.h"
#include "cpu_driver_pooling.h"
#include "kernel.h"
#include "problem.h"
#include "problem_lines.h"
#include "thread_scratch.h"

namespace convgrad {
namespace {

constexpr int64_t kVector = 64;

using Task = std::function<void(int64_t)>;

// Tasks on threads by turns, not by whoever is first: neighbours are then always on two
// threads, with nothing to order them but the start and the end of a stage. That is what
// lets a race be found however the threads are scheduled.
class Stages {
 public:
  Stages(int threads, std::string fault, int64_t stages_in_all)
      : threads_(threads), fault_(std::move(fault)), in_all_(stages_in_all) {}

  void Run(int64_t count, const Task& task) {
    std::vector<std::thread> running;
    ++stages_;
    if (held_) {
      running.emplace_back([held = std::move(held_)] { held(0); });
      held_ = nullptr;
    }
    int64_t first = 0;
    if (fault_ == "early" && stages_ < in_all_ && count > 0) {
      held_ = task;  // what it refers to lives as long as all stages
      first = 1;
    }
    const bool twice = fault_ == "twice";
    // The second time backwards, so that results cannot depend on the order.
    const bool backwards = threads_ > 2;
    for (int t = 0; t < threads_; ++t) {
      running.emplace_back([this, t, first, count, twice, backwards, &task] {
        const int64_t step = twice ? 1 : threads_;
        for (int64_t i = first + (twice ? 0 : t); i < count; i += step) {
          task(backwards ? count - 1 - (i - first) : i);
        }
      });
    }
    for (std::thread& thread : running) thread.join();
  }

  int64_t stages() const { return stages_; }

 private:
  int threads_;
  std::string fault_;
  int64_t in_all_, stages_ = 0;
  Task held_;
};

// Every value of 16 bits survives a round trip.
bool NarrowFormatsHold() {
  for (const NarrowFormat& type : {kBF16Format, kF16Format}) {
    for (int bits = 0; bits < 1 << 16; ++bits) {
      const double value = type.Decode(static_cast<uint16_t>(bits));
      if (!std::isnan(value) && type.Encode(value) != bits) return false;
    }
  }
  return kBF16Format.Encode(1.0 / 3) == 0x3eab && kF16Format.Encode(1.0 / 3) == 0x3555 &&
         kF16Format.Encode(65520) == 0x7c00 && kF16Format.Encode(0x1p-25) == 0 &&
         kF16Format.Encode(0x1.8p-24) == 2;
}

int64_t Lacks(const std::string& fault, const char* buffer) {
  return fault == std::string("short_") + buffer ? kVector : 0;
}

// Runs a kernel on each number of threads, the first time into `first`; the fault is that
// of the others. Returns whether all leave the bits of the first.
//   run(result, workspace, threads, parallel_for)
template <typename Run>
bool GivesTheSameBits(const Array& first, const Ints& shape, int64_t lacks,
                      int64_t workspace_bytes, const std::vector<int>& threads,
                      const std::string& fault, Run run) {
  bool same = true;
  int64_t stages = 0;
  for (size_t i = 0; i < threads.size(); ++i) {
    const Array again(first.dtype(), shape, lacks);
    const Array& result = i == 0 ? first : again;
    const Array workspace(DType::kF64, {(workspace_bytes + 7) / 8},
                          Lacks(fault, "workspace"));
    Stages loop(threads[i], i == 0 ? "" : fault, stages);
    run(result.data(), workspace.data(), threads[i],
        [&loop](int64_t count, const Task& task) { loop.Run(count, task); });
    stages = loop.stages();
    same = same && std::memcmp(result.data(), first.data(), first.bytes()) == 0;
  }
  return same;
}

// Whether a problem is planned the same with the workspace that the handler has for it:
// that of its plan, or, if that is small, its thread's.
template <typename PlanFunction>
bool IsPlannedAgain(PlanFunction plan_of, Problem problem, const char* kernel) {
  Plan first{}, again{};
  if (!plan_of(problem, kernel, &first)) return true;
  for (const int64_t least : {int64_t{0}, kThreadScratchBytes}) {
    problem.workspace_limit = std::max(least, first.workspace_bytes);
    const bool same = plan_of(problem, kernel, &again) &&
                      std::strcmp(first.kernel, again.kernel) == 0 &&
                      first.workspace_bytes == again.workspace_bytes &&
                      first.exchanged == again.exchanged &&
                      first.merges_windows == again.merges_windows;
    if (!same) return false;
  }
  return true;
}

// What a line asks of a map: dX, or y, which is read as an input gradient.
struct Request {
  Problem problem;
  Ints from_shape, to_shape;  // of dY and dX, or of x and y
  int64_t w_at;               // where the filter begins
  std::string prefix;         // of kernels' names, in print
};

// Runs a request's kernels and prints a line for each. Returns the number of failures.
int RunRequest(const Line& line, const Request& request, const std::vector<int>& threads,
               const std::string& fault) {
  const Problem& problem = request.problem;
  std::mt19937 random(static_cast<unsigned>(std::hash<std::string>{}(line.name)));
  Array dy(problem.dtype, request.from_shape, Lacks(fault, "dy"));
  Array w(problem.dtype, line.rhs_shape, Lacks(fault, "w"));
  Fill(&dy, line.special, &random);
  Fill(&w, line.special, &random);
  const void* const filter = static_cast<const unsigned char*>(w.data()) +
                             request.w_at * SizeInBytes(problem.dtype);
  std::vector<double> expected;

  int failures = 0;
  std::vector<const char*> kernels;
  for (const char* const* name = CpuKernelNames(); *name != nullptr; ++name) {
    kernels.push_back(*name);
  }
  kernels.push_back("auto");  // which alone exchanges operands
  for (const char* const kernel : kernels) {
    Plan plan{};
    if (!IsPlannedAgain(PlanCpu, problem, kernel)) {
      std::printf("FAIL %s %s %s: planned otherwise with the workspace of its plan\n",
                  line.name.c_str(), line.dtype.c_str(), kernel);
      ++failures;
    }
    if ((line.kernel != "*" && line.kernel != kernel) ||
        !PlanCpu(problem, kernel, &plan) ||
        (std::strcmp(kernel, "auto") == 0 && !plan.exchanged)) {
      continue;
    }
    const Array first(problem.dtype, request.to_shape, Lacks(fault, "dx"));
    if (first.count() == 0) continue;
    if (expected.empty() && fault.empty()) {
      expected =
          LiteralSum(problem, dy.Values(), w.Values(), first.count(), request.w_at);
    }
    const bool same = GivesTheSameBits(
        first, request.to_shape, Lacks(fault, "dx"), plan.workspace_bytes, threads, fault,
        [&](void* dx, void* workspace, int64_t count, const ParallelFor& loop) {
          RunCpu(problem, plan, dy.data(), filter, dx, workspace, {}, count, loop);
        });
    bool finished = true;
    if (fault.empty()) {
      const int which = 1 + static_cast<int>(random() % 3);
      const EpilogueArrays arrays(which, problem.dtype, request.to_shape, line.special,
                                  &random);
      const Array dx(problem.dtype, request.to_shape);
      const Array workspace(DType::kF64, {(plan.workspace_bytes + 7) / 8});
      Stages run(threads.back(), "", 0);
      RunCpu(problem, plan, dy.data(), filter, dx.data(), workspace.data(),
             arrays.Pointers(), threads.back(),
             [&run](int64_t count, const Task& task) { run.Run(count, task); });
      finished = arrays.Holds(first, dx);
    }
    const double off = fault.empty() ? Error(first, expected) : 0;
    const bool passed = off <= line.tolerance && same && finished;
    std::printf("%s %s %s %s%s error %.2e of %.2e %s%s\n", passed ? "pass" : "FAIL",
                line.name.c_str(), line.dtype.c_str(), request.prefix.c_str(), kernel,
                off, line.tolerance, same ? "" : "other bits with other threads",
                finished ? "" : "another epilogue than that of the bits without one");
    failures += passed ? 0 : 1;
  }
  return failures;
}

// The definition of the filter gradient. dW as its strides lay it out.
std::vector<double> LiteralFilterGrad(const Problem& p, const std::vector<double>& x,
                                      const std::vector<double>& dy, int64_t count) {
  std::vector<double> dw(static_cast<size_t>(count));
  const auto along = [&p](auto&& self, int a, const double* from_x, const double* from_dy,
                          double* to) -> void {
    if (a == kAxes) {
      *to += *from_x * *from_dy;
      return;
    }
    const Axis& axis = p.axis[a];
    for (int64_t r = 0; r < axis.win; ++r) {
      for (int64_t i = 0; i < axis.out; ++i) {
        const int64_t at = i * axis.stride - axis.pad_lo + r * axis.rhs_dilation;
        if (at < 0 || at % axis.lhs_dilation != 0 || at / axis.lhs_dilation >= axis.in) {
          continue;
        }
        self(self, a + 1, from_x + at / axis.lhs_dilation * p.dx.axis[a],
             from_dy + i * p.dy.axis[a], to + r * p.w.axis[a]);
      }
    }
  };
  for (int64_t g = 0; g < p.groups; ++g) {
    for (int64_t k = 0; k < p.out_channels; ++k) {
      for (int64_t c = 0; c < p.in_channels; ++c) {
        for (int64_t n = 0; n < p.batch; ++n) {
          along(along, 0, x.data() + n * p.dx.batch + g * p.dx.group + c * p.dx.channel,
                dy.data() + n * p.dy.batch + g * p.dy.group + k * p.dy.channel,
                dw.data() + g * p.w.group + k * p.w.out_channel + c * p.w.in_channel);
        }
      }
    }
  }
  return dw;
}

// Runs the filter gradient's kernels and prints a line for each. Returns the number of
// failures.
int RunFilter(const Line& line, const Problem& problem, const std::vector<int>& threads,
              const std::string& fault) {
  std::mt19937 random(static_cast<unsigned>(std::hash<std::string>{}(line.name)));
  Array x(problem.dtype, line.lhs_shape, Lacks(fault, "x"));
  Array dy(problem.dtype, line.out_shape, Lacks(fault, "filter_dy"));
  Fill(&x, line.special, &random);
  Fill(&dy, line.special, &random);
  std::vector<double> expected;
  // Sums over images and positions, where the line's bound is for those over channels.
  const double terms =
      static_cast<double>(problem.batch * problem.axis[0].out * problem.axis[1].out) *
      static_cast<double>(problem.axis[2].out);
  const double bound = line.tolerance * std::max(1.0, std::sqrt(terms));
  int failures = 0;
  if (!IsPlannedAgain(PlanCpuFilterGrad, problem, "auto")) {
    std::printf(
        "FAIL %s %s filter:auto planned otherwise with the workspace of its plan\n",
        line.name.c_str(), line.dtype.c_str());
    ++failures;
  }
  for (const char* const* name = CpuFilterKernelNames(); *name != nullptr; ++name) {
    Plan plan{};
    if ((line.kernel != "*" && line.kernel != *name) ||
        !PlanCpuFilterGrad(problem, *name, &plan)) {
      continue;
    }
    const Array first(problem.dtype, line.rhs_shape, Lacks(fault, "dw"));
    if (first.count() == 0) continue;
    if (expected.empty() && fault.empty()) {
      expected = LiteralFilterGrad(problem, x.Values(), dy.Values(), first.count());
    }
    const bool same = GivesTheSameBits(
        first, line.rhs_shape, Lacks(fault, "dw"), plan.workspace_bytes, threads, fault,
        [&](void* dw, void* workspace, int64_t, const ParallelFor& loop) {
          RunCpuFilterGrad(problem, plan, x.data(), dy.data(), dw, workspace, loop);
        });
    const double off = fault.empty() ? Error(first, expected) : 0;
    const bool passed = off <= bound && same;
    std::printf("%s %s %s filter:%s error %.2e of %.2e %s\n", passed ? "pass" : "FAIL",
                line.name.c_str(), line.dtype.c_str(), *name, off, bound,
                same ? "" : "other bits with other threads");
    failures += passed ? 0 : 1;
  }
  return failures;
}

// The maps of a line; with a fault to be caught not the forward one, whose kernels are
// those of dX. Returns the number of failures.
int RunLine(const Line& line, const std::vector<int>& threads, const std::string& fault) {
  Request dx{}, y{};
  if (const std::string error = MakeProblem(line.lhs_shape, line.rhs_shape,
                                            line.out_shape, line.attributes, &dx.problem);
      !error.empty()) {
    std::printf("FAIL %s %s: %s\n", line.name.c_str(), line.dtype.c_str(), error.c_str());
    return 1;
  }
  dx.problem.dtype = DTypeByName(line.dtype);
  dx.from_shape = y.to_shape = line.out_shape;
  dx.to_shape = y.from_shape = line.lhs_shape;
  const int failures =
      RunRequest(line, dx, threads, fault) + RunFilter(line, dx.problem, threads, fault);
  if (!fault.empty()) return failures;
  y.problem = ForwardAsInputGrad(dx.problem, &y.w_at);
  y.prefix = "forward:";
  Line forward = line;  // whose sums may be longer
  const double k = static_cast<double>(std::max<int64_t>(1, dx.problem.out_channels));
  forward.tolerance *=
      std::sqrt(std::max(1.0, static_cast<double>(dx.problem.in_channels) / k));
  return failures + RunRequest(forward, y, threads, fault);
}

// The gradient of max pooling. Returns the number of failures.
int RunPoolLine(const PoolLine& line, const std::vector<int>& threads) {
  const DType dtype = DTypeByName(line.dtype);
  std::mt19937 random(static_cast<unsigned>(std::hash<std::string>{}(line.name)));
  Array x(dtype, line.x_shape), dy(dtype, line.dy_shape);
  Fill(&x, line.special, &random);
  Fill(&dy, line.special, &random);
  for (int64_t i = 0; i < x.count(); ++i) x.Set(i, std::nearbyint(2 * x.Get(i)));
  PoolArgs args{};
  if (const std::string error =
          MakePool(line.x_shape, line.dy_shape, line.attributes, dtype, &args);
      !error.empty()) {
    std::printf("FAIL %s %s: %s\n", line.name.c_str(), line.dtype.c_str(), error.c_str());
    return 1;
  }
  args.x = x.data();
  args.dy = dy.data();
  const Array dx(dtype, line.x_shape);
  const bool same =
      GivesTheSameBits(dx, line.x_shape, 0, 0, threads, "",
                       [&args](void* result, void*, int64_t, const ParallelFor& loop) {
                         args.dx = result;
                         RunCpuMaxPoolGrad(args, loop);
                       });
  const std::vector<double> expected =
      LiteralPoolGrad(line, dtype, x.Values(), dy.Values());
  const std::vector<double> found = dx.Values();
  const bool right = std::equal(
      found.begin(), found.end(), expected.begin(),
      [](double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); });
  std::printf("%s %s %s pool %s%s\n", right && same ? "pass" : "FAIL", line.name.c_str(),
              line.dtype.c_str(), right ? "" : "another value than the definition's ",
              same ? "" : "other bits with other threads");
  return right && same ? 0 : 1;
}

int Main(const char* path, const char* numbers, const std::string& fault) {
  if (!NarrowFormatsHold()) {
    std::fprintf(stderr, "conversions of 16-bit types are wrong\n");
    return 2;
  }
  std::vector<int> threads;
  std::istringstream from(numbers);
  for (std::string number; std::getline(from, number, ',');) {
    threads.push_back(std::max(1, std::atoi(number.c_str())));
  }
  // By lines, in step with a sanitizer's report.
  std::setvbuf(stdout, nullptr, _IOLBF, 1 << 12);
  std::printf("instruction set %s\n", CpuIsa());
  std::ifstream file(path);
  int failures = 0, lines = 0;
  for (std::string text; std::getline(file, text); ++lines) {
    if (PoolLine pool; text.rfind("pool ", 0) == 0 && ReadPoolLine(text, &pool)) {
      failures += RunPoolLine(pool, threads);
      continue;
    }
    Line line;
    if (!ReadLine(text, &line)) {
      std::fprintf(stderr, "malformed line: %s\n", text.c_str());
      return 2;
    }
    failures += RunLine(line, threads, fault);
  }
  std::printf("%d problems, %d failures\n", lines, failures);
  return lines == 0 || threads.empty() ? 2 : failures > 0;
}

}  // namespace
}  // namespace convgrad

int main(int argc, char** argv) {
  if (argc != 3 && argc != 4) {
    std::fprintf(stderr, "usage: cpu_driver FILE THREADS[,THREADS...] [FAULT]\n");
    return 2;
  }
  return convgrad::Main(argv[1], argv[2], argc == 4 ? argv[3] : "");
}
