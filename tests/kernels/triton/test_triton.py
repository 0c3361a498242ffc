"""The Triton kernels on a machine without a GPU, each in a process of its own.

TRITON_INTERPRET must be set before Triton is imported, and the compiler needs it unset. So other
processes run the tests of interpreted.py, interpreted_scan.py and compiled.py. Together they show
that each kernel computes the right numbers and that NVIDIA's assembler accepts it. Not covered
without a GPU: what a compiled kernel computes, and races between its threads. Where there is a GPU,
the last test compares the numbers. Speed: benchmarks/triton_kernels.py.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize(
    ("name", "interpret"), [("interpreted", "1"), ("interpreted_scan", "1"), ("compiled", "0")]
)
def test_kernels(name: str, interpret: str, tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": interpret, "TRITON_CACHE_DIR": str(tmp_path)}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # plugins take seconds to load
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--noconftest",
        f"{HERE / name}.py",
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    last = done.stdout.strip().splitlines()[-1:]
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert last and re.match(r"\d+ passed.* in ", last[0]), last


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_compiled_kernels_equal_torch() -> None:
    """The benchmark's comparison on small sizes: bit for bit for quantizers and gathers. Never run
    so far."""
    command = [sys.executable, "-m", "benchmarks.triton_kernels", "--tokens=256", "--width=1024"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
