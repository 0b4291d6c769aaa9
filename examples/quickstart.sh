#!/usr/bin/env bash
# Train a Mixture-of-Experts checkpoint from real text on this machine.
#   bash examples/quickstart.sh [--out DIR] [--corpus DIR|debian]
#     --out DIR        output folder (default runs/quickstart)
#     --corpus DIR     your own text: every *.jsonl file (key "text") and every folder in DIR is a source
#     --corpus debian  a multilingual mix from apt; default: text on this machine
# A second run reuses current results.
set -euo pipefail
started=$SECONDS
fail() { echo "quickstart: $*" >&2; exit 2; }
usage() { sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

out=runs/quickstart
corpus=system
while [ $# -gt 0 ]; do
  case "$1" in
    --out | --corpus)
      [ $# -ge 2 ] || fail "$1 takes a value (try --help)"
      case "$2" in
        *://*) fail "$1 $2: an address, not a path; give a folder of a mounted file system" ;;
      esac
      if [ "$1" = --out ]; then out="$2"; else corpus="$2"; fi
      shift 2
      ;;
    -h | --help) usage; exit 0 ;;
    *) fail "unknown option '$1' (try --help)" ;;
  esac
done
[ "$out" = runs/quickstart ] || out="$(realpath -m "$out")"
case "$corpus" in
  system) corpus_mb=12 vocab_size=2048 ;;
  debian) corpus_mb=120 vocab_size=8192 ;;
  *)
    [ -d "$corpus" ] || fail "--corpus $corpus is neither a folder nor 'debian'"
    corpus="$(realpath "$corpus")" vocab_size=2048
    ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly RECIPE=examples/quickstart/pretrain.yaml
readonly ranks=2
total_steps="$(sed -n 's/^ *train_iters: *\([0-9]*\).*/\1/p' "$RECIPE")"
stop_at=$((total_steps / 2))
step() { printf '\n[%s] %s (after %s s)\n' "$1" "$2" "$((SECONDS - started))"; }

step 1/8 "Environment"
bash tools/setup_env.sh
bin="${MOETRON_VENV:-.venv}/bin"
export PYTHONWARNINGS=ignore OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

step 2/8 "Real text"
if [ -d "$corpus" ]; then
  text="$corpus"
else
  text="$out/corpus"
  "$bin/python" tools/collect_corpus.py --source "$corpus" --max-mb "$corpus_mb" --output "$text"
fi

step 3/8 "An umT5-style tokenizer: SentencePiece unigram with byte fallback"
tokenizer="$out/tokenizer/umt5.model"
"$bin/python" tools/train_tokenizer.py --input "$text" --vocab-size "$vocab_size" --sample-mb 4 \
  --output "${tokenizer%.model}"

step 4/8 "Token shards, 3 % of the documents held out"
shards() { # SOURCE NAME FRACTION
  "$bin/python" tools/preprocess_corpus.py --input "$1" --tokenizer "$tokenizer" --append-eod \
    --output-prefix "$out/data/$2" --holdout-fraction "$3" --holdout-prefix "$out/data/$2.valid"
}
train=() valid=()
for source in "$text"/*; do
  case "$source" in
    *.jsonl) name="$(basename "$source" .jsonl)" ;;
    *) [ -d "$source" ] || continue; name="$(basename "$source")" ;;
  esac
  shards "$source" "$name" 0.03 || { echo "retrying with a fifth held out"; shards "$source" "$name" 0.2; }
  train+=("$out/data/$name") valid+=("$out/data/$name.valid")
done
[ ${#train[@]} -gt 0 ] || fail "$text holds neither .jsonl files nor folders"

run="$out/run"
pretrain() {
  PYTHON="$bin/python" RANKS="$ranks" bash examples/train.sh quickstart \
    --data-path "${train[@]}" --valid-data-path "${valid[@]}" --tokenizer-model "$tokenizer" \
    --save "$run" --load "$run" "$@"
}
# A run of other data or another recipe is neither resumed nor deleted.
key="$(cat "$RECIPE" "${train[@]/%/.json}" | sha256sum | cut -d' ' -f1)"
if [ -d "$run" ] && [ "$(cat "$run/quickstart.key" 2>/dev/null)" != "$key" ]; then
  mv "$run" "$run.before-$(date +%Y%m%d-%H%M%S)"
fi
mkdir -p "$run"
echo "$key" >"$run/quickstart.key"
last="$(printf 'step_%07d' "$total_steps")"

if [ "$(cat "$run/latest" 2>/dev/null)" = "$last" ]; then
  step 5-6/8 "Training: $run/$last exists"
else
  if [ ! -e "$run/latest" ]; then
    step 5/8 "Training: 64 experts, 8 per token, on $ranks ranks; stops at step $stop_at to show resuming"
    pretrain --exit-interval "$stop_at"
  fi
  step 6/8 "Resuming from $run/$(cat "$run/latest")"
  pretrain
fi

step 7/8 "A sample, and unigram and bigram baselines"
"$bin/python" tools/generate.py --load "$run" --prompt 'def main(' --max-new-tokens 80 | tee "$out/sample.txt"
"$bin/python" tools/ngram_baseline.py --train-data-path "${train[@]}" --valid-data-path "${valid[@]}" \
  --seq-length "$(sed -n 's/^ *seq_length: *\([0-9]*\).*/\1/p' "$RECIPE")" --output "$out/ngrams.json"

step 8/8 "Summary"
"$bin/python" tools/report.py "$run" --output "$out/curves.png"
"$bin/python" examples/quickstart/summarize.py --out "$out" --seconds "$((SECONDS - started))"
