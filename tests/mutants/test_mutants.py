"""The list of mutants follows the code, and the runner tells a good test from a bad one.

Not covered: that each mutant is killed, which takes half an hour (`make mutants`).
"""

import ast
import functools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.mutants.mutants import Mutant, load_mutants
from tests.mutants.run import ROOT, Result, is_good, judge_all

MUTANTS = load_mutants()
PACKAGE = ROOT / "nemotron_train"
LAYERS = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}


def test_each_layer_has_mutants() -> None:
    """A folder of nemotron_train is a layer. The single modules beside them have none."""
    assert {mutant.package for mutant in MUTANTS} == LAYERS


def test_names_are_unique() -> None:
    names = [(mutant.package, mutant.name) for mutant in MUTANTS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("file", sorted({mutant.file for mutant in MUTANTS}))
def test_each_mutant_is_a_change_of_todays_code(file: str) -> None:
    """The text before is there exactly once. The mutant is Python that compiles, so that its tests
    fail by what it does."""
    text = (PACKAGE / file).read_text(encoding="utf-8")
    for mutant in MUTANTS:
        if mutant.file == file:
            assert text.count(mutant.before) == 1, f"{mutant.name}: follow the code"
            changed = text.replace(mutant.before, mutant.after)
            assert changed != text, mutant.name
            if file.endswith(".py"):
                ast.parse(changed)


def test_each_named_test_exists() -> None:
    """Read from the syntax trees: collecting all of them would take a minute."""
    for test in sorted({test for mutant in MUTANTS for test in mutant.tests}):
        file, _, name = test.partition("::")
        names = _functions(file)
        assert any(known.startswith("test_") for known in names), test
        assert not name or name.partition("[")[0] in names, test


@functools.cache
def _functions(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


ADD = Mutant(
    name="a sum that is a difference",
    package="sums",
    file="sums/add.py",
    before="a + b",
    after="a - b",
    tests=("test_add.py::test_one",),
)
SOURCE = "def add(a, b):\n    return a + b\n"
TESTS = """
import time
from nemotron_train.sums.add import add

def test_one():
    assert add(2, 3) == 5

def test_that_cannot_fail():
    assert add(2, 0) == 2

def test_that_waits_for_ever():
    time.sleep(600 * (add(2, 3) != 5))
"""


@pytest.mark.parametrize(
    ("change", "result"),
    [
        ({}, Result.killed),
        ({"tests": ("test_add.py::test_that_cannot_fail",)}, Result.survived),
        ({"tests": ("test_add.py::test_that_waits_for_ever",)}, Result.timed_out),
        ({"tests": ("test_add.py::test_that_is_gone",)}, Result.broken),
        ({"before": "a * b"}, Result.stale),
        ({"file": "sums/gone.py"}, Result.stale),
    ],
    ids=["killed", "survived", "timed_out", "broken", "other_text", "no_file"],
)
def test_the_runner_tells_what_became_of_a_mutant(
    tmp_path: Path, change: dict[str, Any], result: Result
) -> None:
    """A package of one function. Afterwards the copy computes as before: a mutant of the same
    length in the same second must not stay behind as a compiled file."""
    package = tmp_path / "nemotron_train"
    (package / "sums").mkdir(parents=True)
    (package / "__init__.py").touch()
    source = package / "sums" / "add.py"
    source.write_text(SOURCE)
    (tmp_path / "test_add.py").write_text(TESTS)
    mutant = replace(ADD, **change)
    timeout = 4.0 if result == Result.timed_out else 120.0
    said: list[str] = []
    assert judge_all([tmp_path], [mutant], timeout, said.append) == {mutant: result}
    assert len(said) == 1 and said[0].startswith(result) and mutant.name in said[0]
    assert source.read_text() == SOURCE
    check = "from nemotron_train.sums.add import add; assert add(2, 3) == 5"
    subprocess.run([sys.executable, "-c", check], cwd=tmp_path, check=True, env={})


def test_a_wrong_reason_is_no_excuse() -> None:
    """A mutant that is marked as equivalent must survive."""
    marked = replace(ADD, equivalent="because")
    assert is_good(ADD, Result.killed) and not is_good(ADD, Result.survived)
    assert is_good(marked, Result.survived) and not is_good(marked, Result.killed)
    assert not any(is_good(m, r) for m in (ADD, marked) for r in list(Result)[2:])
