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
  RANKS=2 bash examples/train.sh olmoe_1b_7b/tiny --config "$recipes/life.yaml" --tokenizer-model "$tokenizer" \
    --save "$out/$1" "${@:2}"
}
to_hf() { # RUN FOLDER: with the chat template of a run on chats; an export is never overwritten
  [ -e "$out/$2" ] || "$python" tools/convert_checkpoint.py to-hf --load "$out/$1" --output "$out/$2"
}
has() { "$python" -c "import $1" 2>/dev/null; }

train run --data-root "$out/data" --load "$out/run"
"$python" tools/report.py "$out/run"
to_hf run hf
if has transformers; then
  "$python" $recipes/check_export.py --run "$out/run" --model "$out/hf"
else
  echo "$out/hf not compared: transformers is not installed (pip install 'moetron[hf]')"
fi

"$python" tools/collect_chats.py --output "$out/chats"
prepare() { # KIND MAX_LENGTH: shards for training and those held out
  for part in "$1" "$1.valid"; do
    "$python" tools/prepare_chats.py --input "$out/chats/$part.jsonl" --kind "$1" --max-length "$2" \
      --tokenizer "$tokenizer" --output-prefix "$out/chats/$part"
  done
}
prepare chats 256
prepare pairs 128 # a pair has to fit a sample
tune() { # RUN BASE FLAG... : evaluate the base at step 0, then train; a second call resumes
  local flags=("$1" --config "$recipes/sft_tiny.yaml" --data-root "$out/chats" "${@:3}")
  if [ -e "$out/$1/latest" ]; then
    train "${flags[@]}" --load "$out/$1"
  else
    train "${flags[@]}" --load "$out/$2" --finetune --skip-train
    train "${flags[@]}" --load "$out/$2" --finetune
  fi
}
tune sft run
tune dpo sft --config "$recipes/dpo_tiny.yaml"
to_hf dpo dpo_hf

stages=(pretrained="$out/run" SFT="$out/sft" DPO="$out/dpo")
if has lm_eval; then
  for stage in "${stages[@]}"; do
    "$python" tools/evaluate.py --load "${stage#*=}" --tasks closing_brackets,own_pages \
      --include-path examples/evaluation --output "$out/harness/${stage%%=*}.json"
  done
else
  echo "no tasks of lm-evaluation-harness: it is not installed (pip install 'moetron[eval]')"
fi
"$python" $recipes/compare_stages.py "${stages[@]/#/--stage=}" --questions "$out/chats" --harness "$out/harness" \
  --output "$out/stages.md"
printf '%s\n' "What does TextWrapper do?" /reset "What is ls for?" \
  | "$python" tools/generate.py --load "$out/dpo" --chat --temperature 0
