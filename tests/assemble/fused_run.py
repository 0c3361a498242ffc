"""Run by test_fused.py in a process in which the stand-in for Transformer Engine is importable.
Builds small models with and without the fused forms and writes what it saw as JSON.

Usage: python fused_run.py OUTPUT_FOLDER
"""

import json
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nemotron_train.compose.compose import compose_config
from nemotron_train.config.schema import ParallelConfig
from nemotron_train.plan.precision.resolve import resolve_plan
from nemotron_train.plan.switches import ALL_OFF
from nemotron_train.platform import device

SMALL = [
    "precision=fp32",
    "model.pattern=ME*E",
    "model.hidden_size=64",
    "model.vocab_size=512",
    "model.attention={heads: 4, key_value_heads: 2, head_dim: 16}",
    "model.mamba={heads: 4, head_dim: 16, state_size: 16, groups: 2, chunk_size: 16}",
    "model.moe.experts=8",
    "model.moe.expert_hidden_size=32",
    "model.moe.shared_expert_hidden_size=64",
    "model.moe.latent_size=32",
    "train.sequence_length=64",
]


def pretend_apex() -> list[str]:
    """Make apex's extension importable. Returns the list to which each call adds a word."""
    calls: list[str] = []
    extension = types.ModuleType("fused_weight_gradient_mlp_cuda")

    def add(x: torch.Tensor, dy: torch.Tensor, main_grad: torch.Tensor) -> None:
        calls.append("product")
        main_grad += dy.float().T @ x.float()

    extension.wgrad_gemm_accum_fp32 = add  # type: ignore[attr-defined]
    sys.modules[extension.__name__] = extension
    return calls


CALLS = pretend_apex()  # before Megatron-Core is imported
PLAIN = device.prepare(1)
PLATFORM = replace(PLAIN, transformer_engine=True)
FUSED = replace(ALL_OFF, fused_norm_linear=True, transformer_engine_gradients=True)


def build(switches: Any, groups: Any, *more: str, platform: Any = PLATFORM) -> tuple[Any, Any]:
    """The configuration's model, and the same in Megatron's DDP."""
    from nemotron_train.assemble.build import build_model, wrap_data_parallel

    config = compose_config([*SMALL, *more])
    platform = replace(platform, switches=switches)
    model = build_model(config, resolve_plan(config), platform, groups)
    return model, wrap_data_parallel(model, config, groups)


def batch() -> dict[str, torch.Tensor]:
    tokens_BS = torch.randint(0, 512, (2, 65), generator=torch.Generator().manual_seed(7))
    documents_BS = torch.arange(64).div(24, rounding_mode="floor").expand(2, 64).contiguous()
    return {
        "tokens_BS": tokens_BS[:, :-1].contiguous(),
        "labels_BS": tokens_BS[:, 1:].contiguous(),
        "loss_mask_BS": torch.ones(2, 64),
        "document_ids_BS": documents_BS,
    }


def apart(name: str) -> str:
    """The name of a parameter in a model whose norms are modules of their own."""
    name = name.replace("mixer.in_proj.layer_norm_weight", "norm.weight")
    return name.replace("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight")


def gradients(model: Any, wrapped: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses, and the FP32 gradients after two backward passes over one batch."""
    wrapped.zero_grad_buffer()
    losses = None
    for _ in range(2):
        losses = model(**batch())
        losses.sum().backward()
    assert losses is not None
    return losses.tolist(), {apart(n): p.main_grad for n, p in model.named_parameters()}


def difference(truth: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest relative difference of a gradient."""
    return max(
        float((other[name] - value).norm() / value.norm().clamp_min(1e-30))
        for name, value in truth.items()
    )


def with_apex(groups: Any, calls: list[str]) -> dict[str, Any]:
    """A BF16 model of Megatron's own linears, without and with apex's products."""
    adding = replace(ALL_OFF, apex_gradients=True)
    plain = build(ALL_OFF, groups, "precision=bf16", platform=PLAIN)
    fused = build(adding, groups, "precision=bf16", platform=PLAIN)
    plain_losses, truth = gradients(*plain)
    assert not calls
    fused_losses, found = gradients(*fused)
    return {
        "calls": len(calls),
        "losses": [plain_losses, fused_losses],
        "worst_gradient": difference(truth, found),
        "output_layer": difference(
            {"": truth["output_layer.weight"]}, {"": found["output_layer.weight"]}
        ),
    }


def exchanged(folder: Path, source: Any, target: Any, groups: Any) -> bool:
    """Whether `target` has the parameters of `source` after a checkpoint between them."""
    from megatron.core import dist_checkpointing

    metadata = {"dp_cp_group": groups.dp_cp, "singleton_local_shards": False}
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            seed = sum(apart(name).encode())
            parameter.normal_(generator=torch.Generator().manual_seed(seed))
    folder.mkdir()
    dist_checkpointing.save(source.sharded_state_dict(metadata=metadata), str(folder))
    state: Any = target.sharded_state_dict(metadata=metadata)
    target.load_state_dict(dist_checkpointing.load(state, str(folder)))
    one = {apart(name): tensor for name, tensor in source.named_parameters()}
    other = {apart(name): tensor for name, tensor in target.named_parameters()}
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def decoded(model: Any) -> list[float]:
    """Log-probabilities of two sequences, read in chunks of seven tokens and then one by one."""
    from nemotron_train.generate.engine import Engine

    tokens_BS = batch()["tokens_BS"]
    sequences = [tokens_BS[0, :20].tolist(), tokens_BS[1, :13].tolist()]
    engine = Engine(model)
    return [
        value
        for chunk in (7, 1)
        for scored in engine.log_probabilities(sequences, chunk)
        for value in scored
    ]


def main(folder: Path) -> None:
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from nemotron_train.platform import groups as process_groups

    groups = process_groups.start(ParallelConfig(), "gloo")
    model_parallel_cuda_manual_seed(1234)
    plain, plain_ddp = build(ALL_OFF, groups)
    fused, fused_ddp = build(FUSED, groups)
    plain_losses, plain_gradients = gradients(plain, plain_ddp)
    fused_losses, fused_gradients = gradients(fused, fused_ddp)
    modules = dict(fused.named_modules())
    saw = {
        "classes": {
            name: [type(modules[name]).__name__, modules[name].fuse_wgrad_accumulation]
            for name in modules
            if hasattr(modules[name], "fuse_wgrad_accumulation")
        },
        "output_layer_fuses": fused.output_layer.gradient_accumulation_fusion,
        "losses": [plain_losses, fused_losses],
        "same_names": sorted(plain_gradients) == sorted(fused_gradients),
        "worst_gradient": difference(plain_gradients, fused_gradients),
        "decoded": [decoded(plain), decoded(fused)],
        "apex": with_apex(groups, CALLS),
        "to_plain": exchanged(folder / "to_plain", fused, plain, groups),
        "to_fused": exchanged(folder / "to_fused", plain, fused, groups),
    }
    process_groups.stop()
    (folder / "saw.json").write_text(json.dumps(saw))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
