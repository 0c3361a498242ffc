"""Known-bad combinations of versions, shapes and features, each with the report that documents it.

Owns: the table of guards, their conditions, and their effect (refuse the run, or warn). Does not
own: the facts about the machine (`plan.hardware`), the fallback to emulation if a native guard
fires (`plan.backend`), checks of the configuration itself (`plan.checks`). No torch.

The source of a guard is an issue or pull request, or else the file that shows the problem. Upstream
faults with a workaround here are no guards; `WORKED_AROUND` lists them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from packaging.version import Version

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.schema import Config, GemmFormat
from nemotron_train.plan.architecture.layers import LayerKind, layers
from nemotron_train.plan.hardware import Hardware
from nemotron_train.plan.precision.resolve import PrecisionPlan

TESTED_MEGATRON = "0.19.2"
# Compute capabilities for which Transformer Engine documents NVFP4 training (docs, nvfp4.rst).
DATA_CENTER_BLACKWELL = ((10, 0), (10, 3))


class Effect(StrEnum):
    """The effect of a guard that fires."""

    refuse = "refuse"
    warn = "warn"


@dataclass(frozen=True)
class Surroundings:
    """The environment of a run. hardware: None if the run is on another machine, as for the `plan`
    command; packages: installed versions; environment: environment variables; native: Transformer
    Engine computes the block-scaled formats."""

    hardware: Hardware | None = None
    packages: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    native: bool = False


@dataclass(frozen=True)
class Guard:
    """A known-bad combination. check: returns the problem in one clause, or "" if the guard does
    not fire."""

    name: str
    source: str  # owner/repo#number, or the file that shows it
    effect: Effect
    check: Callable[[Config, PrecisionPlan, Surroundings], str]


@dataclass(frozen=True)
class Finding:
    """A guard that fired."""

    name: str
    effect: Effect
    text: str


def findings(config: Config, plan: PrecisionPlan, surroundings: Surroundings) -> list[Finding]:
    """The guards that fire, in the order of `GUARDS`."""
    result = []
    for guard in GUARDS:
        text = guard.check(config, plan, surroundings)
        if text:
            result.append(Finding(guard.name, guard.effect, f"{text} ({guard.source})"))
    return result


def enforce(
    config: Config, plan: PrecisionPlan, surroundings: Surroundings, say: Callable[[str], None]
) -> None:
    """Pass every warning to `say`, one line each. Raises ConfigError for the first refusal."""
    fired = findings(config, plan, surroundings)
    for finding in fired:
        if finding.effect is Effect.warn:
            say(f"warning: {finding.text}")
    for finding in fired:
        if finding.effect is Effect.refuse:
            raise ConfigError(finding.text)


# Shapes -------------------------------------------------------------------------------------


def largest_scan_offset(config: Config) -> int:
    """The largest element offset that mamba_ssm's chunked scan computes in 32 bits on a rank.

    Rows of x, B and C have the width of the convolution's output. There is one state per chunk,
    head and channel. C B^T has one element per chunk, group and pair of positions.
    `model.mamba.core.offsets_overflow` checks the same limit on the tensors.
    """
    mamba, train = config.model.mamba, config.train
    tensor = config.parallel.tensor
    rows, length = train.micro_batch_sequences, train.sequence_length
    heads, groups = mamba.heads // tensor, max(1, mamba.groups // tensor)
    width = heads * mamba.head_dim + 2 * groups * mamba.state_size
    num_chunks = -(-length // mamba.chunk_size)
    states = rows * num_chunks * heads * mamba.head_dim * mamba.state_size
    squares = rows * num_chunks * mamba.chunk_size**2 * groups
    return max(rows * length * width, states, squares)


def _scan_overflows(config: Config, plan: PrecisionPlan, surroundings: Surroundings) -> str:
    """For a run that has the kernels, and for a plan, whose machine may have them."""
    hardware = surroundings.hardware
    may_have_kernels = hardware is None or (hardware.cuda and "mamba-ssm" in surroundings.packages)
    has_mamba = any(layer.kind == LayerKind.mamba for layer in layers(config.model))
    if not may_have_kernels or not has_mamba or largest_scan_offset(config) < 2**31:
        return ""
    return (
        f"train.sequence_length={config.train.sequence_length} with "
        f"train.micro_batch_sequences={config.train.micro_batch_sequences} and "
        f"parallel.tensor={config.parallel.tensor}: element offsets reach 2^31 in mamba_ssm's "
        "kernels, which compute them in 32 bits; our own Triton scan, with 64 bits, takes their "
        "place (it has not run on a GPU); fewer sequences a micro-batch or more tensor-parallel "
        "ranks keep mamba_ssm's"
    )


# Versions -----------------------------------------------------------------------------------


def _other_megatron(config: Config, plan: PrecisionPlan, surroundings: Surroundings) -> str:
    installed = surroundings.packages.get("megatron-core", TESTED_MEGATRON)
    if Version(installed) == Version(TESTED_MEGATRON):
        return ""
    threads = ", ".join(fault.source for fault in WORKED_AROUND if fault.in_megatron)
    return (
        f"megatron-core {installed} is installed; the adaptations, and the workarounds for "
        f"{threads}, were made and tested with {TESTED_MEGATRON}"
    )


def _grouped_product(config: Config, plan: PrecisionPlan, surroundings: Surroundings) -> str:
    """BF16 experts on a GPU use torch's grouped matrix product (grouped_mm)."""
    hardware, torch = surroundings.hardware, surroundings.packages.get("torch", "")
    if hardware is None or hardware.capability != (10, 3) or not torch.startswith("2.13."):
        return ""
    has_bf16_experts = any(
        ".mlp.experts." in path and formats.fprop == GemmFormat.bf16
        for path, formats in plan.at(0).formats.items()
    )
    if not has_bf16_experts or surroundings.native:
        return ""
    return (
        f"torch {torch} on {hardware.device_name} (compute capability 10.3): the backward pass of "
        "grouped_mm gave NaN gradients where rows lay beyond the last expert's; here none do, and "
        "that has not run on such a GPU"
    )


