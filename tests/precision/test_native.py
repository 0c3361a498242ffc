"""Native plans from configuration to trained model, over a stand-in for Transformer Engine.

Megatron-Core's own wrappers, contexts, per-module recipes, grouped experts and dispatcher run
unchanged. The stand-in (tests/precision/stand_in) computes in plain PyTorch and records the recipe
under which each linear ran. The tests cover the choices Megatron makes and how the parts fit, on
one rank. Not covered: any kernel, any GPU, tensor or expert parallelism, and whether the real
package records what the stand-in records. Its names were read in Transformer Engine's source.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
PLANS = ("nvfp4_nemotron3", "nvfp4_all", "mxfp8", "nvfp4_without_mtp", "nvfp4_without_last_layers")
# The small model, ME*EM*E and MTP's *E: Table 3 of arXiv 2604.12374 by hand, the last pair in BF16.
FIRST_FIVE = {
    "0.mixer.in_proj": "nvfp4",
    "0.mixer.out_proj": "mxfp8",
    "1.mlp.fc1_latent_proj": "bf16",
    "1.mlp.fc2_latent_proj": "bf16",
    "1.mlp.experts.linear_fc1": "nvfp4",
    "1.mlp.experts.linear_fc2": "nvfp4",
    "1.mlp.shared_experts.linear_fc1": "nvfp4",
    "1.mlp.shared_experts.linear_fc2": "nvfp4",
    "2.self_attention.linear_qkv": "bf16",
    "2.self_attention.linear_proj": "bf16",
    "3.mlp.fc1_latent_proj": "bf16",
    "3.mlp.fc2_latent_proj": "bf16",
    "3.mlp.experts.linear_fc1": "nvfp4",
    "3.mlp.experts.linear_fc2": "nvfp4",
    "3.mlp.shared_experts.linear_fc1": "nvfp4",
    "3.mlp.shared_experts.linear_fc2": "nvfp4",
    "4.mixer.in_proj": "nvfp4",
    "4.mixer.out_proj": "mxfp8",
}


@pytest.fixture(scope="module")
def saw(
    tmp_path_factory: pytest.TempPathFactory, small_run: tuple[Path, list[str]]
) -> dict[str, Any]:
    """The observations of native_run.py, from a process in which the stand-in can be imported."""
    folder = tmp_path_factory.mktemp("native")
    data = [text for text in small_run[1] if text.startswith("data")]
    path = os.pathsep.join([str(HERE / "stand_in"), str(HERE.parent.parent)])
    done = subprocess.run(
        [sys.executable, str(HERE / "native_run.py"), str(folder), *data],
        cwd=small_run[0],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "saw.json").read_text())


def wanted(plan: str, path: str) -> str:
    local = path.removeprefix("decoder.layers.")
    if plan == "nvfp4_all" or plan == "mxfp8":
        return plan.removesuffix("_all")
    in_mtp, in_last = path.startswith("mtp."), local[:2] in ("5.", "6.")
    if in_mtp and plan != "nvfp4_without_mtp":
        return "bf16"
    if in_last and plan != "nvfp4_without_last_layers":
        return "bf16"
    if not in_mtp and not in_last:
        return FIRST_FIVE[local]
    exempt = path.endswith(("_latent_proj", "linear_qkv", "linear_proj"))
    return "bf16" if exempt else "nvfp4"


@pytest.mark.parametrize("plan", PLANS)
def test_linears_run_in_the_plans_formats(saw: dict[str, Any], plan: str) -> None:
    """Every linear that has a rule: the format it is set to and the format it ran in."""
    seen = saw["plans"][plan]
    assert set(seen["ran"]) == set(seen["set"])
    assert len(seen["ran"]) == len(FIRST_FIVE) + (2 + 6) + (1 + 2 + 6)
    for path, ran in seen["ran"].items():
        assert ran == seen["set"][path] == wanted(plan, path), path
    assert seen["without_gradient"] == []


def test_a_difference_stops_the_run(saw: dict[str, Any]) -> None:
    lost = "decoder.layers.0.mixer.out_proj {} nvfp4, the plan says mxfp8: the run stops"
    assert saw["refusals"]["set"].startswith(lost.format("is set to run in"))
    assert saw["refusals"]["ran"].startswith(lost.format("ran in"))
    plain = "decoder.layers.0.mixer.in_proj is set to run in bf16, the plan says nvfp4"
    assert saw["refusals"]["plain"].startswith(plain)
    assert saw["refusals"]["option"].endswith("disable_rht=False, the plan says hadamard=False")


def test_experts_are_the_plain_ones_in_other_parameters(saw: dict[str, Any]) -> None:
    """Both start from the same weights. The stand-in does not quantize, so the losses in BF16 are
    equal: with Megatron's dispatcher and its padding in the native model, without them in ours."""
    exchange = saw["exchange"]
    assert exchange["names"] and exchange["initial"]
    assert exchange["losses"]["native"] == pytest.approx(exchange["losses"]["plain"], rel=1e-5)


@pytest.mark.parametrize("direction", ["to_plain", "to_native"])
def test_checkpoints_know_no_backend(saw: dict[str, Any], direction: str) -> None:
    assert saw["exchange"][direction]
    assert saw["exchange"][f"{direction}_keys"] == [], "no pickled state of Transformer Engine"


def test_a_run_goes_on_under_the_other_backend(saw: dict[str, Any]) -> None:
    """Two native steps, one more after a resume, and the last one emulated, with the optimizer
    state."""
    assert saw["run"]["codes"] == [3, 3, 0]
    losses = saw["run"]["losses"]
    assert len(losses) == 4 and losses == sorted(losses, reverse=True)


def test_auto_is_native_on_blackwell(saw: dict[str, Any]) -> None:
    device = "NVIDIA B200, compute capability 10.0, Transformer Engine 2.17.1"
    assert saw["choice"] == f"precision nvfp4_nemotron3: native ({device})"
