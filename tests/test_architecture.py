"""The code's structure, read from its syntax trees: the direction of imports, who may import what,
which modules load no torch, and the length of files and functions.

A folder directly under nemotron_train/ is a layer. LAYERS lists them from top to bottom. A module
imports from its own layer or from a lower one. No two folders, at any depth, import each other.

Not covered: names reached through objects that are passed, and imports by string.
"""

import ast
import graphlib
import re
import runpy
import subprocess
import sys
from collections.abc import Mapping, Set
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "nemotron_train"

LAYERS = (
    "__main__",
    "cli",
    "check",
    "launch",
    "convert",
    "posttrain",
    "evaluate",
    "generate",
    "run",
    "report",
    "compose",
    "train",
    "assemble",
    "precision",
    "optim",
    "run_folder",
    "data",
    "model",
    "kernels",
    "platform",
    "plan",
    "config",
)

# Layers and folders whose modules load no torch, and single modules of others that load none.
NO_TORCH = ("cli", "compose", "config", "data", "launch", "plan", "report", "run_folder")
NO_TORCH_FOLDERS = ("posttrain.environments", "posttrain.sandbox")
NO_TORCH_MODULES = [
    "check.compare",
    "check.data",
    "check.environment",
    "check.parallel",
    "check.precision",
    "check.ranks",
    "check.resume",
    "convert.merge_weights",
    "convert.hugging_face.config",
    "convert.hugging_face.fields",
    "convert.hugging_face.mapping",
    "evaluate.knobs",
    "generate.knobs",
    "generate.text",
    "platform.files",
    "platform.lock",
    "platform.terminal",
    "posttrain.advantage",
    "posttrain.correction",
    "posttrain.curriculum",
    "posttrain.knobs",
    "posttrain.ratios",
    "posttrain.tasks",
    "posttrain.warm_start",
    "precision.telemetry_record",
    "train.guard.spikes",
    "train.guard.watchdog",
    "train.loop",
    "train.progress_bar",
]

KNOW_MEGATRON = ("assemble.*", "model.*", "optim.*", "platform.*", "precision.*", "train.*")
KNOW_MEGATRON += ("check.state",)
OWN_CUDA = ("platform.device", "platform.megatron_cpu")

MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 80

Imports = Mapping[str, Set[str]]


def _modules() -> dict[str, Path]:
    """Maps each module name, without the package's name, to its file."""
    modules = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        modules[".".join(parts).removesuffix("__init__").removesuffix(".")] = path
    return modules


