"""The module transformer_engine_torch without a compiler: functions and enums as `bindings` found
them in its C++ source, with reference functions in torch behind those that a step of ours calls.

A call is checked as pybind11 does: number, names and kinds of the arguments. A function without a
reference raises NotImplementedError. `install` is for the whole process and is never undone.
"""

import collections
import enum
import functools
import importlib
import importlib.abc
import importlib.machinery
import inspect
import os
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

from tests.platform.pretend import packages
from tests.platform.transformer_engine import bindings

NAME = "transformer_engine_torch"
CALLS: collections.Counter[str] = collections.Counter()  # of reference functions

_REFERENCES = ("quantized", "products", "norms", "optimizer", "attention", "facts")
_DEFAULTS = {"py::none()": None, "std::nullopt": None, "nullptr": None, "false": False}
_DEFAULTS |= {"true": True}


def install() -> None:
    """Let this process import Transformer Engine, when our own code does: it reads its environment
    variables then. Needs the pretended device, and the package in its folder
    (`make test-transformer-engine`)."""
    packages.put_on_path("transformer_engine")
    place = packages.folder("transformer_engine")
    assert place is not None
    # Do not load libtransformer_engine.so, which the core package would bring (340 MB).
    os.environ["NVTE_PROJECT_BUILDING"] = "1"
    sys.modules[NAME] = make_module(bindings.read(place / "source"))
    sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Finds transformer_engine.common, and makes its loader of the extension do nothing: the module
    is there already."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != "transformer_engine.common":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None
        loader: Any = spec.loader
        execute = loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            module.load_framework_extension = lambda framework: None

        loader.exec_module = exec_module
        return spec


@functools.cache
def forms() -> dict[str, Callable[..., Any]]:
    """Name -> reference function. They import Transformer Engine."""
    found: dict[str, Callable[..., Any]] = {}
    for name in _REFERENCES:
        found |= importlib.import_module(f"tests.platform.transformer_engine.{name}").FUNCTIONS
    return found


def make_module(found: bindings.Bindings) -> types.ModuleType:
    """A module with the functions, enums and classes."""
    module = types.ModuleType(NAME)
    for name, members in found.enums.items():
        setattr(module, name, enum.IntEnum(name, members, module=NAME))
    for name in found.classes:
        setattr(module, name, type(name, (), {"__module__": NAME}))
    for function in found.functions.values():
        setattr(module, function.name, _Function(function))
    return module


class _Function:
    """A function of the extension."""

    def __init__(self, function: bindings.Function) -> None:
        self.__name__ = function.name
        self.types = {a.name: a.type for a in function.arguments}
        kind = inspect.Parameter.POSITIONAL_ONLY
        if function.takes_names:
            kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        defaults = [_default(a) for a in function.arguments]
        for place, default in enumerate(defaults):  # one before an argument without: of no use
            if default is inspect.Parameter.empty:
                defaults[:place] = [default] * place
        self.signature = inspect.Signature(
            [
                inspect.Parameter(argument.name, kind, default=default)
                for argument, default in zip(function.arguments, defaults, strict=True)
            ]
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = self.signature.bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            if not accepts(self.types[name], value):
                kind = self.types[name]
                raise TypeError(f"{self.__name__}: {name} is {type(value).__name__}, not {kind}")
        form = forms().get(self.__name__)
        if form is None:
            raise NotImplementedError(f"{NAME}.{self.__name__} has no reference function")
        CALLS[self.__name__] += 1
        bound.apply_defaults()
        with torch.no_grad():
            return form(*bound.args, **bound.kwargs)


def _default(argument: bindings.Argument) -> Any:
    text = argument.default
    if text == bindings.REQUIRED:
        return inspect.Parameter.empty
    if text in _DEFAULTS:
        return _DEFAULTS[text]
    number = text.removesuffix("f")
    try:
        return int(number) if number.lstrip("-").isdigit() else float(number)
    except ValueError:
        return text  # an enum's member, of a function without a reference


def accepts(kind: str, value: Any) -> bool:
    """Whether pybind11 converts `value` to the C++ type `kind`. Types that are not listed here
    accept everything."""
    kind = kind.removeprefix("const ").replace("MaybeTensor", "std::optional<at::Tensor>")
    outer, _, rest = kind.partition("<")
    if outer in ("std::optional", "at::optional"):
        return value is None or accepts(rest[:-1], value)
    if outer == "std::vector":
        is_sequence = isinstance(value, list | tuple | torch.Size)
        return is_sequence and all(accepts(rest[:-1], item) for item in value)
    if kind == "at::Tensor":
        return isinstance(value, torch.Tensor)
    if kind == "std::string":
        return isinstance(value, str)
    if kind == "bool":
        return value is None or isinstance(value, bool)  # pybind11 takes None for False
    if kind in ("int", "int64_t", "size_t", "DType"):
        return isinstance(value, int) and (kind != "size_t" or value >= 0)
    if kind in ("float", "double"):
        return isinstance(value, int | float)
    return True
