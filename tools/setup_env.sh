#!/usr/bin/env bash
# Create the virtual environment of the quick start and the tests, or reuse it if it is current.
#   bash tools/setup_env.sh            # Moetron and its dependencies, as locked in requirements/
#   bash tools/setup_env.sh --dev      # also lint, types and tests
#   bash tools/setup_env.sh --newest   # as --dev, with the newest versions that setup.py allows, updated at each call
# MOETRON_VENV names the folder (default .venv), PYTHON the interpreter to build it from (one that has a lock file).
# MOETRON_TORCH=cuda installs torch for GPUs where none is, such as a login node; cpu the CPU build where there is one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Not in the lock files, since the build (CPU or a CUDA version) depends on the machine. --newest keeps this version
# too, since our CI machines have no CPU build of a newer one.
readonly TORCH_VERSION=2.13.0
venv="${MOETRON_VENV:-.venv}"
lane="${1:---base}"

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 2; }

# Print the lock file of an interpreter; requirements/ has one per supported Python.
lock_of() {
  local version suffix=""
  [ "$lane" = --base ] || suffix="-dev"
  version="$("$1" -c 'import sys; print("%d%d" % sys.version_info[:2])' 2>/dev/null)" || return
  echo "requirements/py$version$suffix.lock"
}

find_python() {
  local candidate locked
  locked="$(basename -a requirements/*-dev.lock | sed -E 's/py3([0-9]+)-dev.lock/3.\1/' | sort -Vr | tr '\n' ' ')"
  # shellcheck disable=SC2086 # one word per version
  for candidate in ${PYTHON:-python3 $(printf 'python%s ' $locked)}; do
    if [ -f "$(lock_of "$candidate")" ]; then
      echo "$candidate"
      return
    fi
  done
  die "found none of Python $locked; install one or name it: PYTHON=/path/to/python3 bash tools/setup_env.sh"
}

# Debian packages ensurepip separately. Without it, the outer pip installs pip into the venv.
make_venv() {
  "$1" -m venv "$venv" >/dev/null 2>&1 && return
  rm -rf "$venv"
  "$1" -m venv --without-pip "$venv" || die "cannot create a virtual environment in $venv with $1"
  "$1" -m pip --python "$venv/bin/python" install --quiet pip \
    || die "no pip for $venv; install your distribution's python3-venv or python3-pip"
}

pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

# Any build of the version will do unless one is asked for; PyPI's, without a suffix, is for CUDA.
torch_is_current() {
  local found
  found="$("$venv/bin/python" -c 'import importlib.metadata as m; print(m.version("torch"))' 2>/dev/null)" || return
  case "${MOETRON_TORCH:-auto} $found" in "cuda "*+cpu) return 1 ;; "cpu "*+cu* | "cpu $TORCH_VERSION") return 1 ;; esac
  [ "${found%%+*}" = "$TORCH_VERSION" ]
}

wants_cuda() {
  case "${MOETRON_TORCH:-auto}" in
    cuda) return 0 ;;
    cpu) return 1 ;;
  esac
  command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1
}

# PyPI's torch for Linux is the CUDA build of several GB. Without a GPU, install the CPU build from the configured
# indexes if they have it, else from PyTorch's index through uv.
install_torch() {
  local install=(pip install --quiet --quiet)
  if wants_cuda; then
    say "torch with CUDA (MOETRON_TORCH=cpu: without)"
    pip uninstall --quiet --yes torch >/dev/null 2>&1 || true  # pip takes a CPU build of this version for it
    "${install[@]}" "torch==$TORCH_VERSION"
    return
  fi
  say "no GPU found: CPU build of torch (for the GPUs of other nodes: MOETRON_TORCH=cuda)"
  "${install[@]}" "torch==$TORCH_VERSION+cpu" 2>/dev/null && return
  "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" --torch-backend cpu "torch==$TORCH_VERSION" \
    2>/dev/null && return
  say "CPU build unavailable: installing the large default build"
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
  [ -z "${MOETRON_TORCH:-}" ] || torch_is_current || return 1
  local have
  have="$(stamp)"
  [ "$(cat "$venv/.moetron-dev" 2>/dev/null)" = "$have" ] && return
  [ "$lane" = --base ] && [ "$(cat "$venv/.moetron-base" 2>/dev/null)" = "$have" ]
}

case "${MOETRON_TORCH:-auto}" in auto | cuda | cpu) ;; *) die "MOETRON_TORCH=$MOETRON_TORCH: cuda, cpu or auto" ;; esac
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
  say "creating $venv with $("$python" --version)"
  make_venv "$python"
fi
lock="$(lock_of "$venv/bin/python")"
[ -f "$lock" ] || die "$venv: no $lock for its $("$venv/bin/python" --version); remove the folder and run again"
rm -f "$venv/.moetron-base" "$venv/.moetron-dev"
if [ "$lane" = --newest ]; then
  say "installing the newest versions that setup.py allows"
  install_newest
else
  say "installing from $lock"
  install_locked
fi
conflicts="$(pip check)" || die "conflicting versions in $venv; remove the folder and run again"$'\n'"$conflicts"
case "$lane" in --base) stamp >"$venv/.moetron-base" ;; *) stamp >"$venv/.moetron-dev" ;; esac
say "environment $venv ready after $((SECONDS - started)) s"
