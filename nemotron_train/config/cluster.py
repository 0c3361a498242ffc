"""Description of a Slurm cluster and of a job on it: `recipes/cluster/` as a typed dataclass.

Owns: these knobs and the checks of their values; every value that is written into a job script is
validated here. Does not own: the script (`launch.slurm.job`), or whether a run fits the cluster
(`launch.slurm.checks`). No torch.
"""

import re
from dataclasses import dataclass, field
from enum import StrEnum

from omegaconf import MISSING

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.secrets import is_secret_name


class Launcher(StrEnum):
    """The program that starts the ranks of a node."""

    srun = "srun"  # one Slurm task per rank
    torchrun = "torchrun"  # one Slurm task per node; torchrun starts the ranks of the node


@dataclass
class ClusterConfig:
    """A cluster and the resources that a job requests. An empty string means Slurm's default."""

    name: str = MISSING
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""  # node features, in the syntax of sbatch --constraint
    gpus_per_node: int = MISSING  # 0: train on CPUs
    gpu_memory_gib: float = 0.0  # memory of each GPU, to check that the run fits; 0: no check
    ranks_per_node: int = MISSING  # must equal gpus_per_node unless that is 0
    cpus_per_rank: int = MISSING
    exclusive: bool = False  # reserve whole nodes, with all of their memory
    segment_nodes: int = 0  # nodes per block; a block is inside one NVLink domain; 0: no blocks
    time_limit_minutes: int = MISSING  # limit for each start of the job
    signal_lead_seconds: int = MISSING  # the run saves and stops this long before the time limit
    requeue: bool = True  # restart after the time limit, preemption, or failure of a rank or node
    chain_links: int = 1  # number of jobs submitted at once; each starts when the previous one ends
    launcher: Launcher = Launcher.srun
    python: str = ""  # interpreter in the job; "": the current one, or python3 in a container
    container_image: str = ""  # for pyxis (srun --container-image); "": no container
    container_mounts: list[str] = field(default_factory=list)  # SOURCE:DESTINATION[:FLAGS]
    environment: dict[str, str] = field(default_factory=dict)  # such as NCCL settings; no secrets
    network_interface: str = ""  # interface for gloo and NCCL, such as eth0
    scratch: str = ""  # folder for temporary files on the local disk of every node


_WORD = re.compile(r"[A-Za-z0-9_.-]+")
_WORDS = re.compile(r"[A-Za-z0-9_.,-]+")
_CONSTRAINT = re.compile(r"[A-Za-z0-9_.,&|*()\[\]-]+")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# The job script sets these from Slurm's variables. A value from a recipe would break the
# rendezvous.
_JOB_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
_JOB_VARIABLES += ("MASTER_PORT",)


def check_cluster(cluster: ClusterConfig) -> None:
    """Raises ConfigError at the first value that is out of range or unsafe in a job script."""
    for knob in ("ranks_per_node", "cpus_per_rank", "time_limit_minutes", "chain_links"):
        if getattr(cluster, knob) < 1:
            raise ConfigError(f"cluster.{knob}={getattr(cluster, knob)}: must be 1 or more")
    for knob in ("gpus_per_node", "gpu_memory_gib", "segment_nodes", "signal_lead_seconds"):
        if not 0 <= getattr(cluster, knob) < 2**31:
            raise ConfigError(f"cluster.{knob}={getattr(cluster, knob)}: must be 0 or more")
    if cluster.gpus_per_node not in (0, cluster.ranks_per_node):
        raise ConfigError(
            f"cluster.ranks_per_node={cluster.ranks_per_node}: must be "
            f"cluster.gpus_per_node={cluster.gpus_per_node}, one rank a GPU"
        )
    if cluster.signal_lead_seconds >= 60 * cluster.time_limit_minutes:
        raise ConfigError(
            f"cluster.signal_lead_seconds={cluster.signal_lead_seconds}: must be less than "
            f"cluster.time_limit_minutes={cluster.time_limit_minutes}, or no step is ever made"
        )
    _check_texts(cluster)
    for name, value in cluster.environment.items():
        _check_variable(name, value)


def _check_texts(cluster: ClusterConfig) -> None:
    for knob, allowed, allowed_text in (
        ("name", _WORD, "letters, digits, _ . and -"),
        ("account", _WORD, "letters, digits, _ . and -"),
        ("qos", _WORD, "letters, digits, _ . and -"),
        ("network_interface", _WORDS, "letters, digits, _ . - and commas"),
        ("partition", _WORDS, "letters, digits, _ . - and commas"),
        ("constraint", _CONSTRAINT, "letters, digits, and _ . , - & | * ( ) [ ]"),
    ):
        value = getattr(cluster, knob)
        if value and not allowed.fullmatch(value):
            raise ConfigError(f"cluster.{knob}={value!r}: use {allowed_text} only")
    for knob in ("python", "container_image", "scratch"):
        refuse_control_characters(f"cluster.{knob}", getattr(cluster, knob))
    if cluster.scratch and not cluster.scratch.startswith("/"):
        raise ConfigError(f"cluster.scratch={cluster.scratch!r}: give an absolute path")
    for mount in cluster.container_mounts:
        refuse_control_characters("cluster.container_mounts", mount)
        parts = mount.split(":")
        if "," in mount or len(parts) not in (2, 3) or not all(p[:1] == "/" for p in parts[:2]):
            raise ConfigError(
                f"cluster.container_mounts: {mount!r} must be /SOURCE:/DESTINATION or "
                "/SOURCE:/DESTINATION:FLAGS, without commas"
            )
    if cluster.container_mounts and not cluster.container_image:
        raise ConfigError("cluster.container_mounts without cluster.container_image: name an image")


def _check_variable(name: str, value: str) -> None:
    """Check an environment variable, which the script stores as plain text. The error message does
    not print the value if the name looks like a secret."""
    if not _VARIABLE.fullmatch(name):
        raise ConfigError(f"cluster.environment: {name!r} is no name of a variable")
    if is_secret_name(name):
        raise ConfigError(
            f"cluster.environment.{name} looks like a secret, and a job script is no place for "
            "one: export it in your own environment, which sbatch hands on, or use ~/.netrc"
        )
    if name in _JOB_VARIABLES:
        raise ConfigError(
            f"cluster.environment.{name}: the job script sets it itself; leave it out"
        )
    refuse_control_characters(f"cluster.environment.{name}", value)


def refuse_control_characters(knob: str, text: str) -> None:
    """Raises ConfigError if `text` has a newline or another control character: a newline could
    start a new command in a job script."""
    if any(not character.isprintable() for character in text):
        raise ConfigError(f"{knob}={text!r}: line breaks and control characters are refused")
