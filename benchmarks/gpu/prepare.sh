#!/usr/bin/env bash
# Compile and fetch here what a machine with a GPU, lent for minutes and without internet, need not do:
#
#   PYTHON=python3.12 bash benchmarks/gpu/prepare.sh [CAPABILITY]
#
# into build/gpu, which travels there with the checkout and is used by benchmarks/run_gpu.sh. CAPABILITY is 9.0 (Hopper)
# unless given. PYTHON should be of the release that is there, with the same PyTorch and Triton (a CPU is enough), ninja,
# pybind11, setuptools and pytest; nvcc of the same release. What is not the same there is compiled there.
set -uo pipefail

RIVALS="liger-kernel==0.8.5 fla-core==0.6.0 einops flash-attn-res==0.1.12"

cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 2
python="${PYTHON:-python3}"
capability="${1:-9.0}"
to="build/gpu"
failed=0
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$to"

TORCH_CUDA_ARCH_LIST="$capability" "$python" -m build_tools.carried "$to/objects" | tail -n 1 || failed=1
rm -rf "$to/wheels"
# shellcheck disable=SC2086 # the names are words
"$python" -m pip download --quiet --no-deps --only-binary=:all: --dest "$to/wheels" $RIVALS || failed=1
"$python" -m benchmarks.gpu.kernels make "$to/triton" --capability "$capability" | tail -n 1 || failed=1

echo "$(du -sm "$to" | cut -f1) MiB in $to:"
du -sm "$to"/* | sort -rn
exit "$failed"
