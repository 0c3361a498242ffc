"""Checkpoints: Megatron-Core's distributed format, plus our own integrity checks.

Owns: which tensors are saved, their copy to host memory, the files Megatron writes, loading them.
Does not own: which folder can be trusted and which is removed (`integrity`), the JSON files next to
the tensors (`checkpoint_metadata`), the thread that writes (`background`).

Saved: weights, optimizer state, router biases (buffers of the model), the data cursor, random
states, the model configuration and the precision plan. Weights are the parameters and their FP32
masters, never quantized, so training can continue from them under any plan. Shards have global
names and offsets, so another parallel layout can load them.
"""

import contextlib
import pickle
import queue
import shutil
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import (
    CheckpointingConfig,
    CheckpointingException,
    save_config,
)
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, distrib_optimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.api import CheckpointException

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.schema import Config, ModelConfig
from nemotron_train.optim.build import load_optimizer_state
from nemotron_train.optim.update import gather_parameters
from nemotron_train.platform.device import wait_for_device
from nemotron_train.platform.files import system_error
from nemotron_train.run_folder import checkpoint_index, checkpoint_metadata, integrity
from nemotron_train.run_folder.integrity import partial_folder, step_folder
from nemotron_train.run_folder.progress import Progress
from nemotron_train.train.checkpoint import random_states
from nemotron_train.train.checkpoint.background import Background, SaveFailed

# UPSTREAM(megatron-core 0.19.2): planning a save starts a manager process for a queue. Only a
# writer in a separate process needs it. It costs one second and its memory per rank.
filesystem_async._results_queue = queue.SimpleQueue()  # type: ignore[assignment]
# UPSTREAM(megatron-core 0.19.2): the optimizer's `sharded_state_dict` ends with a full garbage
# collection, for programs that disabled the collector. We keep it enabled, so we skip this call,
# which costs 120 ms per save.
distrib_optimizer.gc = types.SimpleNamespace(collect=lambda: 0)  # type: ignore[attr-defined]


_WRONG_FIELDS = (AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError)

# A file to write: path, name, and content, which is objects and (item, tensor) pairs.
Bucket = tuple[Any, str, tuple[list[Any], list[tuple[Any, torch.Tensor]]]]
Buffers = dict[Any, torch.Tensor]  # keyed by torch's MetadataIndex of the tensor


class _Planner(TorchDistSaveShardedStrategy):
    """Plans a save as Megatron does, and keeps the writer and metadata for us to run."""

    writer: Any
    metadata: Any  # torch's `Metadata` on the first rank, without the tensors' places in the files

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any, kind: str) -> Any:
        self.writer, self.metadata = writer, planned[1]
        return super()._get_save_and_finalize_callbacks(writer, planned, kind)


@contextlib.contextmanager
def no_code_runs() -> Iterator[None]:
    """In this context, torch loads only tensors, plain values and the allowed metadata classes.

    It prevents code execution by a manipulated checkpoint. UPSTREAM(torch 2.13): `read_metadata`
    unpickles any class that `.metadata` names, and the default planner loads objects (Megatron's
    common state) with weights_only=False.
    """
    load = torch.load

    def load_weights_only(*args: Any, **options: Any) -> Any:
        return load(*args, **{**options, "weights_only": True})

    torch.load = load_weights_only
    filesystem.pickle = types.SimpleNamespace(  # type: ignore[assignment]
        load=checkpoint_index.load_metadata, dump=pickle.dump
    )
    try:
        yield
    finally:
        torch.load = load
        filesystem.pickle = pickle  # type: ignore[assignment]


def agreed_latest(
    folder: Path, say: Callable[[str], None], verified: set[int] | None = None
) -> Path | None:
    """`integrity.latest` of the first rank, broadcast to all ranks. COLLECTIVE.

    Raises ConfigError on all ranks.
    """
    path_and_problem: list[Any] = [None, ""]
    if dist.get_rank() == 0:
        try:
            path_and_problem[0] = integrity.latest(folder, say, verified)
        except ConfigError as error:
            path_and_problem[1] = str(error)
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(path_and_problem, src=0)
    if path_and_problem[1]:
        raise ConfigError(path_and_problem[1])
    return path_and_problem[0]


