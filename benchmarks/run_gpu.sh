#!/usr/bin/env bash
# Build, test and measure on a GPU, in one command:
#
#   bash benchmarks/run_gpu.sh OUT_DIR [--plan all|first|second] [--seconds N] [--steps "build tests ..."] [--smoke]
#
# --list says what would be done, and for how many seconds at most. --plan all does everything in nine minutes. On a machine that is lent for less, --plan first (200 s) shows
# whether the kernels are right, and a few numbers; --plan second (400 s) tests and measures the rest.
# Needs a Python with PyTorch for the device (PYTHON=... names another than python3), and for the CUDA kernels nvcc,
# ninja, pybind11 and setuptools; without them the Triton kernels alone are measured. What is missing is said and left
# out. OUT_DIR gets run.log, tests.log, results.json, tables.md and, with matplotlib, floor.png, stages.png, others.png,
# all as the run goes on. Exits with 1 when the build, a test or a sanitizer found something wrong; it measures all the
# same. --smoke runs a few tests and tiny shapes on the CPU, and builds nothing: to see that the script itself runs.
# What benchmarks/gpu/prepare.sh has put into build/gpu is used where it fits: objects, Triton's cache, wheels.
set -uo pipefail

MEASURED="layers networks floor positions rivals memory pieces stages divergence overhead compiled layers_compiled"
ALL_STEPS="build first tests sanitizer $MEASURED"
# So short that they share a process where they follow each other; the others have one each.
SHORT="positions rivals memory pieces stages divergence overhead"

# Steps in their order, each with the seconds that it may take at most, and the seconds of the whole. Together the steps
# may take longer than there is: those before the measurements leave `reserved` seconds for these, and the last are left
# out.
plan_of() {
  case "$1" in
    first)
      table="build=60 first=75 sanitizer=20 floor=18 layers=20 positions=10 rivals=10" seconds=195 reserved=50 ;;
    second)
      table="build=45 tests=190 layers=30 networks=35 floor=25 positions=15 rivals=35 memory=6 pieces=12 stages=20
        divergence=6 overhead=5 compiled=20 layers_compiled=20" seconds=395 reserved=150 ;;
    all)
      table="build=150 tests=170 sanitizer=70 layers=35 networks=35 floor=30 positions=15 rivals=35 pieces=15 stages=25
        memory=7 divergence=7 overhead=7 compiled=25 layers_compiled=25" seconds=530 reserved=180 ;;
    *) echo "run_gpu.sh: --plan: got '$1'; allowed are all, first, second" >&2; exit 2 ;;
  esac
}

usage() {
  sed -n '2,15s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  exit "${1:-0}"
}

out="" plan=all own_seconds="" own_steps="" smoke=0 list=0
while [ $# -gt 0 ]; do
  case "$1" in
    --plan) plan="${2:?--plan: a name is missing}"; shift 2 ;;
    --seconds) own_seconds="${2:?--seconds: a number is missing}"; shift 2 ;;
    --steps) own_steps="${2:?--steps: a list is missing}"; shift 2 ;;
    --smoke) smoke=1; shift ;;
    --list) list=1; shift ;;
    -h | --help) usage ;;
    -*) echo "run_gpu.sh: unknown option $1; allowed are --plan, --seconds, --steps, --list, --smoke" >&2; exit 2 ;;
    *) if [ -n "$out" ]; then echo "run_gpu.sh: one OUT_DIR, got $out and $1" >&2; exit 2; fi; out="$1"; shift ;;
  esac
done
[ -n "$out" ] || [ "$list" = 1 ] || usage 2 >&2
plan_of "$plan"
refused() { echo "run_gpu.sh: $1: got '$2'; allowed $3" >&2; exit 2; }
case "${own_seconds:-0}" in *[!0-9]*) refused --seconds "$own_seconds" "is a whole number" ;; esac
seconds="${own_seconds:-$seconds}"
for step in $own_steps; do
  case " $ALL_STEPS " in *" $step "*) ;; *) refused --steps "$step" "are $ALL_STEPS" ;; esac
done

# most_of STEP: the seconds it may take, by the plan; of one that the plan does not have, those of the whole run.
most_of() {
  local entry
  for entry in $table; do [ "${entry%%=*}" = "$1" ] && echo "${entry#*=}" && return; done
  echo 60
}
# What is named by --steps runs in the order of the plan, and what the plan does not have after it.
steps=""
for entry in $table; do
  step="${entry%%=*}"
  case " ${own_steps:-$step} " in *" $step "*) steps="$steps $step" ;; esac
