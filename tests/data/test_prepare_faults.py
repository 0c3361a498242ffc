"""`data prepare` on a full disk, with broken writes, and killed at every write.

Each ends in one line with exit code 2 (or dies), and the same command then makes the bytes of an
undisturbed one and leaves nothing else. Not covered: loss of power; a disk that reports a fault
later than the call that caused it.
"""

import errno
import json
import os
import resource
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from nemotron_train.config.errors import ConfigError
from nemotron_train.data import indexed, readers
from nemotron_train.data import prepare as prepare_module
from nemotron_train.data.prepare import PrepareConfig, prepare

TEXTS = [f"document {number}: " + "some words of it " * (number % 9) for number in range(150)]
WRITES = ("open", "os.rename", "os.mkdir", "os.remove", "os.truncate")


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_BATCH_BYTES", 2000)
    monkeypatch.setattr(prepare_module, "_COMMIT_TOKENS", 1000)


@pytest.fixture
def config(tmp_path: Path, tokenizer_folder: Path) -> PrepareConfig:
    (tmp_path / "in").mkdir()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (tmp_path / "in" / "a.jsonl").write_text(lines)
    (tmp_path / "in" / "b.zip").write_text("")
    return PrepareConfig(
        input=str(tmp_path / "in"),
        output=str(tmp_path / "made" / "out"),
        tokenizer=str(tokenizer_folder),
        validation_fraction=0.2,
        shard_tokens=1500,
        workers=1,
    )


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def expected(config: PrepareConfig, tmp_path: Path) -> dict[str, bytes]:
    prepare(PrepareConfig(**{**vars(config), "output": str(tmp_path / "whole")}))
    return contents(tmp_path / "whole")


def check_rerun(config: PrepareConfig, expected: dict[str, bytes]) -> None:
    prepare(config)
    output = Path(config.output)
    assert contents(output) == expected
    assert sorted(path.name for path in output.parent.iterdir()) == ["out"]


