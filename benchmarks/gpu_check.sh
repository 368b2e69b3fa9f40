#!/usr/bin/env bash
# Builds, tests, sanitizes and measures the package on a machine with a GPU, in one call of
# less than ten minutes.
#
#   benchmarks/gpu_check.sh [--dry-run] [FOLDER]
#
# Needs nvcc, JAX with its CUDA plugin, scikit-build-core, pybind11, cmake, ninja and
# pytest in the Python named by PYTHON; no network. PyTorch is measured if it is there.
# Nothing is installed: the build goes to a temporary folder.
#
#   FOLDER           for gpu_check.json, the benchmarks' JSON, and the planner's table of rates
#                    with its measurements (default $OUT, or else benchmarks/results)
#   --dry-run        print the parts, their limits and commands, and run nothing
#   PYTHON           the Python to use (default python3)
#   TIME_LIMIT_S     the whole run ends within this (default 570)
#   BENCH_S          of it, what is kept for the benchmarks (default 150)
#   CALIBRATE_S      of it, what is kept for measuring the planner's rates (default 50)
#   LAYERS           the layers to measure (default benchmarks/layers.json)
#   PER_CLASS        layers of each class to measure (default 1)
#   ONLY             extended regular expression: run only parts whose name matches
#
# A part that fails does not stop the others. gpu_check.json holds the status, duration and
# last lines of each, and the benchmarks' results; the exit status is 0 if all passed.

set -uo pipefail

dry_run=
if [[ ${1:-} == --dry-run ]]; then
  dry_run=1
  shift
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=${1:-${OUT:-$root/benchmarks/results}}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
cd "$root" || exit 1
python=${PYTHON:-python3}
time_limit_s=${TIME_LIMIT_S:-570}
bench_s=$((${BENCH_S:-150} / 2))
calibrate_s=${CALIBRATE_S:-50}
kept_s=$((2 * bench_s + calibrate_s))
layers=${LAYERS:-benchmarks/layers.json}
per_class=${PER_CLASS:-1}
only=${ONLY:-}

work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
mkdir "$work/logs" "$work/programs"
touch "$work/steps.tsv"
failed=0

# selected NAME: whether a part is asked for.
selected() { [[ -z $only || $1 =~ $only ]]; }

# record NAME STATUS SECONDS LIMIT_S COMMAND...
record() {
  printf '%s\t%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "$4" "${*:5}" >>"$work/steps.tsv"
  if [[ $2 != 0 ]]; then failed=1; fi
}

# step NAME LIMIT_S COMMAND...: runs a part within its limit and what is left of the whole,
# records its status, and keeps its output.
step() {
  local name=$1 limit_s=$2 left_s status start=$SECONDS
  shift 2
  if ! selected "$name"; then return; fi
  if [[ -n $dry_run ]]; then
    printf '%-28s %4s s  %s\n' "$name" "$limit_s" "$*"
    return
  fi
  left_s=$((time_limit_s - kept_s - SECONDS - 5))  # the last seconds write the JSON
  if ((left_s < limit_s)); then limit_s=$left_s; fi
  echo "=== $name, at $SECONDS s of $time_limit_s"
  if ((limit_s < 1)); then
    echo "no time left" >"$work/logs/$name"
    status=124
  else
    timeout --kill-after=3 "$limit_s" "$@" >"$work/logs/$name" 2>&1 </dev/null
    status=$?
  fi
  tail -n 25 "$work/logs/$name"
  echo "=== $name: status $status after $((SECONDS - start)) s"
  record "$name" "$status" "$((SECONDS - start))" "$limit_s" "$*"
}

step driver 10 nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
step build 150 env JAX_CONVGRAD_CUDA=ON "$python" -m pip install --no-build-isolation --no-deps \
  --no-index --disable-pip-version-check --config-settings=build-dir="$work/build" \
  --target "$work/site" .
# The checkout's package finds the compiled modules of the one that was just built.
export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}"
# PyTorch and the programs without JAX need a share of the memory too.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.5}
export CONVGRAD_EMULATOR_CACHE="$work/cache"
cli=("$python" -m jax_convgrad)
programs=$work/programs
# Read off the source, so that it is known what did not run if the build fails.
mapfile -t rungs < <(sed -n 's/^    {"\([a-z0-9_]*\)", Plan.*/\1/p' csrc/kernel.cu)

