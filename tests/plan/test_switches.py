"""Every switch: where it is on, where it is off and why, and that `on` refuses there in one line.

Not covered: what a switch does (tests/assemble), a GPU.
"""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from nemotron_train.cli.main import main
from nemotron_train.compose.compose import compose_config
from nemotron_train.config.errors import ConfigError
from nemotron_train.config.gpu import Dispatcher, GpuConfig, Switch
from nemotron_train.config.schema import Config
from nemotron_train.plan.precision.resolve import PrecisionPlan, resolve_plan
from nemotron_train.plan.switches import (
    ALL_OFF,
    APEX_GRADIENTS,
    CAUSAL_CONV1D,
    DEEP_EP,
    HYBRID_EP,
    MAMBA_SSM,
    PACKAGES,
    PERMUTATION,
    SWITCHES,
    TRANSFORMER_ENGINE,
    VARIABLE_LENGTH,
    Facts,
    Switches,
    choose_switches,
    exchanges_tokens,
    planned_switches,
)

BROKEN = "ImportError: libcudart.so.12: cannot open shared object file"
NANO = [
    "run=nano_30b_a3b",
    "precision=bf16",
]  # no latent size, a shared expert, ranks that exchange
SUPER = ["run=super_120b_a12b", "precision=bf16"]  # a latent size
TINY = ["precision=bf16"]  # one rank
EMULATED = ["run=nano_30b_a3b", "precision=nvfp4_nemotron3"]


def facts(*missing: str, cuda: bool = True, native: bool = False) -> Facts:
    return Facts(cuda, dict.fromkeys(missing, BROKEN), native)


@cache
def composed(words: tuple[str, ...]) -> tuple[Config, PrecisionPlan]:
    config = compose_config(list(words))
    return config, resolve_plan(config)


def choose(words: list[str], given: Facts, *more: str) -> Switches:
    """The decision for `words`. more: knobs of `gpu`, set on the composed configuration, or any
    other knobs."""
    gpu = [word for word in more if word.startswith("gpu.") and word not in words]
    config, plan = composed((*words, *[word for word in more if word not in gpu]))
    changes = dict(word.removeprefix("gpu.").split("=") for word in gpu)
    typed = {name: _typed(name, value) for name, value in changes.items()}
    return choose_switches(replace(config, gpu=replace(config.gpu, **typed)), plan, given)


def _typed(name: str, value: str) -> Any:
    if name == "tp_comm_overlap":
        return value == "true"
    return Dispatcher(value) if name == "moe_token_dispatcher" else Switch(value)


def test_knobs_of_a_command_line_have_these_types() -> None:
    """`on` and `off` are booleans of YAML, but not of a command line."""
    gpu = compose_config(["gpu.mamba_ssm=on", "gpu.fused_adamw=off"]).gpu
    assert gpu == GpuConfig(mamba_ssm=Switch.on, fused_adamw=Switch.off)


def is_on(name: str, switches: Switches) -> bool:
    on = switches.text.partition(" on: ")[2].partition("; off: ")[0].split(", ")
    return name in on


def test_with_every_package_everything_legal_is_on() -> None:
    nano = choose(NANO, facts())
    assert nano.transformer_engine_gradients and not nano.apex_gradients
    assert nano.permute_fusion and nano.shared_expert_overlap
    assert nano.fused_norm_linear and nano.fused_adamw
    assert nano.dispatcher == "alltoall" and not nano.tensor_parallel_overlap
    assert nano.text.endswith("fused_adamw; off: variable_length_attention")
    assert "\n" not in nano.text


def test_a_cpu_has_none_and_says_nothing() -> None:
    for words in (NANO, SUPER, TINY, EMULATED):
        assert choose(words, facts(*PACKAGES, cuda=False)) == ALL_OFF


def test_apex_adds_gradients_where_transformer_engine_cannot() -> None:
    switches = choose(NANO, facts(TRANSFORMER_ENGINE, PERMUTATION))
    assert switches.apex_gradients and not switches.transformer_engine_gradients


