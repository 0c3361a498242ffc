"""The fields that Megatron-Core, its DDP and the optimizer get, against published recipes.

The expected values are those of the peers' recipe files, read on their main branches:

- NVIDIA-NeMo/Megatron-Bridge, src/megatron/bridge/recipes/nemotronh/h100/nemotron_3_nano.py and
  nemotron_3_super.py (pretraining), for all fields below;
- the same file's supervised fine-tuning, for the shared-expert overlap: true under alltoall, false
  under DeepEP;
- NVIDIA/Megatron-LM, examples/nemotron3/nano.py, for Nano's dispatcher and permutation;
- NVIDIA/Megatron-LM, megatron/core/models/hybrid/hybrid_layer_specs.py, for the norm in in_proj and
  linear_qkv (tests/assemble/test_fused.py builds it).

Where we differ, `DIFFERENT` says so and why. Not covered: whether a field makes a GPU faster.
"""

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest

from nemotron_train.assemble import build
from nemotron_train.assemble.specs import parts
from nemotron_train.assemble.transformer_config import transformer_config
from nemotron_train.compose.compose import compose_config
from nemotron_train.plan.precision.resolve import resolve_plan
from nemotron_train.plan.switches import (
    ALL_OFF,
    PACKAGES,
    PERMUTATION,
    TRANSFORMER_ENGINE,
    Facts,
    choose_switches,
)
from nemotron_train.platform import device

NANO = {
    "moe_permute_fusion": True,
    "moe_token_dispatcher_type": "flex",
    "moe_flex_dispatcher_backend": "deepep",
    "moe_shared_expert_overlap": False,
    "moe_router_dtype": "fp32",
    "tp_comm_overlap": True,
    "bf16": True,
}
SUPER = {
    "moe_token_dispatcher_type": "alltoall",
    "moe_shared_expert_overlap": False,
    "gradient_accumulation_fusion": True,
    "calculate_per_token_loss": True,
    "mtp_use_repeated_layer": True,
    "mtp_num_layers": 2,
    "mtp_loss_scaling_factor": 0.3,
}
# Published values that ours do not have: field -> reason.
DIFFERENT = {
    "cuda_graph_impl": "graphs of attention and Mamba-2 would replay one batch's documents",
    "cuda_graph_modules": "the same",
    "use_fused_weighted_squared_relu": "the experts are ours, or Transformer Engine's operations",
    "moe_grouped_gemm": "the experts are ours; the field chooses Megatron's",
}


def fields(words: list[str], *missing: str) -> dict[str, Any]:
    """The TransformerConfig for a GPU on which all packages but `missing` can be used."""
    config = compose_config(words)
    facts = Facts(True, dict.fromkeys(missing, "it is not installed"), native=False)
    switches = choose_switches(config, resolve_plan(config), facts)
    platform = replace(device.prepare(), switches=switches)
    with pytest.MonkeyPatch.context() as patch:
        # Megatron asks whether Transformer Engine's functions are there.
        for name in ("", "_with_probs"):
            patch.setattr(f"{MOE_UTILS}.fused_permute{name}", print)
            patch.setattr(f"{MOE_UTILS}.fused_sort_chunks_by_index{name}", print)
        patch.setattr(f"{MOE_UTILS}.fused_unpermute", print)
        return vars(transformer_config(config, platform))


MOE_UTILS = "megatron.core.transformer.moe.moe_utils"
BF16 = "precision=bf16"


@pytest.mark.parametrize("field", NANO)
def test_nano_as_published(field: str) -> None:
    """Its dispatcher and its overlap are options here; its layout is that of the recipe: tensor 4
    with sequence parallelism, expert 8."""
    layout = ["parallel.tensor=2", "parallel.sequence=true", "parallel.expert=8"]
    options = ["gpu.moe_token_dispatcher=deepep", "gpu.tp_comm_overlap=true"]
    found = fields(["run=nano_30b_a3b", BF16, *layout, *options])
    assert found[field] == NANO[field]


