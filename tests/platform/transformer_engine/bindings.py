"""What Transformer Engine's C++ extension offers to Python, read from the source of that extension.

pybind11 states every function as `m.def("name", &function, py::arg("a"), py::arg("b") = 1)`. Names,
order and defaults of the arguments come from there, or from the function's declaration where the
definition names none. Types come from the declaration. Enums come from `enum_<...>(m, "Name")` and
their numbers from the headers.

Only what these files need is understood: no templates, no overloads. What is not understood is left
out and then missing in Python, with an AttributeError that names it.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_ARGUMENT = re.compile(r'(?:py|pybind11)::arg\("(\w+)"\)(?:\s*=\s*(.+))?', re.DOTALL)
_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)
REQUIRED = "required"  # default of an argument that has none


@dataclass(frozen=True)
class Argument:
    """An argument of a C++ function. default: its C++ text."""

    name: str
    type: str
    default: str = REQUIRED


@dataclass(frozen=True)
class Function:
    """A function of the extension. takes_names: whether Python may pass arguments by name."""

    name: str
    arguments: tuple[Argument, ...]
    takes_names: bool


@dataclass(frozen=True)
class Bindings:
    """All that was read."""

    functions: dict[str, Function]
    enums: dict[str, dict[str, int]]
    classes: tuple[str, ...]


def read(source: Path) -> Bindings:
    """Read the unpacked source distribution of transformer-engine-torch."""
    headers = source / "common_headers" / "common"
    text = _plain(source / "csrc" / "extensions" / "pybind.cpp")
    shared = _plain(headers / "util" / "pybind_helper.h").replace("\\\n", "\n")
    declared = _plain(source / "csrc" / "extensions.h")
    numbers = "\n".join(
        _plain(path)
        for path in [
            *sorted((headers / "include" / "transformer_engine").glob("*.h")),
            *sorted((source / "csrc").glob("*.h")),
        ]
    )
    both = text + shared
    functions = {f.name: f for f in _functions(text, f"{declared}\n{numbers}")}
    classes = re.findall(r'class_<[^()]*>\(\s*m,\s*"(\w+)"', both)
    return Bindings(functions, dict(_enums(both, numbers)), tuple(classes))


def _plain(path: Path) -> str:
    """The text of a file without its comments."""
    return _COMMENT.sub("", path.read_text("utf-8"))


def _functions(text: str, declared: str) -> Iterator[Function]:
    for found in re.finditer(r"\bm\.def\(", text):
        parts = split(inside(text, found.end()))
        if not parts[0].startswith('"') or not re.fullmatch(r"&?[\w:]+", parts[1]):
            continue
        types = _declaration(parts[1].rpartition(":")[2].lstrip("&"), declared)
        named = [match for part in parts[2:] if (match := _ARGUMENT.fullmatch(part))]
        if types is None:
            continue
        if named:
            assert len(named) == len(types), parts[0]
            arguments = tuple(
                Argument(match[1], argument.type, (match[2] or REQUIRED).strip())
                for match, argument in zip(named, types, strict=True)
            )
        else:  # without py::arg, C++ defaults do not reach Python
            arguments = tuple(Argument(a.name, a.type) for a in types)
        yield Function(parts[0].strip('"'), arguments, bool(named))


def _declaration(name: str, text: str) -> list[Argument] | None:
    """The arguments of a C++ function, or None if it is not declared in `text`."""
    found = re.search(rf"[\s&>]{name}\((?=[^;]*\);)", text)
    if found is None:
        return None
    arguments = []
    for part in split(inside(text, found.end())):
        kind, _, default = part.partition("=")
        match = re.fullmatch(r"(?:const\s+)?(.+?)[\s&*]+(\w+)", kind.strip(), re.DOTALL)
        assert match, part
        arguments.append(Argument(match[2], " ".join(match[1].split()), default.strip()))
    return arguments


def _enums(text: str, numbers: str) -> Iterator[tuple[str, dict[str, int]]]:
    """Name of each enum, and the numbers of its members. A member without a number in its header
    has the one after its predecessor's."""
    for found in re.finditer(r'enum_<[^()]*>\(\s*m,\s*"(\w+)"', text):
        statement = text[found.end() : text.index(";", found.end())]
        name = found[1]
        body = re.search(rf"enum\s+(?:class\s+)?{name}\s*\{{([^}}]*)\}}", numbers)
        body = body or re.search(rf"typedef\s+enum\s*\{{([^}}]*)\}}\s*{name};", numbers)
        if body is None:
            continue
        values: dict[str, int] = {}
        number = -1
        for part in split(body[1]):
            member, _, value = (word.strip() for word in part.partition("="))
            number = values.get(value, int(value) if value.lstrip("-").isdigit() else number + 1)
            values[member] = number
        members = re.findall(r'\.value\("(\w+)",\s*([\w:]+)\)', statement)
        yield name, {member: values[cpp.rpartition(":")[2]] for member, cpp in members}


def inside(text: str, start: int) -> str:
    """The text up to the parenthesis that closes the one before `start`."""
    depth = 1
    for end in range(start, len(text)):
        depth += (text[end] in "([{") - (text[end] in ")]}")
        if depth == 0:
            return text[start:end]
    raise ValueError("a parenthesis is never closed")


def split(text: str) -> list[str]:
    """The parts between commas that no bracket and no quote encloses."""
    parts, depth, quoted, begin = [], 0, False, 0
    for place, letter in enumerate(text):
        quoted ^= letter == '"'
        if not quoted:
            depth += (letter in "([{<") - (letter in ")]}>")
        if letter == "," and depth == 0 and not quoted:
            parts.append(text[begin:place].strip())
            begin = place + 1
    return [part for part in (*parts, text[begin:].strip()) if part]
