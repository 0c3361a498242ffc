"""What one rank holds, under names and offsets that no layout changes.

Owns: a rank's weights, gradients and optimizer state as shards of global tensors, by the same maps
that checkpoints use; fingerprints of modules' outputs. Does not own: comparing them
(`check.compare`), files (`check.worker`).
"""

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.distributed import DistributedDataParallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed.checkpoint.filesystem import FileSystemReader

from nemotron_train.check.compare import Shard
from nemotron_train.optim.gradients import whole_gradients
from nemotron_train.optim.update import gather_parameters
from nemotron_train.precision.attach import global_modules
from nemotron_train.run_folder.integrity import damage, step_folder
from nemotron_train.train.checkpoint import random_states

# Modules whose output has the full width: each layer, and what a layer adds up.
TRACED = ("mixer", "self_attention", "mlp", "mlp.shared_experts")


def model_metadata(groups: ProcessGroupCollection) -> dict[str, Any]:
    """What Megatron's `sharded_state_dict` of a model is told."""
    return {"singleton_local_shards": False, "dp_cp_group": groups.dp_cp}


def weight_shards(models: Sequence[DistributedDataParallel], metadata: dict) -> list[Shard]:
    """This rank's parameters and persistent buffers (router biases), one shard a tensor.
    COLLECTIVE."""
    gather_parameters(models)
    return [_shard(tensor) for model in models for tensor in _tensors(model, metadata, _as_it_is)]


def gradient_shards(models: Sequence[DistributedDataParallel], metadata: dict) -> list[Shard]:
    """This rank's gradients under the names of the weights. COLLECTIVE."""
    shards = []
    for model in models:
        by_place = {
            (parameter.data_ptr(), parameter.shape): gradient
            for parameter, gradient in whole_gradients(model).items()
        }

        def gradient_of(data: torch.Tensor, known: Mapping = by_place) -> torch.Tensor | None:
            return known.get((data.data_ptr(), data.shape))

        shards += [_shard(tensor) for tensor in _tensors(model, metadata, gradient_of)]
    return shards


def _as_it_is(data: torch.Tensor) -> torch.Tensor:
    return data


def _tensors(
    model: DistributedDataParallel,
    metadata: dict,
    value_of: Callable[[torch.Tensor], torch.Tensor | None],
) -> Iterator[ShardedTensor]:
    """The model's sharded tensors with `value_of` each in its place; None leaves it out."""
    core: Any = model.module
    for entry in core.sharded_state_dict(metadata=metadata).values():
        if not isinstance(entry, ShardedTensor | ShardedTensorFactory):
            continue
        assert isinstance(entry.data, torch.Tensor)
        value = value_of(entry.data)
        if value is None:
            continue
        if isinstance(entry, ShardedTensor):
            yield replace(entry, data=value.detach(), dtype=value.dtype)
        else:
            yield from _built([replace(entry, data=value.detach())])


def _built(entries: Any) -> Iterator[ShardedTensor]:
    for entry in entries:
        if isinstance(entry, ShardedTensorFactory):
            yield from _built(nested_values(entry.build()))
        elif isinstance(entry, ShardedTensor):
            yield entry


def _shard(tensor: ShardedTensor) -> Shard:
    assert tensor.data is not None
    values = tensor.data.detach().cpu().float().numpy()
    values = values.reshape((1,) * tensor.prepend_axis_num + values.shape)
    return Shard(tensor.key, tuple(tensor.global_shape), tuple(tensor.global_offset), values)


def weight_dtypes(models: Sequence[DistributedDataParallel]) -> dict[str, str]:
    """Dtype of the weight of every module of this rank that has one, by global path."""
    modules = [entry for model in models for entry in global_modules(model.module).items()]
    weights = ((path, getattr(module, "weight", None)) for path, module in modules)
    return {path: str(w.dtype) for path, w in weights if isinstance(w, torch.Tensor)}


def random_digests() -> dict[str, str]:
    """Digests of the states of every random generator that training could draw from."""
    states = random_states.capture()
    named = {f"megatron {name}": state for name, state in states.pop("megatron").items()}
    return {name: _digest(repr(state).encode()) for name, state in (states | named).items()}


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def saved_digests(checkpoints: Path, step: int) -> dict[str, str]:
    """Digest of every tensor and value in the checkpoint of `step`, read from its files as they
    lie there: weights, router biases, masters and moments, by global name and offset.

    The bytes of tensors are taken, not of their containers; other values are compared as values,
    since a pickle also tells which equal strings were one object. Raises RuntimeError for a
    checkpoint that is not whole.
    """
    path = step_folder(checkpoints, step)
    problem = damage(path)
    if problem is not None:
        raise RuntimeError(f"{path}: {problem}")
    found = {}
    for index, place in FileSystemReader(path).read_metadata().storage_data.items():
        with open(path / place.relative_path, "rb") as file:
            file.seek(place.offset)
            content = file.read(place.length)
        if index.offset is None:
            content = repr(torch.load(io.BytesIO(content), weights_only=True)).encode()
        name = f"{index.fqn} {tuple(index.offset or ())}"
        found[name] = _digest(content)
    return found


class Trace:
    """Fingerprints of the outputs of layers and of what they add up, over all calls of a step: the
    sum of squares and the sum along a fixed random direction. Sums over tokens are the same however
    the tokens are dealt to ranks, so that the ranks' fingerprints add up to one rank's."""

    def __init__(
        self, models: Sequence[torch.nn.Module], groups: ProcessGroupCollection, sequence: bool
    ) -> None:
        # Without sequence parallelism the tensor-parallel ranks hold the same output.
        self._counts = sequence or groups.tp.rank() == 0
        self.sums: dict[str, np.ndarray] = {}
        for model in models:
            for path, module in global_modules(model).items():
                if _is_traced(path):
                    module.register_forward_hook(self._hook(path))

    def _hook(self, path: str) -> Callable:
        def hook(module: torch.nn.Module, inputs: object, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            if not (self._counts and isinstance(value, torch.Tensor)):
                return
            y = value.detach().double().flatten(0, -2)
            direction = torch.linspace(-1.0, 1.0, y.shape[-1], dtype=torch.double, device=y.device)
            found = torch.stack([y.square().sum(), (y @ direction).sum()]).cpu().numpy()
            self.sums[path] = self.sums.get(path, 0.0) + found

        return hook


def _is_traced(path: str) -> bool:
    """A decoder layer, one of the multi-token-prediction block, or one of `TRACED` in it."""
    if path in ("embedding", "decoder.final_norm"):
        return True
    before, found, after = path.rpartition(".layers.")
    number, _, inside = after.partition(".")
    is_layer = bool(found) and number.isdecimal() and not before.endswith("mtp")
    return is_layer and (not inside or inside in TRACED)
