"""Checks a Slurm job before it is submitted, so that errors show before the queue wait.

Owns: whether the layout divides the job's ranks, whether weights and optimizer fit a GPU, whether
the data exists, whether the run folder holds another run. Each error is one line that suggests a
fix. Does not own: checks of the configuration alone (`plan.checks`). No torch, no Slurm.
"""

import math
from pathlib import Path

from nemotron_train.config.cluster import ClusterConfig
from nemotron_train.config.errors import ConfigError
from nemotron_train.config.schema import Config, DataKind
from nemotron_train.data.manifest import FILE_NAME
from nemotron_train.plan.cost.memory import heaviest_rank, rank_memory
from nemotron_train.plan.cost.operators import GPU
from nemotron_train.plan.derive import Derived, derive
from nemotron_train.plan.precision.resolve import PrecisionPlan
from nemotron_train.run_folder.branch import check_parent
from nemotron_train.run_folder.checkpoint_metadata import check_model
from nemotron_train.run_folder.folder import refuse_another_run, run_path
from nemotron_train.run_folder.integrity import damage, step_folder, steps_in

_GIB = 2**30
_MAX_TIMES_NODES = 64  # largest multiple of `nodes` to try when searching for enough memory


def check_nodes(config: Config, cluster: ClusterConfig, nodes: int) -> None:
    """Raises ConfigError if the layout does not divide the job's ranks; suggests node counts."""
    parallel = config.parallel
    dense = parallel.tensor * parallel.context
    grid = parallel.pipeline * math.lcm(dense, parallel.expert * parallel.expert_tensor)
    ranks = nodes * cluster.ranks_per_node
    if grid < 1 or ranks % grid == 0:  # grid < 1: `plan.checks` reports it
        return
    step = grid // math.gcd(grid, cluster.ranks_per_node)
    lower = nodes // step * step
    suggestion = f"{lower} or {lower + step}" if lower else str(step)
    raise ConfigError(
        f"nodes={nodes} x cluster.ranks_per_node={cluster.ranks_per_node} = {ranks} ranks, which "
        f"parallel.* = {grid} ranks do not divide: nodes={suggestion} would do"
    )


def check_memory(config: Config, derived: Derived, cluster: ClusterConfig, nodes: int) -> str:
    """Raises ConfigError if parameters, gradients and optimizer alone exceed a GPU's memory.

    Returns a warning if only the predicted peak exceeds it (GPU kernels that save less may stay
    below), else "".
    """
    limit = cluster.gpu_memory_gib * _GIB
    memory = heaviest_rank(config, derived, GPU)
    needed, peak = _state_bytes(config, derived), memory.peak_bytes
    if not limit:
        return ""
    if needed <= limit:
        if peak <= limit:
            return ""
        return (
            f"a rank's predicted peak is {peak / _GIB:.0f} GiB, above cluster.gpu_memory_gib="
            f"{cluster.gpu_memory_gib:g}: try train.recompute, or a smaller micro batch"
        )
    sufficient_nodes = _smallest_sufficient_nodes(config, cluster, nodes, limit)
    suggestion = (
        f"nodes={sufficient_nodes} would hold it"
        if sufficient_nodes
        else "no number of nodes holds it: raise parallel.tensor, parallel.pipeline or "
        "parallel.expert"
    )
    raise ConfigError(
        f"a rank needs {needed / _GIB:.1f} GiB before activations, more than "
        f"cluster.gpu_memory_gib={cluster.gpu_memory_gib:g}: {suggestion}"
    )


def _smallest_sufficient_nodes(
    config: Config, cluster: ClusterConfig, nodes: int, limit: float
) -> int:
    """The smallest multiple of `nodes` on which a rank's state fits and the batch divides, or 0.

    More nodes only shard the optimizer further.
    """
    for factor in range(2, _MAX_TIMES_NODES + 1):
        try:
            derived = derive(config, factor * nodes * cluster.ranks_per_node)
        except ConfigError:
            continue
        if _state_bytes(config, derived) <= limit:
            return factor * nodes
    return 0


def _state_bytes(config: Config, derived: Derived) -> int:
    return max(memory.state_bytes for memory in rank_memory(config, derived, GPU))


def local_problems(config: Config, plan: PrecisionPlan, cluster: ClusterConfig) -> list[str]:
    """Problems with files of this machine, one line each: missing data, or a run folder with
    another run or a checkpoint of another model.

    With a container, only paths under its mounts are checked.
    """
    problems = []
    if config.data.kind == DataKind.prepared:
        sources = [source for phase in config.data.phases for source in phase.blend]
        for path in dict.fromkeys(source.path for source in [*sources, *config.data.validation]):
            local_path = _local_path(path, cluster)
            if local_path is not None and not (local_path / FILE_NAME).is_file():
                problems.append(
                    f"data: {path} holds no prepared data ({FILE_NAME} is missing): write it with "
                    f"nemotron-train data prepare output={path} ..."
                )
    try:
        refuse_another_run(config, plan)
        _refuse_another_model(config)
    except ConfigError as error:
        problems.append(str(error))
    return problems


def _refuse_another_model(config: Config) -> None:
    """Raises ConfigError if the newest checkpoint, from which the run would resume, has another
    model. A damaged checkpoint is skipped: the run itself handles it."""
    folder = run_path(config) / "checkpoints"
    for step in steps_in(folder)[-1:]:
        checkpoint = step_folder(folder, step)
        if damage(checkpoint, contents=False) is None:
            check_model(checkpoint, config.model)


def branch_problems(config: Config) -> list[str]:
    """Why the run cannot branch from its parent's checkpoint: no such step, another model, or
    nothing left to train. Empty if it can. Tensors are not read."""
    if not config.branch:
        return []
    try:
        check_parent(config, contents=False)
    except ConfigError as error:
        return [str(error)]
    return []


def _local_path(path: str, cluster: ClusterConfig) -> Path | None:
    """The path on the login node of a path of the job; None if no container mount covers it."""
    if not cluster.container_image:
        return Path(path)
    absolute = Path.cwd() / path
    for mount in cluster.container_mounts:
        source, destination = mount.split(":")[:2]
        if absolute.is_relative_to(destination):
            return Path(source) / absolute.relative_to(destination)
    return None
