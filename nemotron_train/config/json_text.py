"""JSON text that every JSON reader accepts. The only caller of `json.dumps` (a test checks this).

Python's own writer is not strict: it writes NaN and Infinity, which JSON does not have, and half
surrogates, which are no text. A strict reader (jq, a browser, another language) refuses the file.
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

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
