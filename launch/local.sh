#!/usr/bin/env bash
# Trains on several ranks of this machine: launch/local.sh RANKS [KNOB=VALUE ...]
# Example: launch/local.sh 2 parallel.tensor=2 parallel.sequence=true name=two_ranks
# Ends as `pretrain` does: with its exit code, and with the reason of a refusal last, once.
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
python=$here/.venv/bin/python
[[ -x $python ]] || python=python3 # in a container that provides the environment
exec "$python" -m nemotron_train.launch.local "$@"
