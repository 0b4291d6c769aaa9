#!/usr/bin/env bash
# OpenMoE's whole life, tiny: UL2 on half code, then causal language modelling on little code, one run.
#   bash examples/openmoe_8b/tiny_life.sh [--out DIR]     (default runs/openmoe_tiny_life)
# The text is on this machine already: Python's standard library, and what packages say of themselves.
set -euo pipefail
out=runs/openmoe_tiny_life
case "${1:-}" in
  "") ;;
  --out) out="$(realpath -m "${2:?--out takes a folder}")" ;;
  *) sed -n '2,4s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 2 ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
bash tools/setup_env.sh
python="${MOETRON_VENV:-.venv}/bin/python"
export PYTHONWARNINGS=ignore
stdlib="$("$python" -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')"
packages="$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
shard() { "$python" tools/preprocess_corpus.py --tokenizer bytes --append-eod --output-prefix "$out/data/$1" --input "${@:2}"; }
shard code "$stdlib/asyncio" "$stdlib"/{email,json}/*.py
shard prose "$packages/*.dist-info/METADATA"
recipes=(--config examples/openmoe_8b/tiny.yaml --config examples/openmoe_8b/tiny_data.yaml --data-root "$out/data")
"$python" tools/inspect_data.py "${recipes[@]}" --show 1
"$python" pretrain_moe.py "${recipes[@]}" --save "$out/run" --load "$out/run"
"$python" - "$out/run/metrics.jsonl" <<'PYTHON'
import json, sys
rows = [json.loads(line) for line in open(sys.argv[1])]
for row in [rows[0], *rows[len(rows) // 2 - 1 : len(rows) // 2 + 1], rows[-1]]:
    losses = ", ".join(f"{name} {loss:.2f}" for name, loss in row["source_losses"].items())
    print(f"step {row['step']}, stage {row['stage']}: loss {row['lm_loss']:.3f} ({losses}), "
          f"dropped {row['dropped_fraction']:.1%}, objectives {sorted(row['objective_losses'])}")
PYTHON
