#!/usr/bin/env bash
# Trains on all GPUs of this machine in one process.
#
#   gpu_scripts/train_single_node.sh CONFIG.yaml [section.key=value …]
#
# CUDA_VISIBLE_DEVICES=0,1 restricts the run to those GPUs; PYTHON names another interpreter. In the
# config, mesh: {data: -1} puts a copy of the model on each GPU, {data: 1, fsdp: -1} shards it.
set -euo pipefail

if [[ $# -eq 0 || $1 == -* ]]; then
  echo "usage: $0 CONFIG.yaml [section.key=value …]" >&2
  exit 2
fi

# Without a working CUDA installation JAX would fall back to the CPU; this makes it an error.
export JAX_PLATFORMS="${JAX_PLATFORMS:-cuda}"

exec "${PYTHON:-python}" -m jlora.train "$@"
