#!/usr/bin/env bash
# What a GPU can say about this commit, by one command, in at most LIMIT_S seconds (590 if unset):
#   bash tests/gpu/measure_all.sh REFERENCES OUT [--smoke]
# REFERENCES: folder made on a CPU by `python -m tests.gpu.references`. OUT gets a log for each part,
# its figures as they come, summary.txt (part, exit code, seconds) and, after every part,
# figures.tar with all of them. Exit code 1: a part failed. PYTHON names the interpreter.
#
# First tests/gpu, then small models in several processes and losses of bf16 and FP8 after 200 steps,
# all at once, then the bench, alone on the GPU. ONLY=REGEX chooses parts by their names; `flags`, the
# speed of each flag of docs/gpu.md alone, runs only so. No part gets more time than is left; one that
# exceeds its own is killed. --smoke: the same on a CPU, tiny shapes.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 2
references="${1:?folder of references}" out="${2:?folder for results}" smoke="${3:-}"
python="${PYTHON:-python3}" limit_s="${LIMIT_S:-590}"
if [ ! -f "$references/references.jsonl" ]; then
  echo "$references has no references: python -m tests.gpu.references $references" >&2
  exit 2
fi
# More threads would fight for the cores: ten processes run at once.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
mkdir -p "$out"
out="$(cd "$out" && pwd)"
: >"$out/summary.txt"

# part NAME SECONDS COMMAND...: run with a limit; note what came of it, and pack all there is.
part() {
  local name="$1" limit="$2" start="$SECONDS" code
  shift 2
  [[ "$name" =~ ${ONLY:-} ]] || return 0
  [ "$((limit_s - SECONDS))" -lt "$limit" ] && limit="$((limit_s - SECONDS))"
  if [ "$limit" -lt 5 ]; then
    code="not started"
  else
    timeout -s INT -k 10 "$limit" env --default-signal=INT "$@" >"$out/$name.log" 2>&1 </dev/null
    code="$?" # 124 and 137: killed
  fi
  printf '%-20s %-12s %4d s\n' "$name" "$code" "$((SECONDS - start))" | tee -a "$out/summary.txt"
  pack
}

# One tar at a time: parts that run beside each other end at any time.
pack() {
  (
    flock 9
    tar -C "$out" --exclude=figures.tar --exclude=.lock -cf "$out/.figures" . 2>/dev/null
    mv "$out/.figures" "$out/figures.tar"
  ) 9>"$out/.lock"
}

# compare NAME SECONDS KINDS REGEX: continue after a fault that ended the process.
# shellcheck disable=SC2016 # expanded by the inner shell
compare() {
  part "compare_$1" "$2" bash -c 'for _ in 1 2 3; do "$@"; code=$?; [ $code -le 1 ] && break; done; exit $code' \
    again "$python" -m tests.gpu.compare --references "$references" --kinds "$3" --only "$4" \
    --json "$out/compare_$1.jsonl" --resume
}

{
  git log -1 --format='%H %cd' 2>/dev/null
  nvidia-smi 2>&1
  "$python" -m pip list 2>/dev/null
} >"$out/machine.txt"

others='^(?!graphs|offload)'
if [ "$smoke" = --smoke ]; then
  compare local 120 local '^olmoe_1b_7b$'
  part tests_gpu 300 "$python" -m pytest tests/gpu -m gpu -v -rs
  part losses 120 "$python" -m tests.bench.bench_gpu --smoke --out "$out" --loss-steps 2 local
  part bench 120 "$python" -m tests.bench.bench_gpu --smoke --out "$out/bench" --only '^local$'
else
  part tests_gpu 180 "$python" -m pytest tests/gpu -m gpu -v -rs -n 4 --dist loadfile --durations 20
  compare graphs 280 te16,delayed '^(graphs|offload)' &
  compare local 280 local,emulated "$others" &
  compare local16 280 local16,scaled "$others" &
  compare te32 280 te32 "$others" &
  compare te16 280 te16 "$others" &
  compare fp8 280 delayed,tensorwise "$others" &
  compare fp8_blocks 280 blockwise,scaled_experts "$others" &
  compare fp8_parameters 280 delayed_params,tensorwise_params,blockwise_params "$others" &
  part losses 280 "$python" -m tests.bench.bench_gpu --out "$out" --loss-steps 200 local \
    fp8-tensorwise-local fp8-delayed fp8-blockwise fp8-tensorwise-grouped_mm &
  wait
  part bench 180 "$python" -m tests.bench.bench_gpu --out "$out/bench"
  # Five minutes more: only by name.
  [ -z "${ONLY:-}" ] ||
    part flags 300 "$python" -m tests.bench.bench_gpu --each-flag --budget-s 285 --out "$out/flags"
fi
rm -f "$out/.lock"
echo "$SECONDS s; figures: $out/figures.tar"
# Nothing but exit code 0 is a success; a comparison outside its bound has 1.
! grep -qvE '^\S+ +0 ' "$out/summary.txt"
