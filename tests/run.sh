#!/usr/bin/env bash
# Sets up the environment if needed, then lint, types, the documentation site and the default tests.
#   bash tests/run.sh                   everything that CI runs
#   bash tests/run.sh --slow            the minutes-long tests
#   bash tests/run.sh --parallel-full   every parallel layout
#   bash tests/run.sh --gpu             the suite for 1 to 8 GPUs
#   bash tests/run.sh --only ARG...     pytest with these arguments
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup_env.sh --dev
bin="${MOETRON_VENV:-.venv}/bin"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

lint() {
  "$bin/ruff" format --check --quiet .
  "$bin/ruff" check --quiet .
  git ls-files -z '*.sh' .ci/run | xargs -0 "$bin/shellcheck"
  "$bin/mypy"
}

case "${1:-}" in
  "")
    lint
    bash tools/build_docs.sh
    "$bin/pytest" tests -m "not slow and not parallel_full and not gpu" -n 2 --dist worksteal --durations 15
    ;;
  --slow) "$bin/pytest" tests -m "slow and not parallel_full and not gpu" ;;
  --parallel-full) "$bin/pytest" tests/parallel -m "parallel_full and not gpu" -s ;;
  --gpu) "$bin/pytest" tests/gpu -m gpu ;;
  --only) shift; "$bin/pytest" "$@" ;;
  *) echo "tests/run.sh: unknown option '$1' (see the head of the file)" >&2; exit 2 ;;
esac
