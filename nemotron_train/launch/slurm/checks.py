"""What cannot work on a cluster, found before anybody waits in its queue. No torch, no Slurm.

Owns: does the layout divide the job's ranks, do the weights and their optimizer fit a GPU, is the
data there, does the run folder hold another run. Each refusal is one line that says what would
work. Does not own: the checks on the configuration alone (`plan.checks`).
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
_MAX_TIMES_NODES = 64  # how far to look for a number of nodes that would do


def check_nodes(config: Config, cluster: ClusterConfig, nodes: int) -> None:
    """Raises ConfigError where the layout cannot divide the job's ranks, with the numbers of nodes
    that it can."""
    parallel = config.parallel
    dense = parallel.tensor * parallel.context
    grid = parallel.pipeline * math.lcm(dense, parallel.expert * parallel.expert_tensor)
    ranks = nodes * cluster.ranks_per_node
    if grid < 1 or ranks % grid == 0:  # a sign that is wrong has a message of its own
        return
    step = grid // math.gcd(grid, cluster.ranks_per_node)
    below = nodes // step * step
    would = f"{below} or {below + step}" if below else str(step)
    raise ConfigError(
        f"nodes={nodes} x cluster.ranks_per_node={cluster.ranks_per_node} = {ranks} ranks, which "
        f"parallel.* = {grid} ranks do not divide: nodes={would} would do"
    )


def check_memory(config: Config, derived: Derived, cluster: ClusterConfig, nodes: int) -> str:
    """Raises ConfigError where parameters, gradients and optimizer alone exceed a GPU. A warning
    where only the predicted peak does, which GPU kernels that keep less may stay below; or ""."""
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
    more = _nodes_that_hold(config, cluster, nodes, limit)
    way_out = (
        f"nodes={more} would hold it"
        if more
        else "no number of nodes holds it: raise parallel.tensor, parallel.pipeline or "
        "parallel.expert"
    )
    raise ConfigError(
        f"a rank needs {needed / _GIB:.1f} GiB before activations, more than "
        f"cluster.gpu_memory_gib={cluster.gpu_memory_gib:g}: {way_out}"
    )


def _nodes_that_hold(config: Config, cluster: ClusterConfig, nodes: int, limit: float) -> int:
    """The smallest multiple of `nodes` on which a rank's state fits and the batch divides; 0: none
    was found. More nodes shard the optimizer further, and nothing else."""
    for times in range(2, _MAX_TIMES_NODES + 1):
        try:
            derived = derive(config, times * nodes * cluster.ranks_per_node)
        except ConfigError:
            continue
        if _state_bytes(config, derived) <= limit:
            return times * nodes
    return 0


def _state_bytes(config: Config, derived: Derived) -> int:
    return max(memory.state_bytes for memory in rank_memory(config, derived, GPU))


def problems_here(config: Config, plan: PrecisionPlan, cluster: ClusterConfig) -> list[str]:
    """What is wrong around the job, one line each: data that is missing, a run folder that holds
    another run or a checkpoint of another model. A container may see other files: there, only
    mounted paths are looked at."""
    found = []
    if config.data.kind == DataKind.prepared:
        sources = [source for phase in config.data.phases for source in phase.blend]
        for path in dict.fromkeys(source.path for source in [*sources, *config.data.validation]):
            here = _seen_from_here(path, cluster)
            if here is not None and not (here / FILE_NAME).is_file():
                found.append(
                    f"data: {path} holds no prepared data ({FILE_NAME} is missing): write it with "
                    f"nemotron-train data prepare output={path} ..."
                )
    try:
        refuse_another_run(config, plan)
        _refuse_another_model(config)
    except ConfigError as error:
        found.append(str(error))
    return found


def _refuse_another_model(config: Config) -> None:
    """The newest checkpoint is what the run would go on from. One that is damaged is left to the
    run, which reads it whole and may have an older one."""
    folder = run_path(config) / "checkpoints"
    for step in steps_in(folder)[-1:]:
        checkpoint = step_folder(folder, step)
        if damage(checkpoint, contents=False) is None:
            check_model(checkpoint, config.model)


def branch_problem(config: Config) -> list[str]:
    """What keeps the run from its parent's checkpoint, so far as can be told without reading
    tensors: no such step, another model, nothing left to train."""
    if not config.branch:
        return []
    try:
        check_parent(config, contents=False)
    except ConfigError as error:
        return [str(error)]
    return []


def _seen_from_here(path: str, cluster: ClusterConfig) -> Path | None:
    """Where the login node finds a path of the job; None where it cannot know."""
    if not cluster.container_image:
        return Path(path)
    asked = Path.cwd() / path
    for mount in cluster.container_mounts:
        source, destination = mount.split(":")[:2]
        if asked.is_relative_to(destination):
            return Path(source) / asked.relative_to(destination)
    return None