class Checkpoints:
    """Saves and loads the checkpoints of a run. Every method is COLLECTIVE.

    check_held: raises if this process may no longer write to the run folder; called on the first
    rank. plan: record of the precision plan. data: `BatchSource.description`.
    """

    def __init__(
        self,
        folder: Path,
        chunks: Sequence[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        groups: ProcessGroupCollection,
        config: Config,
        plan: Mapping[str, Any],
        data: Mapping[str, Any],
        check_held: Callable[[], None],
        say: Callable[[str], None],
    ) -> None:
        self._folder = folder
        self._keep = config.train.keep_checkpoints
        self._say = say
        self._chunks = chunks
        self._optimizer = optimizer
        self._config = config
        self._plan = plan
        self._data = data
        self._check_held = check_held
        self._rank = dist.get_rank()
        self._num_ranks = dist.get_world_size()
        self._background = Background()
        self._pending: Path | None = None  # final path of the save in flight
        self._host_copies: Buffers = {}
        self._verified: set[int] = set()  # steps whose files this process has hashed or written
        self._metadata = {
            "distrib_optim_sharding_type": "fully_reshardable",
            "distrib_optim_fully_reshardable_mem_efficient": False,
            "chained_optim_avoid_prefix": True,
            "singleton_local_shards": False,
            "dp_cp_group": groups.dp_cp,
        }

    def _sharded_state(self, is_loading: bool, has_optimizer: bool = True) -> dict:
        # The entries have global names. The key `chunk_N` is used on this rank only.
        cores: list[Any] = [chunk.module for chunk in self._chunks]
        model_state = {
            f"chunk_{number}": core.sharded_state_dict(metadata=self._metadata)
            for number, core in enumerate(cores)
        }
        if not has_optimizer:
            return {"model": model_state}
        return {
            "model": model_state,
            "optimizer": self._optimizer.sharded_state_dict(
                model_state, is_loading=is_loading, metadata=self._metadata
            ),
        }

    @property
    def in_flight(self) -> bool:
        """Whether a save was started and `poll` has not reported its end."""
        return self._background.in_flight

    def latest(self) -> Path | None:
        """Path of the run's newest undamaged checkpoint; None if the run has no checkpoint.

        Waits for a save in flight. Raises ConfigError if all checkpoints are damaged.
        """
        self.poll(wait=True)
        return agreed_latest(self._folder, self._say, self._verified)

    def save(self, progress: Progress) -> Path:
        """Write the checkpoint of `progress` and remove old ones (`train.keep_checkpoints`).

        Returns its path. Raises SaveFailed on every rank if it cannot be written.
        """
        self.start(progress, is_copied=False)
        path = self.poll(wait=True)
        assert path is not None
        return path

    def start(self, progress: Progress, is_copied: bool = True) -> None:
        """Start to write the checkpoint of `progress`; `poll` reports its end.

        With `is_copied`, copies the tensors to host memory and lets a thread write them. Without
        it, writes them from where they are: the weights must not change until `poll` reports the
        end. Waits for an earlier save that is still in flight. Raises SaveFailed.
        """
        self.poll(wait=True)
        gather_parameters(self._chunks)
        final = step_folder(self._folder, progress.step)
        partial, problem = partial_folder(final), ""
        if self._rank == 0:
            try:
                self._check_held()
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            except (OSError, RuntimeError) as error:
                problem = f"{final}: {error}"
        self._background.together(problem)
        planner = _Planner()
        dist_checkpointing.save(
            self._sharded_state(is_loading=False),
            str(partial),
            planner,
            async_sharded_save=True,
            async_strategy="mcore",
        )
        buckets = planner.writer.write_buckets
        if is_copied:
            buckets = _copied(buckets, self._host_copies)
        texts = checkpoint_metadata.texts_of(
            progress, self._config, self._plan, self._data, self._num_ranks
        )
        states = random_states.capture()
        self._pending = final
        self._background.start(
            lambda: (*_write_shards(planner.writer, buckets, partial), states),
            lambda results: self._commit(final, planner, texts, results),
            is_waited_for=not is_copied,
        )

    def poll(self, *, wait: bool = False) -> Path | None:
        """Path of the save in flight if it completed with this call, else None.

        With `wait`, waits for it first. Raises SaveFailed on every rank if the checkpoint could not
        be written.
        """
        try:
            if not self._background.poll(wait=wait):
                return None
        except SaveFailed:
            if self._rank == 0 and self._pending is not None:
                shutil.rmtree(partial_folder(self._pending), ignore_errors=True)
            raise
        return self._pending

    def _commit(
        self, final: Path, planner: _Planner, texts: dict[str, str], results: Sequence[Any]
    ) -> None:
        """End of a save, on the first rank: metadata of the shards, manifest, rename.

        results: for each rank, what `_write_shards` returned and the random states.
        """
        partial, sums = partial_folder(final), {}
        try:
            places, digests, states = zip(*results, strict=True)
            for rank_digests in digests:
                sums |= rank_digests
            planner.metadata.__dict__.pop("all_local_plans", None)  # as large as all other fields
            planner.writer.finish(planner.metadata, list(places))
            save_config(CheckpointingConfig(planner.backend, planner.version), str(partial))
            for name, text in {
                **texts,
                checkpoint_metadata.RANDOM: checkpoint_metadata.random_text(states),
            }.items():
                integrity.write_durably(partial / name, text)
            integrity.commit(final, sums, self._check_held)
        except OSError as error:
            raise OSError(f"{final}: {error.strerror or error}") from error
        self._verified.add(int(final.name.removeprefix("step_")))
        integrity.drop_old(self._folder, self._keep, self._verified)

    def load(self, path: Path, weights_only: bool = False) -> Progress:
        """Load the checkpoint in `path` into the model and the optimizer; return its progress.

        Restores the random states if the number of ranks is the same. If the checkpoint has no
        optimizer state (`convert merge`), or with `weights_only`, the masters are copied from the
        weights, and moments and step count stay those of a new optimizer. Raises ConfigError if the
        checkpoint belongs to another model or lacks something that this model needs.
        """
        checkpoint_metadata.check_model(path, self._config.model)
        has_optimizer = checkpoint_metadata.has_optimizer(path) and not weights_only
        state = self._sharded_state(is_loading=True, has_optimizer=has_optimizer)
        loaded = _load(path, state)
        for number, chunk in enumerate(self._chunks):
            chunk.module.load_state_dict(loaded["model"][f"chunk_{number}"])
        if has_optimizer:
            load_optimizer_state(self._optimizer, loaded["optimizer"])
        else:
            self._optimizer.reload_model_params()
        states = checkpoint_metadata.random_state_of(path, self._rank, self._num_ranks)
        if states is not None:
            try:
                random_states.restore(states)
            except (*_WRONG_FIELDS, RuntimeError, OverflowError) as error:
                name = path / checkpoint_metadata.RANDOM
                raise ConfigError(f"{name}: holds no random states ({error!s:.200})") from error
        return checkpoint_metadata.progress_of(path)


def load_weights(
    path: Path, cores: Sequence[Any], groups: ProcessGroupCollection, model: ModelConfig
) -> None:
    """Load weights and buffers of the checkpoint in `path` into models without optimizer or DDP.

    The checkpoint may have any parallel layout. COLLECTIVE. Raises ConfigError if it belongs to
    another model or cannot be loaded.
    """
    checkpoint_metadata.check_model(path, model)
    metadata = {"singleton_local_shards": False, "dp_cp_group": groups.dp_cp}
    states = {
        f"chunk_{number}": core.sharded_state_dict(metadata=metadata)
        for number, core in enumerate(cores)
    }
    loaded = _load(path, {"model": states})
    for number, core in enumerate(cores):
        core.load_state_dict(loaded["model"][f"chunk_{number}"])


def _load(path: Path, state: dict[str, Any]) -> Any:
    """Fill the sharded `state` from the checkpoint in `path`. Raises ConfigError.

    The exceptions besides torch's are those of Megatron-Core reading fields that nothing checks
    before. RuntimeError is not among them: a lost connection raises it.
    """
    try:
        with no_code_runs():
            return dist_checkpointing.load(state, str(path))
    except (CheckpointException, CheckpointingException, *_WRONG_FIELDS) as error:
        # CheckpointException is a BaseException, not an Exception.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise ConfigError(f"{path}: cannot be loaded: {reason:.300}") from error


def _copied(buckets: Sequence[Bucket], copies: Buffers) -> list[Bucket]:
    """Copy the tensors of the buckets to host memory and return buckets of the copies.

    The host buffers are reused by the next save; those for GPU tensors are pinned. SYNC: waits for
    the copies.
    """
    copied = []
    for path, name, (objects, tensors) in buckets:
        pairs = []
        for item, tensor in tensors:
            copy = copies.get(item.index)
            if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
                copy = torch.empty(
                    tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type != "cpu"
                )
                copies[item.index] = copy
            copy.copy_(tensor, non_blocking=True)
            pairs.append((item, copy))
        copied.append((path, name, (objects, pairs)))
    wait_for_device()
    return copied


def _write_shards(
    writer: Any, buckets: Sequence[Bucket], partial: Path
) -> tuple[list[Any], dict[str, str]]:
    """Write this rank's shards; return the place of each tensor and the digests of the files.

    Tensors of a GPU come to the host one at a time: Megatron's writer takes no others.
    """
    transforms = [writer.transforms] if hasattr(writer, "transforms") else []
    places: list[Any] = []
    for number, (path, name, (objects, tensors)) in enumerate(buckets):
        on_host = ((item, tensor.cpu()) for item, tensor in tensors)
        bucket: Any = (path, name, (objects, on_host))
        _, outcome = filesystem_async.FileSystemWriterAsync.write_preloaded_data(  # type: ignore
            transforms, number, bucket, None, None, True
        )
        if isinstance(outcome, Exception):
            cause = system_error(outcome)
            reason = cause.strerror if cause else outcome
            raise OSError(f"{partial}: {reason}") from outcome
        places += outcome
    return places, integrity.hashed(partial, [name for _, name, _ in buckets])
