"""Initial weights, identical under every layout.

Every rank draws each whole tensor from a generator seeded by the run's seed and the tensor's global
name, and keeps its shard. The values therefore do not depend on the number of ranks. Megatron's own
initialization draws each shard separately and gives different weights under another layout.

Distributions are those of Nemotron 3: normal(0, init_std) for linears and embeddings, with the
projections that write to the residual stream divided by sqrt(layers) (Megatron's rule for hybrids),
and Mamba-2's for A, dt and the convolution (arXiv 2405.21060 and state-spaces/mamba's mamba2.py).
"""

import hashlib
import math
import re
from collections.abc import Iterator

import torch

from nemotron_train.config.schema import MambaConfig, ModelConfig
from nemotron_train.model.hybrid import NemotronModel
from nemotron_train.model.sharding import full_shape, shard_of

RESIDUAL_WRITERS = ("out_proj.weight", "linear_proj.weight", "linear_fc2.weight")
RESIDUAL_WRITERS += ("fc2_latent_proj.weight",)


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def global_parameters(
    model: NemotronModel,
) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """(global name, parameter) of this rank: decoder layers are numbered from 0 over all pipeline
    stages."""
    for name, parameter in model.named_parameters():
        match = re.match(r"decoder\.layers\.(\d+)\.(.*)", name)
        if match:
            number = model.decoder.layers[int(match[1])].layer_number - 1
            name = f"decoder.layers.{number}.{match[2]}"
        yield name, parameter


def draw(
    name: str, shape: tuple[int, ...], model: ModelConfig, generator: torch.Generator
) -> torch.Tensor:
    """The whole (unsharded) initial tensor with this global name, FP32."""
    last = name.rsplit(".", 1)[-1]
    mamba: MambaConfig = model.mamba
    if name.endswith(("norm.weight", "layernorm.weight", "layer_norm_weight")):
        return torch.ones(shape)
    if last == "D":
        return torch.ones(shape)
    if last == "A_log":
        uniform = torch.rand(shape, generator=generator)
        return torch.log(mamba.A_init_min + (mamba.A_init_max - mamba.A_init_min) * uniform)
    if last == "dt_bias":
        low, high = math.log(mamba.dt_min), math.log(mamba.dt_max)
        dt = torch.exp(low + (high - low) * torch.rand(shape, generator=generator))
        dt = dt.clamp(min=mamba.dt_init_floor)
        return dt + torch.log(-torch.expm1(-dt))  # the inverse of softplus
    if last in ("conv_weight", "conv_bias"):
        bound = mamba.conv_kernel_size**-0.5
        return (2 * torch.rand(shape, generator=generator) - 1) * bound
    std = model.init_std
    if name.endswith(RESIDUAL_WRITERS):
        std /= math.sqrt(len(model.pattern.replace("|", "")))
    return torch.randn(shape, generator=generator) * std


@torch.no_grad()
def initialize(model: NemotronModel, config: ModelConfig, seed: int) -> None:
    """Fill every parameter of `model` with its shard of the initial weights. Each expert is drawn
    separately, from its global index, so the result does not depend on expert parallelism."""
    groups = model.pg_collection
    for name, parameter in global_parameters(model):
        if getattr(parameter, "is_expert", False):
            shard, num_shards = groups.expt_tp.rank(), groups.expt_tp.size()
            first_expert = groups.ep.rank() * parameter.shape[0]
            shape = full_shape(parameter, num_shards)[1:]
            for index in range(parameter.shape[0]):
                expert_name = f"{name}.{first_expert + index}"
                full = draw(name, shape, config, _generator(seed, expert_name))
                dim = parameter.partition_dim - 1  # type: ignore[attr-defined]
                parameter[index].copy_(full.chunk(num_shards, dim)[shard])
        elif hasattr(parameter, "expert_index"):  # the matrix of one expert (`model.moe.native`)
            shard, num_shards = groups.expt_tp.rank(), groups.expt_tp.size()
            stacked = name.rstrip("0123456789")
            index: int = parameter.expert_index  # type: ignore[attr-defined]
            generator = _generator(seed, f"{stacked}.{index}")
            full = draw(stacked, full_shape(parameter, num_shards), config, generator)
            parameter.copy_(shard_of(full, parameter, shard, num_shards))
        else:
            shard, num_shards = groups.tp.rank(), groups.tp.size()
            full = draw(name, full_shape(parameter, num_shards), config, _generator(seed, name))
            parameter.copy_(shard_of(full, parameter, shard, num_shards))
