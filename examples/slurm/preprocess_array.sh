#!/usr/bin/env bash
# Preprocess a corpus on many nodes: an array job in which each task takes a partition of the files, then a
# job that merges the partitions, byte-identical to a single run. On the login node:
#   SHARES=16 bash examples/slurm/preprocess_array.sh --input 'corpus/*.jsonl.gz' --tokenizer tok.model \
#     --output-prefix data/train --append-eod
# SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_TIMELIMIT and the like are variables of sbatch; PYTHON and CPUS are of this script.
set -euo pipefail
root="${MOETRON_ROOT:-$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)}"
python="${PYTHON:-$root/.venv/bin/python}"
preprocess=("$python" "$root/tools/preprocess_corpus.py")

if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
  number=$((SLURM_ARRAY_TASK_ID - ${SLURM_ARRAY_TASK_MIN:-0}))
  exec "${preprocess[@]}" "$@" --share "$number/$SLURM_ARRAY_TASK_COUNT" --workers "${SLURM_CPUS_PER_TASK:-1}"
elif [ -n "${SLURM_JOB_ID:-}" ]; then
  exec "${preprocess[@]}" "$@"
fi

shares="${SHARES:?set it to the number of array tasks}"
export MOETRON_ROOT="$root" PYTHON="$python"  # sbatch runs a copy of this script
script="$root/examples/slurm/preprocess_array.sh"
array="$(sbatch --parsable --job-name preprocess --array "0-$((shares - 1))" \
  --cpus-per-task "${CPUS:-8}" "$script" "$@")"
sbatch --job-name merge --dependency "afterok:${array%%;*}" "$script" "$@" --merge-shares "$shares"
