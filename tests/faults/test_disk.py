"""A disk that is full, broken or read-only while a checkpoint is written.

To pass: the run fails with an error and an exit code other than 0, 2 or 3. Older checkpoints keep
every byte. The unfinished checkpoint is never selected. With room again the run continues and
equals the uninterrupted one. The tests on a small tmpfs need permission to mount one and are
skipped without it; the file-size limit and the failing write need no permission. Not covered:
quotas, a disk that lies about flush.
"""

import errno
import hashlib
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

WORDS = ["train.save_every_steps=2"]


def content(folder: Path) -> dict[str, str]:
    """Digests of all files of all visible checkpoints."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("step_*/*"))
    }


def goes_on(job, reference, metrics, weights, run: Path, *words: str) -> None:
    again = job(f"name={run.name}", *WORDS, *words)
    assert again.wait() == [0], again.output()
    whole = reference(10, *WORDS)
    assert metrics(run) == metrics(whole)
    assert weights(run, 10) == weights(whole, 10)
    assert not list((run / "checkpoints").glob(".*partial*"))


@pytest.mark.parametrize(
    "name", [pytest.param("broken", marks=pytest.mark.faults), "full_by_limit"]
)
def test_a_write_that_fails(job, small_run, reference, newest, metrics, weights, name: str) -> None:
    """EIO at a write event of the third save, or a file that may not grow past a tenth of a
    shard."""
    run = small_run[0] / "runs" / name
    first = job(f"name={name}", *WORDS, "train.stop_after_steps=4")
    assert first.wait() == [3], first.output()
    shard = max(path.stat().st_size for path in run.glob("checkpoints/step_*/*.distcp"))
    before = content(run / "checkpoints")
    fault = {"error": {"event": 3, "errno": errno.EIO}}
    if name == "full_by_limit":
        fault = {"file_size": shard // 10}
    second = job(f"name={name}", *WORDS, faults={0: fault})
    (code,) = second.wait()
    assert code == 1, second.output()
    said = second.output().strip().splitlines()[-1]
    assert "step_00000006" in said or "step 6" in said, second.output()
    assert content(run / "checkpoints") == before
    found, problems = newest(run)
    assert found is not None and found.name == "step_00000004" and not problems
    goes_on(job, reference, metrics, weights, run)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a tmpfs, or remounts it with other options."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        again = ["-o", f"remount,{options}"] if folder.is_mount() else ["-o", options]
        command = ["mount", "-t", "tmpfs", *again, "tmpfs", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("no right to mount a tmpfs")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.faults
@pytest.mark.parametrize("how", ["full", "read_only"])
def test_small_disk(
    job, small_run, reference, newest, metrics, weights, small_disk, how: str
) -> None:
    """A tmpfs with room for two and a half checkpoints, or one that becomes read-only."""
    whole = reference(10, *WORDS)
    size = sum(path.stat().st_size for path in (whole / "checkpoints" / "step_00000010").iterdir())
    disk = small_disk(f"size={int(2.5 * size) + 200_000}")
    run = disk / how
    words = [f"folder={disk}"]
    first = job(f"name={how}", *WORDS, *words, "train.stop_after_steps=4")
    assert first.wait() == [3], first.output()
    before = content(run / "checkpoints")
    if how == "read_only":
        small_disk("ro")
    second = job(f"name={how}", *WORDS, *words)
    (code,) = second.wait()
    assert code in (1, 2), second.output()
    assert any(word in second.output() for word in ("No space", "Read-only")), second.output()
    assert content(run / "checkpoints") == before
    found, problems = newest(run)
    assert found is not None and found.name == "step_00000004" and not problems
    small_disk(f"rw,size={int(6 * size) + 1_000_000}")
    goes_on(job, reference, metrics, weights, run, *words)
    shutil.rmtree(run)
