"""Stages that go wrong, for test_gpu_acceptance.py. They run in the worker's process."""

import os
import subprocess
import sys
import time

from benchmarks.gpu_acceptance.results import Fail, Report, Skip


def passes(report: Report) -> None:
    """A table and a figure with characters that HTML would read."""
    report.row("numbers <b>", name="<script>x</script>", count=12345, equal=True)
    report.figure = "1 < 2 & <script>alert(1)</script>"


def skips(report: Report) -> None:
    """As for a package that is missing."""
    raise Skip("nothing is installed")


def fails(report: Report) -> None:
    """As for a wrong number."""
    report.figure = "3 of 4"
    raise Fail("one differs")


def raises(report: Report) -> None:
    """An error of any kind."""
    raise ZeroDivisionError("of\nseveral lines")


def dies(report: Report) -> None:
    """As a kernel that takes the process with it."""
    print("the last words", flush=True)
    os.abort()


def hangs(report: Report) -> None:
    """With a child that would live on, after a row and a figure."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    report.figure = "half of it"
    report.row("processes", child=child.pid)
    time.sleep(600)


def codes_differ(report: Report) -> None:
    """The formats' stage, where the device gets one bit of one code wrong."""
    from benchmarks.gpu_acceptance import formats
    from nemotron_train.precision import nvfp4

    right = nvfp4.quantize_nvfp4

    def wrong(x, **options):
        packed = right(x, **options)
        if x.is_cuda:
            packed.codes[0, 0] ^= 1
        return packed

    nvfp4.quantize_nvfp4 = wrong
    formats.KINDS = ("normal",)
    formats.run(report)
