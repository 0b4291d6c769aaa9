#!/usr/bin/env bash
# Run a tiny OLMoE from text to a chat: tokenizer, shards, pretraining, annealing to zero in a new order; export and a
# comparison of transformers' loss with ours; fine-tuning on chats, preferences, a chat, and a table of the three stages.
# It shows that every step works, not a useful assistant. About ten minutes on two cores.
#   bash examples/olmoe_1b_7b/life.sh [DIR]     # default runs/olmoe_life
set -euo pipefail
case "${1:-}" in -*) sed -n '2,5s/^# //p' "${BASH_SOURCE[0]}" >&2; exit 2 ;; esac
out="$(realpath -m "${1:-"$(dirname "${BASH_SOURCE[0]}")/../../runs/olmoe_life"}")"
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore HF_HUB_OFFLINE=1
bash examples/tiny_corpus.sh "$out/data"
python="${MOETRON_VENV:-.venv}/bin/python"
readonly tokenizer="$out/data/umt5.model" recipes=examples/olmoe_1b_7b
train() { # RUN FLAG...
  RANKS=2 bash examples/train.sh olmoe_1b_7b/tiny --config $recipes/life.yaml --tokenizer-model "$tokenizer" \
    --save "$out/$1" "${@:2}"
}
has() { "$python" -c "import $1" 2>/dev/null; }

train run --data-root "$out/data" --load "$out/run"
"$python" tools/report.py "$out/run"
"$python" tools/convert_checkpoint.py to-hf --load "$out/run" --output "$out/hf"
if has transformers; then
  "$python" $recipes/check_export.py --run "$out/run" --model "$out/hf"
else
  echo "$out/hf not compared: transformers is not installed (pip install 'moetron[hf]')"
fi

"$python" tools/collect_chats.py --output "$out/chats"
for part in chats chats.valid pairs pairs.valid; do
  "$python" tools/prepare_chats.py --input "$out/chats/$part.jsonl" --kind "${part%.valid}" --tokenizer "$tokenizer" \
    --max-length $([ "${part%.valid}" = pairs ] && echo 128 || echo 256) --output-prefix "$out/chats/$part" # two in a pair
done
tune() { # RUN BASE FLAG... : evaluate the base at step 0, then train; a second call resumes
  local flags=("$1" --config $recipes/sft_tiny.yaml --data-root "$out/chats" "${@:3}")
  if [ -e "$out/$1/latest" ]; then
    train "${flags[@]}" --load "$out/$1"
  else
    train "${flags[@]}" --load "$out/$2" --finetune --skip-train
    train "${flags[@]}" --load "$out/$2" --finetune
  fi
}
tune sft run
tune dpo sft --config $recipes/dpo_tiny.yaml
"$python" tools/convert_checkpoint.py to-hf --load "$out/dpo" --output "$out/dpo_hf" # with the chat template

if has lm_eval; then
  for stage in run sft dpo; do
    "$python" tools/evaluate.py --load "$out/$stage" --tasks closing_brackets,numbers_go_on,own_pages \
      --include-path examples/evaluation --output "$out/harness/$stage.json"
  done
else
  echo "no tasks of lm-evaluation-harness: it is not installed (pip install 'moetron[eval]')"
fi
"$python" $recipes/compare_stages.py --stage run="$out/run" --stage sft="$out/sft" --stage dpo="$out/dpo" \
  --questions "$out/chats" --harness "$out/harness" --output "$out/stages.md"
"$python" tools/generate.py --load "$out/dpo" --chat --temperature 0 --prompt "What does TextWrapper do?" --prompt "Explain ls."
