// Times the CUDA kernels on a few layers without JAX, kernel by kernel and tile by tile,
// beside a copy of the same bytes and a cuBLAS product of the same arithmetic.
//
//   gpu_layers FILE JSON [SECONDS] [SPOILED]
//
// FILE holds problems as tests/emulator/problem_lines.h describes them. A line of the
// kernel "*" is measured with every kernel that takes it, as the planner cuts it up; a
// line with a tile, with that tile and its sum not split. Neighbours of one name and
// dtype share their operands.
//
// Every result is checked before it is timed: the kernel `direct` on some outputs against
// the definition in double, the others against `direct` on all of dX, by the norm of the
// difference and by its largest element. A kernel that is wrong is not timed.
//
// Times are device times of a CUDA graph that goes through as many sets of operands as
// lie well beyond the L2 cache: it is cold, unless the output says "warm". JSON is
// complete after each row. After SECONDS nothing new begins. SPOILED names a kernel of
// which one output is changed, so that a test sees it reported. Exit status 1 if a result
// is wrong, 3 if the GPU's context is lost.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cuda/planning.h"
#include "cuda/platform.cuh"
#include "gpu_blas.h"
#include "gpu_device.h"
#include "gpu_layer.h"
#include "kernel.h"
#include "problem.h"
#include "problem_lines.h"

namespace convgrad {
namespace {

constexpr double kSecondsOfTiming = 0.04;  // of one kernel and tile

// ---- ceilings ---------------------------------------------------------------------

// The matrices of cuBLAS's products.
class Products {
 public:
  bool AreThere() const { return blas_.IsThere(); }

  // us of a product; of one with fewer rows, brought to all, where A would be too large.
  const char* Time(DType dtype, bool allow_tf32, int64_t m, int64_t n, int64_t k,
                   double* us) {
    if (!blas_.IsThere()) return "no cuBLAS";
    const int64_t size = SizeInBytes(dtype);
    const int64_t rows = std::min(m, kMostBytesOfA / (k * size));
    const int64_t a_bytes = RoundUp(rows * k * size, 256);
    const int64_t b_bytes = RoundUp(n * k * size, 256);
    const Memory memory(static_cast<size_t>(a_bytes + b_bytes + rows * n * size));
    char* const b = memory.get() + a_bytes;
    FillOnDevice(dtype, memory.get(), (a_bytes + b_bytes) / size, 3);
    Times times;
    const char* const error = Measure(
        2, kSecondsOfTiming,
        [&](cudaStream_t stream, int) {
          return blas_.Enqueue(stream, dtype, allow_tf32, rows, n, k, memory.get(), b,
                               b + b_bytes);
        },
        &times);
    *us = times.median * static_cast<double>(m) / static_cast<double>(rows);
    return error;
  }

