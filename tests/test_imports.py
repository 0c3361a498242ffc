"""The shape of the code, read from its syntax trees: which way imports go, who may know whom, what
loads no torch, how long files and functions may be.

Not covered: names reached through objects that are passed, and imports by string.
"""

import ast
import fnmatch
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "nemotron_train"

# From top to bottom. A module imports from its own row or a lower one; the whole is acyclic. The
# first pattern that fits decides (names without `nemotron_train.`).
LAYERS = [
    ("entry", ["__main__", "cli"]),
    ("composition", ["verbs", "recipe_files"]),
    ("composition", ["evaluate", "evaluate.*"]),
    ("composition", ["run", "compose", "data.commands", "report.*", "launch.*", "generate.*"]),
    ("composition", ["check", "check.*", "convert.*"]),
    ("session", ["train.session"]),
    ("whole model, side jobs", ["model.build", "train.evaluate", "train.hooks"]),
    (
        "assembly",
        ["model.specs", "train.step", "train.checkpoint", "train.branch", "precision.attach"],
    ),
    ("assembly", ["train.diagnose", "train.health"]),
    ("assembly", ["train.saved"]),
    ("assembly", ["precision.native"]),
    ("metadata", ["config.shrink"]),
    ("metadata", ["config.derive", "config.memory", "config.checks", "optim.schedule"]),
    ("metadata", ["config.activations", "config.communication", "config.operators"]),
    ("metadata", ["model.shape", "precision.plan", "precision.rules", "precision.blocking"]),
    ("metadata", ["model.stages", "config.layout_checks"]),
    ("metadata", ["precision.transformer_engine", "precision.record", "train.lineage"]),
    ("metadata", ["config.guards", "precision.backend"]),
    ("metadata", ["train.metrics", "train.run_folder", "train.progress_bar", "train.integrity"]),
    ("metadata", ["train.run_lock", "train.starts", "train.knobs", "train.metric_groups"]),
    ("ground", ["", "config", "config.schema", "config.cluster", "platform", "platform.*"]),
    ("parts", ["model", "precision", "optim", "train", "data", "report"]),
    ("parts", ["model.*", "precision.*", "optim.*", "train.*", "data.*"]),
]
ORDER = ["ground", "metadata", "parts", "assembly", "whole model, side jobs", "session"]
ORDER += ["composition", "entry"]

KNOW_MEGATRON = ["platform.*", "model.*", "optim.build", "precision.attach", "precision.linear"]
KNOW_MEGATRON += ["precision.native", "train.step", "train.checkpoint", "train.evaluate"]
KNOW_MEGATRON += ["train.session", "optim.gradients", "check.state"]
KNOW_MEGATRON += ["optim.update", "train.diagnose", "train.health"]
KNOW_MEGATRON += ["train.random_states"]
OWN_CUDA = ["platform.device", "platform.megatron_cpu"]
# What the core must do without; run.py composes, cli.py calls.
AROUND_THE_CORE = ["report.*", "launch.*", "generate.*", "posttrain.*", "convert.*"]
AROUND_THE_CORE += ["check.*", "evaluate.*"]

# Modules that load no torch, with all that they import.
NO_TORCH = ["", "cli", "compose", "config.*", "model.shape", "precision.plan", "precision.rules"]
NO_TORCH += ["precision.transformer_engine", "optim.schedule", "data.*", "report.*", "launch.*"]
NO_TORCH += ["precision.record", "train.lineage", "precision.backend", "platform.hardware"]
NO_TORCH += ["precision.telemetry_record", "model.stages"]
NO_TORCH += ["verbs", "check.commands", "check.launch", "check.compare", "check.data"]
NO_TORCH += ["recipe_files"]
NO_TORCH += ["check.parallel", "check.resume"]
NO_TORCH += ["check.precision", "convert.commands", "convert.weights"]
NO_TORCH += ["evaluate.commands", "evaluate.knobs"]
NO_TORCH += ["generate.commands", "generate.knobs", "generate.text"]
NO_TORCH += ["convert.huggingface", "convert.huggingface_fields", "convert.huggingface_config"]
NO_TORCH += ["train.failure", "train.spikes", "train.starts", "train.watchdog"]
NO_TORCH += ["train.metrics", "train.run_folder", "train.progress_bar", "train.integrity"]
NO_TORCH += ["train.run_lock", "train.saved", "train.knobs", "train.metric_groups"]

MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 80
# Longer on purpose, and not to grow: one algorithm with its hand-derived backward.
MAX_LINES_OF = {"model.ssd_chunked": 450}


def _modules() -> dict[str, Path]:
    """Module name, without the package's, to its file."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts).removesuffix("__init__").removesuffix(".")] = path
    return found


MODULES = _modules()
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def _imports(tree: ast.Module) -> set[str]:
    """Full names of everything imported anywhere in a file, inside functions too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _own_imports(name: str) -> set[str]:
    """The modules of this package that a module imports; an import of a name counts for its
    module."""
    found = set()
    for full in _imports(TREES[name]):
        if full.split(".")[0] != "nemotron_train":
            continue
        target = full.removeprefix("nemotron_train").removeprefix(".")
        while target not in MODULES:
            target = target.rpartition(".")[0]
        found.add(target)
    return found - {name}


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _layer(name: str) -> int:
    for layer, patterns in LAYERS:
        if _matches(name, patterns):
            return ORDER.index(layer)
    raise AssertionError(f"{name}: say in LAYERS where this module belongs")


def _importers(prefix: str) -> list[str]:
    return [
        name
        for name, tree in TREES.items()
        if any(full == prefix or full.startswith(f"{prefix}.") for full in _imports(tree))
    ]


def test_imports_go_down() -> None:
    wrong = [
        f"{name} imports {target}"
        for name in MODULES
        for target in _own_imports(name)
        if _layer(target) > _layer(name)
    ]
    assert not wrong, wrong


def test_no_import_cycle() -> None:
    graph = {name: _own_imports(name) for name in MODULES}
    list(graphlib.TopologicalSorter(graph).static_order())  # CycleError shows the cycle


def test_the_core_does_not_know_what_surrounds_it() -> None:
    wrong = [
        f"{name} imports {target}"
        for name in MODULES
        if name not in ("run", "cli") and not _matches(name, AROUND_THE_CORE)
        for target in _own_imports(name)
        if _matches(target, AROUND_THE_CORE)
    ]
    assert not wrong, wrong


def test_megatron_core_has_one_border() -> None:
    assert [name for name in _importers("megatron") if not _matches(name, KNOW_MEGATRON)] == []


def test_nothing_imports_megatron_training() -> None:
    assert _importers("megatron.training") == []


def test_only_the_composition_knows_hydra() -> None:
    assert _importers("hydra") == ["compose"]


def test_torch_cuda_has_one_owner() -> None:
    users = [name for name, path in MODULES.items() if "torch.cuda" in path.read_text("utf-8")]
    assert [name for name in users if name not in OWN_CUDA] == []


def test_what_works_on_a_login_node_loads_no_torch() -> None:
    """Imports each such module in a fresh interpreter: the truth about what is loaded with it."""
    names = [name for name in MODULES if _matches(name, NO_TORCH)]
    assert {"cli", "config.derive", "report.plot", "data.prepare"} <= set(names)
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(('nemotron_train.' + name).rstrip('.'))\n"
        "    assert 'torch' not in sys.modules, name\n"
        "    assert 'matplotlib' not in sys.modules, name\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", MODULES)
def test_files_and_functions_stay_short(name: str) -> None:
    num_lines = len(MODULES[name].read_text(encoding="utf-8").splitlines())
    assert num_lines <= MAX_LINES_OF.get(name, MAX_FILE_LINES)
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines"


@pytest.mark.parametrize("name", MODULES)
def test_each_module_says_what_it_is(name: str) -> None:
    assert ast.get_docstring(TREES[name]), "a module docstring says what it owns and what not"
