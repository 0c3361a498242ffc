"""The performance switches of a run on one machine: what Megatron-Core and the optimizer get.

Owns: the decision, a pure function of the configuration, the precision plan and the usable
packages, and the line that reports it. A switch is on where its knob is `auto` and nothing speaks
against it; `on` makes an error of the reason. Does not own: the import of the packages
(`platform.packages`), the translation (`assemble`), known faults of versions (`plan.guards`). No
torch.

The reasons were read in megatron-core 0.19.2. No switch has run on a GPU.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.gpu import Dispatcher, Switch
from nemotron_train.config.schema import Backend, Config, Dtype, RecomputeMode
from nemotron_train.plan.architecture.layers import LayerKind, layers
from nemotron_train.plan.precision.resolve import PrecisionPlan

# Packages by the name of their knob, or of what they bring. `platform.packages` imports them.
TRANSFORMER_ENGINE, MAMBA_SSM, CAUSAL_CONV1D = "transformer_engine", "mamba_ssm", "causal_conv1d"
PERMUTATION = "transformer_engine.pytorch.permutation"
APEX_GRADIENTS = "fused_weight_gradient_mlp_cuda"
DEEP_EP, HYBRID_EP = "deep_ep", "deep_ep.HybridEPBuffer"
VARIABLE_LENGTH = "torch.nn.attention.varlen"
PACKAGES = (TRANSFORMER_ENGINE, MAMBA_SSM, CAUSAL_CONV1D, PERMUTATION)
PACKAGES += (APEX_GRADIENTS, DEEP_EP, HYBRID_EP, VARIABLE_LENGTH)


@dataclass(frozen=True)
class Facts:
    """What the decision depends on besides the configuration.

    problems: for each package that cannot be used, the reason; native: Transformer Engine computes
    the block-scaled formats; capability: CUDA's compute capability, without meaning if not `cuda`.
    """

    cuda: bool
    problems: Mapping[str, str]
    native: bool
    capability: tuple[int, int] = (9, 0)

    def has(self, package: str) -> bool:
        """Whether the package can be used."""
        return self.cuda and package not in self.problems


@dataclass(frozen=True)
class Switches:
    """The decision. All off: a CPU.

    transformer_engine_gradients, apex_gradients: who adds weight gradients in FP32 at the end of
    the product; text: one line for the user, "" on a CPU.
    """

    transformer_engine_gradients: bool = False
    apex_gradients: bool = False
    permute_fusion: bool = False
    shared_expert_overlap: bool = False
    fused_norm_linear: bool = False
    fused_adamw: bool = False
    variable_length_attention: bool = False
    dispatcher: Dispatcher = Dispatcher.alltoall
    tensor_parallel_overlap: bool = False
    text: str = ""


ALL_OFF = Switches()
Check = Callable[[Config, PrecisionPlan, Facts], str]


def choose_switches(config: Config, plan: PrecisionPlan, facts: Facts) -> Switches:
    """Decide every switch. Raises ConfigError if a knob asks for what cannot work here: one line
    with the knob, its value, the reason and what would be right."""
    gpu = config.gpu
    on = {
        name: _is_on(name, getattr(gpu, name), problem)
        for name, check in SWITCHES.items()
        for problem in [check(config, plan, facts)]
    }
    for name, value, problem in _options(config, plan, facts):
        if problem:
            raise ConfigError(f"gpu.{name}={value}: {problem}")
    uses_engine = _uses_engine(config, plan, facts)
    switches = Switches(
        transformer_engine_gradients=on["gradient_accumulation_fusion"] and uses_engine,
        apex_gradients=on["gradient_accumulation_fusion"] and not uses_engine,
        permute_fusion=on["moe_permute_fusion"],
        shared_expert_overlap=on["moe_shared_expert_overlap"],
        fused_norm_linear=on["fused_norm_linear"],
        fused_adamw=on["fused_adamw"],
        variable_length_attention=on["variable_length_attention"],
        dispatcher=gpu.moe_token_dispatcher,
        tensor_parallel_overlap=gpu.tp_comm_overlap,
    )
    return _with_text(switches, on) if facts.cuda else switches


def for_inference(switches: Switches) -> Switches:
    """What a process that evaluates or generates uses of a run's switches: those of its forward
    pass. Off are the gradients, the optimizer, and the exchanges of tokens and activations, whose
    buffers have the size of a training batch."""
    return Switches(
        permute_fusion=switches.permute_fusion,
        fused_norm_linear=switches.fused_norm_linear,
        variable_length_attention=switches.variable_length_attention,
    )


def planned_switches(config: Config, plan: PrecisionPlan) -> str:
    """One line for `plan`: the switches on a GPU on which every package can be used. Block-scaled
    formats count as emulated unless `precision.backend=native`. Raises ConfigError if a knob asks
    for what the configuration itself excludes."""
    native = plan.is_quantized and config.precision.backend == Backend.native
    refused = {
        package: f"gpu.{root}=off"
        for package in PACKAGES
        for root in [package.partition(".")[0]]
        if getattr(config.gpu, root, Switch.auto) == Switch.off
    }
    line = choose_switches(config, plan, Facts(True, refused, native)).text
    return f"on a GPU where every package can be used, {line}"


def _is_on(name: str, value: Switch, problem: str) -> bool:
    if value == Switch.on and problem:
        raise ConfigError(
            f"gpu.{name}=on: {problem}; gpu.{name}=auto uses it where it works, off never"
        )
    return value != Switch.off and not problem


def _with_text(switches: Switches, on: Mapping[str, bool]) -> Switches:
    used = [name for name, is_on in on.items() if is_on]
    if switches.dispatcher != Dispatcher.alltoall:
        used.append(f"moe_token_dispatcher={switches.dispatcher}")
    if switches.tensor_parallel_overlap:
        used.append("tp_comm_overlap")
    unused = [name for name, is_on in on.items() if not is_on]
    text = f"gpu switches on: {', '.join(used) or 'none'}; off: {', '.join(unused) or 'none'}"
    values = {**vars(switches), "text": text}
    return Switches(**values)


# Facts of the configuration -----------------------------------------------------------------


def _uses_engine(config: Config, plan: PrecisionPlan, facts: Facts) -> bool:
    """Whether the model's linears are Transformer Engine's (`assemble.specs.parts`)."""
    return facts.has(TRANSFORMER_ENGINE) and not _emulates(config, plan, facts)


def _emulates(config: Config, plan: PrecisionPlan, facts: Facts) -> bool:
    """Whether the linears are the emulating ones: for block-scaled formats, and for telemetry."""
    measures = config.precision.telemetry.every > 0
    return not facts.native and (plan.is_quantized or measures)


def _no_engine(config: Config, plan: PrecisionPlan, facts: Facts) -> str:
    """Why the model's linears are not Transformer Engine's."""
    if not facts.has(TRANSFORMER_ENGINE):
        return _missing(facts, TRANSFORMER_ENGINE, "Transformer Engine")
    if not _uses_engine(config, plan, facts):
        return (
            f"precision={config.precision.name} is emulated or measured here, and such linears are "
            "not Transformer Engine's"
        )
    return ""


def _missing(facts: Facts, package: str, name: str) -> str:
    if not facts.cuda:
        return "there is no CUDA device"
    return f"{name} cannot be used ({facts.problems[package]})"


def _has(config: Config, kind: LayerKind) -> bool:
    return any(layer.kind == kind for layer in layers(config.model))


def exchanges_tokens(config: Config, native: bool) -> bool:
    """Whether routed tokens pass through a dispatcher of Megatron's. Without one every expert is on
    the rank and `model.moe.layer` calls the experts directly."""
    parallel = config.parallel
    ranks = parallel.expert * parallel.expert_tensor * parallel.tensor * parallel.context
    return _has(config, LayerKind.moe) and (native or ranks > 1)


# Options: off unless a knob asks for them ---------------------------------------------------


def _options(config: Config, plan: PrecisionPlan, facts: Facts) -> list[tuple[str, str, str]]:
    """(knob, value, problem) of each option that the configuration asks for."""
    gpu = config.gpu
    asked = []
    if gpu.moe_token_dispatcher != Dispatcher.alltoall:
        problem = _dispatcher_problem(config, facts)
        asked.append(("moe_token_dispatcher", str(gpu.moe_token_dispatcher), problem))
    if gpu.tp_comm_overlap:
        asked.append(("tp_comm_overlap", "true", _overlap_problem(config, plan, facts)))
    return asked


def _dispatcher_problem(config: Config, facts: Facts) -> str:
    name = config.gpu.moe_token_dispatcher
    package = DEEP_EP if name == Dispatcher.deepep else HYBRID_EP
    if not facts.has(package):
        return f"{_missing(facts, package, package)}; gpu.moe_token_dispatcher=alltoall needs none"
    if config.parallel.expert * config.parallel.expert_tensor == 1:
        return (
            f"{name} exchanges tokens between ranks of experts, and parallel.expert x "
            "parallel.expert_tensor is 1; gpu.moe_token_dispatcher=alltoall is right here"
        )
    if not _has(config, LayerKind.moe):
        return f"model.pattern={config.model.pattern} has no mixture of experts"
    if name == Dispatcher.hybridep and config.train.short_sequence_length > 0:
        return (
            f"train.short_sequence_length={config.train.short_sequence_length}: HybridEP's buffers "
            "have one size; 0 is right here"
        )
    return ""


def _overlap_problem(config: Config, plan: PrecisionPlan, facts: Facts) -> str:
    parallel, train = config.parallel, config.train
    if problem := _no_engine(config, plan, facts):
        return problem
    if parallel.tensor == 1 or not parallel.sequence:
        return (
            f"parallel.tensor={parallel.tensor} with parallel.sequence={parallel.sequence}: user "
            "buffers overlap the exchange of sequence-parallel ranks; parallel.tensor above 1 with "
            "parallel.sequence=true is right, or gpu.tp_comm_overlap=false"
        )
    if train.short_sequence_length > 0:
        return (
            f"train.short_sequence_length={train.short_sequence_length}: the user buffers have one "
            "size; 0 is right here"
        )
    return ""


# Switches -----------------------------------------------------------------------------------


def _package(package: str, name: str) -> Check:
    """The check of a knob that asks for a package."""

    def check(config: Config, plan: PrecisionPlan, facts: Facts) -> str:
        return "" if facts.has(package) else _missing(facts, package, name)

    return check


def _gradient_fusion(config: Config, plan: PrecisionPlan, facts: Facts) -> str:
    """Transformer Engine's linears do it themselves; Megatron's need apex's extension and raise
    RuntimeError without it (tensor_parallel/layers.py)."""
    if _uses_engine(config, plan, facts):
        return ""
    if not facts.cuda:
        return "there is no CUDA device"
    if _emulates(config, plan, facts):
        return (
            f"precision={config.precision.name} is emulated or measured here, and such products "
            "give their weight gradients to autograd"
        )
    if config.precision.parameter_dtype == Dtype.float32:
        return "precision.parameter_dtype=float32: autograd already adds the gradients in FP32"
    if not facts.has(APEX_GRADIENTS):
        return (
            "neither Transformer Engine nor apex's fused_weight_gradient_mlp_cuda can be used "
            f"({facts.problems[APEX_GRADIENTS]})"
        )
    return ""


def _permute_fusion(config: Config, plan: PrecisionPlan, facts: Facts) -> str:
    if not facts.has(PERMUTATION):
        return _missing(facts, PERMUTATION, "Transformer Engine's permutation, 2.1 or newer,")
    if not exchanges_tokens(config, facts.native):
        return "every expert is on its rank, so that no dispatcher permutes tokens"
    return ""


def _shared_expert_overlap(config: Config, plan: PrecisionPlan, facts: Facts) -> str:
    """Megatron asserts that a latent MoE does not train with it (moe_layer.py). Its linears are
    changed for it, which our emulated ones do not know."""
    moe = config.model.moe
    if not facts.cuda:
        return "there is no CUDA device"
    if not exchanges_tokens(config, facts.native):
        return "every expert is on its rank, so that there is no exchange to overlap with"
    if moe.shared_expert_hidden_size == 0:
        return "model.moe.shared_expert_hidden_size=0: the model has no shared expert"
    if moe.latent_size > 0:
        return (
            f"model.moe.latent_size={moe.latent_size}: Megatron-Core does not overlap the shared "
            "expert with a latent exchange in training"
        )
    if config.gpu.moe_token_dispatcher != Dispatcher.alltoall:
        return (
            f"gpu.moe_token_dispatcher={config.gpu.moe_token_dispatcher}: the published recipes "
            "overlap under alltoall only"
        )
    if _emulates(config, plan, facts):
        return f"precision={config.precision.name} is emulated or measured here"
    if config.train.recompute.moe == RecomputeMode.full:
        return "train.recompute.moe=full: the exchange runs again in the backward pass"
    return ""


def _fused_norm_linear(config: Config, plan: PrecisionPlan, facts: Facts) -> str:
    """Inside the fused module the quantizer may read the norm's FP32 output. Emulation, and the
    comparison with it, quantize the BF16 output."""
    if problem := _no_engine(config, plan, facts):
        return problem
    quantized = sorted(
        {
            path.rpartition(".")[2]
            for phase in plan.phases
            for path, formats in phase.formats.items()
            if path.endswith((".in_proj", ".linear_qkv")) and formats.is_quantized
        }
    )
    if quantized:
        return (
            f"precision={config.precision.name} computes {' and '.join(quantized)} in a "
            "block-scaled format, whose operand is the BF16 output of the norm"
        )
    return ""


def _fused_adamw(config: Config, plan: PrecisionPlan, facts: Facts) -> str:
    return "" if facts.cuda else "there is no CUDA device"


def _variable_length_attention(config: Config, plan: PrecisionPlan, facts: Facts) -> str:
    """torch's kernel is FlashAttention's, for 16-bit operands from compute capability 8.0."""
    width = config.model.attention.head_dim
    if not _has(config, LayerKind.attention):
        return f"model.pattern={config.model.pattern} has no attention"
    if _uses_engine(config, plan, facts):
        return "Transformer Engine's attention computes all documents in one kernel, too"
    if not facts.has(VARIABLE_LENGTH):
        return _missing(facts, VARIABLE_LENGTH, VARIABLE_LENGTH)
    if facts.capability < (8, 0):
        return "FlashAttention needs compute capability 8.0, this device has {}.{}".format(
            *facts.capability
        )
    if config.precision.parameter_dtype == Dtype.float32:
        return "precision.parameter_dtype=float32: FlashAttention computes 16-bit operands only"
    if width > 256 or width % 8:
        return f"model.attention.head_dim={width}: FlashAttention needs a multiple of 8 up to 256"
    return ""


SWITCHES: Mapping[str, Check] = {
    TRANSFORMER_ENGINE: _package(TRANSFORMER_ENGINE, "transformer_engine"),
    MAMBA_SSM: _package(MAMBA_SSM, "mamba_ssm"),
    CAUSAL_CONV1D: _package(CAUSAL_CONV1D, "causal_conv1d"),
    "gradient_accumulation_fusion": _gradient_fusion,
    "moe_permute_fusion": _permute_fusion,
    "moe_shared_expert_overlap": _shared_expert_overlap,
    "fused_norm_linear": _fused_norm_linear,
    "fused_adamw": _fused_adamw,
    "variable_length_attention": _variable_length_attention,
}