WHERE_OFF = [  # (switch, configuration, facts, words of the reason)
    (TRANSFORMER_ENGINE, NANO, facts(TRANSFORMER_ENGINE), "libcudart.so.12"),
    (MAMBA_SSM, NANO, facts(MAMBA_SSM), "libcudart.so.12"),
    (CAUSAL_CONV1D, NANO, facts(CAUSAL_CONV1D), "libcudart.so.12"),
    (
        "gradient_accumulation_fusion",
        NANO,
        facts(TRANSFORMER_ENGINE, APEX_GRADIENTS),
        "apex's fused_weight_gradient_mlp_cuda",
    ),
    ("gradient_accumulation_fusion", EMULATED, facts(), "is emulated"),
    (
        "gradient_accumulation_fusion",
        [*NANO, "precision.telemetry.every=1", "precision.telemetry.probe=nvfp4"],
        facts(),
        "measured here",
    ),
    (
        "gradient_accumulation_fusion",
        ["precision=fp32"],
        facts(TRANSFORMER_ENGINE),
        "precision.parameter_dtype=float32",
    ),
    ("moe_permute_fusion", NANO, facts(PERMUTATION), "2.1 or newer"),
    ("moe_permute_fusion", TINY, facts(), "no dispatcher"),
    ("moe_shared_expert_overlap", TINY, facts(), "no exchange"),
    ("moe_shared_expert_overlap", SUPER, facts(), "model.moe.latent_size=1024"),
    (
        "moe_shared_expert_overlap",
        [*NANO, "model.moe.shared_expert_hidden_size=0"],
        facts(),
        "no shared expert",
    ),
    (
        "moe_shared_expert_overlap",
        [*NANO, "gpu.moe_token_dispatcher=deepep"],
        facts(),
        "gpu.moe_token_dispatcher=deepep",
    ),
    ("moe_shared_expert_overlap", EMULATED, facts(), "is emulated"),
    (
        "moe_shared_expert_overlap",
        [*NANO, "train.recompute.moe=full"],
        facts(),
        "train.recompute.moe=full",
    ),
    ("variable_length_attention", NANO, facts(), "Transformer Engine's attention"),
    ("variable_length_attention", NANO, facts(TRANSFORMER_ENGINE, VARIABLE_LENGTH), "varlen"),
    (
        "variable_length_attention",
        NANO,
        replace(facts(TRANSFORMER_ENGINE), capability=(7, 5)),
        "this device has 7.5",
    ),
    (
        "variable_length_attention",
        ["precision=fp32"],
        facts(TRANSFORMER_ENGINE),
        "precision.parameter_dtype=float32",
    ),
    (
        "variable_length_attention",
        [*TINY, "model.attention.head_dim=36"],
        facts(TRANSFORMER_ENGINE),
        "model.attention.head_dim=36",
    ),
    (
        "variable_length_attention",
        [*TINY, "model.pattern=ME", "model.mtp.depths=0"],
        facts(TRANSFORMER_ENGINE),
        "has no attention",
    ),
    ("fused_norm_linear", NANO, facts(TRANSFORMER_ENGINE), "libcudart.so.12"),
    ("fused_norm_linear", EMULATED, facts(), "emulated"),
    ("fused_norm_linear", EMULATED, facts(native=True), "in_proj in a block-scaled format"),
]


@pytest.mark.parametrize(("name", "words", "given", "reason"), WHERE_OFF)
def test_auto_is_off_and_on_refuses_where_it_cannot_work(
    name: str, words: list[str], given: Facts, reason: str
) -> None:
    assert not is_on(name, choose(words, given))
    with pytest.raises(ConfigError) as refusal:
        choose(words, given, f"gpu.{name}=on")
    text = str(refusal.value)
    assert text.startswith(f"gpu.{name}=on: ") and reason in text and "\n" not in text
    assert f"gpu.{name}=auto" in text


