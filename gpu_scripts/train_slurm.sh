#!/usr/bin/env bash
# Trains on several nodes under SLURM: one process a node, which uses all of its GPUs.
#
#   sbatch --nodes=4 gpu_scripts/train_slurm.sh CONFIG.yaml [section.key=value …]
#
# train.output_dir must be on a file system that all nodes share. SLURM sends SIGTERM three minutes
# before the time limit: the run saves and exits with 143, the job is requeued, and with
# train.resume: auto it resumes from the checkpoint.
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
# Two jobs may share a node, so the port is derived from the job's id.
export JLORA_COORDINATOR="${nodes[0]}:$((20000 + SLURM_JOB_ID % 10000))"
export JLORA_NUM_PROCESSES="$SLURM_NTASKS"
export JAX_PLATFORMS="${JAX_PLATFORMS:-cuda}"
export PYTHON="${PYTHON:-python}"

# SLURM_PROCID is set only inside the job step, hence the inner shell.
code=0
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 bash -c \
  'JLORA_PROCESS_ID="$SLURM_PROCID" exec "$PYTHON" -m jlora.train "$@"' jlora "$@" || code=$?

if [[ $code -eq 143 ]]; then
  echo "saved before the time limit; job $SLURM_JOB_ID is requeued" >&2
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
