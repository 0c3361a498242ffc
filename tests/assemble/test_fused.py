"""Transformer Engine's fused forms over a stand-in (tests/precision/stand_in): the same model.

A fused model has a norm inside in_proj and linear_qkv, and linears that add their weight gradient
to the FP32 buffer themselves. It is compared with the model without both, which is the second
truth. Not covered: any kernel, any GPU, several ranks, block-scaled formats, and whether the real
package does what the stand-in does. Its arguments were read in Megatron's wrappers, which run here.
"""

import json
import os
import subprocess
import sys
import types
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from nemotron_train.assemble.fused import start_user_buffers
from nemotron_train.compose.compose import compose_config

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def saw(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The observations of fused_run.py."""
    folder = tmp_path_factory.mktemp("fused")
    stand_in = HERE.parent / "precision" / "stand_in"
    done = subprocess.run(
        [sys.executable, str(HERE / "fused_run.py"), str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(stand_in), str(HERE.parent.parent)])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "saw.json").read_text())


def test_the_norm_is_inside_the_linear(saw: dict[str, Any]) -> None:
    classes = {name.removeprefix("decoder.layers."): c for name, c in saw["classes"].items()}
    assert classes["0.mixer.in_proj"] == ["TELayerNormColumnParallelLinear", True]
    assert classes["2.self_attention.linear_qkv"] == ["TELayerNormColumnParallelLinear", True]
    assert classes["0.mixer.out_proj"] == ["TERowParallelLinear", True]
    assert classes["1.mlp.fc1_latent_proj"] == ["TELinear", True]
    assert all(fuses for _, fuses in classes.values())


def test_the_output_layer_asks_for_no_apex(saw: dict[str, Any]) -> None:
    """It is Megatron's linear, which raises RuntimeError without apex."""
    assert saw["output_layer_fuses"] is False


def test_the_fused_model_is_the_same_model(saw: dict[str, Any]) -> None:
    """Initial weights by their effect: losses and every gradient, accumulated over two passes."""
    plain, fused = saw["losses"]
    assert fused == pytest.approx(plain, rel=1e-6)
    assert saw["same_names"] and saw["worst_gradient"] < 1e-4


def test_the_fused_model_decodes_the_same(saw: dict[str, Any]) -> None:
    """Its layers have no norm of their own, which decoding must not look for."""
    plain, fused = saw["decoded"]
    assert len(plain) == 2 * (19 + 12)
    assert fused == pytest.approx(plain, abs=1e-4)


def test_apex_adds_the_gradients_of_megatrons_linears(saw: dict[str, Any]) -> None:
    """Over a stand-in for apex's extension. The first model calls it never; the second one in each
    linear of two backward passes, and in the output layer once for each of its uses. In BF16 the
    two round weight gradients differently, except in the output layer, where both add in FP32."""
    apex = saw["apex"]
    plain, fused = apex["losses"]
    assert fused == plain
    linears = 2 + 2 + 2 + 3  # in_proj and out_proj, two of attention, two shared experts
    assert apex["calls"] >= 2 * linears
    assert 0 < apex["worst_gradient"] < 0.02
    assert apex["output_layer"] < 0.01


@pytest.mark.parametrize("direction", ["to_plain", "to_fused"])
def test_checkpoints_know_no_fusion(saw: dict[str, Any], direction: str) -> None:
    assert saw[direction]


@pytest.mark.parametrize("quantized", [False, True])
def test_user_buffers_have_the_size_of_a_piece(
    quantized: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The arguments of Transformer Engine's `initialize_ub`. Not covered: the buffers."""
    calls: list[dict[str, Any]] = []
    modes = types.SimpleNamespace(FP8="fp8", NONE="none")
    base = types.SimpleNamespace(
        UserBufferQuantizationMode=modes, initialize_ub=lambda **options: calls.append(options)
    )
    package = types.ModuleType("transformer_engine.pytorch")
    package.module = types.SimpleNamespace(base=base)  # type: ignore[attr-defined]
    parent = types.ModuleType("transformer_engine")
    parent.pytorch = package  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformer_engine", parent)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", package)
    config = compose_config(
        ["run=nano_30b_a3b", "train.micro_batch_sequences=2", "parallel.context=2"]
    )
    start_user_buffers(config, quantized)
    (call,) = calls
    rows = 2 * config.train.sequence_length // 2
    assert call["shape"] == [rows, config.model.hidden_size]
    assert call["tp_size"] == asdict(config.parallel)["tensor"]
    assert call["quantization_modes"] == (["fp8", "none"] if quantized else ["none"])