@pytest.mark.parametrize("name", SWITCHES)
def test_each_switch_is_off_on_demand_and_refused_on_a_cpu(name: str) -> None:
    """Each is on for Nano with the packages that it needs, so neither half is vacuous."""
    here = facts(TRANSFORMER_ENGINE) if name == "variable_length_attention" else facts()
    assert is_on(name, choose(NANO, here))
    assert is_on(name, choose(NANO, here, f"gpu.{name}=on"))
    assert not is_on(name, choose(NANO, here, f"gpu.{name}=off"))
    with pytest.raises(ConfigError, match=f"gpu.{name}=on: there is no CUDA device"):
        choose(NANO, facts(*PACKAGES, cuda=False), f"gpu.{name}=on")


def test_a_reason_names_every_switch() -> None:
    """No switch is without a case in which it is off, except the optimizer's."""
    assert {name for name, *_ in WHERE_OFF} == set(SWITCHES) - {"fused_adamw"}


OPTIONS = [  # (knobs, configuration, facts, words of the reason; "" where it works)
    (["gpu.moe_token_dispatcher=deepep"], NANO, facts(), ""),
    (["gpu.moe_token_dispatcher=hybridep"], SUPER, facts(), ""),
    (["gpu.moe_token_dispatcher=deepep"], NANO, facts(DEEP_EP), "deep_ep cannot be used"),
    (["gpu.moe_token_dispatcher=hybridep"], NANO, facts(HYBRID_EP), "HybridEPBuffer"),
    (["gpu.moe_token_dispatcher=deepep"], TINY, facts(), "parallel.expert_tensor is 1"),
    (
        ["gpu.moe_token_dispatcher=deepep"],
        NANO,
        facts(*PACKAGES, cuda=False),
        "there is no CUDA device",
    ),
    (["gpu.tp_comm_overlap=true"], SUPER, facts(), ""),
    (["gpu.tp_comm_overlap=true"], TINY, facts(), "parallel.tensor=1"),
    (["gpu.tp_comm_overlap=true"], SUPER, facts(TRANSFORMER_ENGINE), "libcudart"),
    (["gpu.tp_comm_overlap=true"], [*SUPER, "precision=nvfp4_nemotron3"], facts(), "emulated"),
    (
        ["gpu.tp_comm_overlap=true", "train.short_sequence_length=4096", "train.short_share=0.5"],
        SUPER,
        facts(),
        "train.short_sequence_length=4096",
    ),
]


@pytest.mark.parametrize(("knobs", "words", "given", "reason"), OPTIONS)
def test_options(knobs: list[str], words: list[str], given: Facts, reason: str) -> None:
    if not reason:
        assert (
            knobs[0].removeprefix("gpu.").removesuffix("=true") in choose(words, given, *knobs).text
        )
        return
    with pytest.raises(ConfigError) as refusal:
        choose(words, given, *knobs)
    text = str(refusal.value)
    assert text.startswith(f"{knobs[0]}: ") and reason in text and "\n" not in text


def test_a_native_model_always_has_a_dispatcher() -> None:
    """Native experts are reached through Megatron's dispatcher on one rank, too."""
    tiny = compose_config(TINY)
    assert exchanges_tokens(tiny, native=True) and not exchanges_tokens(tiny, native=False)


def test_plan_prints_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *NANO]) == 0
    (line,) = [text for text in capsys.readouterr().out.splitlines() if "gpu switches" in text]
    config = compose_config(NANO)
    assert line == planned_switches(config, resolve_plan(config))
    assert line.startswith("on a GPU where every package can be used, gpu switches on: ")


def test_plan_knows_what_is_switched_off() -> None:
    config = compose_config([*NANO, "gpu.transformer_engine=off"])
    line = planned_switches(config, resolve_plan(config))
    assert line.endswith("off: transformer_engine, moe_permute_fusion, fused_norm_linear"), (
        "apex adds the gradients"
    )


def test_plan_refuses_what_the_configuration_excludes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *SUPER, "gpu.moe_shared_expert_overlap=on"]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    assert shown.err.startswith("nemotron-train: gpu.moe_shared_expert_overlap=on: ")
