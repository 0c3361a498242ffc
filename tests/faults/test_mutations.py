"""Three protections removed from a copy of the package. Each removal must turn a test red.

The test copies `nemotron_train`, replaces one passage, puts the copy first on the path and runs a
test of this folder against it. If the passage is not found, the test fails: the mutation must
follow the code.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
FAULTS = Path(__file__).parent

MUTATIONS = {
    "visible_before_complete": (
        "run_folder/integrity.py",
        "    partial, step = partial_folder(final), _step_of(final)\n",
        "    partial_folder(final).rename(final)\n"
        "    partial, step = final, _step_of(final)\n"
        "    final = partial_folder(final)\n",
        "test_kill.py::test_killed_in_saves_equals_uninterrupted[four]",
    ),
    "no_checksum": (
        "run_folder/integrity.py",
        "            if file_sha256(folder / name, follow_links=False) != sums[name]:\n",
        "            if False:\n",
        "test_damage.py::test_100_flipped_bits_are_found",
    ),
    "no_agreement": (
        "train/stop.py",
        "            dist.all_reduce(reduced, op=dist.ReduceOp.MAX)\n",
        "",
        "test_signals.py::test_one_rank_is_asked[1]",
    ),
}


@pytest.mark.faults
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_turns_a_test_red(tmp_path: Path, name: str) -> None:
    file, passage, replacement, test = MUTATIONS[name]
    for folder in ("nemotron_train", "recipes"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    path = tmp_path / "nemotron_train" / file
    text = path.read_text()
    assert text.count(passage) == 1, f"{file} has changed: rewrite the mutation"
    path.write_text(text.replace(passage, replacement))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += ["-c", f"{ROOT / 'pyproject.toml'}", "--rootdir", f"{ROOT}"]
    command += ["-m", "faults or not faults", f"{FAULTS / test}"]
    done = subprocess.run(
        command,
        cwd=tmp_path,  # python -m puts it first on the path
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 1, done.stdout  # 1: a test failed; other codes: no test ran
    assert "1 failed" in done.stdout, done.stdout
