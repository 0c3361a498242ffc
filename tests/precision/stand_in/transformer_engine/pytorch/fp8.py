"""The stack of autocast contexts."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_STACK: list[tuple[bool, Any]] = [(False, None)]


class FP8GlobalStateManager:
    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return _STACK[-1][0]

    @classmethod
    def get_fp8_recipe(cls) -> Any:
        return _STACK[-1][1]


@contextmanager
def fp8_autocast(
    enabled: bool = True, fp8_recipe: Any = None, fp8_group: Any = None
) -> Iterator[None]:
    _STACK.append((enabled, fp8_recipe))
    try:
        yield
    finally:
        _STACK.pop()


@contextmanager
def fp8_model_init(
    enabled: bool = True, recipe: Any = None, preserve_high_precision_init_val: bool = False
) -> Iterator[None]:
    assert not enabled, "weights are kept in high precision here"
    yield
