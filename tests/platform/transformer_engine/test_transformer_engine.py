"""Real Transformer Engine and Megatron-Core's wrappers on a pretended B200, from the spec tree to
training steps on one rank and two. `make test-transformer-engine`.

The C++ half is replaced: functions, arguments and enums are those of its source, the arithmetic is
ours in torch (`tests/platform/transformer_engine`). Second truths: the plan for the formats, the
layer pattern for the classes, and our emulation without Transformer Engine for the losses.

Not covered: the C++ code and CUDA kernels, their numbers, alignments and speed; stochastic rounding
(the reference rounds to nearest); fused attention; Transformer Engine's Triton permutation, which
is switched off; swizzled scales; CUDA streams and NCCL.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.platform.pretend import packages
from tests.platform.test_pretended_cuda import pretend
from tests.platform.transformer_engine import bindings, stand_in
from tests.precision.native_run import SMALL

pytestmark = [
    pytest.mark.transformer_engine,
    pytest.mark.usefixtures("in_small_run"),
    pytest.mark.skipif(
        packages.folder("transformer_engine") is None,
        reason="Transformer Engine is absent: make test-transformer-engine installs it",
    ),
]

ROOT = Path(__file__).resolve().parents[3]
PLANS = sorted(path.stem for path in (ROOT / "recipes" / "precision").glob("*.yaml"))
# Without block formats, or not for Megatron's per-module file (one format a module, one phase).
NOT_NATIVE = {"bf16", "fp32", "nvfp4_bf16_forward", "nvfp4_then_mxfp8"}
# The pattern ME*EM*E and MTP's *E: 2 Mamba, 4 MoE and 3 attention layers.
MAMBA, MOE, ATTENTION = 2, 4, 3
CLASSES = {
    "megatron.TEColumnParallelLinear": MAMBA + MOE + ATTENTION + 1,  # and MTP's projection
    "megatron.TERowParallelLinear": MAMBA + MOE + ATTENTION,
    "megatron.TELinear": 2 * MOE,  # latent projections
    "megatron.TEColumnParallelGroupedLinear": MOE,
    "megatron.TERowParallelGroupedLinear": MOE,
    "transformer_engine.RMSNorm": MAMBA + MOE + ATTENTION + 4,  # final norms, and MTP's two
    "megatron.TEDotProductAttention": ATTENTION,
    "transformer_engine.Fp8Padding": MOE,
    "transformer_engine.Fp8Unpadding": MOE,
}
B200 = {"PRETEND_DEVICE": "NVIDIA B200", "PRETEND_CAPABILITY": "10.0"}
ENGINE = {"PRETEND_TRANSFORMER_ENGINE": "1", **B200}
NEAREST = "precision.default.stochastic_rounding=false"  # as the reference rounds


UNFUSED = "gpu.moe_permute_fusion=off"
NATIVE = ["precision.backend=native"]
NVFP4 = ["precision=nvfp4_nemotron3", NEAREST, UNFUSED, *NATIVE]
# Half of the input projection's rows and half of a micro-batch have whole blocks, too.
WIDE = ["model.mamba.heads=64", "model.mamba.head_dim=4", "train.micro_batch_sequences=4"]


def train(small_run: tuple[Path, list[str]], name: str, *words: str) -> list[str]:
    """The arguments of two steps of two micro-batches."""
    data = [word for word in small_run[1] if word.startswith("data")]
    two = ["train.global_batch_tokens=512", "train.micro_batch_sequences=2", "train.threads=1"]
    return ["pretrain", *SMALL, *data, *two, f"name=engine_{name}", *words]


def lines(name: str) -> list[dict[str, float]]:
    """The run's record of each step."""
    text = Path(f"runs/engine_{name}/metrics.jsonl").read_text()
    return [line for line in map(json.loads, text.splitlines()) if "loss" in line]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What tree.py saw."""
    output = tmp_path_factory.mktemp("engine") / "tree.json"
    module = "tests.platform.transformer_engine.tree"
    done = subprocess.run(
        [sys.executable, "-m", module, str(output), *PLANS],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(output.read_text())


@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_reaches_the_real_modules(plan: str, tree: dict[str, Any]) -> None:
    """Formats read back from the modules before and after a step, module by module; classes
    counted; each product of forward and backward pass in the one format of its module."""
    saw = tree["plans"][plan]
    assert saw["native"] == (plan not in NOT_NATIVE), saw["text"]
    if not saw["native"]:
        return
    assert saw["set"] == saw["ran"] == saw["plan"] and len(saw["plan"]) == 35
    assert {name: saw["classes"].get(name) for name in CLASSES} == CLASSES
    assert saw["devices"] == ["cuda"]
    for name in ("nvfp4", "mxfp8"):
        kinds = (f"product {name.upper()} {kind}" for kind in ("TN", "NN", "NT"))
        calls = [saw["calls"].get(kind, 0) for kind in kinds]
        assert (calls[0] > 0) == (name in saw["plan"].values())
        assert calls[0] == calls[1] == calls[2], "fprop, dgrad and wgrad"


def test_the_stand_in_has_the_arguments_of_the_source(tree: dict[str, Any]) -> None:
    place = packages.folder("transformer_engine")
    assert place is not None
    source = place / "source" / "csrc" / "extensions" / "pybind.cpp"
    found = bindings.read(place / "source")
    assert set(found.functions) == set(re.findall(r'\bm\.def\(\s*"(\w+)"', source.read_text()))
    assert len(found.functions) > 150 and len(found.enums) > 12
    assert found.enums["DType"]["kFloat4E2M1"] == 10
    assert tree["wrong_arity"] == [], "reference functions with other arguments than C++"
    module = stand_in.make_module(found)
    with pytest.raises(TypeError, match="missing a required argument: 'quantizer'"):
        module.quantize(1)
    with pytest.raises(TypeError, match=r"multi_tensor_scale: noop_flag is int, not at::Tensor"):
        module.multi_tensor_scale(1, 2, [], 1.0)
    with pytest.raises(TypeError, match=r"positional.only|unexpected keyword"):
        module.rmsnorm_bwd(dz=None)


@pytest.fixture(scope="module")
def runs(small_run: tuple[Path, list[str]], in_small_run: None) -> None:
    """Two steps in each format, by Transformer Engine and by emulation without it."""
    plans = {"bf16": [], "mxfp8": [], "nvfp4_nemotron3": [NEAREST]}
    for plan in ("bf16", "mxfp8"):  # a process each: the environment is read at the import
        backend = NATIVE if plan != "bf16" else []
        pretend(
            train(small_run, f"{plan}_native", f"precision={plan}", UNFUSED, *backend), **ENGINE
        )
    pretend(
        train(small_run, "nvfp4_nemotron3_native", *NVFP4),
        train(small_run, "resumed", *NVFP4, "train.stop_after_steps=1"),
        train(small_run, "resumed", *NVFP4),
        train(small_run, "wide", *NVFP4, *WIDE),
        **ENGINE,
    )
    pretend(
        *(
            train(small_run, f"{plan}_emulated", f"precision={plan}", *words,
                  *["precision.backend=emulated"] * (plan != "bf16"))
            for plan, words in plans.items()
        ),
        **B200,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("plan", "first", "second", "validation"),
    [
        ("bf16", 1e-5, 5e-4, 4e-3),
        ("mxfp8", 5e-5, 6e-4, 6e-3),
        ("nvfp4_nemotron3", 1e-5, 1e-3, 1e-2),
    ],
)
def test_a_step_computes_what_emulation_computes(
    plan: str, first: float, second: float, validation: float, runs: None
) -> None:
    """The first loss is a forward pass from equal weights. It differs by 1e-4 and more from format
    to format, so the bound tells them apart. The norm of the gradients tests the backward pass."""
    one, other = lines(f"{plan}_native"), lines(f"{plan}_emulated")
    assert one[0]["loss"] == pytest.approx(other[0]["loss"], abs=first)
    assert one[0]["grad_norm"] == pytest.approx(other[0]["grad_norm"], rel=2e-3)
    assert one[1]["loss"] == pytest.approx(other[1]["loss"], abs=second)
    assert one[1]["validation_loss"] == pytest.approx(other[1]["validation_loss"], abs=validation)


def test_the_formats_differ(runs: None) -> None:
    found = [lines(f"{plan}_native")[0]["loss"] for plan in ("bf16", "mxfp8", "nvfp4_nemotron3")]
    assert min(abs(a - b) for a in found for b in found if a is not b) > 1e-4


def test_a_resumed_run_goes_on(runs: None) -> None:
    """Transformer Engine's optimizer, and weights whose experts are modules' separate tensors."""
    whole, resumed = lines("nvfp4_nemotron3_native"), lines("resumed")
    assert [line["loss"] for line in resumed] == [line["loss"] for line in whole]


def test_two_ranks(small_run: tuple[Path, list[str]], runs: None) -> None:
    """Tensor and sequence parallelism, which gathers quantized tensors, and experts on two ranks.
    Half of an NVFP4 tensor has a scale of its own where no rank gathers it."""
    sharded = ["parallel.tensor=2", "parallel.sequence=true"]
    pretend(
        train(small_run, "expert", *NVFP4, "parallel.expert=2"),
        train(small_run, "tensor", *NVFP4, *WIDE, *sharded),
        ranks=2,
        **ENGINE,
    )
    for name, whole in (("expert", "nvfp4_nemotron3_native"), ("tensor", "wide")):
        one, other = lines(name), lines(whole)
        for step in range(2):
            assert one[step]["loss"] == pytest.approx(other[step]["loss"], abs=3e-3), name
            assert one[step]["grad_norm"] == pytest.approx(other[step]["grad_norm"], rel=0.02), name
