#!/usr/bin/env bash
# Trains on several nodes under SLURM, one process a node with all of its GPUs.
#
#   sbatch --nodes=4 gpu_scripts/train_slurm.sh CONFIG.yaml [section.key=value …]
#
# train.output_dir must lie on a file system that all nodes see. SLURM sends SIGTERM three minutes
# before the time limit: the run saves, exits with 143, and the job is put back in the queue, where
# train.resume: auto goes on from the checkpoint.
#SBATCH --job-name=jlora
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

if [[ $# -eq 0 || $1 == -* ]]; then
  echo "usage: sbatch [--nodes=N] $0 CONFIG.yaml [section.key=value …]" >&2
  exit 2
fi
: "${SLURM_JOB_ID:?start this script with sbatch}"

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# Two jobs may share a node, so the port follows from the job.
export JLORA_COORDINATOR="${nodes[0]}:$((20000 + SLURM_JOB_ID % 10000))"
export JLORA_NUM_PROCESSES="$SLURM_NTASKS"
export JAX_PLATFORMS="${JAX_PLATFORMS:-cuda}"
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"
export PYTHON="${PYTHON:-python}"

# SLURM_PROCID is known only inside the step, hence the inner shell.
code=0
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 bash -c \
  'JLORA_PROCESS_ID="$SLURM_PROCID" exec "$PYTHON" -m jlora.train "$@"' jlora "$@" || code=$?

if [[ $code -eq 143 ]]; then
  echo "saved before the time limit; job $SLURM_JOB_ID goes back to the queue" >&2
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
