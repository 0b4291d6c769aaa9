#!/usr/bin/env bash
# Train a recipe on many nodes under SLURM. On the login node:
#   sbatch --nodes 32 --gpus-per-node 8 examples/slurm/pretrain.sh olmoe_1b_7b \
#     --data-path PREFIX --tokenizer-model FILE --save RUN
# The first word names a folder of examples/ (its pretrain.yaml), or FOLDER/STAGE; flags follow. A run
# that SLURM stops or requeues resumes from --save. MOETRON_ROOT and PYTHON name the checkout and its
# interpreter (default: the folder of submission); RANKS is the number of ranks per node (default: one per GPU).
# One process checks settings, data and folders before ranks start, so that a user error is one message and exit code
# 2; with --dry-run no ranks start. Ranks rendezvous at the first node on port MASTER_PORT, by default 10000 + job id
# modulo 20000, so that jobs on one node use different ports.
#SBATCH --job-name pretrain
#SBATCH --ntasks-per-node 1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --signal TERM@300
set -euo pipefail
fail() { echo "pretrain.sh: $*" >&2; exit 2; }
[ $# -gt 0 ] || fail "no recipe: give a folder of examples/, or FOLDER/STAGE"
[ -n "${SLURM_JOB_ID:-}" ] || fail "submit it with sbatch; on one node: examples/train.sh"
root="${MOETRON_ROOT:-$SLURM_SUBMIT_DIR}"
recipe="$1"
shift
case "$recipe" in */*) ;; *) recipe="$recipe/pretrain" ;; esac
config="$root/examples/$recipe.yaml"
[ -f "$config" ] || fail "no $config; submit from the checkout, or set MOETRON_ROOT"
save=""
previous=""
for word in "$@"; do
  if [ "$previous" = --save ]; then save="$word"; fi
  case "$word" in --save=*) save="${word#--save=}" ;; esac
  previous="$word"
done
resume=()
again=()
if [ -n "$save" ]; then resume=(--load "$save"); fi
# A requeued run resumes from its own checkpoint, even if it started from another run's.
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && [ -n "$save" ] && [ -e "$save/latest" ]; then
  again=(--load "$save" --no-finetune --no-reset-progress)
fi
head_node="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
nodes="$SLURM_JOB_NUM_NODES"
ranks="${RANKS:-${SLURM_GPUS_ON_NODE:-8}}"
port="${MASTER_PORT:-$((10000 + SLURM_JOB_ID % 20000))}"
python="${PYTHON:-$root/.venv/bin/python}"
flags=(--config "$config" "${resume[@]}" "$@" "${again[@]}")
alone=("$python" "$root/pretrain_moe.py" --world-size "$((nodes * ranks))" "${flags[@]}")
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
# Time for a step and a save, within SLURM's 300 s.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-270}"
case " $* " in *" --dry-run "* | *" --check "*) exec "${alone[@]}" ;; esac
"${alone[@]}" --check
# All cores of a node for its launcher: srun does not read the job's number, and would bind all ranks of a node to one.
cores=(--cpu-bind=none)
if [ -n "${SLURM_CPUS_ON_NODE:-}" ]; then cores+=(--cpus-per-task "$SLURM_CPUS_ON_NODE"); fi
# srun takes the place of this shell, and so also gets the signals of `--signal B:USR1@300` and `scancel --batch`; it
# passes them on to the launchers of all nodes. A node that fails ends the others; the first one may end up to 300 s
# later than them, when it closes the logs.
exec srun --kill-on-bad-exit=1 --wait=300 "${cores[@]}" "$python" "$root/tools/launch.py" --nnodes "$nodes" --nproc-per-node "$ranks" \
  --master-addr "$head_node" --master-port "$port" "$root/pretrain_moe.py" "${flags[@]}"
