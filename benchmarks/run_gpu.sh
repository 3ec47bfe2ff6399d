#!/usr/bin/env bash
# Build, test and measure on a GPU, in one command of less than nine minutes:
#
#   bash benchmarks/run_gpu.sh OUT_DIR [--seconds N] [--steps "build tests sanitizer layers ..."] [--smoke]
#
# Needs a Python with PyTorch for the device (PYTHON=... names another than python3), and for the CUDA kernels nvcc,
# ninja, pybind11 and setuptools; without them the Triton kernels alone are measured. What is missing is said and left
# out. OUT_DIR gets run.log, tests.log, results.json, tables.md and, with matplotlib, floor.png, stages.png, others.png.
# Exits with 1 when the build, a test or a sanitizer found something wrong; it measures all the same. --smoke runs a few
# tests and tiny shapes on the CPU, and builds nothing: to see that the script itself runs.
set -uo pipefail

ALL_STEPS="build tests sanitizer layers networks floor pieces stages memory divergence overhead rivals compiled layers_compiled"

usage() {
  sed -n '2,12s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  exit "${1:-0}"
}

out="" seconds=530 steps="$ALL_STEPS" smoke=0
while [ $# -gt 0 ]; do
  case "$1" in
    --seconds) seconds="${2:?--seconds: a number is missing}"; shift 2 ;;
    --steps) steps="${2:?--steps: a list is missing}"; shift 2 ;;
    --smoke) smoke=1; shift ;;
    -h | --help) usage ;;
    -*) echo "run_gpu.sh: unknown option $1; allowed are --seconds, --steps, --smoke" >&2; exit 2 ;;
    *) if [ -n "$out" ]; then echo "run_gpu.sh: one OUT_DIR, got $out and $1" >&2; exit 2; fi; out="$1"; shift ;;
  esac
done
[ -n "$out" ] || usage 2 >&2
case "$seconds" in *[!0-9]* | "") echo "run_gpu.sh: --seconds: got '$seconds'; allowed is a whole number" >&2; exit 2 ;; esac
for step in $steps; do
  case " $ALL_STEPS " in *" $step "*) ;; *) echo "run_gpu.sh: --steps: got '$step'; allowed are $ALL_STEPS" >&2; exit 2 ;; esac
done

