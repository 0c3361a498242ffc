"""mamba_ssm's Triton kernels on a machine without a GPU, in a process of their own.

TRITON_INTERPRET must be set before Triton is imported, and the pretended device is for a whole
process. mamba_ssm_interpreted.py has the tests and says what they do not cover. Half a minute.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nemotron_train.platform import device
from tests.platform.pretend import packages

ROOT = Path(__file__).resolve().parents[3]


def test_a_cpu_does_not_find_them() -> None:
    """The folder is on no path, and a CPU's first line is what it was."""
    assert not any("test_packages" in entry for entry in sys.path)
    platform = device.prepare()
    if platform.device == "cpu":
        assert "Mamba-2: chunked torch" in device.with_packages(platform, {}).describe()


def test_the_interpreted_kernels() -> None:
    if packages.folder("mamba_ssm") is None:
        pytest.skip("mamba_ssm is absent: make env installs it for this test")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "MAMBA_DETERMINISTIC": "1"}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # plugins take seconds to load
    file = f"{Path(__file__).parent / 'mamba_ssm_interpreted.py'}"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--noconftest", file]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    last = done.stdout.strip().splitlines()[-1:]
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert last and re.match(r"5 passed.* in ", last[0]), last
