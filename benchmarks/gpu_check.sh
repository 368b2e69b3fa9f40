#!/usr/bin/env bash
# Builds, tests, checks, measures and sanitizes the package on a machine with a GPU.
#
# Needs nvcc, JAX with its CUDA plugin, scikit-build-core, pybind11, cmake, ninja and
# pytest in the Python named by PYTHON; no network. PyTorch is measured if it is there.
# Nothing is installed: the build goes to a temporary folder.
#
#   OUT              folder for gpu_check.json (default benchmarks/results)
#   PYTHON           the Python to use (default python3)
#   TIME_LIMIT_S     the whole run ends within this (default 530)
#   LAYERS           the layers to measure (default benchmarks/layers.json)
#   PER_CLASS        layers of each class to measure (default 1)
#
# A step that fails does not stop the others. gpu_check.json holds the status, duration and
# last lines of each, and the benchmarks' results; the exit status is 0 if all passed.

set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 1
python=${PYTHON:-python3}
out=${OUT:-benchmarks/results}
time_limit_s=${TIME_LIMIT_S:-530}
layers=${LAYERS:-benchmarks/layers.json}
per_class=${PER_CLASS:-1}

mkdir -p "$out" || exit 1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/logs" "$work/bench"
failed=0

# step NAME LIMIT_S COMMAND...: runs a command within its limit and what is left of the
# whole, records its status, and keeps its output.
step() {
  local name=$1 limit_s=$2 left_s status start
  shift 2
  left_s=$((time_limit_s - SECONDS - 5))  # the last seconds write the JSON
  if ((left_s < limit_s)); then limit_s=$left_s; fi
  echo "=== $name"
  start=$SECONDS
  if ((limit_s < 1)); then
    echo "no time left" >"$work/logs/$name"
    status=124
  else
    timeout --kill-after=3 "$limit_s" "$@" >"$work/logs/$name" 2>&1
    status=$?
  fi
  tail -n 25 "$work/logs/$name"
  echo "=== $name: status $status after $((SECONDS - start)) s"
  printf '%s\t%s\t%s\t%s\t%s\n' "$name" "$status" "$((SECONDS - start))" "$limit_s" "$*" \
    >>"$work/steps.tsv"
  if ((status != 0)); then failed=1; fi
}

has() { command -v "$1" >/dev/null 2>&1; }

step driver 10 nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
step build 150 env JAX_CONVGRAD_CUDA=ON "$python" -m pip install --no-build-isolation --no-deps \
  --no-index --disable-pip-version-check --config-settings=build-dir="$work/build" \
  --target "$work/site" .
# The checkout's package finds the compiled modules of the one that was just built.
export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}"
# PyTorch needs a share of the memory too.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.5}

peers=lax
if "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  peers=lax,torch
fi
cli=("$python" -m jax_convgrad)

step info 20 "${cli[@]}" info
step tests 80 env JAX_CONVGRAD_REQUIRE_CUDA=1 "$python" -m pytest -q -m cuda tests
step check_bf16 30 "${cli[@]}" check --count 60 --dtype bf16 --require-native
step check_f32 30 "${cli[@]}" check --count 60 --dtype f32 --require-native
step check_f32_highest 30 "${cli[@]}" check --count 60 --dtype f32 --precision highest \
  --require-native
for dtype in bf16 f32; do
  # Stopped at its limit it leaves the rows that it has.
  step "bench_$dtype" 75 "${cli[@]}" bench --layers "$layers" --dtype "$dtype" --layout NHWC \
    --peers "$peers" --implementation native --per-class "$per_class" --batch-budget 100000 --row-seconds 0.2 \
    --json "$work/bench/$dtype.json"
done

sanitizer=compute-sanitizer
if ! has "$sanitizer" && [[ -x ${CUDA_HOME:-/usr/local/cuda}/bin/$sanitizer ]]; then
  sanitizer=${CUDA_HOME:-/usr/local/cuda}/bin/$sanitizer
fi
for limited in memcheck:60 racecheck:45 synccheck:30; do
  tool=${limited%:*}
  if has "$sanitizer"; then
    # JAX's own pool would hide an access past the end of a buffer: one cudaMalloc each.
    step "$tool" "${limited#*:}" env XLA_PYTHON_CLIENT_ALLOCATOR=platform "$sanitizer" --tool "$tool" \
      --error-exitcode 9 "${cli[@]}" check --count 5 --dtype f32
  else
    echo "compute-sanitizer not found" >"$work/logs/$tool"
    printf '%s\t%s\t%s\t%s\t%s\n' "$tool" missing 0 0 "$sanitizer --tool $tool" \
      >>"$work/steps.tsv"
  fi
done

"$python" - "$work" "$out/gpu_check.json" <<'PYTHON_END'
"""Gathers the steps' statuses, logs and benchmark results into one JSON."""
import json
import pathlib
import sys

work, target = map(pathlib.Path, sys.argv[1:])
steps = []
for line in (work / "steps.tsv").read_text().splitlines():
    name, status, seconds, limit_s, command = line.split("\t", 4)
    log = (work / "logs" / name).read_text(errors="replace").splitlines()
    steps.append(
        {
            "name": name,
            "status": int(status) if status.isdigit() else status,
            "timed_out": status in ("124", "137"),
            "seconds": int(seconds),
            "limit_s": int(limit_s),
            "command": command,
            "output_tail": log[-60:],
        }
    )
bench = {}
for path in sorted((work / "bench").glob("*.json")):
    try:
        bench[path.stem] = json.loads(path.read_text())
    except ValueError as e:
        bench[path.stem] = {"unreadable": str(e)}
target.write_text(json.dumps({"steps": steps, "bench": bench}, indent=1) + "\n")
print(f"wrote {target}")
for step in steps:
    print(f"{step['status']!s:>8}  {step['seconds']:>4} s  {step['name']}")
PYTHON_END
gathered=$?
exit $((failed || gathered))
