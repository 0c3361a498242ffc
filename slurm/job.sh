#!/usr/bin/env bash
# A multi-node training job. Written by `nemotron-train slurm`. Self-contained: submit it with
# `sbatch FILE`. The lines from here to 'settings' come from the cluster's recipe. The rest is the
# same for all jobs.
# @SBATCH@
set -euo pipefail

# --- settings -------------------------------------------------------------------------------
# @SETTINGS@

# --- one rank -------------------------------------------------------------------------------
# Wraps every rank, also in the container. Its arguments are the training command. Stores the
# rank's own exit code for the batch script, because srun and torchrun lose it. A rank that stopped
# on request (3) reports success here. Otherwise --kill-on-bad-exit would end the ranks that are
# still writing the run's summary.
as_rank() {
    local code=0 log
    trap : USR1 TERM # this shell must outlive the signal that stops the rank
    if [[ $launcher == srun ]]; then
        export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS
        export LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$ranks_per_node
    fi
    log=$run_folder/ranks/rank_$(printf %04d "$RANK").log
    exec >>"$log" 2>&1
    echo "--- job $SLURM_JOB_ID start $start on ${SLURMD_NODENAME-?}, $(date -u +%FT%TZ)"
    [[ -z $scratch ]] || mkdir -p "$TMPDIR"
    unset TORCHELASTIC_ERROR_FILE # a refusal belongs into this log, not into torchrun's report
    # The rank must not inherit the signals that torchrun's process ignores.
    env --default-signal=USR1,TERM "$@" || code=$?
    echo "--- rank $RANK ended with exit code $code"
    # The first rank that fails gives the reason. Ranks that end because of it do not count.
    ((code == 0)) || (set -o noclobber && echo "$code $RANK" >"$ended") 2>/dev/null || true
    ((code != 3)) || code=0
    exit "$code"
}

# One task per node instead of one per rank: torchrun starts the ranks.
as_torchrun() {
    trap '' USR1 TERM # the ranks get the signals anyway; forwarding would be a second signal
    export TORCHELASTIC_SIGNALS_TO_HANDLE=SIGQUIT
    exec "$python" -m torch.distributed.run --nnodes "$SLURM_NNODES" \
        --nproc-per-node "$ranks_per_node" --node-rank "$SLURM_NODEID" \
        --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" \
        --no-python bash -c "$program"$'\nas_rank "$@"' rank "$@"
}

# --- the chain ------------------------------------------------------------------------------
# slurm/chain.log has one line per event, with tab-separated fields:
#     time  begin  job  start  step  nodes
#     time  end    job  start  step  exit code  what follows
# `step` is that of the newest complete checkpoint. A human who deletes the file resets the count of
# starts.

