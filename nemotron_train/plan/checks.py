"""Checks of a configuration; each violation is a ConfigError.

Owns: checks of ranges, and checks that involve several knobs. Does not own: types and enumerations
(checked in `compose`), the parallel layout (`plan.layout_checks`), and everything outside the
configuration (data folders, tokenizers, checkpoints and the device are checked where they are
used). No torch.
"""

import re
from dataclasses import fields
from fnmatch import fnmatchcase
from math import inf
from operator import attrgetter

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.guard import GuardConfig
from nemotron_train.config.schema import Config, DataKind, ModelConfig
from nemotron_train.plan.architecture.layers import LayerKind, layers, parse_pattern, tensors
from nemotron_train.plan.layout_checks import check_layout, must_divide


def check(config: Config, num_ranks: int) -> None:
    """Raises ConfigError at the first violation in `config` on `num_ranks` ranks: one line with the
    knob or knobs, the value and what would be valid. The precision plan is checked where it is
    resolved (`plan.precision.resolve.resolve_plan`)."""
    _check_signs(config)
    _check_name(config.name)
    stages = parse_pattern(config.model.pattern)
    inside_mtp = []
    if config.model.mtp.depths > 0:
        inside_mtp = parse_pattern(config.model.mtp.pattern, "model.mtp.pattern", False)[0]
    kinds = {kind for stage in [*stages, inside_mtp] for kind in stage}
    _check_model(config.model, kinds)
    check_layout(config, stages, kinds, num_ranks)
    _check_schedule(config)
    _check_rows(config)
    _check_frozen(config)
    _check_data(config)


_ABOVE_ZERO = (
    "model.hidden_size",
    "model.vocab_size",
    "model.norm_epsilon",
    "model.init_std",
    "model.attention.heads",
    "model.attention.key_value_heads",
    "model.attention.head_dim",
    "model.mamba.heads",
    "model.mamba.head_dim",
    "model.mamba.state_size",
    "model.mamba.groups",
    "model.mamba.conv_kernel_size",
    "model.mamba.chunk_size",
    "model.mamba.dt_min",
    "model.mamba.dt_max",
    "model.mamba.dt_init_floor",
    "model.mamba.A_init_min",
    "model.mamba.A_init_max",
    "model.moe.experts",
    "model.moe.experts_per_token",
    "model.moe.expert_hidden_size",
    "model.moe.router_scaling_factor",
    "optim.peak_learning_rate",
    "optim.epsilon",
    "optim.clip_grad_norm",
    "parallel.tensor",
    "parallel.pipeline",
    "parallel.virtual_pipeline",
    "parallel.context",
    "parallel.expert",
    "parallel.expert_tensor",
    "parallel.bucket_parameters",
    "train.total_tokens",
    "train.sequence_length",
    "train.global_batch_tokens",
    "train.micro_batch_sequences",
    "train.rendezvous_seconds",
    "train.log_every_steps",
    "train.validation_tokens",
    "train.keep_checkpoints",
    "guard.spike_window",
    "guard.spike_sigmas",
)
_ZERO_OR_MORE = (
    "model.mamba.dt_limit_min",
    "model.moe.shared_expert_hidden_size",
    "model.moe.latent_size",
    "model.moe.router_bias_update_rate",
    "model.moe.load_balance_loss_coefficient",
    "model.mtp.depths",
    "model.mtp.loss_scale",
    "optim.min_learning_rate",
    "optim.warmup_tokens",
    "optim.decay_tokens",
    "optim.weight_decay",
    "train.seed",
    "train.threads",
    "train.validate_every_steps",
    "train.save_every_steps",
    "train.short_sequence_length",
    "train.short_share",
    "train.stop_after_steps",
    "train.stop_after_minutes",
    *(f"guard.{knob.name}" for knob in fields(GuardConfig) if knob.type in (int, float)),
)
_BELOW_ONE = ("optim.beta1", "optim.beta2")


MAX_SEED = 2**62 - 1


def _check_signs(config: Config) -> None:
    """Check ranges. The comparisons are written so that NaN fails them."""
    for knob in _ABOVE_ZERO:
        value = attrgetter(knob)(config)
        if not 0 < value < inf:
            raise ConfigError(f"{knob}={value}: must be a finite number above 0")
    for knob in _ZERO_OR_MORE:
        value = attrgetter(knob)(config)
        if not 0 <= value < inf:
            raise ConfigError(f"{knob}={value}: must be a finite number, 0 or more")
    for knob in _BELOW_ONE:
        value = attrgetter(knob)(config)
        if not 0 <= value < 1:
            raise ConfigError(f"{knob}={value}: must be at least 0 and below 1")
    if (
        config.train.seed > MAX_SEED
    ):  # torch and Megatron-Core keep seeds, and sums of them, in int64
        raise ConfigError(
            f"train.seed={config.train.seed}: must be from 0 to {MAX_SEED} (2^62 - 1)"
        )


