#!/usr/bin/env bash
# Train a recipe on this node, one rank a GPU (or RANKS of them):
#   bash examples/train.sh olmoe_1b_7b --data-path PREFIX --tokenizer-model FILE --save RUN
#   RANKS=2 bash examples/train.sh deepseek_v3/tiny --expert-model-parallel-size 2    # two CPU ranks
# The first word names a folder of examples/ (its pretrain.yaml), or FOLDER/STAGE; flags follow.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
recipe="${1:?which recipe: a folder of examples/, or FOLDER/STAGE}"
shift
case "$recipe" in */*) ;; *) recipe="$recipe/pretrain" ;; esac
gpus="$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)"
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
exec "${PYTHON:-$root/.venv/bin/python}" -m torch.distributed.run --standalone \
  --nproc-per-node "${RANKS:-$((gpus > 0 ? gpus : 1))}" \
  "$root/pretrain_moe.py" --config "$root/examples/$recipe.yaml" "$@"