mkdir -p "$out" || exit 2
out="$(cd "$out" && pwd)"
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
python="${PYTHON:-python3}"
log="$out/run.log"
: >"$log"
rm -f "$out"/results.json "$out"/tables.md "$out"/tests.log "$out"/*.png
SECONDS=0
failed=""
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
# One thread each: several processes of tests and compilers run at once.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}" TORCHINDUCTOR_COMPILE_THREADS="${TORCHINDUCTOR_COMPILE_THREADS:-8}"

say() { printf '[%3d s] %s\n' "$SECONDS" "$*" | tee -a "$log"; }
wanted() { case " $steps " in *" $1 "*) return 0 ;; *) return 1 ;; esac }

# limited CAP KEEP COMMAND...: run with a limit of CAP seconds, less where KEEP seconds must remain for later steps.
limited() {
  local cap="$1" keep="$2" left
  shift 2
  left=$((seconds - SECONDS - keep))
  [ "$left" -lt "$cap" ] && cap="$left"
  if [ "$cap" -lt 5 ]; then
    say "no time left for: $*"
    return 125
  fi
  timeout --kill-after=5 "$cap" "$@"
}

step_failed() { # WHAT CODE
  case "$2" in
    124 | 137) say "$1: cut off at its time limit" ;;
    *) say "$1: FAILED with code $2" ;;
  esac
  failed="$failed $1"
}

selection=(tests/gpu --ignore=tests/gpu/test_memory.py) alone=(tests/gpu/test_memory.py)
where=()
if [ "$smoke" = 1 ]; then
  device="0.0 CPU (a dry run)"
  export ELA_KERNELS_TEST_DEVICE=cpu OMP_NUM_THREADS=1
  selection=(tests/gpu/test_parity.py -k "weights_only or previous_weights") where=(--device cpu)
else
  device="$("$python" - 2>>"$log" <<'PYTHON'
import torch

if torch.cuda.is_available():
    major, minor = torch.cuda.get_device_capability()
    print(f"{major}.{minor} {torch.cuda.get_device_name()}")
PYTHON
  )"
fi
if [ -z "$device" ]; then
  say "$python has no PyTorch that finds a GPU; the reason, if there is one, is in $log"
  exit 2
fi
capability="${device%% *}"
say "${device#* }, compute capability $capability, $seconds s"

if wanted build && [ "$smoke" = 0 ]; then
  export TORCH_CUDA_ARCH_LIST="$capability"
  # The kernels are copied next to the sources, from where all the steps below import them.
  if ELA_KERNELS_BUILD=cuda limited 150 60 "$python" setup.py --quiet build_ext --inplace >>"$log" 2>&1; then
    say "built with CUDA for $capability"
  else
    step_failed "build with CUDA" $?
    if ELA_KERNELS_BUILD=cpu limited 90 60 "$python" setup.py --quiet build_ext --inplace >>"$log" 2>&1; then
      say "built without CUDA: only the Triton kernels are measured (the compiler's words are in run.log)"
    else
      step_failed "build without CUDA" $?
    fi
  fi
fi
limited 60 0 "$python" -m ela_kernels info 2>&1 | tee -a "$log"

# Triton compiles at a kernel's first call, on one core: beside the tests all that is measured is compiled ahead on the
# others, into the caches on disk where the processes below find it.
measured=""
for part in $steps; do case "$part" in build | tests) ;; *) measured="$measured $part" ;; esac; done
size=()
[ "$smoke" = 1 ] && size=(--smoke)
# Without the variables set above, which nproc heeds.
cores="$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc 2>/dev/null || echo 4)"
warming=""
if [ -n "$measured" ]; then
  # shellcheck disable=SC2086 # the parts are words
  limited 170 150 "$python" -m benchmarks.gpu.warm --workers $(((cores + 2) / 3)) --parts $measured "${where[@]}" \
    "${size[@]}" >"$out/warm.part" 2>&1 &
  warming=$!
fi

finish_warming() {
  [ -n "$warming" ] || return 0
  local code=0
  wait "$warming" || code=$?
  tail -n 25 "$out/warm.part" >>"$log" 2>/dev/null
  if [ "$code" = 0 ]; then say "$(tail -n 1 "$out/warm.part")"; else say "compiling ahead: cut off, with code $code"; fi
  rm -f "$out/warm.part"
  warming=""
}

if wanted tests && ! "$python" -c "import pytest" 2>>"$log"; then
  say "tests: skipped, there is no pytest"
  finish_warming
elif wanted tests; then
  workers=()
  if [ "$smoke" = 0 ] && "$python" -c "import xdist" 2>/dev/null; then
    workers=(-n $(((2 * cores + 2) / 3)) --dist worksteal)
  fi
  # The tests that take much memory, or count it, run alone.
  code=0
  limited 170 220 "$python" -m pytest -q -m gpu -p no:cacheprovider --durations=15 "${selection[@]}" \
    "${workers[@]}" >"$out/tests.log" 2>&1 || code=$?
  finish_warming
  limited 70 200 "$python" -m pytest -q -m gpu -p no:cacheprovider "${alone[@]}" >>"$out/tests.log" 2>&1 || code=$?
  say "tests: $(grep -E '^[0-9]+ (passed|failed|skipped)|^=+ .*(passed|failed|error).* =+$|no tests ran' "$out/tests.log" |
    tr '\n' ';')"
  # With the error's first words: a short reply must be enough to see what is wrong.
  grep -E '^(FAILED|ERROR)' "$out/tests.log" | cut -c1-300 | head -n 30 | tee -a "$log"
  grep -E '^E  ' "$out/tests.log" | cut -c1-200 | sort | uniq -c | sort -rn | head -n 15 | tee -a "$log"
  [ "$code" = 0 ] || step_failed tests "$code"
fi
finish_warming

sanitize() { # TOOL CAP
  local code=0 found="$out/sanitizer.part"
  # Every tensor an allocation of its own: the allocator's pool would hide what is beyond a tensor's end.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 limited "$2" 170 compute-sanitizer --tool "$1" --error-exitcode 77 \
    "$python" -m benchmarks.gpu.exercise "${where[@]}" >"$found" 2>&1 || code=$?
  tail -n 60 "$found" >>"$log" 2>/dev/null
  if grep -qiE "device not supported|unable to (find|load)|failed to initialize|not supported on" "$found" 2>/dev/null; then
    say "compute-sanitizer $1: skipped, it refuses this machine: $(grep -iE -m1 'not supported|unable|failed to init' "$found")"
  elif [ "$code" = 77 ] || grep -qE "ERROR SUMMARY: [1-9]|RACECHECK SUMMARY: [1-9]" "$found" 2>/dev/null; then
    step_failed "compute-sanitizer $1" 77
    grep -E "Error|Invalid|hazard" "$found" | sort | uniq -c | head -n 10 | tee -a "$log"
  elif [ "$code" = 124 ] || [ "$code" = 125 ] || [ "$code" = 137 ]; then
    say "compute-sanitizer $1: no errors until it was cut off at its time limit"
  elif [ "$code" = 0 ]; then
    say "compute-sanitizer $1: $(grep -E 'SUMMARY' "$found" 2>/dev/null | tr '\n' ' ')"
  else
    step_failed "compute-sanitizer $1" "$code"
  fi
  rm -f "$found"
}

if wanted sanitizer; then
  PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"
  if command -v compute-sanitizer >/dev/null 2>&1; then
    sanitize memcheck 45
    sanitize racecheck 35
  else
    say "compute-sanitizer: skipped, there is none on the PATH"
  fi
fi

# Most important first: a part that finds no time left is left out, and what was measured before it stays.
measure() { # SECONDS PART...: so many seconds for each; the parts share a process
  local most="$1" code=0 left parts=()
  shift
  for part in "$@"; do if wanted "$part"; then parts+=("$part"); fi; done
  [ "${#parts[@]}" -gt 0 ] || return 0
  left=$(((seconds - SECONDS - 30) / ${#parts[@]}))
  [ "$left" -lt "$most" ] && most="$left"
  if [ "$most" -lt 3 ]; then
    say "${parts[*]}: no time left"
    return 0
  fi
  limited $((most * ${#parts[@]} + 15)) 15 "$python" -m benchmarks.gpu.run "${parts[@]}" --out "$out" --seconds "$most" \
    "${where[@]}" "${size[@]}" 2>&1 | tee -a "$log"
  code="${PIPESTATUS[0]}"
  case "$code" in
    0) say "${parts[*]}: measured" ;;
    124 | 137) say "${parts[*]}: cut off at its time limit; what it had measured is kept" ;;
    *) step_failed "${parts[*]}" "$code" ;;
  esac
}

measure 35 layers
measure 35 networks
measure 35 floor
measure 15 pieces
measure 30 stages
measure 7 memory divergence overhead rivals
measure 30 compiled layers_compiled

say "done${failed:+; failed:$failed}"
limited 30 0 "$python" -m benchmarks.gpu.run report --out "$out" 2>>"$log"
[ -z "$failed" ]
