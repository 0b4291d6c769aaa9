#!/usr/bin/env bash
# Run a tiny OpenMoE from text to report: tokenizer, shards, UL2 on half code, then causal language modelling on little
# code in the same run, and a report that shows the change. A few minutes on two cores.
#   bash examples/openmoe_8b/life.sh [DIR]     # default runs/openmoe_life
set -euo pipefail
case "${1:-}" in -*) sed -n '2,4s/^# //p' "${BASH_SOURCE[0]}" >&2; exit 2 ;; esac
out="$(realpath -m "${1:-"$(dirname "${BASH_SOURCE[0]}")/../../runs/openmoe_life"}")"
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore
bash examples/tiny_corpus.sh "$out/data"

python="${MOETRON_VENV:-.venv}/bin/python"
RANKS=2 bash examples/train.sh openmoe_8b/tiny --config examples/openmoe_8b/life.yaml \
  --data-root "$out/data" --tokenizer-model "$out/data/umt5.model" --save "$out/run" --load "$out/run"
"$python" tools/analyze_routing.py "$out/run"
"$python" tools/report.py "$out/run"
