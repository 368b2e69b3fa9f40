#!/usr/bin/env bash
# Tests and measures the package on a machine with a GPU that is lent for fifteen minutes: in
# one call of less than ten, what decides most first.
#
#   benchmarks/gpu_check.sh [--dry-run] [--second] [FOLDER]
#
# Runs what benchmarks/gpu_prepare.sh built ahead in build/gpu, if it is of these sources, and
# else builds that here first. Needs JAX with its CUDA plugin and pytest in the Python named by
# PYTHON; no network. PyTorch and cuBLAS are measured if they are there.
#
#   FOLDER           for what comes out, at most eight files (default $OUT, or else
#                    benchmarks/results): gpu_check.log and gpu_check.json, which grow as the
#                    parts end; gpu_layers.json; bench_bf16.json and bench_f32.json; the
#                    planner's table of rates with its measurements
#   --dry-run        print the parts, their limits and commands, and run nothing
#   --second         another call: racecheck and synccheck, and what the first one did not
#                    pass, if FIRST is its gpu_check.json
#   PYTHON           the Python to use (default python3)
#   PREPARED         what gpu_prepare.sh built (default build/gpu)
#   TIME_LIMIT_S     the whole call ends within this (default 570)
#   LAYERS           the layers that JAX measures (default benchmarks/layers.json)
#   PER_CLASS        of them, so many of each class (default 1)
#   ONLY             extended regular expression: run only parts whose name matches
#   JAX_CONVGRAD_CUDA_EXCLUDE   kernels to leave out, with commas between
#
# A part that fails does not stop the others. If the instructions of sm_90a fail, wgmma is
# excluded from what follows, and so is a kernel that hangs or breaks the GPU's context. The exit
# status is 0 if all parts that ran have passed and there was time for all.

set -uo pipefail

dry_run= second=
while [[ ${1:-} == --* ]]; do
  case $1 in
    --dry-run) dry_run=1 ;;
    --second) second=1 ;;
    *) echo "gpu_check.sh: unknown option $1" >&2 && exit 2 ;;
  esac
  shift
done
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=${1:-${OUT:-$root/benchmarks/results}}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
cd "$root" || exit 1
python=${PYTHON:-python3}
time_limit_s=${TIME_LIMIT_S:-570}
if [[ ! $time_limit_s =~ ^[0-9]+$ ]]; then
  echo "gpu_check.sh: TIME_LIMIT_S must be whole seconds, got $time_limit_s" >&2 && exit 2
fi
time_limit_s=$((10#$time_limit_s)) # also of 090
layers=${LAYERS:-benchmarks/layers.json}
per_class=${PER_CLASS:-1}
only=${ONLY:-}
log=$out/gpu_check.log

work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
touch "$work/steps" "$work/about"
if [[ -z $dry_run ]]; then : >"$log"; fi
failed=0
kept_s=0     # for what comes later
last_status= # of the last part that was asked for: empty if it did not run
declare -A excluded passed_before seen

export LC_NUMERIC=C # EPOCHREALTIME with a point
# Its output comes line by line, also from a process that is about to be killed.
export PYTHONUNBUFFERED=1

about() { printf '%s\t%s\n' "$1" "$2" >>"$work/about"; }
say() { printf '%s\n' "$*" | tee -a "$log"; }

# record NAME STATUS SECONDS LIMIT_S BEGIN END COMMAND...
record() {
  printf '%s\t%s\t%s\t%s\t%s\t%s\t%s\n' "${@:1:6}" "${*:7}" >>"$work/steps"
  "$python" -I -S benchmarks/gpu_report.py "$out" "$work/steps" "$work/about"
}

# wanted NAME: whether a part is asked for and was not run before.
wanted() { [[ (-z $only || $1 =~ $only) && -z ${passed_before[$1]:-}${seen[$1]:-} ]]; }

# skip NAME WHY...
skip() {
  last_status=
  if [[ -n $dry_run ]] || ! wanted "$1"; then return; fi
  seen[$1]=1
  say "=== $1: SKIPPED, ${*:2}"
  record "$1" skipped 0 0 0 0 "${*:2}"
}

# step NAME LIMIT_S COMMAND...: runs a part within its limit and what is left of the whole,
# records its status, and keeps its output.
step() {
  local name=$1 limit_s=$2 left_s status begin began=$EPOCHREALTIME seconds
  shift 2
  last_status=
  if ! wanted "$name"; then return; fi
  if [[ -n $dry_run ]]; then
    seen[$name]=1
    printf '%-28s %4s s  %s\n' "$name" "$limit_s" "$*"
    return
  fi
  left_s=$((time_limit_s - kept_s - SECONDS - 4)) # to stop it, and to write
  if ((left_s < 1)); then
    skip "$name" "no time left"
    failed=1
    return
  fi
  seen[$name]=1
  if ((left_s < limit_s)); then limit_s=$left_s; fi
  say "=== $name, at $SECONDS s of $time_limit_s"
  begin=$(stat -c %s "$log")
  timeout --kill-after=3 "$limit_s" "$@" >>"$log" 2>&1 </dev/null
  status=$?
  seconds=$(awk "BEGIN { printf \"%.1f\", $EPOCHREALTIME - $began }")
  tail -c "+$((begin + 1))" "$log" >"$work/output"
  record "$name" "$status" "$seconds" "$limit_s" "$begin" "$(stat -c %s "$log")" "$*"
  # Few lines of each: who called may see only the end of it all.
  case $name in
    layers) grep -e '\*  ' -e FAIL -e cuBLAS -e stopped "$work/output" | cut -c 1-200 ;;
    bench*) tail -n 25 "$work/output" ;;
    hopper_primitives) cat "$work/output" ;;
    *) tail -n $((status == 0 ? 2 : 12)) "$work/output" | cut -c 1-400 ;;
  esac
  say "=== $name: status $status after $seconds s"
  last_status=$status
  if ((status != 0)); then failed=1; fi
}

