#!/usr/bin/env bash
# Makes the virtual environment that the quick start and the tests run in, or reuses it if it is current.
#   bash tools/setup_env.sh            # what Moetron needs, as locked in requirements/
#   bash tools/setup_env.sh --dev      # lint, types and tests too
#   bash tools/setup_env.sh --newest   # as --dev, but the newest versions inside setup.py's ranges, updated at each call
# MOETRON_VENV names the folder (default .venv), PYTHON the interpreter to build it from (one that has a lock file).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Not in the lock files, since the build depends on the machine: for CPU, or for a version of CUDA. --newest keeps this
# version too: the machines of our CI find no CPU build of a newer one.
readonly TORCH_VERSION=2.13.0
venv="${MOETRON_VENV:-.venv}"
lane="${1:---base}"

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 2; }

# The lock file of an interpreter; requirements/ has those of every supported Python.
lock_of() {
  local version suffix=""
  [ "$lane" = --base ] || suffix="-dev"
  version="$("$1" -c 'import sys; print("%d%d" % sys.version_info[:2])' 2>/dev/null)" || return
  echo "requirements/py$version$suffix.lock"
}

find_python() {
  local candidate locked
  locked="$(basename -a requirements/*-dev.lock | sed -E 's/py3([0-9]+)-dev.lock/3.\1/' | sort -Vr | tr '\n' ' ')"
  # shellcheck disable=SC2086 # one word for each version
  for candidate in ${PYTHON:-python3 $(printf 'python%s ' $locked)}; do
    if [ -f "$(lock_of "$candidate")" ]; then
      echo "$candidate"
      return
    fi
  done
  die "found none of Python $locked; install one or name it: PYTHON=/path/to/python3 bash tools/setup_env.sh"
}

# A venv needs ensurepip only for its pip, which Debian packages apart: the outer pip can do that job.
make_venv() {
  "$1" -m venv "$venv" >/dev/null 2>&1 && return
  rm -rf "$venv"
  "$1" -m venv --without-pip "$venv" || die "could not make a virtual environment in $venv with $1"
  "$1" -m pip --python "$venv/bin/python" install --quiet pip \
    || die "no pip for $venv; install your distribution's python3-venv or python3-pip"
}

pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

torch_is_current() {
  "$venv/bin/python" -c 'import sys, importlib.metadata as m; sys.exit(m.version("torch").split("+")[0] != sys.argv[1])' \
    "$TORCH_VERSION" 2>/dev/null
}

# PyPI's torch for Linux is the CUDA build, several GB. Without a GPU: the CPU build, from the configured indexes if
# they hold it, else through uv, which knows where PyTorch publishes it.
install_torch() {
  local install=(pip install --quiet --quiet)
  if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
    say "GPU found: torch with CUDA"
    "${install[@]}" "torch==$TORCH_VERSION"
    return
  fi
  say "no GPU found: CPU build of torch"
  "${install[@]}" "torch==$TORCH_VERSION+cpu" 2>/dev/null && return
  "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" --torch-backend cpu "torch==$TORCH_VERSION" \
    2>/dev/null && return
  say "CPU build unavailable: installing the default one, which is large"
  "${install[@]}" "torch==$TORCH_VERSION"
}

install_locked() {
  pip install --quiet --quiet --no-deps --require-hashes --requirement "$lock"
  torch_is_current || install_torch
  pip install --quiet --quiet --no-deps --no-build-isolation --editable .
}

install_newest() {
  pip install --quiet --quiet --upgrade --requirement requirements/environment.in
  torch_is_current || install_torch
  pip install --quiet --quiet --upgrade --upgrade-strategy eager --constraint <(echo "torch==$TORCH_VERSION") \
    --editable '.[dev]'
}

stamp() {
  { cat setup.py tools/setup_env.sh requirements/*; pwd; "$venv/bin/python" --version; } | sha256sum | cut -d' ' -f1
}

is_current() {
  [ -x "$venv/bin/python" ] || return 1
  local have
  have="$(stamp)"
  [ "$(cat "$venv/.moetron-dev" 2>/dev/null)" = "$have" ] && return
  [ "$lane" = --base ] && [ "$(cat "$venv/.moetron-base" 2>/dev/null)" = "$have" ]
}

case "$lane" in
  --base | --dev)
    if is_current; then
      say "environment $venv is current"
      exit 0
    fi
    ;;
  --newest) ;;
  *) die "unknown option '$lane' (see the head of the file)" ;;
esac
started=$SECONDS
if [ ! -x "$venv/bin/python" ]; then
  python="$(find_python)"
  say "making $venv with $("$python" --version)"
  make_venv "$python"
fi
lock="$(lock_of "$venv/bin/python")"
[ -f "$lock" ] || die "$venv is of $("$venv/bin/python" --version), for which there is no $lock: remove it and run again"
rm -f "$venv/.moetron-base" "$venv/.moetron-dev"
if [ "$lane" = --newest ]; then
  say "installing the newest versions inside setup.py's ranges"
  install_newest
else
  say "installing what $lock says"
  install_locked
fi
conflicts="$(pip check)" || die "versions in $venv do not fit together; remove the folder and run again"$'\n'"$conflicts"
case "$lane" in --base) stamp >"$venv/.moetron-base" ;; *) stamp >"$venv/.moetron-dev" ;; esac
say "environment $venv ready after $((SECONDS - started)) s"
