"""The start of a process on a pretended GPU: packages, backend, switches and the lines about them.

`device.prepare` and `device.hardware` are replaced; the decisions and their order are real. Not
covered: a GPU, and the real packages (tests/platform/test_packages.py has fakes).
"""

import json
import os
from dataclasses import replace
from typing import Any

import pytest
import torch.distributed as dist

from nemotron_train.compose.compose import compose_config
from nemotron_train.config.errors import ConfigError
from nemotron_train.config.json_text import json_text
from nemotron_train.config.schema import ParallelConfig
from nemotron_train.plan.derive import derive
from nemotron_train.plan.hardware import Hardware
from nemotron_train.plan.precision.resolve import resolve_plan
from nemotron_train.plan.switches import (
    ALL_OFF,
    CAUSAL_CONV1D,
    MAMBA_SSM,
    PERMUTATION,
    TRANSFORMER_ENGINE,
)
from nemotron_train.platform import device, groups, packages, runtime
from nemotron_train.platform.device import Platform
from nemotron_train.platform.runtime import cuda_environment, queue_warning, start_runtime
from nemotron_train.run import machine_record

H100 = Hardware("NVIDIA H100 80GB HBM3", (9, 0), "2.20.2")
B200 = Hardware("NVIDIA B200", (10, 0), "2.20.2")
BROKEN = "ImportError: libcudart.so.12: cannot open shared object file"
BROKEN_ENGINE = {TRANSFORMER_ENGINE: BROKEN, PERMUTATION: packages.NOT_INSTALLED}
NATIVE = ["run=nano_30b_a3b", "precision=nvfp4_nemotron3", "precision.default.hadamard=false"]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Starts a runtime on a GPU on which the packages have these problems. Returns it, with what
    was shown and what was warned of."""
    environment = dict(os.environ)
    environment.pop("CUDA_DEVICE_MAX_CONNECTIONS", None)
    monkeypatch.setattr(os, "environ", environment)

    def started(
        words: list[str], problems: dict[str, str], hardware: Hardware = H100, **options: Any
    ) -> tuple[runtime.Runtime, list[str], list[str]]:
        gpu = Platform("cuda", hardware.device_name, "nccl", False, False)
        refused: list[str] = []

        def found(names: Any = ()) -> dict[str, str]:
            refused.extend(names)
            off = {name: f"gpu.{name}=off" for name in refused}
            return {**problems, **off}

        monkeypatch.setattr(device, "prepare", lambda threads=0: gpu)
        monkeypatch.setattr(device, "hardware", lambda platform: hardware)
        monkeypatch.setattr(packages, "problems", found)
        config = compose_config(words)
        shown: list[str] = []
        said: list[str] = []
        plan = resolve_plan(config)
        result = start_runtime(config, plan, 0, said.append, shown.append, **options)
        return result, shown, said

    return started


def test_a_package_that_cannot_be_used_is_said_and_not_used(start: Any) -> None:
    problems = {MAMBA_SSM: BROKEN, CAUSAL_CONV1D: packages.NOT_INSTALLED}
    result, shown, said = start(["precision=bf16"], problems)
    assert not result.platform.mamba_kernels and result.platform.transformer_engine
    lines = [line for line in said if "cannot be used" in line]
    expected = f"warning: mamba_ssm is installed but cannot be used: {BROKEN}; the run goes on"
    assert lines == [f"{expected} without it"]
    assert "Mamba-2: own kernels" in shown[0]
    assert shown[-1].startswith("gpu switches on: transformer_engine, gradient_")
    assert result.platform.switches.fused_adamw


@pytest.mark.parametrize("package", [TRANSFORMER_ENGINE, MAMBA_SSM, CAUSAL_CONV1D])
def test_a_package_that_is_demanded_and_broken_ends_the_start(start: Any, package: str) -> None:
    problems = BROKEN_ENGINE if package == TRANSFORMER_ENGINE else {package: BROKEN}
    with pytest.raises(ConfigError) as refusal:
        start(["precision=bf16", f"gpu.{package}=on"], problems)
    text = str(refusal.value)
    assert text.startswith(f"gpu.{package}=on: {package} cannot be used ({BROKEN}); ")


def test_a_package_can_be_switched_off(start: Any) -> None:
    result, _, said = start(["precision=bf16", "gpu.mamba_ssm=off"], {})
    assert not result.platform.mamba_kernels and said == []


def test_faults_of_a_package_that_is_off_do_not_matter(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A warning about mamba_ssm's 32-bit offsets, where its scan would be used."""
    installed = {"mamba-ssm": "2.3.0"}
    monkeypatch.setattr(runtime, "installed_versions", lambda: installed)
    long = ["run=ultra_550b_a55b", "precision=bf16", "train.micro_batch_sequences=1"]
    long += ["train.sequence_length=262144", "train.global_batch_tokens=100663296"]
    for words, problems, warns in (
        (long, {}, True),
        ([*long, "gpu.mamba_ssm=off"], {}, False),
        (long, {MAMBA_SSM: BROKEN}, False),
    ):
        _, _, said = start(words, problems)
        assert any("mamba#1015" in line for line in said) == warns


