"""The first eight minutes on a GPU: how stages end, what is written, two real stages.

`make gpu-acceptance ARGS=--pretend` runs all ten stages; here only the two cheapest do. Second
truths: processes that are really killed, hand-counted times and bytes. Not covered: anything on a
GPU, where the profiler's events, the allocator's peak and the timings come from.
"""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from benchmarks.gpu_acceptance import floors, resume, scan, step_profile
from benchmarks.gpu_acceptance.__main__ import main
from benchmarks.gpu_acceptance.page import build_page
from benchmarks.gpu_acceptance.results import Acceptance, Report, Result, Verdict
from benchmarks.gpu_acceptance.runner import run_stages
from benchmarks.gpu_acceptance.setting import FULL, ROOT, SMALL, Setting
from benchmarks.gpu_acceptance.stages import STAGES, Stage
from nemotron_train.compose.compose import compose_config
from nemotron_train.plan.derive import derive

FAULTY = "tests.benchmarks.acceptance_stages"


def faulty(name: str, seconds: float = 10) -> Stage:
    return Stage(name, f"stage {name}", f"{FAULTY}:{name}", seconds, "a check")


def run(stages: list[Stage], tmp_path: Path, budget: float, pretend: bool = False) -> Acceptance:
    work, output = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    output.mkdir()
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        written = json.loads((output / "results.json").read_text())["results"]
        done = [r for r in written if r["verdict"] != Verdict.waiting]
        assert len(done) == len(said), "on disk before the next stage begins"
        assert (output / "index.html").read_text().count("<h2>") == 1 + len(said)

    return run_stages(stages, Setting(work, pretend), output, budget, say)


def is_alive(pid: int) -> bool:
    path = Path(f"/proc/{pid}/stat")
    return path.exists() and path.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_stage_that_goes_wrong_stops_no_other(tmp_path: Path) -> None:
    """One hangs and is killed with its child; each of the others ends in another way."""
    names = ("passes", "hangs", "dies", "raises", "fails", "skips")
    acceptance = run([faulty(n, 8 if n == "hangs" else 25) for n in names], tmp_path, 120)
    found = {result.name: result for result in acceptance.results}
    verdicts = [str(found[name].verdict) for name in names]
    assert verdicts == ["PASS", "FAIL", "FAIL", "FAIL", "FAIL", "SKIP"]
    assert acceptance.exit_code == 1

    hung = found["hangs"]
    assert hung.reason == f"killed at its limit of {hung.limit:.0f} s" and hung.limit <= 24
    assert hung.seconds == pytest.approx(hung.limit, abs=10) and hung.figure == "half of it"
    child = hung.tables["processes"][0]["child"]
    deadline = time.monotonic() + 5
    while is_alive(int(str(child))) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(int(str(child)))
    assert found["dies"].reason == "the process was ended by SIGABRT"
    assert "the last words" in found["dies"].log
    assert found["raises"].reason == "ZeroDivisionError: of"
    assert found["fails"].reason == "one differs" and found["fails"].figure == "3 of 4"
    assert found["skips"].reason == "nothing is installed"

    page = (tmp_path / "out" / "index.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page and "12,345" in page
    assert "PRETENDED" not in page
    assert "the last words" in (tmp_path / "out" / "log.txt").read_text()


def test_the_budget_is_kept(tmp_path: Path) -> None:
    """Two stages that hang get their shares, and the third has more than its own."""
    stages = [faulty("hangs", 1), faulty("hangs", 2), faulty("passes", 17)]
    started = time.monotonic()
    acceptance = run(stages, tmp_path, 30)
    assert time.monotonic() - started < 35
    limits = [result.limit for result in acceptance.results]
    assert limits[0] == pytest.approx(1.5, abs=0.1) and limits[1] == pytest.approx(3, abs=0.5)
    assert limits[2] > 17
    assert acceptance.results[2].verdict == Verdict.passed


def test_ended_from_outside(tmp_path: Path) -> None:
    """As when a session's time is over: the stage that runs is killed, and its part is written."""
    code = f"""if True:
        import signal, sys
        from pathlib import Path
        from benchmarks.gpu_acceptance import __main__ as command
        from benchmarks.gpu_acceptance.stages import Stage
        command.STAGES = (Stage("hangs", "h", "{FAULTY}:hangs", 9, ""),
                          Stage("passes", "p", "{FAULTY}:passes", 9, ""))
        command._num_gpus = lambda: 1
        sys.exit(command.main(["--output", {str(tmp_path / "out")!r}]))
    """
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    results, child = tmp_path / "out" / "results.json", 0
    deadline = time.monotonic() + 60
    while not child and time.monotonic() < deadline:
        time.sleep(0.1)
        child = child_of(process.pid)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    written = json.loads(results.read_text())["results"]
    assert [(r["verdict"], r["reason"]) for r in written] == [
        ("FAIL", "ended from outside"),
        ("-", ""),
    ]
    assert not is_alive(child)


def child_of(pid: int) -> int:
    """A child of a child, 0 without one: here what the stage that hangs has started."""
    for child in children(pid):
        for grandchild in children(child):
            return grandchild
    return 0


def children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(word) for word in path.read_text().split()] if path.exists() else []


def test_no_time_left_is_a_failure(tmp_path: Path) -> None:
    acceptance = run([faulty("passes", 1), faulty("passes", 1000)], tmp_path, 0.5)
    assert acceptance.exit_code == 1
    assert {r.reason for r in acceptance.results} == {"no time was left of --budget"}