done
for step in $ALL_STEPS; do
  case " $steps " in *" $step "*) continue ;; esac
  case " $own_steps " in *" $step "*) steps="$steps $step" ;; esac
done

if [ "$list" = 1 ]; then
  echo "plan $plan, $seconds s"
  for step in $steps; do echo "$step $(most_of "$step")"; done
  exit 0
fi

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
  local cap="$1" keep="$2" left options=(--kill-after=5)
  shift 2
  left=$((seconds - SECONDS - keep))
  [ "$left" -lt "$cap" ] && cap="$left"
  if [ "$cap" -lt 5 ]; then
    say "no time left for: $*"
    return 125
  fi
  [ -n "${as_from_keyboard:-}" ] && options=(--foreground --signal=INT --kill-after=10)
  timeout "${options[@]}" "$cap" "$@"
}

step_failed() { # WHAT CODE
  case "$2" in
    124 | 125 | 137) say "$1: cut off at its time limit" ;;
    *) say "$1: FAILED with code $2" ;;
  esac
  failed="$failed $1"
}

where=() size=()
if [ "$smoke" = 1 ]; then
  device="0.0 CPU (a dry run)"
  export ELA_KERNELS_TEST_DEVICE=cpu OMP_NUM_THREADS=1
  where=(--device cpu) size=(--smoke)
else
  device="$("$python" - 2>>"$log" <<'PYTHON'
import torch

if torch.cuda.is_available():
    major, minor = torch.cuda.get_device_capability()
    print(f"{major}.{minor} {torch.cuda.get_device_name()}")
PYTHON
  )"
fi
[ "$plan" = first ] && size+=(--few)
if [ -z "$device" ]; then
  say "$python has no PyTorch that finds a GPU; the reason, if there is one, is in $log"
  exit 2
fi
capability="${device%% *}"
say "plan $plan on ${device#* }, compute capability $capability, $seconds s:$steps"