# Transformer Engine in block-scaled formats -------------------------------------------------


def _native(
    check: Callable[[Config, PrecisionPlan, Hardware], str],
) -> Callable[[Config, PrecisionPlan, Surroundings], str]:
    """A check of the device, applied only if Transformer Engine computes block-scaled formats."""

    def on_device(config: Config, plan: PrecisionPlan, surroundings: Surroundings) -> str:
        hardware = surroundings.hardware
        return check(config, plan, hardware) if surroundings.native and hardware is not None else ""

    return on_device


def _older(hardware: Hardware, version: str) -> bool:
    """Whether Transformer Engine is older than `version`. A pre-release of `version` counts as
    older, because it may lack features of the release."""
    installed = hardware.transformer_engine
    return installed is not None and Version(installed) < Version(version)


def _no_engine(config: Config, plan: PrecisionPlan, hardware: Hardware) -> str:
    if hardware.cuda and hardware.transformer_engine is not None:
        return ""
    return "without a GPU and Transformer Engine, Megatron-Core trains in BF16 and says nothing"


def _old_engine(config: Config, plan: PrecisionPlan, hardware: Hardware) -> str:
    if not _older(hardware, "2.14"):
        return ""
    return (
        "before Transformer Engine 2.14, NVFP4 block scales came of another formula than the "
        "emulated ones"
    )


def _before_blackwell(config: Config, plan: PrecisionPlan, hardware: Hardware) -> str:
    if hardware.capability is None or hardware.capability >= (10, 0):
        return ""
    return (
        "NVFP4 and MXFP8 products need compute capability 10.0; Transformer Engine does not "
        "refuse NVFP4 below it, and its kernels then compute nothing that is defined"
    )


def _unknown_blackwell(config: Config, plan: PrecisionPlan, hardware: Hardware) -> str:
    capability = hardware.capability
    if capability is None or capability < (10, 0) or capability in DATA_CENTER_BLACKWELL:
        return ""
    if capability[0] == 12:  # covered by three other guards
        return ""
    return "Transformer Engine documents NVFP4 training for compute capability 10.0 and 10.3 only"


def _is_workstation_blackwell(hardware: Hardware) -> bool:
    return hardware.capability is not None and hardware.capability[0] == 12


def _zeroed_gradients(config: Config, plan: PrecisionPlan, hardware: Hardware) -> str:
    if not _is_workstation_blackwell(hardware) or not _older(hardware, "2.19"):
        return ""
    return "before Transformer Engine 2.19, stochastic rounding made every gradient zero on sm_120"


def _mxfp8_on_workstation(config: Config, plan: PrecisionPlan, hardware: Hardware) -> str:
    if not _is_workstation_blackwell(hardware) or GemmFormat.mxfp8 not in plan.formats_used:
        return ""
    return f"precision={config.precision.name} has MXFP8 products, which sm_120 cannot compute"


def _fused_transform(config: Config, plan: PrecisionPlan, hardware: Hardware) -> str:
    if not _is_workstation_blackwell(hardware) or _older(hardware, "2.19"):
        return ""
    return (
        f"{hardware.describe()}: NVFP4 training is documented for compute capability 10.0 and "
        "10.3; on sm_120 the fused Hadamard kernel has crashed"
    )


