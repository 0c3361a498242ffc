#!/usr/bin/env bash
# A sweep: each task of this array is one of its cells. Written by `nemotron-train sweep`.
# Self-contained: `sbatch --array=0,3-5 FILE` runs the cells with these numbers.
# @SBATCH@
set -euo pipefail

# --- settings -------------------------------------------------------------------------------
# @SETTINGS@

# --- the cell -------------------------------------------------------------------------------
cell=${cells[${SLURM_ARRAY_TASK_ID?this is the script of an array: give sbatch --array=N}]-}
if [[ -z $cell ]]; then
    echo "nemotron-train: the sweep has no cell $SLURM_ARRAY_TASK_ID" >&2
    exit 2
fi
cd "$workdir"
folder=$sweep_folder/$cell/slurm
log=$folder/job_${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID.log
echo "cell $SLURM_ARRAY_TASK_ID: $log"
# The cell's own job continues in this process, which Slurm signals before the time limit.
exec bash "$folder/job.sh" >>"$log" 2>&1
