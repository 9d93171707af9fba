#!/usr/bin/env bash
# Trains on the GPUs of this machine, all of them in one process.
#
#   gpu_scripts/train_single_node.sh CONFIG.yaml [section.key=value …]
#
# CUDA_VISIBLE_DEVICES=0,1 takes only those; PYTHON names another interpreter. The mesh in the config
# says what the GPUs do: {data: -1} copies the model, {data: 1, fsdp: -1} shares it between them.
set -euo pipefail

if [[ $# -eq 0 || $1 == -* ]]; then
  echo "usage: $0 CONFIG.yaml [section.key=value …]" >&2
  exit 2
fi

# Without a working CUDA this stops at once and does not train on the CPU for a week.
export JAX_PLATFORMS="${JAX_PLATFORMS:-cuda}"
# XLA takes this part of each GPU's memory in advance; the rest is for cuDNN and NCCL.
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"

exec "${PYTHON:-python}" -m jlora.train "$@"