step info 20 "${cli[@]}" info
step programs 100 "$python" tests/emulator/on_gpu.py "$programs"
step primitives 10 "$programs/primitives"
step hopper_primitives 10 "$programs/hopper_primitives"
for rung in "${rungs[@]}"; do
  # Every dtype, and the same bits ten times on each of two streams.
  step "float64_$rung" 30 "$programs/core" "$programs/all.$rung" 10
done
step tests 170 env JAX_CONVGRAD_REQUIRE_CUDA=1 "$python" -m pytest -q -m cuda --durations=8 tests

sanitizer=compute-sanitizer
command -v "$sanitizer" >/dev/null || sanitizer=${CUDA_HOME:-/usr/local/cuda}/bin/$sanitizer
for tool in memcheck racecheck synccheck; do
  for program in primitives hopper_primitives; do
    step "${tool}_$program" 15 "$sanitizer" --tool "$tool" --error-exitcode 9 "$programs/$program"
  done
  for rung in "${rungs[@]}"; do
    step "${tool}_$rung" 20 "$sanitizer" --tool "$tool" --error-exitcode 9 \
      "$programs/core" "$programs/few.$rung"
  done
done
for dtype in bf16 f32; do
  step "check_$dtype" 30 "${cli[@]}" check --count 20 --dtype "$dtype" --require-native
done

kept_s=$((kept_s - calibrate_s))
# It begins nothing in its last seconds, in which the fit is made and written.
step calibrate "$calibrate_s" "${cli[@]}" calibrate --seconds $((calibrate_s > 20 ? calibrate_s - 15 : 5)) \
  --row-seconds 0.05 --write "$out/rates.h" --json "$out/calibration.json"

peers=lax
if [[ -z $dry_run ]] && selected bench_bf16 &&
  "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  peers=lax,torch  # in cuDNN's benchmark mode
fi
for dtype in bf16 f32; do
  kept_s=$((kept_s > bench_s ? kept_s - bench_s : 0))
  # Stopped at its limit it leaves the rows that it has.
  step "bench_$dtype" "$bench_s" "${cli[@]}" bench --layers "$layers" --dtype "$dtype" \
    --layout NHWC --peers "$peers" --implementation native --per-class "$per_class" \
    --batch-budget 100000 --row-seconds 0.2 --json "$out/bench_$dtype.json"
done
if [[ -n $dry_run ]]; then exit 0; fi

"$python" - "$work" "$out" <<'PYTHON_END'
"""Gathers the parts' statuses, logs and benchmark results into one JSON, and lists them."""
import json
import pathlib
import sys

work, out = map(pathlib.Path, sys.argv[1:])
steps = []
for line in (work / "steps.tsv").read_text().splitlines():
    name, status, seconds, limit_s, command = line.split("\t", 4)
    log = (work / "logs" / name).read_text(errors="replace").splitlines()
    steps.append(
        {
            "name": name,
            "status": int(status),
            "timed_out": status in ("124", "137"),
            "seconds": int(seconds),
            "limit_s": int(limit_s),
            "command": command,
            "output_tail": log[-60:],
        }
    )
bench = {}
for name in ("bench_bf16", "bench_f32"):
    if any(step["name"] == name for step in steps):
        try:
            bench[name] = json.loads((out / f"{name}.json").read_text())
        except (OSError, ValueError) as e:
            bench[name] = {"unreadable": str(e)}
target = out / "gpu_check.json"
target.write_text(json.dumps({"steps": steps, "bench": bench}, indent=1) + "\n")
print(f"wrote {target}")
for step in steps:
    print(f"{step['status']:>6}  {step['seconds']:>4} s  {step['name']}")
bad = [step["name"] for step in steps if step["status"]]
print(f"{len(steps)} parts, failed: {', '.join(bad) or 'none'}")
PYTHON_END
gathered=$?
exit $((failed || gathered))