# exclude KERNEL WHY...: from all that follows.
exclude() {
  excluded[$1]="${*:2}"
  JAX_CONVGRAD_CUDA_EXCLUDE=$(IFS=, && echo "${!excluded[*]}")
  export JAX_CONVGRAD_CUDA_EXCLUDE
  about "excluded_$1" "${*:2}"
  say "=== $1 is EXCLUDED from what follows: ${*:2}"
}

# of_kernel KERNEL NAME LIMIT_S COMMAND...: a part for one kernel.
of_kernel() {
  if [[ -n ${excluded[$1]:-} ]]; then
    skip "$2" "$1 is excluded: ${excluded[$1]}"
  else
    step "${@:2}"
  fi
}

asked=${JAX_CONVGRAD_CUDA_EXCLUDE:-}
for kernel in ${asked//,/ }; do
  exclude "$kernel" "JAX_CONVGRAD_CUDA_EXCLUDE names it"
done
if [[ -n $second && -n ${FIRST:-} ]]; then
  passed=$("$python" -I -S -c '
import json, sys
print(*(s["name"] for s in json.load(open(sys.argv[1]))["steps"] if s["status"] == 0), sep="\n")
' "$FIRST") || { echo "gpu_check.sh: FIRST must be a gpu_check.json, got $FIRST" >&2 && exit 2; }
  for name in $passed; do passed_before[$name]=1; done
fi
# What every call begins with.
unset 'passed_before[driver]' 'passed_before[hopper_primitives]' 'passed_before[build]'

# ---- what is run ------------------------------------------------------------------------

step driver 10 nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
sources=$(bash benchmarks/gpu_prepare.sh --sources)
prepared=${PREPARED:-build/gpu}
about sources "$sources"
built=$(cat "$prepared/SOURCES" 2>/dev/null)
if [[ $built != "$sources" && -z $dry_run ]]; then
  if [[ -n $built ]]; then built="is STALE, of other sources"; fi
  say "=== $prepared ${built:-is not there}: it is built here"
  about prepared_before "${built:-is not there}"
  prepared=$work/gpu
  step build 200 env PYTHON="$python" ARCHITECTURE=native \
    bash benchmarks/gpu_prepare.sh "$prepared"
fi
about prepared "$prepared"
if [[ -z $dry_run ]]; then
  prepared=$(realpath -m "$prepared")
  # In case the modes were lost on the way.
  chmod +x "$prepared"/{core,primitives,hopper_primitives,gpu_layers} 2>/dev/null
fi
# The checkout's package finds the compiled modules of the one that was built.
export PYTHONPATH="$prepared/site${PYTHONPATH:+:$PYTHONPATH}"
# PyTorch and the programs without JAX need a share of the memory too.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.5}
export CONVGRAD_GPU_PROGRAMS=$prepared # for tests/test_gpu.py, which would build them
cli=("$python" -m jax_convgrad)
# Read off the source, so that it is known what did not run if the build fails.
mapfile -t kernels < <(sed -n 's/^    {"\([a-z0-9_]*\)", Plan.*/\1/p' csrc/kernel.cu)

hopper_primitives() {
  step hopper_primitives 10 "$prepared/hopper_primitives"
  if ((${last_status:-0} != 0)); then
    exclude wgmma "hopper_primitives ended with status $last_status"
  fi
}

# Correctness and speed, within two and a half minutes even if each part takes all it may.
first_answers() {
  local kernel
  step primitives 10 "$prepared/primitives"
  hopper_primitives
  for kernel in "${kernels[@]}"; do
    of_kernel "$kernel" "short_$kernel" 8 "$prepared/core" "$prepared/short.$kernel"
    # Where it is wrong the next parts show; they may not hang, or break the GPU's context.
    if [[ $kernel != direct && ${last_status:-0} =~ ^(3|124|13.)$ ]]; then
      exclude "$kernel" "its short list ended with status $last_status"
    fi
  done
  local cublas
  cublas=$("$python" -I -c '
import importlib.util, pathlib
places = importlib.util.find_spec("nvidia").submodule_search_locations
print(next(p for at in places for p in pathlib.Path(at).glob("*/lib/libcublas.so.*")))' 2>/dev/null)
  step layers 35 env CONVGRAD_CUBLAS="${CONVGRAD_CUBLAS:-$cublas}" "$prepared/gpu_layers" \
    "$prepared/layers" "$out/gpu_layers.json" 27
}

# Beside lax, and PyTorch in cuDNN's benchmark mode. Stopped, it leaves the rows that it has.
benchmarks() {
  step info 25 "${cli[@]}" info
  local peers=lax dtype
  if [[ -z $dry_run ]] && wanted 'bench_bf16' &&
    timeout 30 "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    peers=lax,torch
  fi
  for dtype in bf16 f32; do
    step "bench_$dtype" 50 "${cli[@]}" bench --layers "$layers" --dtype "$dtype" \
      --layout NHWC --peers "$peers" --implementation native --per-class "$per_class" \
      --batch-budget 100000 --row-seconds 0.2 --json "$out/bench_$dtype.json"
  done
}

the_rest() {
  local kernel dtype calibrate_s=50
  for kernel in "${kernels[@]}"; do
    # Every dtype, and the same bits ten times on each of two streams.
    of_kernel "$kernel" "full_$kernel" 15 "$prepared/core" "$prepared/full.$kernel" 10
  done
  for dtype in bf16 f32; do
    step "check_$dtype" 25 "${cli[@]}" check --count 20 --dtype "$dtype" --require-native
  done
  # It begins nothing in its last seconds, in which the fit is made and written.
  step calibrate "$calibrate_s" "${cli[@]}" calibrate --seconds $((calibrate_s - 15)) \
    --row-seconds 0.05 --write "$out/rates.h" --json "$out/calibration.json"
  kept_s=40 # for the memory checker
  step tests 170 env JAX_CONVGRAD_REQUIRE_CUDA=1 "$python" -m pytest -q -m cuda --durations=8 tests
  kept_s=0
}

sanitizer=compute-sanitizer
command -v "$sanitizer" >/dev/null || sanitizer=${CUDA_HOME:-/usr/local/cuda}/bin/$sanitizer
sanitizer_works= # empty: not yet known

# sanitize TOOL NAME LIMIT_S PROGRAM...: of a kernel or of a program of that name.
sanitize() {
  local tool=$1 name=$2 kernel=${2/hopper_primitives/wgmma} # whose instructions they are
  if ! wanted "${tool}_$name"; then return; fi
  if [[ -z $sanitizer_works && -z $dry_run && -z ${excluded[$kernel]:-} ]]; then
    sanitizer_works=no
    say "=== whether compute-sanitizer runs here, on one problem"
    head -n 1 "$prepared/short.direct" >"$work/one"
    if timeout --kill-after=3 15 "$sanitizer" --tool memcheck --error-exitcode 9 \
      "$prepared/core" "$work/one" >>"$log" 2>&1 </dev/null; then
      sanitizer_works=yes
    fi
    about sanitizer_works "$sanitizer_works"
  fi
  if [[ $sanitizer_works == no ]]; then
    skip "${tool}_$name" "compute-sanitizer does not run here"
  else
    of_kernel "$kernel" "${tool}_$name" "$3" "$sanitizer" --tool "$tool" --error-exitcode 9 "${@:4}"
  fi
}

# sanitize_kernels TOOL KERNEL...
sanitize_kernels() {
  local kernel
  for kernel in "${@:2}"; do
    sanitize "$1" "$kernel" 20 "$prepared/core" "$prepared/short.$kernel"
  done
}

if [[ -z $second ]]; then
  first_answers
  benchmarks
  the_rest
  sanitize_kernels memcheck wgmma mma
else
  hopper_primitives
  for tool in racecheck synccheck; do
    sanitize_kernels "$tool" wgmma mma
    sanitize "$tool" primitives 15 "$prepared/primitives"
    sanitize "$tool" hopper_primitives 15 "$prepared/hopper_primitives"
  done
  if [[ -n ${FIRST:-} ]]; then
    first_answers
    benchmarks
    the_rest
  fi
  for tool in memcheck racecheck synccheck; do
    sanitize_kernels "$tool" "${kernels[@]}"
  done
fi
if [[ -n $dry_run ]]; then exit 0; fi

# ---- in the end -------------------------------------------------------------------------

say "$(awk -F '\t' '{ printf "%8s %6s s  %s\n", $2, $3, $1 }' "$work/steps")"
say "$(awk -F '\t' '$2 != "skipped" { ran++; if ($2 != 0) bad = bad " " $1 }
  $2 == "skipped" && $7 == "no time left" { late = late " " $1 }
  END { printf "%d parts, failed:%s\n", ran, bad == "" ? " none" : bad
        if (late != "") printf "no time left for:%s\n", late }' "$work/steps")"
say "in $SECONDS s; see $out"
exit "$failed"