def in_a_child(config: PrepareConfig, before: Callable[[], None]) -> tuple[int, str]:
    """Runs `prepare` in a fork of this process: its wait status, and its ConfigError."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # threads of other tests; the child uses none of them
        child = os.fork()
    if not child:
        status = 9
        try:
            before()
            prepare(config)
            status = 0
        except ConfigError as error:
            os.write(writing, str(error).encode()[:4000])
            status = 2
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as stream:
        message = stream.read()
    return os.waitpid(child, 0)[1], message


def at_write(config: PrepareConfig, event: int, act: Callable[[], None]) -> Callable[[], None]:
    """Calls `act` before the `event`-th time that something beside the output is opened to write,
    renamed, made, removed or cut."""
    count = 0
    place = str(Path(config.output).parent)

    def hook(name: str, arguments: tuple) -> None:
        nonlocal count
        if name not in WRITES or not str(arguments[0]).startswith(place):
            return
        if name == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            return
        count += 1
        if count == event:
            act()

    return lambda: sys.addaudithook(hook)


def test_killed_at_every_write(config: PrepareConfig, expected: dict[str, bytes]) -> None:
    """SIGKILL before each write event in turn, in one output: each attempt goes on from where the
    one before was killed, and a last one finishes."""
    killed = 0
    for event in (*range(1, 40, 3), *range(40, 140, 11)):
        status, _ = in_a_child(
            config, at_write(config, event, lambda: os.kill(os.getpid(), signal.SIGKILL))
        )
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        assert not Path(config.output).exists()
        killed += 1
    assert killed > 10
    check_rerun(config, expected)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_a_write_that_fails(config: PrepareConfig, expected: dict[str, bytes], number: int) -> None:
    """At one of the opens, renames and removals; a few of them in turn."""

    def fail() -> None:
        raise OSError(number, os.strerror(number), "there")

    for event in (2, 5, 9, 14, 20, 27, 35, 44):
        status, message = in_a_child(config, at_write(config, event, fail))
        if status == 0:
            break
        assert os.WEXITSTATUS(status) == 2, (event, message)
        assert message.startswith("output=") or "cannot be made" in message
        assert os.strerror(number) in message and "\n" not in message
    check_rerun(config, expected)


@pytest.mark.parametrize("limit", [0, 100, 1000, 2000, 2900])
def test_a_file_that_may_not_grow(
    config: PrepareConfig, expected: dict[str, bytes], limit: int
) -> None:
    """RLIMIT_FSIZE: the write itself fails, after a part of it, as on a full disk."""

    def lower() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    status, message = in_a_child(config, lower)
    assert os.WEXITSTATUS(status) == 2 and "File too large" in message, message
    assert not Path(config.output).exists()
    check_rerun(config, expected)


@pytest.mark.parametrize("call", ["fsync", "flush", "write"])
@pytest.mark.parametrize("after", [3, 12])
def test_a_full_disk_says_what_is_needed(
    config: PrepareConfig, expected: dict[str, bytes], monkeypatch, call: str, after: int
) -> None:
    """A disk that is full when data is written, flushed or synchronized. The estimate comes from
    the part of the input that was read."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    calls = 0

    def failing(original):
        def fail(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls > after:
                raise full
            return original(*arguments, **options)

        return fail

    with monkeypatch.context() as patch:
        if call == "fsync":
            patch.setattr(os, "fsync", failing(os.fsync))
        elif call == "write":
            patch.setattr(indexed.ShardWriter, "add", failing(indexed.ShardWriter.add))
        else:
            patch.setattr(indexed.ShardWriter, "sync", failing(indexed.ShardWriter.sync))
        with pytest.raises(ConfigError) as refusal:
            prepare(config)
    message = str(refusal.value)
    assert message.startswith(f"output={config.output}: cannot be written: No space left on device")
    assert "bytes are free there" in message and "the same command continues" in message
    assert "more are needed" in message or after == 3  # nothing may be read yet
    check_rerun(config, expected)


def test_a_worker_that_is_killed(config: PrepareConfig, expected: dict[str, bytes]) -> None:
    import psutil

    killed = []

    def kill(progress) -> None:
        for child in psutil.Process().children(recursive=True):
            if "spawn_main" in " ".join(child.cmdline()):
                child.kill()
                killed.append(child.pid)

    two = PrepareConfig(**{**vars(config), "workers": 2})
    with pytest.raises(ConfigError, match=r"workers=2: one was killed"):
        prepare(two, kill)
    assert killed
    check_rerun(config, expected)


@pytest.mark.parametrize("journal", ["", "[]", "{}", '{"progress": 1}', '{"progress": {}}'])
def test_a_damaged_journal_is_named(config: PrepareConfig, journal: str) -> None:
    work = Path(config.output + ".partial")
    work.mkdir(parents=True)
    (work / "journal.json").write_text(journal)
    with pytest.raises(ConfigError, match=r"journal\.json: damaged; delete .*out\.partial"):
        prepare(config)


def test_outputs_that_cannot_be_made_are_refused_before_the_work(
    config: PrepareConfig, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(prepare_module, "read_files", None)  # nothing is read
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "broken").symlink_to("nowhere")
    for output, words in {
        "": "is no name of a new folder",
        ".": "is no name of a new folder",
        "/": "is no name of a new folder",
        f"{tmp_path}/file": "exists and is no prepared data",
        f"{tmp_path}/file/out": "cannot be made there",
        f"{tmp_path}/broken": "a link to nowhere, where nothing is",
        f"{tmp_path}/link": "a link to an empty folder",
        f"{tmp_path}/in/out": "lies in input=",
        f"{tmp_path}/in": "lies in input=",
        f"{tmp_path}/{'x' * 300}": "File name too long",
    }.items():
        with pytest.raises(ConfigError, match=words) as refusal:
            prepare(PrepareConfig(**{**vars(config), "output": output}))
        assert str(refusal.value).startswith(("output=", output)) and "\n" not in str(refusal.value)
