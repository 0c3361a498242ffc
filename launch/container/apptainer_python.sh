#!/usr/bin/env bash
# python3 of an Apptainer image, as cluster.python of a job (pyxis has cluster.container_image):
#
#   nemotron-train slurm ... cluster.python=$PWD/launch/container/apptainer_python.sh \
#       cluster.environment.NEMOTRON_TRAIN_IMAGE=/shared/nemotron_train.sif
#
# APPTAINER_BIND mounts further folders (the data). --nv gives the container the node's driver.
set -euo pipefail

if [[ ! -e ${NEMOTRON_TRAIN_IMAGE-} ]]; then
    echo "NEMOTRON_TRAIN_IMAGE=${NEMOTRON_TRAIN_IMAGE-}: must name an Apptainer image" >&2
    exit 2
fi
exec apptainer exec --nv --bind "$PWD" --pwd "$PWD" "$NEMOTRON_TRAIN_IMAGE" python3 "$@"
