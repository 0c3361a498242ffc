"""Writes the operands that the emulated linears of one rank multiply to a file.
test_precision_layouts.py starts one process per rank. Arguments: the file, then overrides.

Every linear gets the same inputs and output gradients whatever the layout. Each rank cuts its part
from tensors that are drawn whole.
"""

import sys
import zlib
from dataclasses import replace
from typing import Any

import torch

from nemotron_train.compose.compose import compose_config
from nemotron_train.plan.precision.resolve import resolve_plan
from nemotron_train.platform import device

SEQUENCE, ROWS = 64, 2
EXPERT_TOKENS = [0, 48, 16, 33, 1, 60, 2, 20]  # of each of the small run's eight experts


def cut(full: torch.Tensor, dim: int | None, rank: int, size: int) -> torch.Tensor:
    return full if dim is None or size == 1 else full.chunk(size, dim)[rank].contiguous()


def drawn(name: str, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator).bfloat16()


def linear_products(path: str, linear: Any, groups: Any, sequence: bool) -> dict:
    """Forward and backward pass of one linear on this rank's part of x [S,B,K] and dy [S,B,N]."""
    from nemotron_train.model.sharding import shard_of

    how, rank, size = linear.attached.cut, groups.tp.rank(), groups.tp.size()
    out_size, in_size = linear.weight.shape
    full_in = in_size * (size if how == "inputs" else 1)
    full_out = out_size * (size if how == "outputs" else 1)
    x = cut(drawn(path + "x", SEQUENCE, ROWS, full_in), 0, groups.cp.rank(), groups.cp.size())
    dy = cut(drawn(path + "dy", SEQUENCE, ROWS, full_out), 0, groups.cp.rank(), groups.cp.size())
    along_tokens = 0 if sequence and how != "inputs" else None
    x = cut(x, 2 if how == "inputs" else along_tokens, rank, size).requires_grad_()
    if how == "outputs":  # packed from components, like the weight
        dy = shard_of(dy.flatten(0, 1).t(), linear.weight, rank, size).t()
        dy = dy.contiguous().view(SEQUENCE // groups.cp.size(), ROWS, -1)
    else:
        dy = cut(dy, 0 if sequence else None, rank, size)
    y, _ = linear(x)
    dx, dw = torch.autograd.grad(y, [x, linear.weight], dy)
    return {"y": y, "dx": dx, "dw": dw}


def expert_products(path: str, experts: Any) -> dict:
    """All experts, on tokens that are whole on every rank."""
    counts = torch.tensor(EXPERT_TOKENS)
    x = drawn(path + "x", int(counts.sum()), experts.linear_fc1.weight.shape[2]).requires_grad_()
    p = drawn(path + "p", len(x)).float().abs()
    y, _ = experts(x, counts, p)
    dy = drawn(path + "dy", *y.shape)
    weights = [experts.linear_fc1.weight, experts.linear_fc2.weight]
    dx, dw1, dw2 = torch.autograd.grad(y, [x, *weights], dy)
    return {"y": y, "dx": dx, "dw1": dw1, "dw2": dw2}


def main(file: str, overrides: list[str]) -> None:
    config = compose_config(overrides)
    platform = device.prepare(1)
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from nemotron_train.assemble.build import build_model
    from nemotron_train.platform import groups as process_groups
    from nemotron_train.precision import nvfp4
    from nemotron_train.precision.attach import PrecisionControl, global_modules

    groups = process_groups.start(config.parallel, platform.backend)
    model_parallel_cuda_manual_seed(config.train.seed)
    model = build_model(config, resolve_plan(config), platform, groups)
    control = PrecisionControl([model], config, resolve_plan(config), groups)
    control.before_step(3, 0)
    quantize, operands = nvfp4.nvfp4_operand, []

    def recording(*args: Any, **kwargs: Any) -> Any:
        operand = quantize(*args, **kwargs)
        operands.append((operand.values.clone(), operand.scale.clone()))
        return operand

    nvfp4.nvfp4_operand = recording
    found = {}
    for path, module in global_modules(model).items():
        linear: Any = module
        if not path.startswith("decoder.layers."):
            continue
        operands.clear()
        if path.endswith(".mlp.experts"):
            products = expert_products(path, linear)
        elif getattr(linear, "attached", None) is not None and "experts.linear" not in path.replace(
            "shared_experts", ""
        ):
            if path.endswith("in_proj"):
                formats = linear.attached.formats
                linear.attached.formats = replace(formats, stochastic_rounding=False)
            products = linear_products(path, linear, groups, config.parallel.sequence)
        else:
            continue
        sizes = getattr(getattr(linear, "weight", None), "partition_sizes", None)
        cut_along = linear.attached.cut if hasattr(linear, "attached") else "experts"
        found[path] = {
            "cut": cut_along,
            "sizes": sizes,
            "operands": list(operands),
            "products": {name: value.detach().clone() for name, value in products.items()},
        }
    torch.save(found, f"{file}.{torch.distributed.get_rank()}")
    process_groups.stop()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