newest_step() {
    local manifest step newest=0
    for manifest in "$run_folder"/checkpoints/step_*/manifest.json; do
        step=${manifest%/manifest.json}
        step=${step##*/step_}
        [[ $step =~ ^[0-9]{8}$ ]] || continue
        ((10#$step <= newest)) || newest=$((10#$step))
    done
    echo "$newest"
}

note() { # without a subprocess, which Slurm may be killing at this moment
    local IFS=$'\t' now
    TZ=UTC printf -v now '%(%FT%TZ)T' -1
    echo "$now"$'\t'"$*" >>"$chain_log"
}

# The number of consecutive starts, up to now, that began at step $1. Progress resets the count. So
# does an end that needed a human decision, except the crash loop itself (4).
starts_at() {
    [[ -e $chain_log ]] || { echo 0; return; }
    awk -F'\t' -v step="$1" '
        $2 == "begin" { count = $5 == step ? count + 1 : 0 }
        $2 == "end" && $7 ~ /^stop/ && $6 != 4 { count = 0 }
        END { print count + 0 }' "$chain_log"
}

# The end of this start: $1 is the job's exit code, $2 the reason. The rest of the chain is
# cancelled.
stop_chain() {
    note end "$job" "$start" "$(newest_step)" "$1" "stop: $2"
    echo "nemotron-train: $run_folder: $2"
    cancel_links
    exit "$1"
}

# Cancels later links of this run by id: `scancel --name` would end another folder's run of that
# name.
cancel_links() {
    [[ -e $run_folder/slurm/links ]] || return 0
    local link
    while read -r link; do
        [[ ! $link =~ ^[0-9]+$ || $link == "$SLURM_JOB_ID" ]] ||
            scancel --state=PENDING --name="$SLURM_JOB_NAME" "$link" 2>/dev/null || true
    done <"$run_folder/slurm/links"
}

# A restarting controller does not answer for a while. A refusal by a controller that answers is
# final.
requeue_job() {
    local tried answered
    for ((tried = 0; tried < 40; tried++)); do
        answered=$(scontrol ping 2>&1) || true
        if scontrol requeue "$job"; then return 0; fi
        [[ $answered != *" is UP"* && -z $ended_by_slurm ]] || return 1
        echo "nemotron-train: the controller does not answer: $job is not requeued yet"
        sleep 15
    done
    return 1
}

# Handles a start that did not finish the run.
go_on() {
    [[ ! -e $run_folder/STOP ]] || stop_chain "$1" "asked to stop by $run_folder/STOP"
    if ((chain_links > 1)); then
        note end "$job" "$start" "$(newest_step)" "$1" "next link"
    elif [[ $requeue == true && -z $ended_by_slurm ]]; then
        note end "$job" "$start" "$(newest_step)" "$1" requeue
        if requeue_job; then # Slurm ends this script
            for ((waited = 0; waited < 60; waited++)); do
                [[ -z $ended_by_slurm ]] || break
                sleep 1
            done
        fi
    else
        note end "$job" "$start" "$(newest_step)" "$1" -
    fi
    exit "$1"
}

# --- the job --------------------------------------------------------------------------------
cd "$workdir"
mkdir -p "$run_folder/slurm" "$run_folder/ranks"
chain_log=$run_folder/slurm/chain.log
start=${SLURM_RESTART_COUNT:-0}
job=$SLURM_JOB_ID
# The last task of an array has the array's own number, by which the whole array would be requeued.
[[ -z ${SLURM_ARRAY_TASK_ID-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
ended=$run_folder/slurm/ended.$SLURM_JOB_ID.$start
first_step=$(newest_step)
asked= ended_by_slurm= interrupted=

if (($(starts_at "$first_step") >= 3)); then
    stop_chain 4 "three starts in a row got no further than step $first_step: read ranks/*.log; \
to try again all the same, delete $chain_log"
fi
note begin "$job" "$start" "$first_step" "$SLURM_JOB_NODELIST"

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${hosts[0]} MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))
export PYTHONUNBUFFERED=1 # the ranks' logs are files
export launcher ranks_per_node run_folder ended start scratch python
if [[ -n $scratch ]]; then
    export TMPDIR=$scratch/$SLURM_JOB_ID
fi
program=$(declare -f as_rank as_torchrun)
export program

srun_options=(--nodes="$SLURM_NNODES" --kill-on-bad-exit=1)
if [[ -n $container_image ]]; then
    srun_options+=(--container-image="$container_image" --no-container-mount-home)
    [[ -z $container_mounts ]] || srun_options+=(--container-mounts="$container_mounts")
    srun_options+=(--container-workdir="$workdir")
fi
case $launcher in
    srun)
        entry=as_rank
        srun_options+=(--ntasks=$((SLURM_NNODES * ranks_per_node)))
        srun_options+=(--ntasks-per-node="$ranks_per_node")
        srun_options+=(--cpus-per-task="$cpus_per_rank") # srun does not take sbatch's
        ;;
    torchrun)
        entry=as_torchrun
        srun_options+=(--ntasks="$SLURM_NNODES" --ntasks-per-node=1)
        srun_options+=(--cpus-per-task=$((cpus_per_rank * ranks_per_node)))
        ;;
esac

# The signal before the time limit reaches this shell only. srun forwards it to the ranks.
trap 'asked=1 interrupted=1; [[ -z ${srun_pid-} ]] || kill -USR1 "$srun_pid" || true' USR1
# Cancelled, out of time or preempted: Slurm decides whether the job restarts.
trap 'ended_by_slurm=1 interrupted=1' TERM

echo "job $job start $start: $SLURM_NNODES node(s) $SLURM_JOB_NODELIST, from step" \
    "$first_step, $MASTER_ADDR:$MASTER_PORT; logs: $run_folder/ranks"
srun "${srun_options[@]}" bash -c "$program"$'\n'"$entry"$' "$@"' rank "${command[@]}" &
srun_pid=$!
code=0
while :; do # `wait` also returns when a trap fires
    interrupted=
    wait "$srun_pid" && now=0 || now=$?
    ((now == 127)) || code=$now
    [[ -n $interrupted ]] || break
done
if [[ -s $ended ]]; then
    read -r first_code rank <"$ended"
    # A stop on request during which another rank failed counts as a failure.
    ((first_code == 3 && code != 0)) || code=$first_code
    rm -f "$ended"
fi
last_step=$(newest_step)

case $code in
    0) stop_chain 0 "finished at step $last_step" ;;
    2) stop_chain 2 "wrong configuration or input: ranks/rank_$(printf %04d "${rank-0}").log" ;;
    4) stop_chain 4 "it fails at the same step again and again: ranks/*.log" ;;
    3)
        if [[ -n $asked ]] && ((last_step == first_step)); then
            stop_chain 3 "no step was made within the time limit: raise cluster.time_limit_minutes"
        fi
        ;;
    *)
        echo "nemotron-train: rank ${rank-?} ended with exit code $code: $run_folder/ranks"
        if ((last_step == first_step && $(starts_at "$first_step") >= 3)); then
            stop_chain 4 "three starts in a row got no further than step $first_step: read \
ranks/*.log; to try again all the same, delete $chain_log"
        fi
        ;;
esac
go_on "$code"
