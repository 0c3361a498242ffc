#!/usr/bin/env bash
# A real Slurm on this machine for experiments: a controller and two virtual nodes, all on loopback,
# for cluster=local_lab. It uses no network, no system service and no file outside its folder.
#
#   sudo launch/lab.sh start       prints the line for your shell: export SLURM_CONF=...
#   sudo launch/lab.sh stop
#
# Needs root (each node gets its own host name in a private namespace) and Debian's or Ubuntu's
# packages slurmctld, slurmd, slurm-client and munge. LAB_FOLDER (default /tmp/nemotron_train_lab)
# holds configuration, keys, state and logs; LAB_NODES, LAB_CPUS (2 each) and LAB_PORT (17800, the
# first of LAB_NODES + 1) set the size and the ports.
set -euo pipefail

folder=${LAB_FOLDER:-/tmp/nemotron_train_lab}
nodes=${LAB_NODES:-2} cpus=${LAB_CPUS:-2} port=${LAB_PORT:-17800}
host=$(hostname -s)
export SLURM_CONF=$folder/slurm.conf
socket=$folder/munge/socket

running() { # a daemon, by its pid file
    local pid
    pid=$(cat "$1" 2>/dev/null) && [[ -n $pid ]] && kill -0 "$pid" 2>/dev/null
}

end() { # a daemon, by its pid file: SIGTERM first, SIGKILL after five seconds
    running "$1" || { rm -f "$1"; return 0; }
    local pid
    pid=$(cat "$1")
    kill "$pid"
    for _ in {1..50}; do
        kill -0 "$pid" 2>/dev/null || { rm -f "$1"; return 0; }
        sleep 0.1
    done
    kill -KILL "$pid" 2>/dev/null || true
    rm -f "$1"
}

write_configuration() {
    # No cgroups, no accounting, no MPI, because a container lacks them. AuthInfo's cred_expire is
    # also how long a requeued job waits (two minutes by default). %n keeps the nodes' files apart.
    cat >"$SLURM_CONF" <<CONF
ClusterName=lab
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmctldPidFile=$folder/run/slurmctld.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdSpoolDir=$folder/spool/%n
SlurmdPidFile=$folder/run/slurmd.%n.pid
SlurmdLogFile=$folder/log/slurmd.%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000,bf_interval=2
CommunicationParameters=NoAddrCache
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
KillWait=10
MinJobAge=300
OverTimeLimit=0
SlurmdTimeout=20
SlurmctldTimeout=10
MessageTimeout=20
UnkillableStepTimeout=60
PartitionName=main Nodes=ALL Default=YES MaxTime=60 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=60 State=UP PriorityTier=10 PreemptMode=OFF
CONF
    for ((i = 1; i <= nodes; i++)); do
        echo "NodeName=node$i NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + i))" \
            "CPUs=$cpus RealMemory=2000 State=UNKNOWN"
    done >>"$SLURM_CONF"
    echo 'CgroupPlugin=cgroup/v1' >"$folder/cgroup.conf"
    {
        cat /etc/hosts
        for ((i = 1; i <= nodes; i++)); do echo "127.0.0.1 node$i"; done
    } >"$folder/hosts"
}

start_node() { # $1: its name. A private mount makes the nodes' names resolve for this node only
    unshare --mount --uts -- bash -c 'mount --bind "$1" /etc/hosts && hostname "$2" && exec slurmd -N "$2"' \
        _ "$folder/hosts" "$1"
}

idle_nodes() {
    sinfo --noheader --Node --partition=main --states=idle --format=%N 2>/dev/null | sort -u | wc -l
}

start() {
    mkdir -p "$folder"/{munge,state,spool,run,log}
    chmod 755 "$folder" "$folder/munge"
    for ((i = 1; i <= nodes; i++)); do mkdir -p "$folder/spool/node$i"; done
    [[ -s $folder/munge/key ]] || (umask 077 && head -c 128 /dev/urandom >"$folder/munge/key")
    write_configuration
    running "$folder/munge/pid" || munged --socket="$socket" --key-file="$folder/munge/key" \
        --pid-file="$folder/munge/pid" --log-file="$folder/munge/log" --seed-file="$folder/munge/seed"
    running "$folder/run/slurmctld.pid" || slurmctld
    for ((i = 1; i <= nodes; i++)); do
        running "$folder/run/slurmd.node$i.pid" || start_node "node$i"
    done
    for _ in {1..600}; do
        (($(idle_nodes) == nodes)) && break
        sleep 0.1
    done
    (($(idle_nodes) == nodes)) || { echo "the nodes do not come up: $folder/log" >&2; exit 1; }
    echo "export SLURM_CONF=$SLURM_CONF"
}

stop() {
    [[ -e $SLURM_CONF ]] || return 0
    scancel --user=root 2>/dev/null || true
    for pid in "$folder"/run/slurmd.*.pid; do end "$pid"; done
    end "$folder/run/slurmctld.pid"
    end "$folder/munge/pid"
}

case ${1-} in
    start) start ;;
    stop) stop ;;
    node) start_node "$2" ;;    # starts one node again after it was killed
    controller) slurmctld ;;    # likewise the controller
    *) echo "usage: launch/lab.sh start|stop|node NAME|controller" >&2 && exit 2 ;;
esac
