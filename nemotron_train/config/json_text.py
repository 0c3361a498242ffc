"""JSON that every JSON reader accepts, written and read.

Python's own writer is not strict: it writes NaN and Infinity, which JSON does not have, and half
surrogates, which are no text. A strict reader (jq, a browser, another language) refuses the file.
So `json_text` is the only caller of `json.dumps` (a test checks this). Python's reader takes all of
these, and of two fields with one name the last; `strict_json` takes none, for what others wrote.
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

MAX_DEPTH = 100  # of lists and objects in each other; Python's own limit depends on the caller
_HALF_SURROGATES = {code: f"\\u{code:04x}" for code in range(0xD800, 0xE000)}


def json_text(
    value: Any,
    *,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
    ensure_ascii: bool = True,
    default: Callable[[Any], Any] | None = None,
) -> str:
    """`value` as JSON. The options are those of `json.dumps`, and so is the text, except that a
    number that is not finite becomes null, and a half surrogate (from a file name that is not
    UTF-8) becomes the six characters `\\udcff`.

    Raises TypeError for a value that JSON does not have and `default` does not convert.
    """

    def convert(other: Any) -> Any:
        assert default is not None
        return _clean(default(other))

    def write(clean: Any) -> str:
        return json.dumps(
            clean,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
            ensure_ascii=ensure_ascii,
            allow_nan=False,
            default=convert if default else None,
        )

    try:
        text = write(value)
        if "\\ud" not in text:  # how an escaped surrogate begins; few texts have one
            text.encode()
            return text
    except ValueError:  # not finite, or a half surrogate that `ensure_ascii=False` leaves
        pass
    return write(_clean(value))


def _clean(value: Any) -> Any:
    """`value` without numbers that are not finite and without half surrogates."""
    if isinstance(value, str):
        return value.translate(_HALF_SURROGATES)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {_clean(key): _clean(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(entry) for entry in value]
    return value


def strict_json(text: str) -> Any:
    """The value of a JSON text.

    Raises ValueError with the reason for what is not JSON by RFC 8259, and for what readers
    disagree on: a field that is there twice, a number that is not finite, half a surrogate pair,
    lists and objects nested more than MAX_DEPTH deep.
    """
    try:
        value = json.loads(
            text, object_pairs_hook=_fields, parse_float=_finite, parse_constant=_no_constant
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None
    # Cheap bounds: few texts have an escaped surrogate or so many brackets.
    if "\\ud" in text.lower() or text.count("[") + text.count("{") > MAX_DEPTH:
        _check(value, 0)
    return value


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {double!r} is there twice")
    return fields


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no finite number")
    return value


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _check(value: Any, depth: int) -> None:
    """Raises ValueError for half a surrogate pair and for too deep a value."""
    if isinstance(value, str):
        if any(0xD800 <= ord(letter) < 0xE000 for letter in value):
            raise ValueError("half a surrogate pair, which is no text")
    elif isinstance(value, dict | list):
        if depth == MAX_DEPTH:
            raise ValueError("nested too deeply")
        entries = [*value, *value.values()] if isinstance(value, dict) else value
        for entry in entries:
            _check(entry, depth + 1)
