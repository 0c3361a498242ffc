"""Reads the list of mutants: one YAML file a package of nemotron_train in the folder `list`.

    - name: what the mutant does wrong, as a user or a reader of the code would say it
      file: path below the package
      before: text that the file holds exactly once
      after: what takes its place
      tests: [tests below tests/ of which one should fail: the few quick ones]
      equivalent: why nothing can tell the mutant from the original (rare)

Owns: the format. Does not own: running them (`run.py`).
"""

from dataclasses import dataclass
from pathlib import Path

import yaml

LIST = Path(__file__).resolve().parent / "list"


@dataclass(frozen=True)
class Mutant:
    """One change of the package that a test should notice. `file` is below nemotron_train, `tests`
    are pytest's names from the project's root."""

    name: str
    package: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]
    equivalent: str = ""


def load_mutants() -> list[Mutant]:
    """All mutants, by package. Raises TypeError or KeyError on a file that has another form."""
    return [
        _mutant(path.stem, entry)
        for path in sorted(LIST.glob("*.yaml"))
        for entry in yaml.safe_load(path.read_text(encoding="utf-8"))
    ]


def _mutant(package: str, entry: dict) -> Mutant:
    file = f"{package}/{entry['file']}"
    tests = tuple(f"tests/{test}" for test in entry["tests"])
    return Mutant(package=package, **{**entry, "file": file, "tests": tests})
