#!/usr/bin/env bash
# Trains on a TPU slice by running the same command on each of its hosts.
#
#   TPU_NAME=my-slice ZONE=us-east5-a tpu_scripts/train_pod.sh CONFIG.yaml [section.key=value …]
#
# Paths are relative to ~/jlora on the hosts, where setup_pod.sh copies this checkout. train.output_dir
# must be on a file system that all hosts share. RUN_ENV="NAME=value …" sets variables on the hosts.
set -euo pipefail

if [[ $# -eq 0 || $1 == -* ]]; then
  echo "usage: TPU_NAME=… ZONE=… $0 CONFIG.yaml [section.key=value …]" >&2
  exit 2
fi
: "${TPU_NAME:?set it to the name of the TPU slice}" "${ZONE:?set it to the zone of the slice}"

arguments="$(printf '%q ' "$@")"
exec gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone="$ZONE" --worker=all \
  --command="cd ~/jlora && JAX_PLATFORMS=tpu ${RUN_ENV:-} .venv/bin/python -m jlora.train $arguments"
