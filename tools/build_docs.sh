#!/usr/bin/env bash
# Builds the documentation site from docs/ into docs/_build/html; a warning fails the build.
#   bash tools/build_docs.sh            build
#   bash tools/build_docs.sh --links    check the links that leave the site, too (needs the network)
# MOETRON_DOCS_VENV names the environment (default .venv-docs), PYTHON the interpreter to make it from.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case "${1:-}" in "" | --links) ;; *) sed -n '2,5s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2 ;; esac

venv="${MOETRON_DOCS_VENV:-.venv-docs}"
# The extra [docs] of setup.py, without Moetron and torch: pages are generated beforehand, and committed.
requirements="$(sed -n '/^    "docs": \[/,/^    \]/s/^ *"\([^"]*\)",.*/\1/p' setup.py | grep -v '^docs')"
if [ "$(cat "$venv/.requirements" 2>/dev/null)" != "$requirements" ]; then
  echo "docs: making $venv"
  "${PYTHON:-python3}" -m venv "$venv" || { echo "docs: could not make $venv" >&2; exit 2; }
  mapfile -t wanted <<<"$requirements"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${wanted[@]}"
  printf '%s\n' "$requirements" >"$venv/.requirements"
fi
"$venv/bin/sphinx-build" --fail-on-warning --keep-going --quiet --jobs auto -b html docs docs/_build/html
echo "docs: docs/_build/html/index.html"
if [ "${1:-}" = --links ]; then
  "$venv/bin/sphinx-build" --quiet -b linkcheck docs docs/_build/links
fi
