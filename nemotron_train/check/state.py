"""Reads the state of one rank, under names and offsets that do not depend on the layout.

Owns: weights and gradients of a rank as shards of global tensors, from the same sharded state dict
that checkpoints use; digests of checkpoints and random states; fingerprints of module outputs. Does
not own: comparing them (`check.compare`), writing them to files (`check.worker`).
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

# Submodules of a layer whose output has the full hidden width and is added to the residual stream.
TRACED = ("mixer", "self_attention", "mlp", "mlp.shared_experts")


def model_metadata(groups: ProcessGroupCollection) -> dict[str, Any]:
    """The `metadata` argument of Megatron's `sharded_state_dict` of a model."""
    return {"singleton_local_shards": False, "dp_cp_group": groups.dp_cp}


def weight_shards(models: Sequence[DistributedDataParallel], metadata: dict) -> list[Shard]:
    """This rank's parameters and persistent buffers (router biases), one shard for each tensor.
    COLLECTIVE."""
    gather_parameters(models)
    return [_shard(tensor) for model in models for tensor in _tensors(model, metadata, _unchanged)]


def gradient_shards(models: Sequence[DistributedDataParallel], metadata: dict) -> list[Shard]:
    """This rank's gradients, under the names of the weights. COLLECTIVE."""
    shards = []
    for model in models:
        # Sharded tensors do not name their parameter, so its storage address identifies it.
        gradient_by_data = {
            (parameter.data_ptr(), parameter.shape): gradient
            for parameter, gradient in whole_gradients(model).items()
        }

        def gradient_of(
            data: torch.Tensor, gradients: Mapping = gradient_by_data
        ) -> torch.Tensor | None:
            return gradients.get((data.data_ptr(), data.shape))

        shards += [_shard(tensor) for tensor in _tensors(model, metadata, gradient_of)]
    return shards


def _unchanged(data: torch.Tensor) -> torch.Tensor:
    return data


def _tensors(
    model: DistributedDataParallel,
    metadata: dict,
    value_of: Callable[[torch.Tensor], torch.Tensor | None],
) -> Iterator[ShardedTensor]:
    """The model's sharded tensors with their data replaced by `value_of(data)`; None drops one."""
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
            yield from _sharded_tensors([replace(entry, data=value.detach())])


def _sharded_tensors(entries: Any) -> Iterator[ShardedTensor]:
    for entry in entries:
        if isinstance(entry, ShardedTensorFactory):
            yield from _sharded_tensors(nested_values(entry.build()))
        elif isinstance(entry, ShardedTensor):
            yield entry


def _shard(tensor: ShardedTensor) -> Shard:
    assert tensor.data is not None
    values = tensor.data.detach().cpu().float().numpy()
    values = values.reshape((1,) * tensor.prepend_axis_num + values.shape)
    return Shard(tensor.key, tuple(tensor.global_shape), tuple(tensor.global_offset), values)


def weight_dtypes(models: Sequence[DistributedDataParallel]) -> dict[str, str]:
    """Dtype of every module weight of this rank, by global module path."""
    modules = [entry for model in models for entry in global_modules(model.module).items()]
    weights = ((path, getattr(module, "weight", None)) for path, module in modules)
    return {path: str(w.dtype) for path, w in weights if isinstance(w, torch.Tensor)}


def random_digests() -> dict[str, str]:
    """Digest of the state of every random generator that training may use, by name."""
    states = random_states.capture()
    named = {f"megatron {name}": state for name, state in states.pop("megatron").items()}
    return {name: _digest(repr(state).encode()) for name, state in (states | named).items()}


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def saved_digests(checkpoints: Path, step: int) -> dict[str, str]:
    """Digest of every tensor and value in the checkpoint of `step`, by global name and offset.

    Covers weights, router biases, master weights and moments, as stored in the files. A tensor's
    digest is over its stored bytes. Other values are unpickled and digested by `repr`, because a
    pickle also encodes which equal strings were the same object. Raises RuntimeError if the
    checkpoint is damaged.
    """
    path = step_folder(checkpoints, step)
    problem = damage(path)
    if problem is not None:
        raise RuntimeError(f"{path}: {problem}")
    digests = {}
    for index, storage in FileSystemReader(path).read_metadata().storage_data.items():
        with open(path / storage.relative_path, "rb") as file:
            file.seek(storage.offset)
            content = file.read(storage.length)
        if index.offset is None:
            content = repr(torch.load(io.BytesIO(content), weights_only=True)).encode()
        name = f"{index.fqn} {tuple(index.offset or ())}"
        digests[name] = _digest(content)
    return digests


class Trace:
    """Fingerprints of the outputs of layers and of their `TRACED` submodules.

    A fingerprint is float64 [2]: the sum of squares and the projection on a fixed direction, summed
    over all tokens of all forward calls. These sums do not depend on how tokens are split over
    ranks, so the ranks' fingerprints add up to the one-rank fingerprint. `sums`: module path ->
    fingerprint.
    """

    def __init__(
        self, models: Sequence[torch.nn.Module], groups: ProcessGroupCollection, sequence: bool
    ) -> None:
        # Without sequence parallelism all tensor-parallel ranks hold the same output.
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
            fingerprint = torch.stack([y.square().sum(), (y @ direction).sum()]).cpu().numpy()
            self.sums[path] = self.sums.get(path, 0.0) + fingerprint

        return hook


def _is_traced(path: str) -> bool:
    """Whether `path` is the embedding, the final norm, a layer (of the decoder or of the
    multi-token-prediction block), or a `TRACED` submodule of a layer."""
    if path in ("embedding", "decoder.final_norm"):
        return True
    before, separator, after = path.rpartition(".layers.")
    layer_number, _, submodule = after.partition(".")
    is_layer = bool(separator) and layer_number.isdecimal() and not before.endswith("mtp")
    return is_layer and (not submodule or submodule in TRACED)
