#!/usr/bin/env bash
# Trains on several nodes of a cluster: launch/slurm.sh CLUSTER NODES [KNOB=VALUE ...]
# Example: launch/slurm.sh h100_8x 4 run=nano_30b_a3b cluster.account=mine
# The first word may be --dry-run: the script is printed, nothing is submitted.
set -euo pipefail

options=()
if [[ ${1-} == --dry-run ]]; then
    options=(--dry-run)
    shift
fi
if [[ -z ${1-} || ! "${2-}" =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: launch/slurm.sh [--dry-run] CLUSTER NODES [KNOB=VALUE ...]" >&2
    exit 2
fi
cluster=$1 nodes=$2
shift 2

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
python=$here/.venv/bin/python
[[ -x $python ]] || python=python3
exec "$python" -m nemotron_train slurm "${options[@]}" cluster="$cluster" nodes="$nodes" "$@"