def test_two_real_stages_and_a_wrong_bit(tmp_path: Path) -> None:
    """On the pretended device. The formats by torch's operators; Triton's interpreter is slower
    (tests/kernels/triton)."""
    formats = next(stage for stage in STAGES if stage.name == "formats")
    environment = next(stage for stage in STAGES if stage.name == "environment")
    plain = Stage("formats", formats.title, formats.target, 100, formats.checks)
    stages = [environment, plain, faulty("codes_differ", 100)]
    acceptance = run(stages, tmp_path, 600, pretend=True)
    results = acceptance.results
    assert [str(r.verdict) for r in results] == ["PASS", "PASS", "FAIL"], [
        r.reason for r in results
    ]
    assert "NVIDIA H200" in acceptance.machine and torch.__version__ in results[0].figure
    assert results[1].figure.startswith("0 of ") and len(results[1].tables["numbers"]) == 48
    assert "NVFP4 codes and scales of normal numbers by torch: 1" in results[2].reason
    assert acceptance.exit_code == 1
    page = (tmp_path / "out" / "index.html").read_text()
    assert "THE DEVICE IS PRETENDED" in page and "mean nothing" in page


def test_exit_codes_without_running() -> None:
    done = Acceptance(False, 1, [Result("a", "a", "", Verdict.passed), Result("b", "b", "")])
    assert done.exit_code == 1, "what did not run is not done"
    done.results[1].verdict = Verdict.skipped
    assert done.exit_code == 0
    assert "THE DEVICE IS PRETENDED" not in build_page(done)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--output", str(tmp_path / "out")]) == 2
    assert "--pretend" in capsys.readouterr().err
    assert main(["--output", os.devnull + "/x", "--pretend"]) == 2
    assert main(["--budget=-1", "--output", str(tmp_path / "out")]) == 2


def test_the_plan_is_eight_minutes_and_every_shape_is_valid() -> None:
    assert len(STAGES) == 10 and sum(stage.seconds for stage in STAGES) <= 480
    for sizes in (FULL, SMALL):
        derive(compose_config(list(sizes.default_run)))
        for words in sizes.shapes.values():
            derived = derive(compose_config(list(words)))
            assert derived.micro_batches_per_step >= 2
    billion = derive(compose_config(list(FULL.shapes["1B"])))
    assert billion.parameters == pytest.approx(1e9, rel=0.05)


# The parts that only a GPU uses -------------------------------------------------------------


def event(name: str, start: int, end: int, device: DeviceType) -> FunctionEvent:
    return FunctionEvent(id=0, name=name, thread=0, start_us=start, end_us=end, device_type=device)


def test_kernels_are_counted_from_the_profilers_events(tmp_path: Path) -> None:
    """Two kernels that overlap fill 30 of 100 us, not 40."""
    cuda, cpu = DeviceType.CUDA, DeviceType.CPU
    events = [
        event("gemm", 0, 20, cuda),
        event("gemm", 10, 30, cuda),
        event("aten::mm", 0, 90, cpu),
        event("cudaStreamSynchronize", 0, 90, cpu),
    ]
    report = Report(tmp_path / "report.json", Setting(tmp_path))
    step_profile._kernels(report, SimpleNamespace(events=lambda: events), 1e-4, 2e-4)
    assert report.tables["kernels by time"] == [
        {"kernel": "gemm", "calls": 2, "ms": 0.04, "share": "100.0%"}
    ]
    waiting = report.tables["calls of the driver that wait"]
    assert waiting == [{"call": "cudaStreamSynchronize", "count": 1}]
    assert report.figure == "; 2 kernels, which fill 30% of 0 ms"


def test_waits_are_counted_from_torchs_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line is that of the module of ours that led to the warning. Others are not counted."""
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    code = compile("def wait():\n    warn('called a synchronizing CUDA operation')", "x", "exec")
    scope: dict = {"warn": warnings.warn}
    exec(code.replace(co_filename="/a/nemotron_train/train/train_step.py"), scope)
    inner = next(c for c in code.co_consts if hasattr(c, "co_filename"))
    named = inner.replace(co_filename="/a/nemotron_train/train/train_step.py")
    scope["wait"].__code__ = named
    with step_profile._counted() as found:
        scope["wait"]()
        scope["wait"]()
        warnings.warn("something else", stacklevel=1)
    assert found == Counter({"train/train_step.py:2": 2}) and modes == ["warn", "default"]


def test_differences_of_runs_are_found() -> None:
    ours = {1: {"loss": 3.0}, 2: {"loss": 2.0, "lr": 1.0}}
    assert resume.first_difference(ours, {k: dict(v) for k, v in ours.items()}) is None
    assert resume.first_difference(ours, {1: {"loss": 3.0}}) is not None
    found = resume.first_difference(ours, {1: {"loss": 3.0}, 2: {"loss": 2.0 + 1e-15, "lr": 1.0}})
    assert found is not None and found[0] == 2, "the last bit counts"
    assert resume.first_difference(ours, {**ours, 2: {"loss": 2.5, "lr": 1.0}}) == (
        2,
        "loss: 2.0 and 2.5",
    )
    assert resume.unequal_tensors({"a": b"1", "b": 2}, {"a": b"2", "b": 2}) == ["a"]


def test_the_scans_floor_counts_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes are those of the tensors that the scan gets and gives; A and D are small."""
    monkeypatch.setattr(torch.Tensor, "to", _stays(torch.Tensor.to))
    shape = SMALL.scan
    x, dt, _, B, C, _, _ = scan.operands(shape, torch.bfloat16)
    moved = sum(t.numel() * t.element_size() for t in (x, dt, B, C, x))
    assert floors.scan_bytes(shape) == moved


def _stays(move):
    return lambda self, *words, **more: self if words == ("cuda",) else move(self, *words, **more)