MODULES = _modules()
FOLDERS = {name for name, path in MODULES.items() if path.name == "__init__.py" and name}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def _imported_names(tree: ast.Module) -> set[str]:
    """Full names of everything imported anywhere in a file, also inside functions."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _package_imports(name: str) -> set[str]:
    """The modules of this package that a module imports."""
    targets = set()
    for full in _imported_names(TREES[name]):
        if full.split(".")[0] != "nemotron_train":
            continue
        target = full.removeprefix("nemotron_train").removeprefix(".")
        while target not in MODULES:  # the name of a class or function maps to its module
            target = target.rpartition(".")[0]
        targets.add(target)
    return targets - {name, ""}


IMPORTS: Imports = {name: _package_imports(name) for name in MODULES if name}


def _layer(name: str) -> str:
    return name.split(".")[0]


def _folder(name: str) -> str:
    """The folder of a module. A module directly under the package counts as its own folder."""
    return name if name in FOLDERS else name.rpartition(".")[0] or name


def imports_up(imports: Imports) -> list[str]:
    """Every import by a module from a layer above its own."""
    place = {layer: number for number, layer in enumerate(LAYERS)}
    return [
        f"{name} imports {target}"
        for name, targets in imports.items()
        for target in sorted(targets)
        if place[_layer(target)] < place[_layer(name)]
    ]


def folder_imports(imports: Imports) -> dict[str, set[str]]:
    """The folders that the modules of each folder import."""
    graph: dict[str, set[str]] = {}
    for name, targets in imports.items():
        folders = {_folder(target) for target in targets} - {_folder(name)}
        graph.setdefault(_folder(name), set()).update(folders)
    return graph


def cycle(graph: Imports) -> list[str]:
    """One import cycle, or an empty list."""
    try:
        list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def _importers(prefix: str) -> list[str]:
    return [
        name
        for name, tree in TREES.items()
        if any(full == prefix or full.startswith(f"{prefix}.") for full in _imported_names(tree))
    ]


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def test_every_folder_is_a_layer() -> None:
    assert {_layer(name) for name in IMPORTS} == set(LAYERS)


def test_imports_go_down() -> None:
    assert imports_up(IMPORTS) == []


def test_no_cycle_of_files() -> None:
    assert cycle(IMPORTS) == []


def test_no_cycle_of_folders() -> None:
    """At any depth, so that no two packages import each other."""
    assert cycle(folder_imports(IMPORTS)) == []


def test_an_import_up_is_found() -> None:
    """The rule is not vacuous: one forbidden import is added, and it is reported."""
    violated = {**IMPORTS, "config.schema": {*IMPORTS["config.schema"], "plan.derive"}}
    assert imports_up(violated) == ["config.schema imports plan.derive"]


def test_a_cycle_of_folders_is_found() -> None:
    """Both imports go to other files, so only the folders form a cycle. They lie in one layer,
    where the order of layers does not apply."""
    violated = {**IMPORTS, "plan.precision.record": {"plan.hardware"}}
    assert cycle(violated) == [] and imports_up(violated) == []
    assert {"plan", "plan.precision"} <= set(cycle(folder_imports(violated)))


def test_the_picture_is_drawn_from_these_imports() -> None:
    """If the test fails, run `python docs/architecture.py` to redraw it."""
    drawn = runpy.run_path(str(ROOT / "docs" / "architecture.py"))
    assert (ROOT / "docs" / "architecture.svg").read_text("utf-8") == drawn["picture"]()


def test_megatron_core_has_one_border() -> None:
    assert [name for name in _importers("megatron") if not _matches(name, KNOW_MEGATRON)] == []


def test_nothing_imports_megatron_training() -> None:
    assert _importers("megatron.training") == []


def test_only_the_composition_knows_hydra() -> None:
    assert {_layer(name) for name in _importers("hydra")} == {"compose"}


def test_torch_cuda_has_one_owner() -> None:
    users = [name for name, path in MODULES.items() if "torch.cuda" in path.read_text("utf-8")]
    assert [name for name in users if name not in OWN_CUDA] == []


def plain_printing_faults(tree: ast.Module) -> list[str]:
    """Uses of rich that would give the text of a user a meaning, as `line: what`."""
    faults = [name for name in _imported_names(tree) if name.startswith("rich.markup")]
    faults += [name for name in _imported_names(tree) if name in ("rich.print", "rich.inspect")]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            options = {option.arg: ast.unparse(option.value) for option in node.keywords}
            is_named = name in ("Console", "TextColumn", "from_markup", "from_ansi", "print_json")
            if is_named or {options.get("markup"), options.get("emoji")} & {"True"}:
                faults.append(f"{node.lineno}: {ast.unparse(node.func)}")
    return faults


@pytest.mark.parametrize("name", MODULES)
def test_text_of_users_has_no_markup(name: str) -> None:
    """One module makes consoles and progress columns. There, markup and emoji are off."""
    if name != "platform.terminal":
        assert plain_printing_faults(TREES[name]) == []


@pytest.mark.parametrize(
    "code",
    [
        "from rich.markup import escape",
        "from rich import print",
        "console = Console(width=3)",
        "console = rich.console.Console()",
        "Text.from_markup(name)",
        "console.print(name, markup=True)",
        "TextColumn('[bold]step')",
    ],
)
def test_markup_is_found(code: str) -> None:
    assert plain_printing_faults(ast.parse(code))


def json_writers(tree: ast.Module) -> list[str]:
    """Uses of Python's JSON writer, which also writes NaN and half surrogates."""
    uses = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute)]
    names = [f"{use.lineno}: {ast.unparse(use)}" for use in uses]
    writers = ("json.dump", "json.dumps", "json.JSONEncoder")
    found = [name for name in names if name.partition(": ")[2] in writers]
    return found + [name for name in _imported_names(tree) if name in writers]


@pytest.mark.parametrize("name", MODULES)
def test_json_has_one_writer(name: str) -> None:
    """It writes what strict readers accept (tests/config/test_json_text.py)."""
    if name != "config.json_text":
        assert json_writers(TREES[name]) == []


