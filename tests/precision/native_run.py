"""Run by test_native.py in a separate process, in which the stand-in for Transformer Engine is
importable. Builds and trains small native models and writes its observations as JSON.

Usage: python native_run.py OUTPUT_FOLDER DATA_OVERRIDE...
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nemotron_train.compose.compose import compose_config
from nemotron_train.plan.backend import choose_backend
from nemotron_train.plan.hardware import Hardware
from nemotron_train.plan.precision.resolve import resolve_plan
from nemotron_train.platform import device

PLANS = ("nvfp4_nemotron3", "nvfp4_all", "mxfp8", "nvfp4_without_mtp", "nvfp4_without_last_layers")
# Sizes of whole blocks, and each kind of layer in the middle of the decoder and at its end.
SMALL = [
    "model.pattern=ME*EM*E",
    "model.hidden_size=64",
    "model.vocab_size=512",
    "model.attention={heads: 4, key_value_heads: 2, head_dim: 16}",
    "model.mamba={heads: 32, head_dim: 4, state_size: 16, groups: 2, chunk_size: 16}",
    "model.moe.experts=8",
    "model.moe.expert_hidden_size=32",
    "model.moe.shared_expert_hidden_size=64",
    "model.moe.latent_size=32",
    "train.sequence_length=64",
    "train.micro_batch_sequences=4",
    "train.global_batch_tokens=256",
    "train.validation_tokens=256",
    "train.total_tokens=1024",
    "optim.warmup_tokens=0",
    "optim.decay_tokens=0",
]


def pretend_gpu() -> Any:
    """The CPU's platform, with Transformer Engine's layers in the specs and the name of a B200."""
    platform = replace(device.prepare(2), transformer_engine=True)
    device.prepare = lambda num_threads=0: platform  # type: ignore[assignment]
    device.hardware = lambda platform: Hardware("NVIDIA B200", (10, 0), "2.17.1")
    return platform


def small(plan: str, *overrides: str) -> Any:
    return compose_config([f"precision={plan}", *SMALL, *overrides])


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    tokens_BS = torch.randint(0, 512, (4, 65), generator=generator)
    documents_BS = torch.arange(64).div(24, rounding_mode="floor").expand(4, 64).contiguous()
    return {
        "tokens_BS": tokens_BS[:, :-1].contiguous(),
        "labels_BS": tokens_BS[:, 1:].contiguous(),
        "loss_mask_BS": torch.ones(4, 64),
        "document_ids_BS": documents_BS,
    }


def one_plan(plan: str, platform: Any, groups: Any, build_model: Any) -> dict[str, Any]:
    """The formats the modules are set to and the formats they ran in, over one forward and backward
    pass."""
    from nemotron_train.precision.native import NativePrecision, executed_format

    config = small(plan)
    model = build_model(config, resolve_plan(config), platform, groups, native=True)
    control = NativePrecision([model], resolve_plan(config))
    before = control.attached()
    control.before_step(1, 0)
    losses = model(**batch())
    losses.sum().backward()
    control.before_step(2, 256)  # raises if a linear ran in another format
    return {
        "set": before,
        "ran": {path: executed_format(module) for path, module in control._linears.items()},
        "losses": losses.tolist(),
        "without_gradient": [n for n, p in model.named_parameters() if p.grad is None],
    }


def refusals(platform: Any, groups: Any, build_model: Any) -> dict[str, str]:
    """The error messages for modules that are not set to the plan, or did not run in it."""
    from nemotron_train.precision.native import NativePrecision

    found = {}

    def message(name: str, function: Any) -> None:
        try:
            function()
            found[name] = ""
        except RuntimeError as error:
            found[name] = str(error)

    config = small("nvfp4_nemotron3")
    model = build_model(config, resolve_plan(config), platform, groups, native=True)
    out_proj = model.decoder.layers[0].mixer.out_proj
    recipe = out_proj.te_quant_params
    out_proj.te_quant_params = None  # as if Megatron had lost the matcher
    message("set", lambda: NativePrecision([model], resolve_plan(config)))
    out_proj.te_quant_params = recipe
    control = NativePrecision([model], resolve_plan(config))
    control.before_step(1, 0)
    out_proj.te_quant_params = None
    model(**batch())
    message("ran", lambda: control.before_step(2, 256))

    plain = build_model(small("bf16"), resolve_plan(small("bf16")), platform, groups)
    message("plain", lambda: NativePrecision([plain], resolve_plan(config)))

    config = small("nvfp4_all", "precision.default.hadamard=false")  # variable unset
    model = build_model(config, resolve_plan(config), platform, groups, native=True)
    control = NativePrecision([model], resolve_plan(config))
    control.before_step(1, 0)
    model(**batch())
    message("option", lambda: control.before_step(2, 256))
    return found


def stacked(model: Any) -> dict[str, torch.Tensor]:
    """Parameters and buffers. Per-expert tensors `weight<i>` are stacked under the name
    `weight`."""
    found: dict[str, torch.Tensor] = {}
    experts: dict[str, list[torch.Tensor]] = {}
    for name, tensor in model.state_dict().items():
        base = name.rstrip("0123456789")
        if "_extra_state" in name:
            continue
        if base != name and base.endswith("weight"):
            experts.setdefault(base, []).append(tensor)
        else:
            found[name] = tensor
    return found | {name: torch.stack(tensors) for name, tensors in experts.items()}


def exchange(folder: Path, platform: Any, groups: Any, build_model: Any) -> dict[str, Any]:
    """Initial weights of a native and of a plain model, and checkpoints of each loaded into the
    other."""
    from megatron.core import dist_checkpointing

    metadata = {"dp_cp_group": groups.dp_cp, "singleton_local_shards": False}
    native = build_model(
        small("nvfp4_nemotron3"),
        resolve_plan(small("nvfp4_nemotron3")),
        platform,
        groups,
        native=True,
    )
    plain = build_model(small("bf16"), resolve_plan(small("bf16")), platform, groups)
    one, other = stacked(native), stacked(plain)
    losses = {
        name: model(**batch()).tolist() for name, model in (("native", native), ("plain", plain))
    }
    result: dict[str, Any] = {
        "names": sorted(one) == sorted(other),
        "initial": all(torch.equal(one[name], other[name]) for name in one),
        "losses": losses,
    }
    for name, source, target in (("to_plain", native, plain), ("to_native", plain, native)):
        with torch.no_grad():
            for number, parameter in enumerate(source.parameters()):
                parameter.normal_(generator=torch.Generator().manual_seed(number))
        path = folder / name
        path.mkdir()
        dist_checkpointing.save(source.sharded_state_dict(metadata=metadata), str(path))
        loaded: Any = dist_checkpointing.load(
            target.sharded_state_dict(metadata=metadata), str(path)
        )
        target.load_state_dict(loaded)
        one, other = stacked(source), stacked(target)
        result[name] = all(torch.equal(one[key], other[key]) for key in one)
        result[f"{name}_keys"] = sorted(
            key for key in source.sharded_state_dict(metadata=metadata) if "_extra" in key
        )
    return result


def main(folder: Path, data: list[str]) -> None:
    platform = pretend_gpu()
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from nemotron_train.assemble.build import build_model
    from nemotron_train.config.schema import ParallelConfig
    from nemotron_train.plan.guards import Surroundings
    from nemotron_train.platform import groups as process_groups
    from nemotron_train.run import pretrain

    saw: dict[str, Any] = {}
    surroundings = Surroundings(device.hardware(platform))
    config = small("nvfp4_nemotron3")
    saw["choice"] = choose_backend(config, resolve_plan(config), surroundings).text
    run = ["name=run", f"folder={folder}", *data]
    codes = [
        pretrain(small("nvfp4_nemotron3", *run, "train.stop_after_steps=2")),
        pretrain(small("nvfp4_nemotron3", *run, "train.stop_after_steps=1")),
        pretrain(small("nvfp4_nemotron3", *run, "precision.backend=emulated")),
    ]
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    saw["run"] = {"codes": codes, "losses": [r["loss"] for r in records if "loss" in r]}

    groups = process_groups.start(ParallelConfig(), "gloo")
    model_parallel_cuda_manual_seed(1234)
    saw["plans"] = {plan: one_plan(plan, platform, groups, build_model) for plan in PLANS}
    saw["refusals"] = refusals(platform, groups, build_model)
    saw["exchange"] = exchange(folder, platform, groups, build_model)
    process_groups.stop()
    (folder / "saw.json").write_text(json.dumps(saw))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
