#!/usr/bin/env bash
# Make token shards of code and prose from files on this machine, for the life.sh scripts.
#   bash examples/tiny_corpus.sh DIR
# Writes DIR/umt5.model and the shards DIR/code and DIR/prose, each with 5 % held out (DIR/code.valid,
# DIR/prose.valid). The code is Python's standard library; the prose is descriptions and licenses of installed packages.
# A second run reuses the result.
set -euo pipefail
case "${1:-}" in "" | -*) sed -n '2,6s/^# //p' "${BASH_SOURCE[0]}" >&2; exit 2 ;; esac
out="$(realpath -m "$1")"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup_env.sh
python="${MOETRON_VENV:-.venv}/bin/python"
folder() { "$python" -c "import sysconfig; print(sysconfig.get_path('$1'))"; }
code=("$(folder stdlib)/*.py")
prose=("$(folder purelib)/*.dist-info/METADATA" "$(folder purelib)/*.dist-info/**/*LICENSE*")

"$python" tools/train_tokenizer.py --input "${code[@]}" "${prose[@]}" --vocab-size 2048 --sample-mb 1 --output "$out/umt5"
shards() { # NAME INPUT...
  "$python" tools/preprocess_corpus.py --input "${@:2}" --tokenizer "$out/umt5.model" --append-eod --deduplicate \
    --output-prefix "$out/$1" --holdout-fraction 0.05 --holdout-prefix "$out/$1.valid"
}
shards code "${code[@]}"
shards prose "${prose[@]}"
