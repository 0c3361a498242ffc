#!/usr/bin/env bash
# Trains on several ranks of this machine: launch/local.sh RANKS [KNOB=VALUE ...]
# Example: launch/local.sh 2 parallel.tensor=2 parallel.sequence=true name=two_ranks
set -euo pipefail

if [[ ! "${1-}" =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: launch/local.sh RANKS [KNOB=VALUE ...]" >&2
    exit 2
fi
ranks=$1
shift

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
python=$here/.venv/bin/python
[[ -x $python ]] || python=python3 # in a container that provides the environment

# torchrun hides a mistake under its own report and returns only exit code 1: check with `plan`
# first.
"$python" -m nemotron_train plan ranks="$ranks" "$@" >/dev/null

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # silences torchrun; each rank sets its own threads
exec "$python" -m torch.distributed.run --standalone --nproc-per-node "$ranks" \
    --module nemotron_train pretrain "$@"
