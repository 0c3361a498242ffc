"""Reads our model from Hugging Face's `config.json` and writes it as a recipe.

Owns: which configurations are rejected, and the messages. Does not own: the meaning of the fields
(`fields`), weights (`mapping`). Reads plain JSON only: code that a config.json names under
`auto_map` is neither fetched nor run. No torch.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.json_text import json_text
from nemotron_train.config.knobs import differences, to_plain
from nemotron_train.config.quantities import exact, format_count
from nemotron_train.config.schema import (
    AttentionConfig,
    MambaConfig,
    ModelConfig,
    MoeConfig,
    MtpConfig,
)
from nemotron_train.convert.hugging_face.fields import (
    ABSENT,
    CONFIG,
    FIXED,
    LETTERS,
    OF_KIND,
    OPTIONAL,
    OURS,
    READ_BY_HAND,
    SIZES,
    TRAINING,
    WITHOUT_MEANING,
)
from nemotron_train.plan.architecture.layers import LayerKind, parameters

MAX_CONFIG_BYTES = 2**24


@dataclass(frozen=True)
class Read:
    """The model that a config.json describes."""

    model: ModelConfig
    dtype: str  # "float32" or "bfloat16": the declared dtype of the weights


def read_fields(folder: Path) -> dict[str, Any]:
    """The fields of `folder`/config.json. Raises ConfigError if it is missing or unreadable or
    holds no object."""
    path = folder / CONFIG
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError(f"it has {path.stat().st_size} bytes")
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: missing; give a folder with Hugging Face's files") from None
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{path} cannot be read ({reason})") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{path} holds no object")
    return fields


def read_model(folder: Path, name: str, ignored: frozenset[str] = frozenset()) -> Read:
    """The model that `folder`/config.json describes, with the name `name`.

    Raises ConfigError, naming field, value and reason, for anything that our model cannot represent
    and for unknown fields that are not in `ignored`, because they might change the meaning of the
    weights.
    """
    reader = _Reader(folder / CONFIG, read_fields(folder))
    reader.refuse(ignored)
    pattern = reader.pattern("hybrid_override_pattern", ("layers_block_type", "layer_types"))
    reader.check_layers(pattern)
    mtp = reader.mtp()
    kinds = {LayerKind(letter) for letter in pattern + (mtp.pattern if mtp.depths else "")}
    values: dict[str, Any] = {"mamba.dt_min": reader.number("time_step_min", 0.001)}
    for field, knob in SIZES.items():
        owner = next((kind for kind, names in OF_KIND.items() if field in names), None)
        if owner is None or owner in kinds or reader.fields.get(field) is not None:
            values[knob] = reader.size(field)
        else:
            values[knob] = 1
    for field, (knob, default) in OPTIONAL.items():
        kind = reader.size if isinstance(default, int) else reader.number
        values[knob] = kind(field, default)
    values["moe.latent_size"] = reader.size("moe_latent_size", 0)
    values["mamba.dt_limit_min"], values["mamba.dt_limit_max"] = reader.limits()
    values |= reader.training()
    depths, scale = values.pop("mtp.depths", mtp.depths), values.pop("mtp.loss_scale", None)
    if bool(depths) != bool(mtp.depths):
        reader.fail("num_nextn_predict_layers", f"but {OURS} says mtp.depths={depths}")
    if mtp.depths:
        mtp = MtpConfig(depths, mtp.pattern, MtpConfig.loss_scale if scale is None else scale)

    def part(name: str) -> dict[str, Any]:
        return {k.partition(".")[2]: v for k, v in values.items() if k.startswith(f"{name}.")}

    outside = {knob: value for knob, value in values.items() if "." not in knob}
    model = ModelConfig(
        name=name,
        pattern=pattern,
        attention=AttentionConfig(**part("attention")),
        mamba=MambaConfig(**part("mamba")),
        moe=MoeConfig(**part("moe")),
        mtp=mtp,
        **outside,
    )
    return Read(model, reader.dtype())


class _Reader:
    """Reads values of one config.json; raises a specific ConfigError for each invalid one."""

    def __init__(self, path: Path, fields: dict[str, Any]) -> None:
        self.path, self.fields = path, fields

    def fail(self, field: str, why: str) -> None:
        value = json_text(self.fields.get(field))
        shown = value if len(value) <= 80 else f"{value[:77]}..."
        raise ConfigError(f"{self.path}: {field}={shown}: {why}")

    def refuse(self, ignored: frozenset[str]) -> None:
        """Raises ConfigError for the first field that our model cannot represent or does not
        know."""
        for field, value in self.fields.items():
            if field in ignored or value is None:
                continue
            required = FIXED.get(field, ABSENT.get(field))
            if (field in FIXED or field in ABSENT) and not _same(value, required):
                only = "nothing" if required is None else json_text(required)
                self.fail(field, f"cannot be represented; our model has {only} there")
        if self.fields.get("use_conv_bias", True) is None:
            self.fail("use_conv_bias", "cannot be represented; our model has true there")
        known = {*FIXED, *ABSENT, *WITHOUT_MEANING, *SIZES, *OPTIONAL, *READ_BY_HAND, *ignored}
        for field, value in self.fields.items():
            if field not in known and value is not None:
                self.fail(
                    field,
                    "is not known and might change what the weights mean; if it does not, give "
                    f"--ignore {field}",
                )
        if self.fields.get("model_type") is None:
            self.fail("model_type", "must be nemotron_h")
        epsilon = self.fields.get("norm_eps")
        if epsilon is not None and epsilon != self.fields.get("layer_norm_epsilon", epsilon):
            self.fail("norm_eps", "is not layer_norm_epsilon; our norms share one")

    def pattern(self, field: str, listed: tuple[str, ...], default: str = "") -> str:
        """The layers as letters, from a pattern or a list of layer names. `field`: the pattern's
        field; `listed`: alternative fields. Rejects dense MLP layers."""
        patterns: dict[str, str] = {}
        for name in (field, *listed):
            value = self.fields.get(name)
            if isinstance(value, list):
                unknown = [item for item in value if item not in LETTERS]
                if unknown:
                    self.fail(name, f"{unknown[0]!r} is no layer that we know")
                value = "".join(LETTERS[item] for item in value)
            if value is not None and not (isinstance(value, str) and value):
                self.fail(name, "must name at least one layer")
            if value is not None:
                patterns[name] = value
        if not patterns and not default:
            self.fail(field, "is missing; it names the layers")
        name, pattern = next(iter(patterns.items()), (field, default))
        for other, other_pattern in patterns.items():
            if other_pattern != pattern:
                self.fail(other, f"says other layers than {name}")
        for position, letter in enumerate(pattern, start=1):
            if letter not in "M*E":
                reason = "a dense MLP" if letter == "-" else "unknown"
                self.fail(
                    name,
                    f"{letter!r} at position {position} is {reason} and cannot be represented; our "
                    "layers are M (Mamba-2), * (attention), E (mixture of experts)",
                )
        return pattern

    def check_layers(self, pattern: str) -> None:
        number = self.fields.get("num_hidden_layers")
        if number is not None and number != len(pattern):
            self.fail("num_hidden_layers", f"the pattern has {len(pattern)} layers")

    def mtp(self) -> MtpConfig:
        """The multi-token-prediction block. A config.json only records that there is a block;
        Nemotron 3 trains two depths with one block (arXiv 2604.12374, section 2.1.2)."""
        number = self.size("num_nextn_predict_layers", 0)
        if number > 1:
            self.fail(
                "num_nextn_predict_layers",
                "cannot be represented; our block is one, applied several times",
            )
        if number == 0:
            return MtpConfig()
        field, listed = "mtp_hybrid_override_pattern", ("mtp_layers_block_type",)
        return MtpConfig(2, self.pattern(field, listed, MtpConfig.pattern))

    def size(self, field: str, default: int | None = None) -> int:
        value = self.fields.get(field, default)
        value = default if value is None else value
        if field == "head_dim" and value is None:  # its name in Nemotron-H before version 3
            value = self.fields.get("attention_head_dim")
        if value is None:
            self.fail(field, "is missing")
        if type(value) is not int or value < (default != 0):
            self.fail(field, "must be a whole number" + ("" if default == 0 else " above 0"))
        return value  # pyright: ignore[reportReturnType]

    def number(self, field: str, default: float) -> float:
        value = self.fields.get(field)
        value = default if value is None else value
        if type(value) not in (int, float) or not 0 < value < math.inf:
            self.fail(field, "must be a number above 0")
        return float(value)

    def limits(self) -> tuple[float, float]:
        """Limits of dt. Accepts infinity as written by Python's JSON, by transformers 5, or as the
        string "Infinity"."""
        value = self.fields.get("time_step_limit")
        if value is None:
            return 0.0, math.inf
        pair = value if isinstance(value, list) and len(value) == 2 else []
        plain = [limit.get("__float__") if isinstance(limit, dict) else limit for limit in pair]
        numbers = [math.inf if limit == "Infinity" else limit for limit in plain]
        if len(numbers) != 2 or not all(type(limit) in (int, float) for limit in numbers):
            self.fail("time_step_limit", "must be two numbers")
        low, high = (float(limit or 0) for limit in numbers)
        if not 0 <= low < high:
            self.fail("time_step_limit", "must ascend from 0 or more")
        return low, math.inf if high >= 1e20 else high

    def training(self) -> dict[str, Any]:
        """Training knobs that our own export stored; {} if there are none."""
        stored = self.fields.get(OURS)
        if stored is None:
            return {}
        if not isinstance(stored, dict) or set(stored) != set(TRAINING):
            self.fail(OURS, f"must hold {', '.join(TRAINING)}")
        for knob, value in stored.items():
            types = (int,) if knob == "mtp.depths" else (int, float)
            if type(value) not in types or not 0 <= value < math.inf:
                self.fail(OURS, f"{knob} must be a number, 0 or more")
        return dict(stored)

    def dtype(self) -> str:
        value = self.fields.get("torch_dtype") or self.fields.get("dtype") or "bfloat16"
        return "float32" if value in ("float32", "float64") else "bfloat16"


def _same(value: Any, required: Any) -> bool:
    """Equality in which True differs from 1, and 0 equals 0.0."""
    return value == required and isinstance(value, bool) == isinstance(required, bool)


# Knobs that do not change the function that given weights compute.
_FREE = {"name", "init_std", "mamba.dt_max", "mamba.dt_init_floor", "mamba.chunk_size", *TRAINING}


def check_overrides(theirs: ModelConfig, asked: ModelConfig, folder: Path) -> None:
    """Raises ConfigError if overrides changed the model that the weights belong to. `theirs`: the
    model of config.json; `asked`: the model after overrides."""
    for knob, (base, is_now) in differences(to_plain(theirs), to_plain(asked)).items():
        if knob == "pattern":
            is_now = str(is_now).replace("|", "")
        if knob not in _FREE and base != is_now:
            raise ConfigError(
                f"model.{knob}={is_now}: {folder / CONFIG} says {base}, and the weights are of that"
            )
    if bool(theirs.mtp.depths) != bool(asked.mtp.depths):
        raise ConfigError(
            f"model.mtp.depths={asked.mtp.depths}: {folder / CONFIG} says "
            f"{theirs.mtp.depths}, and the weights are of that"
        )


def summary(model: ModelConfig) -> str:
    """One line with the number of layers and parameters."""
    counts = Counter(model.pattern)
    kinds = ", ".join(f"{counts[letter]} {letter}" for letter in "M*E" if counts[letter])
    numbers = parameters(model)
    mtp = f", {exact(numbers.mtp)} of them for multi-token prediction" if numbers.mtp else ""
    return (
        f"{model.name}: {len(model.pattern)} layers ({kinds}), {exact(numbers.published)} "
        f"parameters with router biases{mtp}, {format_count(numbers.active_with_embeddings)} "
        "active a token"
    )


# The recipe ---------------------------------------------------------------------------------


def model_name(folder: Path) -> str:
    """A model name derived from the folder's name, valid as a run name."""
    return re.sub(r"[^a-z0-9_.-]+", "_", folder.resolve().name.lower()).strip("._-") or "imported"


def recipe_text(model: ModelConfig, source: Path) -> str:
    """The model as YAML recipe text for `model=FILE.yaml`, without knobs at their default."""
    plain = to_plain(model)
    for part, default in (("mamba", MambaConfig()), ("moe", MoeConfig()), ("mtp", MtpConfig())):
        plain[part] = _without_defaults(plain[part], to_plain(default))
    if plain["norm_epsilon"] == ModelConfig.norm_epsilon:
        del plain["norm_epsilon"]
    plain["mtp"].setdefault("depths", model.mtp.depths)
    text = yaml.safe_dump(plain, sort_keys=False, default_flow_style=None, width=100)
    return f"# From {source / CONFIG}, by `nemotron-train convert from-hf`.\n{text}"


def _without_defaults(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value != defaults[name]}
