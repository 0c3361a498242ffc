"""`convert to-hf`, `from-hf` and `merge` that are killed, that meet a full disk, or whose output
cannot be written.

A forked child is killed before one of its writes: a file opened for writing, a rename, a removal, a
flush. Second truth: the output of a call that nothing disturbed. Not covered: a machine that loses
power.
"""

import errno
import os
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemotron_train.cli.main import main

pytestmark = pytest.mark.usefixtures("in_small_run")

WRITES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"}
KILLED = 9


@pytest.fixture(scope="module")
def inputs(small_run: tuple[Path, list[str]]) -> None:
    """The run runs/to_kill with a checkpoint at step 2, and its export in hf_whole."""
    words = ["name=to_kill", "precision=bf16", "train.stop_after_steps=2"]
    assert main(["pretrain", *small_run[1], *words]) == 3
    assert main(["convert", "to-hf", "runs/to_kill@2", "--out", "hf_whole"]) == 0


VERBS = {
    "to-hf": ["convert", "to-hf", "runs/to_kill@2", "--shard-gib", "0.0003", "--out", "made/x"],
    "from-hf": ["convert", "from-hf", "hf_whole", "--shard-gib", "0.0003", "--out", "made/x"],
    "merge": ["convert", "merge", "runs/to_kill@2", "output=made/x"],
}


def _watch(reached: Callable[[int], None]) -> None:
    """Calls `reached(n)` before the n-th write of this process from now on."""
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        reached(count)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in WRITES:
            step()
        elif event == "open" and "made" in str(arguments[0]):
            _, mode, flags = arguments
            if set(mode or "") & set("wax+") or flags & (os.O_WRONLY | os.O_RDWR):
                step()

    os.fsync = lambda descriptor: step()  # a kill does not lose what was not flushed
    sys.addaudithook(hook)


def forked(work: Callable[[], int]) -> int:
    """The exit code of a child process that does `work`."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = work()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def num_writes(words: list[str]) -> int:
    """The number of writes of an undisturbed call, whose output is then at `made/whole`."""
    reader, writer = os.pipe()

    def work() -> int:
        _watch(lambda number: os.write(writer, b"."))  # type: ignore[func-returns-value]
        return main(words)

    assert forked(work) == 0
    os.close(writer)
    with open(reader, "rb") as stream:
        return len(stream.read())


def content(folder: Path) -> dict[str, bytes]:
    """Every file of an output, without the time in the record of checkpoints."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in files
        if path.name != "checkpoints.jsonl"
    }


@pytest.mark.parametrize("verb", VERBS)
def test_a_second_call_after_a_kill_completes(
    inputs: None,
    verb: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed at four points over the whole call, and at each of the last five, where the folder
    gets its name. The second call leaves the same files as an undisturbed one and nothing beside
    them; a third says that they are complete."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # which is most of the time
    words, made = VERBS[verb], Path("made")
    shutil.rmtree(made, ignore_errors=True)
    total = num_writes(words)
    expected = content(made / "x")
    assert total > 20 and expected
    points = {1 + total * part // 4 for part in range(4)} | {total - part for part in range(5)}
    for point in sorted(points):
        shutil.rmtree(made, ignore_errors=True)

        def work(point: int = point) -> int:
            _watch(lambda number: os._exit(KILLED) if number == point else None)
            return main(words)

        assert forked(work) == KILLED, f"{point} of {total}"
        if (made / "x").exists():
            assert content(made / "x") == expected, f"visible before complete: {point} of {total}"
        capfd.readouterr()
        assert main(words) == 0, f"{point} of {total}: {capfd.readouterr().err}"
        assert content(made / "x") == expected, f"{point} of {total}"
        assert [path.name for path in made.iterdir()] == ["x"], f"{point} of {total}"
    capfd.readouterr()
    assert main(words) == 0
    assert "is there already, complete" in capfd.readouterr().out
    assert content(made / "x") == expected


@pytest.mark.parametrize("verb", VERBS)
def test_what_differs_is_never_taken_for_complete_nor_replaced(
    inputs: None, verb: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """One bit of the largest file of the output is flipped."""
    words, made = VERBS[verb], Path("made")
    shutil.rmtree(made, ignore_errors=True)
    assert main(words) == 0
    largest = max((p for p in made.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    before = content(made / "x")
    capfd.readouterr()
    assert main(words) == 2
    error = capfd.readouterr().err
    assert "is there already; give another" in error and error.count("\n") == 1
    assert content(made / "x") == before and [p.name for p in made.iterdir()] == ["x"]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("limit", [0, 3000, 60_000])
def test_a_full_disk_is_one_line(
    inputs: None, verb: str, limit: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """No file may grow past `limit` bytes, which the kernel enforces."""
    shutil.rmtree("made", ignore_errors=True)

    def work() -> int:
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
        return main(VERBS[verb])

    reader, writer = os.pipe()  # what pytest captures is a file, too

    def piped() -> int:
        sys.stdout = sys.stderr = os.fdopen(writer, "w")
        return work()

    code = forked(piped)
    os.close(writer)
    with open(reader) as stream:
        lines = [line for line in stream.read().splitlines() if line.startswith("nemotron-train:")]
    assert code == 2 and len(lines) == 1 and os.strerror(errno.EFBIG) in lines[0], lines
    assert not Path("made").exists()


@pytest.mark.parametrize("verb", VERBS)
def test_a_flush_that_fails_is_one_line(
    inputs: None, verb: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree("made", ignore_errors=True)
    calls: list[int] = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    capfd.readouterr()
    assert main(VERBS[verb]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "made/x: cannot be written (No space left" in error
    assert not Path("made").exists()


BAD_OUTPUTS = {
    "below a file": "text.jsonl/x",
    "far below a file": "text.jsonl/a/b/x",
    "below a loop": "loop/x",
    "a loop": "loop",
    "a file": "text.jsonl",
    "this folder": ".",
    "the root": "/",
    "the folder above": "..",
    "the input": {"to-hf": "runs/to_kill", "from-hf": "hf_whole", "merge": "runs/to_kill"},
    "in the input": {
        "to-hf": "runs/to_kill/checkpoints/step_00000002/x",
        "from-hf": "hf_whole/x",
        "merge": "runs/to_kill/checkpoints/x",
    },
    "in the input through a link": {
        "to-hf": "link/runs/to_kill/x",
        "from-hf": "link/hf_whole/x",
        "merge": "link/runs/to_kill/x",
    },
    "a long name": "made/" + "x" * 300,
    "a long path": "made/" + "x/" * 3000,
}


@pytest.mark.parametrize("kind", BAD_OUTPUTS)
@pytest.mark.parametrize("verb", VERBS)
def test_outputs_are_refused_before_the_work(
    inputs: None,
    verb: str,
    kind: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No tensor is read for an output that cannot be written, and nothing changes on the disk."""
    for name, target in (("loop", "loop"), ("link", ".")):
        if not os.path.lexists(name):
            Path(name).symlink_to(target)
    shutil.rmtree("made", ignore_errors=True)
    chosen = BAD_OUTPUTS[kind]
    output = chosen if isinstance(chosen, str) else chosen[verb]
    words = [word.replace("made/x", output) for word in VERBS[verb]]

    def no_work(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("the tensors are read")

    monkeypatch.setattr("nemotron_train.run_folder.integrity.file_sha256", no_work)
    before = {str(p) for folder in (".", "runs", "hf_whole") for p in Path(folder).iterdir()}
    capfd.readouterr()
    assert main(words) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error, error
    after = {str(p) for folder in (".", "runs", "hf_whole") for p in Path(folder).iterdir()}
    assert after == before
