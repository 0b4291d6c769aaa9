#!/usr/bin/env bash
# What CI has no time for, for a timer at night: bash tests/nightly.sh [PYTHON_VERSION ...]
# Slow tests, every parallel layout and kills with the default environment; then with each other Python (default 3.12
# 3.13), so with the other megatron-core: units, parallel tests, losses, quick start, and every layout with the first.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
[ $# -gt 0 ] || set -- 3.12 3.13

failed=()
run() { bash tests/run.sh "$@" || failed+=("$*"); }
run --slow
run --parallel-full
run --chaos
for version in "$@"; do run --python "$version"; done
run --python "$1" --parallel-full
[ ${#failed[@]} -eq 0 ] || { printf 'tests/nightly.sh: FAILED: %s\n' "${failed[@]}" >&2; exit 1; }
echo "tests/nightly.sh: all passed"
