"""Values as the user typed them: a knob that holds text keeps its text, and a whole number may be
written 2e6.

YAML and Hydra guess the type of an unquoted scalar from its spelling: 1.10 becomes 1.1, no becomes
False, 012345 becomes 5349 and 4:00:00 becomes 14400. Here the type of the knob decides instead.

Owns: the type of a knob (`knob_type`) and the conversion of parsed values with their source text.
Does not own: the grammar of lists and tables (Hydra's and YAML's), the merge (`compose`).
"""

import dataclasses
import enum
import re
import typing
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from functools import cache
from typing import Any

_MAX_EXPONENT = 30  # no knob counts that far, and 1e999999999 must not become an integer
_WHOLE = re.compile(r"[+-]?[0-9][0-9_]*")


@cache
def _field_types(schema: type) -> Mapping[str, Any]:
    return typing.get_type_hints(schema)


def knob_type(schema: Any, knob: str) -> Any:
    """The declared type of a dotted knob of the dataclass `schema`; None if there is no such knob.
    A part of the name may be the key of a table or the index of a list."""
    kind = schema
    for name in knob.split("."):
        if dataclasses.is_dataclass(kind):
            kind = _field_types(kind).get(name)  # type: ignore[arg-type]
        elif typing.get_origin(kind) in (dict, list):
            kind = typing.get_args(kind)[-1]
        else:
            return None
    return kind


def knob_names(schema: Any, prefix: str = "") -> list[str]:
    """Every dotted knob of the dataclass `schema`, for messages that name the nearest one."""
    names = []
    for name, kind in _field_types(schema).items():
        names.append(prefix + name)
        if dataclasses.is_dataclass(kind):
            names += knob_names(kind, f"{prefix}{name}.")
    return names


def typed_value(kind: Any, value: Any, text: Any) -> Any:
    """`value` as the type `kind` asks for it.

    value: as YAML or Hydra parsed it. text: the same with every scalar as its source text. Where
    the text does not fit the type, the text itself is returned, so that the error quotes it.
    """
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        types = _field_types(kind)  # type: ignore[arg-type]
        return _typed_entries(value, text, lambda key: types.get(str(key)))
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is dict and isinstance(value, Mapping):
        return _typed_entries(value, text, lambda key: arguments[1], keep_keys=arguments[0] is str)
    if origin is list and isinstance(value, Sequence) and not isinstance(value, str):
        pairs = zip(value, text, strict=True)
        return [typed_value(arguments[0], entry, source) for entry, source in pairs]
    if not isinstance(text, str):
        return value
    if isinstance(value, str) and ("${" in value or value == "???"):
        return value  # an interpolation, or OmegaConf's mark of a missing value
    return _typed_scalar(kind, value, text)


def _typed_entries(
    value: Mapping[Any, Any], text: Any, type_of: Any, keep_keys: bool = True
) -> dict[Any, Any]:
    sources = list(text.items()) if isinstance(text, Mapping) else [(k, None) for k in value]
    entries = {}
    for (key, entry), (source_key, source) in zip(value.items(), sources, strict=True):
        name = source_key if keep_keys and isinstance(source_key, str) else key
        entries[name] = typed_value(type_of(name), entry, source)
    return entries


def _typed_scalar(kind: Any, value: Any, text: str) -> Any:
    if kind is str:
        return value if isinstance(value, str) or value is None else text
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return value if isinstance(value, str) or value is None else text
    if kind is int:
        number = whole_number(text)
        return value if value is None else text if number is None else number
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        try:
            float(text)
        except ValueError:  # YAML reads 4:00:00 as a number to the base of 60
            return value if text.lstrip("+-").lower().startswith(".") else text
    return value


def whole_number(text: str) -> int | None:
    """The whole number that `text` spells (262144, 262_144, 2e6, 2.5e3); None if it is none."""
    if _WHOLE.fullmatch(text):
        return int(text.replace("_", ""))
    try:
        number = Decimal(text.replace("_", ""))
    except InvalidOperation:
        return None
    if not number.is_finite() or number.adjusted() > _MAX_EXPONENT:
        return None
    return int(number) if number == number.to_integral_value() else None
