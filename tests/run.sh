#!/usr/bin/env bash
# Sets up the environment if needed, then lint, types, the documentation site and the default tests. A part that fails
# does not keep the others from running; the last line says which failed.
#   bash tests/run.sh                   everything that CI runs
#   bash tests/run.sh --slow            the minutes-long tests
#   bash tests/run.sh --parallel-full   every parallel layout
#   bash tests/run.sh --gpu             the suite for 1 to 8 GPUs
#   bash tests/run.sh --chaos [...]     60 kills of runs that resume and must equal uninterrupted ones (--kills N, --seed N)
#   bash tests/run.sh --only ARG...     pytest with these arguments
#   bash tests/run.sh --newest [...]    any of these in an environment of its own, .venv-newest: not the locked versions
#                                       but the newest inside setup.py's ranges (torch stays, see tools/setup_env.sh)
#   bash tests/run.sh --python 3.12 [...]  any of these with another Python, so another megatron-core (see setup.py), in
#                                       an environment of its own, .venv-3.12; without more: units, parallel tests,
#                                       losses equal to those of .venv, and the quick start
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export MOETRON_VENV="${MOETRON_VENV:-.venv}"
# Print an interpreter of version $1; pyenv has more than those on PATH.
python_of() {
  local candidate
  for candidate in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$1".*/bin/python; do
    if "$candidate" -c "" 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "tests/run.sh: found no Python $1" >&2
  return 2
}

if [ "${1:-}" = --python ]; then
  version="${2:?tests/run.sh: --python takes a version, such as 3.12}"
  shift 2
  python="$(python_of "$version")"
  reference="$MOETRON_VENV"
  MOETRON_VENV="$MOETRON_VENV-$version"
  PYTHON="$python" bash tools/setup_env.sh --dev
  [ $# -gt 0 ] || set -- --other-python
elif [ "${1:-}" = --newest ]; then
  shift
  MOETRON_VENV="$MOETRON_VENV-newest"
  bash tools/setup_env.sh --newest
else
  bash tools/setup_env.sh --dev
fi
bin="$MOETRON_VENV/bin"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

failed=()
part() { # NAME COMMAND...
  local name="$1"
  shift
  "$@" || failed+=("$name")
}
shell_scripts() { git ls-files -z '*.sh' .ci/run | xargs -0 "$bin/shellcheck"; }

case "${1:-}" in
  "")
    part format "$bin/ruff" format --check --quiet .
    part lint "$bin/ruff" check --quiet .
    part shellcheck shell_scripts
    part types bash tools/typecheck.sh
    part docs bash tools/build_docs.sh
    part tests "$bin/pytest" tests -m "not slow and not parallel_full and not gpu" -n 2 --dist worksteal --durations 15
    ;;
  --slow) part tests "$bin/pytest" tests -m "slow and not parallel_full and not gpu" ;;
  --parallel-full) part tests "$bin/pytest" tests/parallel -m "parallel_full and not gpu" -s ;;
  --gpu)
    part tests "$bin/pytest" tests/gpu -m gpu -n 4 --dist loadfile --durations 10 --ignore tests/gpu/test_layouts.py
    part layouts "$bin/pytest" tests/gpu/test_layouts.py -m gpu -s -rs # all GPUs at once; prints a table
    ;;
  --other-python)
    (unset PYTHON; MOETRON_VENV="$reference" bash tools/setup_env.sh --dev)
    part tests "$bin/pytest" tests/unit tests/parallel -m "not slow and not parallel_full and not gpu" -n 2 \
      --dist worksteal --durations 15
    part versions "$bin/python" -m tests.golden.across_versions --reference "$reference/bin/python"
    MOETRON_REFERENCE_PYTHON="$reference/bin/python" part resume "$bin/pytest" tests/golden/test_across_versions.py
    part quickstart "$bin/pytest" tests/e2e/test_quickstart.py -m slow
    ;;
  --chaos) shift; part chaos "$bin/python" -m tests.chaos.kills "$@" ;;
  --only) shift; part tests "$bin/pytest" "$@" ;;
  *) echo "tests/run.sh: unknown option '$1' (see the head of the file)" >&2; exit 2 ;;
esac
if [ ${#failed[@]} -gt 0 ]; then
  echo "tests/run.sh: FAILED: ${failed[*]}" >&2
  exit 1
fi
echo "tests/run.sh: all parts passed"