# Environment variables of Transformer Engine that change results, and their neutral values. They
# are read when it is imported (transformer_engine/common/recipe/__init__.py).
_ENGINE_SWITCHES = {
    "NVTE_NVFP4_DISABLE_RHT": "0",
    "NVTE_NVFP4_DISABLE_STOCHASTIC_ROUNDING": "0",
    "NVTE_NVFP4_DISABLE_2D_QUANTIZATION": "0",
    "NVTE_NVFP4_ROW_SCALED_ACTIVATION": "0",
    "NVTE_NVFP4_4OVER6": "none",
    "NVTE_BACKWARD_OVERRIDE": "",
}


def _overriding_environment(config: Config, plan: PrecisionPlan, surroundings: Surroundings) -> str:
    if not surroundings.native:
        return ""
    overrides = {
        name: value
        for name, neutral in _ENGINE_SWITCHES.items()
        if (value := surroundings.environment.get(name, neutral)) != neutral
    }
    if not overrides:
        return ""
    texts = ", ".join(f"{name}={value}" for name, value in overrides.items())
    return (
        f"{texts} in the environment would override the precision plan unseen; unset it and say "
        "it in the plan (weight_2d, hadamard, stochastic_rounding)"
    )


def _fast_math(config: Config, plan: PrecisionPlan, surroundings: Surroundings) -> str:
    if not surroundings.native or surroundings.environment.get("NVTE_USE_FAST_MATH", "0") == "0":
        return ""
    return (
        "NVTE_USE_FAST_MATH is set: faster quantization that is not the reference's, nor the "
        "emulation's, arithmetic"
    )


GUARDS: tuple[Guard, ...] = (
    Guard("scan_offsets", "state-spaces/mamba#1015", Effect.warn, _scan_overflows),
    Guard("megatron_version", "pyproject.toml", Effect.warn, _other_megatron),
    Guard("grouped_product", "pytorch/pytorch#193633", Effect.warn, _grouped_product),
    Guard("no_engine", "megatron/core/fp4_utils.py", Effect.refuse, _native(_no_engine)),
    Guard(
        "old_engine",
        "transformer_engine/common/cast/nvfp4/core_nvfp4.cuh",
        Effect.refuse,
        _native(_old_engine),
    ),
    Guard(
        "before_blackwell",
        "NVIDIA/TransformerEngine#3281",
        Effect.refuse,
        _native(_before_blackwell),
    ),
    Guard(
        "unknown_blackwell",
        "NVIDIA/TransformerEngine#2255",
        Effect.refuse,
        _native(_unknown_blackwell),
    ),
    Guard(
        "zeroed_gradients",
        "NVIDIA/TransformerEngine#3281",
        Effect.refuse,
        _native(_zeroed_gradients),
    ),
    Guard(
        "mxfp8_on_workstation",
        "transformer_engine/pytorch/quantization.py",
        Effect.refuse,
        _native(_mxfp8_on_workstation),
    ),
    Guard(
        "fused_transform",
        "NVIDIA/TransformerEngine#3062",
        Effect.warn,
        _native(_fused_transform),
    ),
    Guard(
        "overriding_environment",
        "transformer_engine/common/recipe/__init__.py",
        Effect.refuse,
        _overriding_environment,
    ),
    Guard(
        "fast_math",
        "transformer_engine/pytorch/csrc/quantizer.cpp",
        Effect.warn,
        _fast_math,
    ),
)


@dataclass(frozen=True)
class WorkedAround:
    """An upstream fault with a workaround here. by: the module with the workaround."""

    source: str
    fault: str
    by: str
    in_megatron: bool = True


WORKED_AROUND: tuple[WorkedAround, ...] = (
    WorkedAround(
        "NVIDIA/Megatron-LM#7172",
        "MTP with MoE: the auxiliary loss is recorded under an index beyond its table",
        "model.moe.router",
    ),
    WorkedAround(
        "NVIDIA/Megatron-LM#7452",
        "MTP losses per token are divided by a rank's own number of tokens",
        "train.train_step",
    ),
    WorkedAround(
        "NovaSky-AI/SkyRL#2056",
        "the Mamba state crosses packed documents unless total_tokens is given",
        "model.mamba.layer",
    ),
    WorkedAround(
        "NVIDIA/TransformerEngine#2352",
        "parameters gathered in FP4 (fp4_param) train wrongly",
        "plan.precision.transformer_engine",
        in_megatron=False,
    ),
    WorkedAround(
        "NVIDIA-NeMo/Megatron-Bridge#638",
        "MXFP8 gradients in E5M2 diverged",
        "plan.precision.transformer_engine",
        in_megatron=False,
    ),
    WorkedAround(
        "NVIDIA/TransformerEngine#2966",
        "grouped linears fail where an expert's tokens are no whole blocks",
        "plan.precision.transformer_engine",
        in_megatron=False,
    ),
)