def test_a_json_writer_is_found() -> None:
    for code in ("json.dumps(x)", "json.dump(x, f)", "from json import dumps", "f(json.dumps)"):
        assert json_writers(ast.parse(code)), code


def test_what_works_on_a_login_node_loads_no_torch() -> None:
    """Imports all of these modules in one fresh interpreter and checks what that really loads."""
    names = [name for name in MODULES if _layer(name) in NO_TORCH or name in NO_TORCH_MODULES]
    names += [name for name in MODULES if _folder(name) in NO_TORCH_FOLDERS]
    assert set(NO_TORCH_MODULES) <= set(names)
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module('nemotron_train.' + name)\n"
        "    assert 'torch' not in sys.modules, name\n"
        "    assert 'matplotlib' not in sys.modules, name\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", MODULES)
def test_files_and_functions_stay_short(name: str) -> None:
    num_lines = len(MODULES[name].read_text(encoding="utf-8").splitlines())
    assert num_lines <= MAX_FILE_LINES
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines"


def _c_functions(text: str) -> list[tuple[str, int]]:
    """Name and length of each C function. It begins at the margin and ends with a `}` there."""
    functions, start, name = [], None, ""
    for number, line in enumerate(text.splitlines()):
        if start is None and re.match(r"[A-Za-z].*\w\(", line) and not line.endswith(";"):
            start, name = number, line
        elif line == "}" and start is not None:
            functions.append((name, number - start + 1))
            start = None
    return functions


def _js_functions(text: str) -> list[tuple[str, int]]:
    """First line and length of each function, method and arrow function with a body in braces. It
    ends at the next `}` with the same indentation."""
    kinds = (
        r"(?:async )?function\b.*[({]",  # function name(...) {
        r"(?:\w+ )*[*#]?\w+\(.*\) \{",  # name(...) {
        r".*=> \{",  # const name = (...) => {
    )
    functions, lines = [], text.splitlines()
    for number, line in enumerate(lines):
        if begun := re.match(rf"(\s*)(?:{'|'.join(kinds)})(?:\s*//.*)?$", line):
            close = begun[1] + "}"
            end = next(n for n in range(number + 1, len(lines)) if lines[n].startswith(close))
            functions.append((line.strip(), end - number + 1))
    return functions


SCRIPTS = sorted(
    str(path.relative_to(PACKAGE))
    for path in PACKAGE.rglob("*")
    if path.suffix in (".c", ".h", ".js")
)


@pytest.mark.parametrize("name", SCRIPTS)
def test_c_and_javascript_stay_short(name: str) -> None:
    text = (PACKAGE / name).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE_LINES
    functions = _js_functions(text) if name.endswith(".js") else _c_functions(text)
    assert functions, "the reader of functions found some"
    for function, length in functions:
        assert length <= MAX_FUNCTION_LINES, f"{function} has {length} lines"


@pytest.mark.parametrize("name", MODULES)
def test_each_module_says_what_it_is(name: str) -> None:
    assert ast.get_docstring(TREES[name]), "a module docstring says what it owns and what not"


@pytest.mark.parametrize("name", MODULES)
def test_each_public_function_has_a_docstring(name: str) -> None:
    """Functions and classes at the top of a file, and methods of public classes, except methods
    that only declare a slot."""
    missing = [
        where
        for where, node in _public(TREES[name])
        if not ast.get_docstring(node) and not _is_slot(node)
    ]
    assert not missing, missing


Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _public(tree: ast.Module) -> list[tuple[str, Definition]]:
    definitions: list[tuple[str, Definition]] = []
    for node in tree.body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            definitions.append((node.name, node))
            if isinstance(node, ast.ClassDef):
                methods = [n for n in node.body if isinstance(n, ast.FunctionDef)]
                definitions += [
                    (f"{node.name}.{m.name}", m) for m in methods if not m.name.startswith("_")
                ]
    return definitions


def _is_slot(node: Definition) -> bool:
    """Whether the body is only `...`, as in a protocol."""
    if isinstance(node, ast.ClassDef):
        return False
    body = node.body[-1]
    is_declaration = isinstance(body, ast.Expr) and isinstance(body.value, ast.Constant)
    return is_declaration and len(node.body) == 1