# What was compiled and fetched before, elsewhere. Objects and kernels are named by what they are made from: those that
# are not for this device, these sources and these compilers are not found, and are compiled here.
carried="${ELA_KERNELS_CARRIED:-$PWD/build/gpu}"
if [ "$smoke" = 0 ] && compgen -G "$carried/wheels/*.whl" >/dev/null; then
  site="$(mktemp -d)"
  if limited 30 60 "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" \
    "$carried"/wheels/*.whl >>"$log" 2>&1; then
    export PYTHONPATH="$PYTHONPATH:$site"
  else
    say "the wheels in $carried could not be installed (run.log)"
  fi
fi

if [ "$smoke" = 0 ] && [ -f "$carried/triton/manifest.json" ]; then
  export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$(mktemp -d)}"
  say "$("$python" -m benchmarks.gpu.kernels put "$carried/triton" "$TRITON_CACHE_DIR" 2>>"$log")"
fi
triton_kernels() { find "${TRITON_CACHE_DIR:-$HOME/.triton/cache}" -name '*.cubin' 2>/dev/null | wc -l; }
brought="$(triton_kernels)"

built() { # WITH: cuda or cpu
  ELA_KERNELS_BUILD="$1" limited "$(most_of build)" "$reserved" \
    "$python" setup.py --quiet build_ext --inplace >>"$log" 2>&1
}

build() {
  local code=0
  export TORCH_CUDA_ARCH_LIST="$capability"
  # The kernels are copied next to the sources, from where all the steps below import them.
  if [ -d "$carried/objects" ]; then
    if ELA_KERNELS_OBJECTS="$carried/objects" built cuda && "$python" -c \
      "from ela_kernels.backends.extension import extension_problem as p; raise SystemExit(p())" 2>>"$log"; then
      say "built with CUDA for $capability; $(grep -oE '[0-9]+ of [0-9]+ objects are taken' "$log" | tail -n 1)"
      return
    fi
    say "the objects in $carried do not fit here; compiling all"
  fi
  built cuda || code=$?
  if [ "$code" = 0 ]; then
    say "built with CUDA for $capability"
    return
  fi
  step_failed "build with CUDA" "$code"
  if built cpu; then
    say "built without CUDA: only the Triton kernels are measured (the compiler's words are in run.log)"
  else
    step_failed "build without CUDA" $?
  fi
}

if wanted build && [ "$smoke" = 0 ]; then build; fi
limited 60 0 "$python" -m ela_kernels info 2>&1 | tee -a "$log"

# Triton compiles at a kernel's first call, on one core: beside the tests all that is measured is compiled ahead on the
# others, into the caches on disk where the processes below find it.
measured=""
for part in $steps; do case "$part" in build | first | tests) ;; *) measured="$measured $part" ;; esac; done
# Without the variables set above, which nproc heeds.
cores="$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc 2>/dev/null || echo 4)"
warming=""
if [ -n "$measured" ]; then
  # shellcheck disable=SC2086 # the parts are words
  limited 170 "$reserved" "$python" -m benchmarks.gpu.warm --workers $(((cores + 2) / 3)) --parts $measured \
    "${where[@]}" "${size[@]}" >"$out/warm.part" 2>&1 &
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

# pytests SECONDS ARGUMENTS...: with a line for each test as soon as it has run. It is interrupted as from the keyboard:
# then it still says what failed, if the interrupt reaches it once, and not its workers. Each has one thread for what is
# compared on the CPU: there is a worker for most of the cores.
pytests() {
  local most="$1"
  shift
  as_from_keyboard=1 OMP_NUM_THREADS=1 limited "$most" "$reserved" "$python" -m pytest -v -p no:cacheprovider "$@" >>"$out/tests.log" 2>&1
}

# Where there are tests with the marker gpu; to look for them in all of tests/ takes long.
with_gpu_tests=(tests/gpu tests/conformance tests/test_info.py)

test_step() { # NAME: first or tests
  if ! "$python" -c "import pytest" 2>>"$log"; then
    say "$1: skipped, there is no pytest"
    return
  fi
  local workers=() code=0 most
  most="$(most_of "$1")"
  [ "$smoke" = 0 ] || most=$((4 * most)) # one process, and whatever machine it is
  if [ "$smoke" = 0 ] && "$python" -c "import xdist" 2>/dev/null; then
    workers=(-n $(((2 * cores + 2) / 3)) --dist worksteal)
  fi
  : >"$out/tests.log"
  if [ "$1" = first ]; then
    pytests "$most" -m gpu tests/gpu/test_first.py "${workers[@]}" || code=$?
  elif [ "$smoke" = 1 ]; then
    pytests "$most" -m gpu tests/gpu/test_first.py -k "weights_alone" || code=$?
    # Of a backend that needs no device.
    pytests "$most" tests/conformance/test_op_properties.py -k "cpp and hull" || code=$?
  else
    # Those of CUDA in a fraction of the time: Triton compiles more than two thousand kernels for the others, which may be
    # cut off. The tests that take much memory, or count it, run alone.
    local these=("${with_gpu_tests[@]}" --ignore=tests/gpu/test_memory.py "${workers[@]}")
    pytests $((most / 2)) -m gpu -k "not triton" "${these[@]}" || code=$?
    pytests $((most * 2 / 3)) -m gpu -k triton --durations=15 "${these[@]}" || code=$?
    finish_warming
    pytests 70 -m gpu tests/gpu/test_memory.py || code=$?
  fi
  say "$1: $(grep -E '^=+ .*(passed|failed|skipped|error|no tests ran).* =+$' "$out/tests.log" | tr -d '=\n')"
  # With the error's first words: a short reply must be enough to see what is wrong.
  grep -E '^(FAILED|ERROR)' "$out/tests.log" | cut -c1-300 | head -n 30 | tee -a "$log"
  grep -E '^E  ' "$out/tests.log" | cut -c1-200 | sort | uniq -c | sort -rn | head -n 15 | tee -a "$log"
  if [ "$smoke" = 0 ]; then # a test that is skipped on a device has tested nothing
    grep -E '^SKIPPED' "$out/tests.log" | cut -c1-200 | head -n 10 | tee -a "$log"
  fi
  [ "$code" = 0 ] || step_failed "$1" "$code"
}

# What a sanitizer says of a machine that it does not run on.
refusal="device not supported|unable to (find|load)|failed to initialize|not supported on"

# sanitizer_refuses: whether it says so of the first bytes that a program allocates, without PyTorch: a second or two,
# where the kernels would be waited for in vain.
sanitizer_refuses() {
  local found
  found="$(timeout --kill-after=2 10 compute-sanitizer --tool memcheck "$python" -c '
import ctypes

driver, device, context, memory = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
for code in (
    driver.cuInit(0),
    driver.cuDeviceGet(ctypes.byref(device), 0),
    driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device),
    driver.cuCtxSetCurrent(context),
    driver.cuMemAlloc_v2(ctypes.byref(memory), ctypes.c_size_t(1024)),
):
    assert code == 0, code' 2>&1)"
  echo "$found" >>"$log"
  grep -iE -m1 "$refusal" <<<"$found"
}

sanitize() { # TOOL CAP
  local code=0 found="$out/sanitizer.part"
  # Every tensor an allocation of its own: the allocator's pool would hide what is beyond a tensor's end.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 limited "$2" "$reserved" compute-sanitizer --tool "$1" --error-exitcode 77 \
    "$python" -m benchmarks.gpu.exercise "${where[@]}" "${size[@]}" >"$found" 2>&1 || code=$?
  tail -n 60 "$found" >>"$log" 2>/dev/null
  if grep -qiE "$refusal" "$found" 2>/dev/null; then
    say "compute-sanitizer $1: skipped, it refuses this machine: $(grep -iE -m1 "$refusal" "$found")"
  elif [ "$code" = 77 ] || grep -qE "ERROR SUMMARY: [1-9]|RACECHECK SUMMARY: [1-9]" "$found" 2>/dev/null; then
    step_failed "compute-sanitizer $1" 77
    grep -E "Error|Invalid|hazard" "$found" | sort | uniq -c | head -n 10 | tee -a "$log"
  elif [ "$code" = 124 ] || [ "$code" = 125 ] || [ "$code" = 137 ]; then
    say "compute-sanitizer $1: no errors until it was cut off; whole: $(grep -cE ' layers$' "$found") backends"
  elif [ "$code" = 0 ]; then
    say "compute-sanitizer $1: $(grep -E 'SUMMARY' "$found" 2>/dev/null | tr '\n' ' ')"
  else
    step_failed "compute-sanitizer $1" "$code"
  fi
  rm -f "$found"
}

sanitizer() {
  local most why
  PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin:${CUDA_HOME:-/usr/local/cuda}/compute-sanitizer"
  if ! command -v compute-sanitizer >/dev/null 2>&1; then
    say "compute-sanitizer: skipped, there is none on the PATH"
    return
  fi
  if why="$(sanitizer_refuses)"; then
    say "compute-sanitizer: skipped, it refuses this machine: $why"
    return
  fi
  most="$(most_of sanitizer)"
  # Races take a second run, and are looked for where there is time for it.
  if [ "$most" -lt 40 ]; then
    sanitize memcheck "$most"
  else
    sanitize memcheck $((most * 5 / 9))
    sanitize racecheck $((most * 4 / 9))
  fi
}

measure() { # PART...: in one process
  local left code all=0 most most_of_all given=()
  left=$((seconds - SECONDS - 15))
  for part in "$@"; do
    most="$(most_of "$part")"
    [ "$((left - all))" -lt "$most" ] && most="$((left - all))"
    if [ "$most" -lt 3 ]; then
      say "$part: no time left"
      continue
    fi
    given+=("$part=$most")
    all=$((all + most))
  done
  [ "${#given[@]}" -gt 0 ] || return 0
  most_of_all=$((all + 12))
  [ "$smoke" = 0 ] || most_of_all=$((4 * all)) # whatever machine it is
  limited "$most_of_all" 5 "$python" -m benchmarks.gpu.run "${given[@]}" --out "$out" "${where[@]}" "${size[@]}" 2>&1 |
    tee -a "$log"
  code="${PIPESTATUS[0]}"
  case "$code" in
    0) say "measured: ${given[*]}" ;;
    124 | 137) say "cut off at the time limit: ${given[*]}; what was measured is kept" ;;
    *) step_failed "${given[*]}" "$code" ;;
  esac
}

short=()
for step in $steps; do
  case " $SHORT " in *" $step "*) short+=("$step"); continue ;; esac
  if [ "${#short[@]}" -gt 0 ]; then
    finish_warming
    measure "${short[@]}"
    short=()
  fi
  case "$step" in
    build) ;;
    first | tests) test_step "$step" ;;
    sanitizer) finish_warming; sanitizer ;;
    *) finish_warming; measure "$step" ;;
  esac
done
finish_warming
[ "${#short[@]}" = 0 ] || measure "${short[@]}"

[ "$smoke" = 1 ] || say "Triton compiled $(($(triton_kernels) - brought)) kernels here"
say "done${failed:+; failed:$failed}"
limited 30 0 "$python" -m benchmarks.gpu.run report --out "$out" 2>>"$log"
[ -z "$failed" ]