def test_native_formats_fall_back_where_the_engine_does_not_load(start: Any) -> None:
    """The environment for Transformer Engine is set before its import, and unset again."""
    result, shown, _ = start(NATIVE, {}, B200)
    assert result.backend.native and "NVTE_NVFP4_DISABLE_RHT" in os.environ
    del os.environ["NVTE_NVFP4_DISABLE_RHT"]
    result, shown, said = start(NATIVE, BROKEN_ENGINE, B200)
    assert not result.backend.native and "NVTE_NVFP4_DISABLE_RHT" not in os.environ
    assert any("emulated" in line for line in shown)
    assert any(line.startswith("warning: transformer_engine is installed but") for line in said)
    with pytest.raises(ConfigError, match=r"precision\.backend=native: .*not installed"):
        start([*NATIVE, "precision.backend=native"], BROKEN_ENGINE, B200)


def test_native_formats_need_no_engine_that_is_switched_off(start: Any) -> None:
    result, _, _ = start([*NATIVE, "gpu.transformer_engine=off"], {}, B200)
    assert not result.backend.native and not result.platform.transformer_engine


def test_a_process_that_generates_has_the_switches_of_a_forward_pass(start: Any) -> None:
    """What a run demands for training is not demanded again where its checkpoint is read."""
    words = ["precision=bf16", "gpu.moe_token_dispatcher=deepep", "gpu.tp_comm_overlap=true"]
    words += ["gpu.moe_shared_expert_overlap=on"]
    result, shown, _ = start(words, {}, trains=False)
    switches = result.platform.switches
    assert result.platform.transformer_engine and switches.fused_norm_linear
    assert switches == replace(ALL_OFF, fused_norm_linear=True)
    assert not any("gpu switches" in line for line in shown)
    result, _, _ = start(words, BROKEN_ENGINE, trains=False)
    assert result.platform.switches == replace(ALL_OFF, variable_length_attention=True)


def test_a_start_records_its_switches_and_unusable_packages(start: Any) -> None:
    runtime_, _, _ = start(["precision=bf16"], {MAMBA_SSM: BROKEN})
    machine = machine_record(runtime_, derive(compose_config(["precision=bf16"]), 1))
    assert machine["unusable_packages"] == {MAMBA_SSM: BROKEN}
    assert machine["switches"]["fused_adamw"] is True and "text" not in machine["switches"]
    assert json.loads(json_text(machine)) == machine


def test_a_cpu_says_nothing_new() -> None:
    shown: list[str] = []
    config = compose_config([])
    result = start_runtime(config, resolve_plan(config), 0, shown.append, shown.append)
    assert len(shown) == 1 and shown[0].startswith("CPU, ")
    assert result.platform.switches == ALL_OFF


@pytest.mark.parametrize(
    ("parallel", "queues"),
    [({}, None), ({"tensor": 2}, "1"), ({"context": 2}, "1"), ({"expert": 2, "pipeline": 2}, None)],
)
def test_one_hardware_queue_where_communication_is_queued_first(
    parallel: dict[str, int], queues: str | None
) -> None:
    layout = ParallelConfig(**parallel)
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    assert cuda_environment(layout, {}).get(name) == queues
    assert name not in cuda_environment(layout, {name: "8"}), "the user's value stays"
    assert cuda_environment(layout, {})["MAMBA_DETERMINISTIC"] == "1"
    assert cuda_environment(layout, {name: "1", "MAMBA_DETERMINISTIC": "0"}) == {}
    warns = queues is not None
    assert bool(queue_warning(layout, H100, {name: "8"})) == warns
    assert not queue_warning(layout, B200, {name: "8"})
    assert not queue_warning(layout, replace(H100, capability=None), {name: "8"})
    assert not queue_warning(layout, H100, {name: "1"}) and not queue_warning(layout, H100, {})


@pytest.mark.parametrize(("backend", "number"), [("nccl", 3), ("gloo", None)])
def test_nccl_gets_the_device(
    backend: str, number: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The arguments of torch's call. Not covered: NCCL."""
    calls: list[dict[str, Any]] = []

    class Stop(Exception):
        pass

    def init(name: str, **options: Any) -> None:
        calls.append(options)
        raise Stop

    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", init)
    monkeypatch.setattr(groups, "own_device", lambda: groups.torch.device("cuda", 3))
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(Stop):
        groups.start(ParallelConfig(), backend)
    given = calls[0]["device_id"]
    assert (given and given.index) == number