@pytest.mark.parametrize("field", SUPER)
def test_super_as_published(field: str) -> None:
    """All of it by default. Without apex, Transformer Engine's linears get the fusion themselves
    and Megatron's output layer does not (tests/assemble/test_fused.py)."""
    if field == "gradient_accumulation_fusion":
        missing = [TRANSFORMER_ENGINE, PERMUTATION]
        assert fields(["run=super_120b_a12b", BF16], *missing)[field] is True
        assert fields(["run=super_120b_a12b", BF16])[field] is False
        return
    assert fields(["run=super_120b_a12b", BF16])[field] == SUPER[field]


def test_shared_expert_overlap_as_published() -> None:
    nano = ["run=nano_30b_a3b", BF16]
    assert fields(nano)["moe_shared_expert_overlap"] is True
    with_deepep = fields([*nano, "gpu.moe_token_dispatcher=deepep"])
    assert with_deepep["moe_shared_expert_overlap"] is False


@pytest.mark.parametrize("size", ["nano_30b_a3b", "super_120b_a12b", "ultra_550b_a55b"])
def test_gradients_and_parameters_overlap_as_published(
    size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ddp.overlap_grad_reduce` and `overlap_param_gather` of Megatron-Bridge's recipes: on for
    Nano and Ultra (recipes/nemotronh/h100), and for Super in its performance recipes
    (perf_recipes/nemotronh/common.py; that for 16 H100 has no memory for them)."""
    config, ddp = compose_config([f"run={size}", BF16]), mock.Mock()
    ddp.return_value.modules.return_value = []
    monkeypatch.setattr(build, "DistributedDataParallel", ddp)
    monkeypatch.setattr(build, "DistributedOptimizer", mock.Mock())
    build.DistributedOptimizer.compute_full_param_layout.return_value.layouts = {}  # type: ignore
    model: Any = mock.Mock(parameters=lambda: [])
    build.wrap_data_parallel(model, config, mock.Mock())
    got = vars(ddp.call_args.kwargs["ddp_config"])
    assert got["overlap_grad_reduce"] and got["overlap_param_gather"]
    assert got["use_distributed_optimizer"] and got["bucket_size"] == 40_000_000


def test_hybrid_ep() -> None:
    found = fields(["run=super_120b_a12b", BF16, "gpu.moe_token_dispatcher=hybridep"])
    assert found["moe_token_dispatcher_type"] == "flex"
    assert found["moe_flex_dispatcher_backend"] == "hybridep"


def test_differences_are_still_differences() -> None:
    """A field that gets the published value must leave the list."""
    found = fields(["run=super_120b_a12b", BF16])
    published: dict[str, Any] = {
        "cuda_graph_impl": "transformer_engine",
        "cuda_graph_modules": ["attn", "mamba", "moe_router", "moe_preprocess"],
        "use_fused_weighted_squared_relu": True,
        "moe_grouped_gemm": True,
    }
    assert published.keys() == DIFFERENT.keys()
    assert all(found[name] != value for name, value in published.items())


def test_a_cpu_gets_what_it_always_got() -> None:
    """The fields of a CPU run: every switch off."""
    found = vars(transformer_config(compose_config([]), device.prepare()))
    assert found["gradient_accumulation_fusion"] is False
    assert found["moe_permute_fusion"] is False
    assert found["moe_shared_expert_overlap"] is False
    assert found["moe_token_dispatcher_type"] == "alltoall"
    assert found["tp_comm_overlap"] is False
    assert device.prepare().switches == ALL_OFF
    assert parts(False).norm_column_parallel is None


def test_without_packages_a_gpu_gets_what_needs_none() -> None:
    found = fields(["run=nano_30b_a3b", BF16], *PACKAGES)
    assert found["gradient_accumulation_fusion"] is False
    assert found["moe_permute_fusion"] is False
    assert found["moe_shared_expert_overlap"] is True, "it needs streams only"
