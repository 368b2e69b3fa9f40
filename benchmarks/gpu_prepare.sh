#!/usr/bin/env bash
# Builds what benchmarks/gpu_check.sh runs, ahead, where there need not be a GPU: time on a
# machine with one is short. Needs nvcc.
#
#   benchmarks/gpu_prepare.sh [FOLDER]
#   benchmarks/gpu_prepare.sh --sources      print what names the state of the sources
#
#   FOLDER           what the machine with the GPU needs beside the checkout (default
#                    build/gpu, which git ignores): site/, the package's modules for its
#                    Python; the emulator's programs and benchmarks/gpu_layers.cu, without
#                    Python; their problems; SOURCES. Objects are kept in FOLDER-objects
#   PYTHON           of the version that the machine has (default python3.12). If it lacks JAX
#                    or what builds the package, an environment is made in FOLDER-python, from
#                    the package index
#   ARCHITECTURE     compute capability times ten (default 90), or native

set -euo pipefail
export LC_ALL=C
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD

# A hash of all that is compiled here, or that decides what is.
sources() {
  find CMakeLists.txt pyproject.toml cmake csrc benchmarks/layers.json benchmarks/gpu_*.cu benchmarks/gpu_*.h \
    benchmarks/gpu_prepare.sh tests/machine_code.py tests/emulator -type f \
    ! -path '*/__pycache__/*' -print0 |
    sort -z | xargs -0 sha256sum | sha256sum | cut -c 1-16
}
if [[ ${1:-} == --sources ]]; then
  sources
  exit
fi
state=$(sources) # before anything is compiled
folder=${1:-build/gpu}
python=${PYTHON:-python3.12}
architecture=${ARCHITECTURE:-90}
most_mib=60 # what travels with the checkout to the machine that is lent

mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
rm -rf "$folder/site" "$folder/SOURCES" # without which nothing here counts as built
objects=$folder-objects
mkdir -p "$objects"

needs='import jax, pybind11, scikit_build_core'
if ! "$python" -c "$needs" 2>/dev/null; then
  own=$folder-python
  if ! "$own/bin/python" -c "$needs" 2>/dev/null; then
    echo "== $python lacks JAX or what builds the package: $own ($SECONDS s)"
    "$python" -m venv --clear "$own"
    "$own/bin/python" -m pip install -q --disable-pip-version-check \
      'jax>=0.10,<0.11' 'pybind11>=2.13' 'scikit-build-core>=0.10' 'cmake>=3.24' ninja
  fi
  export PATH="$own/bin:$PATH"
  python=$own/bin/python
fi

echo "== the package for $("$python" --version), $architecture ($SECONDS s)"
# The C++ library of the machine with the GPU may be older than the compiler's here.
LDFLAGS=-static-libstdc++ JAX_CONVGRAD_CPU_ISAS=all JAX_CONVGRAD_CUDA=ON JAX_CONVGRAD_CUDA_ARCHITECTURES=$architecture \
  "$python" -m pip install -q --no-build-isolation --no-deps --no-index \
  --disable-pip-version-check --config-settings=build-dir="$objects" \
  --config-settings=cmake.define.JAX_CONVGRAD_LINEINFO=ON --target "$folder/site" .

echo "== programs and problems ($SECONDS s)"
options=(--objects "$objects/csrc")
case $architecture in
  native) ;;
  90) options+=(--architecture 90a) ;; # wgmma exists on that one chip
  *) options+=(--architecture "$architecture") ;;
esac
CONVGRAD_EMULATOR_CACHE=$objects/programs PYTHONPATH="$root" \
  "$python" tests/emulator/on_gpu.py "$folder" "${options[@]}"

echo "$state" >"$folder/SOURCES"
kib=$(du -sk "$folder" | cut -f 1)
echo "== $folder: $kib KiB, $(find "$folder" -type f | wc -l) files, in $SECONDS s"
if ((kib > most_mib * 1024)); then
  echo "more than $most_mib MiB" >&2
  exit 1
fi
