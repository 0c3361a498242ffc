"""What a Slurm cluster is and how a job uses it: `recipes/cluster/`, as a typed dataclass.

Owns these knobs and the checks on them alone: every value that reaches a job script is validated
here. Does not own the script (`launch.slurm.job`), nor whether a run fits (`launch.slurm.checks`).
No torch.
"""

import re
from dataclasses import dataclass, field
from enum import StrEnum

from omegaconf import MISSING

from nemotron_train.config.errors import ConfigError


class Launcher(StrEnum):
    """Who starts the ranks of a node."""

    srun = "srun"  # one Slurm task a rank
    torchrun = "torchrun"  # one Slurm task a node, which starts the node's ranks


@dataclass
class ClusterConfig:
    """A cluster and the job's use of it. An empty text leaves a choice to Slurm."""

    name: str = MISSING
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""  # nodes' features, as sbatch takes them
    gpus_per_node: int = MISSING  # 0: the ranks compute on CPUs
    gpu_memory_gib: float = 0.0  # what a run may need of each GPU; 0: not checked
    ranks_per_node: int = MISSING  # one a GPU, where there are GPUs
    cpus_per_rank: int = MISSING
    exclusive: bool = False  # no other job on the nodes, and all of their memory
    segment_nodes: int = 0  # nodes come in blocks of so many inside one NVLink domain; 0: any
    time_limit_minutes: int = MISSING  # of one start of the job
    signal_lead_seconds: int = MISSING  # so long before the limit the run saves and stops
    requeue: bool = True  # start again after the time limit, preemption, a failed rank or node
    chain_links: int = 1  # jobs submitted at once, one running after the other
    launcher: Launcher = Launcher.srun
    python: str = ""  # the interpreter in the job; "": this one, or python3 in a container
    container_image: str = ""  # for pyxis (srun --container-image); "": no container
    container_mounts: list[str] = field(default_factory=list)  # SOURCE:DESTINATION[:FLAGS]
    environment: dict[str, str] = field(default_factory=dict)  # NCCL's settings; never a secret
    network_interface: str = ""  # where ranks meet, such as eth0 (for gloo and NCCL)
    scratch: str = ""  # a folder on every node's own disk, for temporary files


_WORD = re.compile(r"[A-Za-z0-9_.-]+")
_WORDS = re.compile(r"[A-Za-z0-9_.,-]+")
_CONSTRAINT = re.compile(r"[A-Za-z0-9_.,&|*()\[\]-]+")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET_VARIABLE = re.compile(
    r"(api_?key|access_?key|private_?key|secret|passw|credential|_auth|_token$|^token$|_pat$)", re.I
)
# Set by the job script from what Slurm says; a recipe's value would break the rendezvous.
_OWN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
_OWN_VARIABLES += ("MASTER_PORT",)


def check_cluster(cluster: ClusterConfig) -> None:
    """Raises ConfigError at the first value that is wrong or must not reach a job script."""
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
    for knob, allowed, words in (
        ("name", _WORD, "letters, digits, _ . and -"),
        ("account", _WORD, "letters, digits, _ . and -"),
        ("qos", _WORD, "letters, digits, _ . and -"),
        ("network_interface", _WORDS, "letters, digits, _ . - and commas"),
        ("partition", _WORDS, "letters, digits, _ . - and commas"),
        ("constraint", _CONSTRAINT, "letters, digits, and _ . , - & | * ( ) [ ]"),
    ):
        value = getattr(cluster, knob)
        if value and not allowed.fullmatch(value):
            raise ConfigError(f"cluster.{knob}={value!r}: use {words} only")
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
    """An environment variable that goes into the script as plain text. Its value is not shown
    where the name says that it is a secret."""
    if not _VARIABLE.fullmatch(name):
        raise ConfigError(f"cluster.environment: {name!r} is no name of a variable")
    if _SECRET_VARIABLE.search(name):
        raise ConfigError(
            f"cluster.environment.{name} looks like a secret, and a job script is no place for "
            "one: export it in your own environment, which sbatch hands on, or use ~/.netrc"
        )
    if name in _OWN_VARIABLES:
        raise ConfigError(
            f"cluster.environment.{name}: the job script sets it itself; leave it out"
        )
    refuse_control_characters(f"cluster.environment.{name}", value)


def refuse_control_characters(knob: str, text: str) -> None:
    """A newline in a value could begin a line of its own in a script. Raises ConfigError."""
    if any(not character.isprintable() for character in text):
        raise ConfigError(f"{knob}={text!r}: line breaks and control characters are refused")