 private:
  static constexpr int64_t kMostBytesOfA = int64_t{1} << 30;
  Blas blas_;
};

// ---- rows -------------------------------------------------------------------------

struct Row {
  std::string layer, dtype, status;
  bool allow_tf32, planned, own_tile, cold;
  Plan plan;
  Errors errors;
  Times times;
  double flops, bytes, copy_us, product_us;  // 0: not measured
};

std::string Text(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string Text(const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  return text;
}

// A number, or null: JSON has no NaN.
std::string Number(double value) {
  return std::isfinite(value) ? Text("%.6g", value) : "null";
}

std::string Quoted(const std::string& text) {
  std::string quoted = "\"";
  for (char c : text) {
    if (c == '"' || c == '\\') quoted += '\\';
    quoted += static_cast<unsigned char>(c) < ' ' ? ' ' : c;
  }
  return quoted + '"';
}

std::string AsJson(const Row& row) {
  const Times& t = row.times;
  std::string json =
      Text("{\"layer\": %s, \"dtype\": %s, \"allow_tf32\": %s, \"kernel\": %s, ",
           Quoted(row.layer).c_str(), Quoted(row.dtype).c_str(),
           row.allow_tf32 ? "true" : "false", Quoted(row.plan.kernel).c_str());
  json += Text("\"tile\": [%d, %d], \"split_k\": %d, \"planned\": %s, \"model_us\": %s, ",
               static_cast<int>(row.plan.tile_m), static_cast<int>(row.plan.tile_n),
               static_cast<int>(row.plan.split_k), row.planned ? "true" : "false",
               row.own_tile ? Number(row.plan.model_us).c_str() : "null");
  json += Text("\"status\": %s, \"error\": %s, \"largest_error\": %s, ",
               Quoted(row.status).c_str(), Number(row.errors.norm).c_str(),
               Number(row.errors.largest).c_str());
  json += Text(
      "\"us\": {\"median\": %s, \"min\": %s, \"q1\": %s, \"q3\": %s, \"rounds\": %d}, ",
      Number(t.median).c_str(), Number(t.least).c_str(), Number(t.q1).c_str(),
      Number(t.q3).c_str(), t.rounds);
  return json + Text(
                    "\"cache\": \"%s\", \"flops\": %s, \"bytes\": %s, \"copy_us\": %s, "
                    "\"product_us\": %s}",
                    row.cold ? "cold" : "warm", Number(row.flops).c_str(),
                    Number(row.bytes).c_str(), Number(row.copy_us).c_str(),
                    Number(row.product_us).c_str());
}

void Print(const Row& row) {
  const Times& t = row.times;
  std::string line =
      Text("%-26s %-8s %-20s %3dx%-3d/%d%s ", row.layer.c_str(),
           row.dtype == "float32" && row.allow_tf32 ? "tf32" : row.dtype.c_str(),
           row.plan.kernel, static_cast<int>(row.plan.tile_m),
           static_cast<int>(row.plan.tile_n), static_cast<int>(row.plan.split_k),
           row.planned ? "*" : " ");
  if (row.status == "ok") {
    line += Text("%9.1f us, min %.1f, +-%.1f %%, model %s; %.1f TF/s, %.0f GB/s",
                 t.median, t.least, 50 * (t.q3 - t.q1) / t.median,
                 row.own_tile ? Text("%.1f", row.plan.model_us).c_str() : "-",
                 row.flops / t.median * 1e-6, row.bytes / t.median * 1e-3);
    line += Text("; copy %.2f", row.copy_us / t.median);
    if (row.product_us > 0) line += Text(", cuBLAS %.2f", row.product_us / t.median);
    if (!row.cold) line += ", warm";
  } else {
    line += "FAIL " + row.status;
  }
  std::printf("%s; error %.1e, %.1e\n", line.c_str(), row.errors.norm,
              row.errors.largest);
}

// Writes what there is so far: complete, whenever somebody looks.
void WriteJson(const std::string& path, const std::string& head,
               const std::vector<Row>& rows) {
  const std::string unfinished = path + ".part";
  std::ofstream file(unfinished);
  file << "{" << head << ", \"rows\": [";
  for (size_t i = 0; i < rows.size(); ++i) {
    file << (i == 0 ? "\n " : ",\n ") << AsJson(rows[i]);
  }
  file << "\n]}\n";
  file.close();
  std::rename(unfinished.c_str(), path.c_str());
}

// The planner's cut for every kernel that takes the line's, or the line's tile.
std::vector<Plan> PlansOf(const Line& line, const Problem& problem, const Gpu& gpu) {
  std::vector<Plan> plans;
  for (const char* const* kernel = CudaKernelNames(); *kernel != nullptr; ++kernel) {
    Plan plan{};
    if ((line.kernel != "*" && line.kernel != *kernel) ||
        !PlanCuda(problem, *kernel, gpu, &plan)) {
      continue;
    }
    if (line.tile_m != 0) {
      // It is in the list already.
      if (plan.tile_m == line.tile_m && plan.tile_n == line.tile_n && plan.split_k <= 1) {
        continue;
      }
      plan.tile_m = line.tile_m;
      plan.tile_n = line.tile_n;
      plan.split_k = 1;
    }
    plans.push_back(plan);
  }
  return plans;
}

int Main(const char* path, const std::string& to, double seconds,
         const std::string& spoiled) {
  const auto began = std::chrono::steady_clock::now();
  const auto elapsed = [&] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - began)
        .count();
  };
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  const DeviceFacts facts = FactsOfDevice();
  Products products;
  std::string head = "\"device\": " + Quoted(facts.name) +
                     Text(", \"multiprocessors\": %d, \"l2_bytes\": %d",
                          facts.multiprocessors, facts.l2_bytes);
  std::printf("%s, %d multiprocessors, %d MB of L2%s\n", facts.name,
              facts.multiprocessors, facts.l2_bytes >> 20,
              products.AreThere() ? "" : "; no cuBLAS");
  for (const auto& [name, dtype] :
       {std::pair{"bf16", DType::kBF16}, {"tf32", DType::kF32}}) {
    constexpr int64_t kSide = 8192;
    double us = 0;
    if (!products.AreThere()) break;
    if (const char* error = products.Time(dtype, true, kSide, kSide, kSide, &us)) {
      std::printf("cuBLAS %s: %s\n", name, error);
      continue;
    }
    const double rate = 2 * std::pow(kSide, 3) / us * 1e-6;
    std::printf("cuBLAS %s, 8192^3: %.0f TF/s\n", name, rate);
    head += Text(", \"cublas_%s_tflop_per_s\": %.1f", name, rate);
  }

