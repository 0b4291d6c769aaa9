#!/usr/bin/env bash
# Builds the documentation site from docs/ into docs/_build/html; a warning fails the build.
#   bash tools/build_docs.sh            build
#   bash tools/build_docs.sh --links    check the links that leave the site, too (needs the network)
# Needs the development environment (bash tools/setup_env.sh --dev); MOETRON_VENV names its folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case "${1:-}" in "" | --links) ;; *) sed -n '2,5s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2 ;; esac

sphinx="${MOETRON_VENV:-.venv}/bin/sphinx-build"
[ -x "$sphinx" ] || { echo "docs: no $sphinx; run bash tools/setup_env.sh --dev first" >&2; exit 2; }
"$sphinx" --fail-on-warning --keep-going --quiet --jobs auto -b html docs docs/_build/html
echo "docs: docs/_build/html/index.html"
if [ "${1:-}" = --links ]; then
  "$sphinx" --quiet -b linkcheck docs docs/_build/links
fi
