"""Models with generic (not initial) weights, as checkpoints written by Megatron-Core."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nemotron_train.plan.precision.resolve import resolve_plan

# Weights as after training: no norm weight is 1, no bias is 0, and a token's dt may lie far below
# the range of the initial draw.
SHAPES = {
    "tiny": ["model=tiny"],
    "nano": [
        "model=nano_30b_a3b",
        "model.pattern=MEM*EMEM*E",
        "model.hidden_size=168",  # the inner width of Mamba-2 is not a multiple of it, as in Nano
        "model.vocab_size=640",
        "model.attention.heads=8",
        "model.attention.head_dim=32",  # 8 x 32 exceeds the hidden width, as in Nano
        "model.mamba.heads=8",
        "model.mamba.head_dim=32",
        "model.mamba.state_size=32",
        "model.mamba.groups=4",
        "model.mamba.chunk_size=64",
        "model.moe.experts=16",
        "model.moe.expert_hidden_size=72",
        "model.moe.shared_expert_hidden_size=144",
    ],
    "super": [
        "model=super_120b_a12b",
        "model.pattern=MEME*EMEM*E",
        "model.hidden_size=128",
        "model.vocab_size=640",
        "model.attention.heads=8",
        "model.attention.head_dim=16",
        "model.mamba.heads=16",
        "model.mamba.head_dim=16",
        "model.mamba.state_size=32",
        "model.mamba.groups=8",
        "model.mamba.chunk_size=64",
        "model.moe.experts=64",
        "model.moe.expert_hidden_size=80",
        "model.moe.shared_expert_hidden_size=168",
        "model.moe.latent_size=32",
    ],
}


@torch.no_grad()
def disturb(model: torch.nn.Module, seed: int) -> None:
    """Gives every parameter and router bias a value that no initialization rule gives."""
    draws = torch.Generator().manual_seed(seed)

    def normal(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=draws)

    for name, parameter in model.named_parameters():
        last = name.rsplit(".", 1)[-1]
        if name.endswith(("norm.weight", "layernorm.weight")):
            parameter.copy_(1 + 0.3 * normal(parameter))
        elif last == "D":
            parameter.copy_(normal(parameter))
        elif last in ("A_log", "conv_bias", "conv_weight"):
            parameter.add_(0.3 * normal(parameter))
        elif last == "dt_bias":
            parameter.add_(2 * normal(parameter))
        elif "word_embeddings" not in name:
            parameter.copy_(normal(parameter) / parameter.shape[-1] ** 0.5)
        else:
            parameter.copy_(normal(parameter))
    for name, buffer in model.named_buffers():
        if name.endswith("expert_bias"):
            buffer.copy_(0.2 * normal(buffer))


@pytest.fixture(scope="module")
def saved_model(groups: Any, small_run: tuple[Path, list[str]]) -> Callable[..., tuple[Any, Path]]:
    """Builds the model of a shape, disturbs it, and saves it with its optimizer as the checkpoint
    of step 3 of a run folder."""
    tokenizer = small_run[0] / "data" / "tokenizer"

    def save(folder: Path, shape: str, *overrides: str) -> tuple[Any, Path]:
        import yaml

        from nemotron_train.assemble.build import build_model, wrap_data_parallel
        from nemotron_train.compose.compose import compose_config
        from nemotron_train.config.knobs import to_plain
        from nemotron_train.data.batches import DataState
        from nemotron_train.optim.build import build_optimizer
        from nemotron_train.plan.precision.record import plan_record
        from nemotron_train.platform import device
        from nemotron_train.platform.files import file_sha256
        from nemotron_train.run_folder.progress import Progress
        from nemotron_train.train.checkpoint.checkpoints import Checkpoints

        words = [f"data.tokenizer={tokenizer}", f"name={folder.name}", *SHAPES[shape], *overrides]
        config, platform = compose_config(words), device.prepare()
        model = build_model(config, resolve_plan(config), platform, groups)
        disturb(model, seed=11)
        wrapped = wrap_data_parallel(model, config, groups)
        optimizer = build_optimizer(config, [wrapped], groups, platform)
        data = {"tokenizer": file_sha256(tokenizer / "tokenizer.json"), "phases": []}
        data |= {"sequence_length": config.train.sequence_length, "seed": config.train.seed}
        checkpoints = Checkpoints(
            folder / "checkpoints",
            [wrapped],
            optimizer,
            groups,
            config,
            plan_record(resolve_plan(config)),
            data,
            lambda: None,
            print,
        )
        folder.mkdir()
        state = DataState("train", config.train.sequence_length, config.train.seed, "")
        checkpoints.save(Progress(3, 1000, state))
        (folder / "config.yaml").write_text(yaml.safe_dump(to_plain(config)))
        return model.eval(), folder

    return save
