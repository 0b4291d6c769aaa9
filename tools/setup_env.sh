#!/usr/bin/env bash
# Makes the virtual environment that the quick start and the tests run in, or reuses it if it is current.
#   bash tools/setup_env.sh [--dev]      # --dev: lint, types and tests too
# MOETRON_VENV names the folder (default .venv), PYTHON the interpreter to build it from (3.10 to 3.12).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly TORCH_VERSION=2.13.0
venv="${MOETRON_VENV:-.venv}"
extras="base"
[ "${1:-}" = "--dev" ] && extras="dev"

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 2; }

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.12 python3.11 python3.10}; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  die "no Python 3.10 to 3.12 found; install one or name it: PYTHON=/path/to/python3.11 bash tools/setup_env.sh"
}

# A venv needs ensurepip only for its pip, which Debian packages apart: the outer pip can do that job.
make_venv() {
  "$1" -m venv "$venv" >/dev/null 2>&1 && return
  rm -rf "$venv"
  "$1" -m venv --without-pip "$venv" || die "could not make a virtual environment in $venv with $1"
  "$1" -m pip --python "$venv/bin/python" install --quiet pip \
    || die "no pip for $venv; install your distribution's python3-venv or python3-pip"
}

# PyPI's torch for Linux is the CUDA build, several GB. Without a GPU: the CPU build, from the configured indexes if
# they hold it, else through uv, which knows where PyTorch publishes it.
install_torch() {
  local pip=("$venv/bin/python" -m pip install --quiet --quiet --disable-pip-version-check)
  if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
    say "GPU found: torch with CUDA"
    "${pip[@]}" "torch==$TORCH_VERSION"
    return
  fi
  say "no GPU found: CPU build of torch"
  "${pip[@]}" "torch==$TORCH_VERSION+cpu" 2>/dev/null && return
  if "${pip[@]}" 'uv>=0.7,<1' \
    && "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" --torch-backend cpu "torch==$TORCH_VERSION"; then
    return
  fi
  say "the CPU build is not to be had: taking the default one, which is large"
  "${pip[@]}" "torch==$TORCH_VERSION"
}

stamp() {
  { cat setup.py tools/setup_env.sh; pwd; "$venv/bin/python" --version; } | sha256sum | cut -d' ' -f1
}

is_current() {
  [ -x "$venv/bin/python" ] || return 1
  local have
  have="$(stamp)"
  [ "$(cat "$venv/.moetron-dev" 2>/dev/null)" = "$have" ] && return
  [ "$extras" = base ] && [ "$(cat "$venv/.moetron-base" 2>/dev/null)" = "$have" ]
}

if is_current; then
  say "environment $venv is current"
  exit 0
fi
started=$SECONDS
if [ ! -x "$venv/bin/python" ]; then
  python="$(find_python)"
  say "making $venv with $("$python" --version)"
  make_venv "$python"
fi
"$venv/bin/python" -c 'import torch' 2>/dev/null || install_torch
say "installing Moetron and what it needs"
target="."
[ "$extras" = dev ] && target=".[dev]"
"$venv/bin/python" -m pip install --quiet --quiet --disable-pip-version-check --editable "$target"
stamp >"$venv/.moetron-$extras"
say "environment $venv ready after $((SECONDS - started)) s"
