"""Runs a model's code on inputs, inside the sandbox, and writes one frame with the outputs.

The code shares the interpreter with this module and may change anything in it, and may write frames
of its own. All it gains is to say which values it returned: what they should be is not here.
"""

import os
import sys
from collections.abc import Sequence
from typing import Any

from nemotron_train.config.json_text import json_text


def run_code(code: str, function: str, inputs: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """Define `function` by `code` and call it on each of `inputs`.

    Returns {"outputs": […]}, or {"error": one line, "memory": whether memory ran out}.
    """
    try:
        names: dict[str, Any] = {"__name__": "solution"}
        exec(compile(code, "<solution>", "exec"), names)
        if not callable(names.get(function)):
            return {"error": f"the code defines no function {function}", "memory": False}
        outputs = [_plain(names[function](*arguments)) for arguments in inputs]
        text = json_text(outputs)  # here, where a value that is none can still become an error
        return {"outputs": text}
    except MemoryError:
        return {"error": "MemoryError", "memory": True}
    except BaseException as error:
        return {"error": _line(error), "memory": False}


def write_frame(nonce: str, value: dict[str, Any], file: int) -> None:
    """Write the nonce and `value` to a descriptor."""
    data = (nonce + json_text(value)).encode()
    while data:
        data = data[os.write(file, data) :]


def _plain(value: Any, depth: int = 0) -> Any:
    """A value of JSON's types, exactly: an object that calls itself equal to everything is none.

    Raises TypeError for another type.
    """
    if depth > 50:
        raise TypeError("a value nested too deeply")
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) in (list, tuple):
        return [_plain(entry, depth + 1) for entry in value]
    if type(value) is dict and all(type(key) is str for key in value):
        return {key: _plain(entry, depth + 1) for key, entry in value.items()}
    raise TypeError(f"a value of type {type(value).__name__} was returned")


def _line(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:200]
    except BaseException:
        return "an exception without a text"


def flush() -> None:
    """Let go what the code printed, so that it counts."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BaseException:
            continue
