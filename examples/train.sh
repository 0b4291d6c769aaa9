#!/usr/bin/env bash
# Train a recipe on this node, with one rank per visible GPU or RANKS ranks:
#   bash examples/train.sh olmoe_1b_7b --data-path PREFIX --tokenizer-model FILE --save RUN
#   RANKS=2 bash examples/train.sh deepseek_v3/tiny --expert-model-parallel-size 2    # two CPU ranks
# The first word names a folder of examples/ (its pretrain.yaml), or FOLDER/STAGE; flags follow. One process checks
# settings, data and folders first, so that a user error is one message and exit code 2. --dry-run plans for the same
# number of ranks (or --world-size N) and launches nothing. Ranks rendezvous on a free port, so runs may share a node.
# Ctrl-C, SIGTERM and SIGUSR1 save and stop with code 75. PRINT=1 prints the command instead of running it.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
recipe="${1:-}"
case "$recipe" in
  "" | -*) sed -n '2,9s/^# //p' "${BASH_SOURCE[0]}" >&2; exit 2 ;;
  */*) ;;
  *) recipe="$recipe/pretrain" ;;
esac
shift
config="$root/examples/$recipe.yaml"
[ -f "$config" ] || { echo "train.sh: no examples/$recipe.yaml; python tools/plan.py --list lists the recipes" >&2; exit 2; }

python="${PYTHON:-${MOETRON_VENV:-$root/.venv}/bin/python}"
case "${CUDA_VISIBLE_DEVICES-all}" in
  all) gpus="$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)" ;;
  "" | -1 | NoDevFiles) gpus=0 ;;
  *) gpus="$(tr , '\n' <<<"$CUDA_VISIBLE_DEVICES" | wc -l)" ;;
esac
ranks="${RANKS:-$((gpus > 0 ? gpus : 1))}"
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
# Time for a step and a save after a signal.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}"
alone=("$python" "$root/pretrain_moe.py" --world-size "$ranks" --config "$config" "$@") # the last --world-size wins
launch=("$python" "$root/tools/launch.py" --nproc-per-node "$ranks" "$root/pretrain_moe.py" --config "$config" "$@")
case " $* " in *" --dry-run "* | *" --check "* | *" --help "*) launch=("${alone[@]}") ;; esac
if [ -n "${PRINT:-}" ]; then
  printf '%q ' "${launch[@]}"
  echo
  exit
fi
[ "${launch[*]}" = "${alone[*]}" ] || "${alone[@]}" --check
exec "${launch[@]}"