def _check_name(name: str) -> None:
    """The name becomes a folder name, so it must not contain a separator or be `..`."""
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", name) or name in (".", ".."):
        raise ConfigError(
            f"name={name}: a run's name is made of letters, digits, '_', '.' and '-' only"
        )


def _check_model(model: ModelConfig, kinds: set[LayerKind]) -> None:
    attention, mamba, moe = model.attention, model.mamba, model.moe
    if LayerKind.attention in kinds:
        must_divide(
            "model.attention.heads",
            attention.heads,
            "model.attention.key_value_heads",
            attention.key_value_heads,
        )
    if LayerKind.mamba in kinds:
        must_divide("model.mamba.heads", mamba.heads, "model.mamba.groups", mamba.groups)
        _check_order("model.mamba.dt_min", mamba.dt_min, "model.mamba.dt_max", mamba.dt_max)
        _check_order(
            "model.mamba.A_init_min", mamba.A_init_min, "model.mamba.A_init_max", mamba.A_init_max
        )
        if not mamba.dt_limit_min < mamba.dt_limit_max:
            raise ConfigError(
                f"model.mamba.dt_limit_min={mamba.dt_limit_min} must be below "
                f"model.mamba.dt_limit_max={mamba.dt_limit_max}"
            )
    if LayerKind.moe in kinds:
        _check_order(
            "model.moe.experts_per_token",
            moe.experts_per_token,
            "model.moe.experts",
            moe.experts,
        )


def _check_schedule(config: Config) -> None:
    optim, total = config.optim, config.train.total_tokens
    _check_order(
        "optim.min_learning_rate",
        optim.min_learning_rate,
        "optim.peak_learning_rate",
        optim.peak_learning_rate,
    )
    if optim.warmup_tokens + optim.decay_tokens > total:
        raise ConfigError(
            f"optim.warmup_tokens={optim.warmup_tokens} + "
            f"optim.decay_tokens={optim.decay_tokens} exceed train.total_tokens={total}"
        )


def _check_rows(config: Config) -> None:
    """Short steps: both knobs or neither, and whole short rows in each long row."""
    train = config.train
    short, share = train.short_sequence_length, train.short_share
    if (short == 0) != (share == 0):
        raise ConfigError(
            f"train.short_sequence_length={short} and train.short_share={share}: set both, the "
            "length of a short step's rows and the share of such steps, or neither"
        )
    if share > 1:
        raise ConfigError(f"train.short_share={share}: is a share of the steps, 1 at most")
    if short:
        knob = "train.short_sequence_length"
        must_divide("train.sequence_length", train.sequence_length, knob, short)


def _check_frozen(config: Config) -> None:
    """Raises ConfigError for a pattern that freezes nothing, and if nothing is left to train."""
    if not config.train.frozen:
        return
    names = {tensor.name for tensor in tensors(config.model)}
    biases = {
        f"{layer.path}.mlp.router.expert_bias"
        for layer in layers(config.model)
        if layer.kind == LayerKind.moe
    }
    for pattern in config.train.frozen:
        if not any(fnmatchcase(name, pattern) for name in names | biases):
            raise ConfigError(
                f"train.frozen: {pattern!r} is the name of no parameter; there are "
                f"{', '.join(sorted(names)[:3])}, … (`plan` lists the layers)"
            )
    frozen = {n for n in names if any(fnmatchcase(n, p) for p in config.train.frozen)}
    if frozen == names:
        raise ConfigError(f"train.frozen={config.train.frozen}: leaves nothing to train")


def _check_data(config: Config) -> None:
    data = config.data
    if config.fresh_data and not config.branch:
        raise ConfigError(
            "fresh_data=true: is for a branch, which else goes on where its parent's data stood; "
            "give branch=RUN_FOLDER@STEP"
        )
    if config.weights_only and not config.branch:
        raise ConfigError(
            "weights_only=true: is for a branch, which else goes on with its parent's optimizer "
            "and token count; give branch=RUN_FOLDER@STEP"
        )
    if data.kind == DataKind.prepared and not (data.phases and data.validation):
        empty = "data.validation" if data.phases else "data.phases"
        raise ConfigError(f"{empty} is empty: name the folders `data prepare` wrote")
    starts = [phase.from_tokens for phase in data.phases]
    if starts and (starts[0] != 0 or sorted(set(starts)) != starts):
        raise ConfigError(
            f"data.phases: from_tokens are {starts}; they must start at 0 and increase"
        )
    blends = {f"data.phases[{n}].blend": phase.blend for n, phase in enumerate(data.phases)}
    if data.validation:
        blends["data.validation"] = data.validation
    for knob, blend in blends.items():
        if not blend:
            raise ConfigError(f"{knob} is empty: name at least one folder")
        for source in blend:
            if not 0 < source.weight < inf:
                raise ConfigError(
                    f"{knob}: weight={source.weight} of {source.path} must be a finite number "
                    "above 0"
                )


def _check_order(low_knob: str, low: float, high_knob: str, high: float) -> None:
    if not low <= high:
        raise ConfigError(f"{low_knob}={low} must not exceed {high_knob}={high}")
