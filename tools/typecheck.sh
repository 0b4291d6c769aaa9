#!/usr/bin/env bash
# Run mypy on the package as it is imported.
#   bash tools/typecheck.sh            all shipped code
#   bash tools/typecheck.sh FILE...    these files against the package
# moe/, data/ and tokenizers/ are outside moetron/ in a checkout. mypy does not follow the search path that
# moetron/__init__.py sets and would type everything imported from them as Any. So it reads a temporary folder in which
# they are linked into the package.
set -euo pipefail
targets=()
for file in "$@"; do targets+=("$(realpath "$file")"); done
[ $# -gt 0 ] || targets=(moetron tools examples pretrain_moe.py)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root="$PWD"
mypy="$(realpath "${MOETRON_VENV:-.venv}")/bin/mypy"

tree="$(mktemp -d)"
trap 'rm -rf "$tree"' EXIT
mkdir "$tree/moetron"
ln -s "$root"/moetron/* "$root"/{moe,data,tokenizers} "$tree/moetron/"
ln -s "$root"/{tools,examples,pretrain_moe.py} "$tree/"
cd "$tree"
"$mypy" --config-file "$root/pyproject.toml" --cache-dir "$root/.mypy_cache" "${targets[@]}" \
  | sed -E 's#^moetron/(moe|data|tokenizers)/#\1/#'
