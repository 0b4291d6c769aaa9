#!/usr/bin/env bash
# Run a tiny OLMoE from text to export: tokenizer, shards, pretraining, annealing to zero in a new order, export, and a
# comparison of transformers' loss with ours on held-out text. A few minutes on two cores.
#   bash examples/olmoe_1b_7b/life.sh [DIR]     # default runs/olmoe_life
set -euo pipefail
case "${1:-}" in -*) sed -n '2,4s/^# //p' "${BASH_SOURCE[0]}" >&2; exit 2 ;; esac
out="$(realpath -m "${1:-"$(dirname "${BASH_SOURCE[0]}")/../../runs/olmoe_life"}")"
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore HF_HUB_OFFLINE=1
bash examples/tiny_corpus.sh "$out/data"

python="${MOETRON_VENV:-.venv}/bin/python"
RANKS=2 bash examples/train.sh olmoe_1b_7b/tiny --config examples/olmoe_1b_7b/life.yaml \
  --data-root "$out/data" --tokenizer-model "$out/data/umt5.model" --save "$out/run" --load "$out/run"
"$python" tools/report.py "$out/run"
"$python" tools/convert_checkpoint.py to-hf --load "$out/run" --output "$out/hf"
if "$python" -c 'import transformers' 2>/dev/null; then
  "$python" examples/olmoe_1b_7b/check_export.py --run "$out/run" --model "$out/hf"
else
  echo "$out/hf not compared: transformers is not installed (pip install 'moetron[hf]')"
fi
