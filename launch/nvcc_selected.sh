#!/usr/bin/env bash
# nvcc for the architectures in NVCC_SELECTED ("90 100") instead of those on the command line. torch
# calls it as PYTORCH_NVCC, for setups that name every architecture themselves; each costs minutes of
# compiling. Used by launch/gpu_packages.sh. Needs CUDA_HOME.
set -euo pipefail

arguments=()
named=
while (($#)); do
    case $1 in
        -gencode) named=1 && shift ;; # its value is the next argument
        -gencode=*) named=1 ;;
        *) arguments+=("$1") ;;
    esac
    shift
done
if [[ -n $named ]]; then
    for architecture in $NVCC_SELECTED; do
        arguments+=(-gencode "arch=compute_$architecture,code=sm_$architecture")
    done
fi
exec "$CUDA_HOME/bin/nvcc" "${arguments[@]}"