  Gpu gpu{};
  if (const char* error = CurrentGpu(&gpu); error != nullptr) {
    std::printf("%s\n", error);
    return 1;
  }
  std::vector<Row> rows;
  WriteJson(to, head, rows);
  std::ifstream file(path);
  std::unique_ptr<Layer> layer;
  std::unique_ptr<Memory> workspace;
  int64_t workspace_bytes = -1;
  Times copy;
  double product_us = 0;
  int failures = 0;
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
    if (elapsed() > seconds) {
      std::printf("stopped after %.0f s, before %s %s\n", elapsed(), line.name.c_str(),
                  line.dtype.c_str());
      break;
    }
    if (layer == nullptr || !layer->Is(line)) {
      layer.reset();  // before the next one takes its memory
      layer = std::make_unique<Layer>(line, problem, facts.l2_bytes);
      if (const char* error = layer->TimeCopy(kSecondsOfTiming, &copy)) {
        std::printf("copy: %s\n", error);
      }
      int64_t m = 0, n = 0, k = 0;
      product_us = 0;
      if (layer->AsProduct(&m, &n, &k) && products.AreThere()) {
        if (const char* error =
                products.Time(problem.dtype, problem.allow_tf32, m, n, k, &product_us)) {
          std::printf("cuBLAS, %s: %s\n", line.name.c_str(), error);
        }
      }
    }
    Plan chosen{};
    (void)PlanCuda(problem, "auto", gpu, &chosen);
    for (const Plan& plan : PlansOf(line, problem, gpu)) {
      if (plan.workspace_bytes > workspace_bytes) {
        workspace.reset();
        workspace = std::make_unique<Memory>(static_cast<size_t>(plan.workspace_bytes));
        workspace_bytes = plan.workspace_bytes;
      }
      Row row{line.name,
              line.dtype,
              "",
              line.allow_tf32,
              false,
              line.tile_m == 0,
              layer->cold(),
              plan,
              {},
              {},
              layer->flops(),
              BytesMoved(problem),
              copy.median,
              product_us};
      row.planned = row.own_tile && std::strcmp(chosen.kernel, plan.kernel) == 0;
      // Whatever ends the program, its last line says who ran.
      std::printf("> %s %s %s %dx%d\n", line.name.c_str(), line.dtype.c_str(),
                  plan.kernel, static_cast<int>(plan.tile_m),
                  static_cast<int>(plan.tile_n));
      const char* error =
          layer->Check(plan, workspace->get(), spoiled == plan.kernel, &row.errors);
      if (error == nullptr) {
        error = Measure(
            layer->sets(), kSecondsOfTiming,
            [&](cudaStream_t stream, int set) {
              return layer->Enqueue(stream, set, plan, workspace->get());
            },
            &row.times);
      }
      row.status = error == nullptr ? "ok" : error;
      failures += error == nullptr ? 0 : 1;
      Print(row);
      rows.push_back(row);
      WriteJson(to, head, rows);
    }
  }
  std::printf("%d rows, %d failures\n", static_cast<int>(rows.size()), failures);
  return rows.empty() ? 2 : failures > 0;
}

}  // namespace
}  // namespace convgrad

int main(int argc, char** argv) {
  if (argc < 3 || argc > 5) {
    std::fprintf(stderr, "usage: gpu_layers FILE JSON [SECONDS] [SPOILED]\n");
    return 2;
  }
  return convgrad::Main(argv[1], argv[2], argc > 3 ? std::atof(argv[3]) : 1e9,
                        argc > 4 ? argv[4] : "");
}
