#!/usr/bin/env bash
# Installs this checkout on every host of a TPU slice; run it again after a change.
#
#   TPU_NAME=my-slice ZONE=us-east5-a tpu_scripts/setup_pod.sh
#
# README.md in this folder says how to create the slice.
set -euo pipefail
: "${TPU_NAME:?set it to the name of the TPU slice}" "${ZONE:?set it to the zone of the slice}"

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
archive="$scratch/jlora.tar.gz"
git -C "$root" archive --format=tar.gz --output="$archive" HEAD

# The home folder's ~ is expanded on the hosts, not here.
# shellcheck disable=SC2088
gcloud compute tpus tpu-vm scp "$archive" "$TPU_NAME:~/jlora.tar.gz" --zone="$ZONE" --worker=all
gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone="$ZONE" --worker=all --command="
  set -e
  mkdir -p ~/jlora && tar -xzf ~/jlora.tar.gz -C ~/jlora
  python3 -m venv ~/jlora/.venv
  ~/jlora/.venv/bin/pip install --quiet -e ~/jlora'[tpu]'
  ~/jlora/.venv/bin/python -c 'import jlora'"
