"""Stage 1: what is there, whether it computes, and what each missing package costs."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch

from benchmarks.gpu_acceptance.results import Fail, Report
from benchmarks.gpu_acceptance.setting import first_line
from benchmarks.gpu_acceptance.wheels import CARRIED, EXPECTED, pins
from nemotron_train.kernels.triton import available
from nemotron_train.plan.hardware import peak_bf16_flops
from nemotron_train.plan.switches import PACKAGES
from nemotron_train.platform import packages

OPTIONAL = ("transformers", "mamba-ssm", "einops", "transformer-engine", "causal-conv1d")
_CUDA_13_DRIVER = 580
_LEAST_CAPABILITY = (8, 0)


def run(report: Report) -> None:
    """Fails where the device, Triton, a needed package or a product does not work."""
    problems = [*_machine(report), *_packages(report)]
    problems += [problem for problem in (_product(report), _triton(report)) if problem]
    if problems:
        raise Fail("; ".join(problems))


def _machine(report: Report) -> list[str]:
    """Rows about the device and the host; a problem each for what cannot work."""
    pretend = report.setting.pretend
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    driver = "pretended" if pretend else _driver()
    total = torch.cuda.get_device_properties(0).total_memory
    facts = {
        "device": name,
        "compute capability": "{}.{}".format(*capability),
        "memory": f"{total / 2**30:.0f} GiB",
        "driver": driver,
        "CUDA of torch": torch.version.cuda or "none",
        "dense BF16 peak": f"{peak_bf16_flops(name) / 1e12:.1f} TFLOP/s"
        if peak_bf16_flops(name)
        else "unknown: no model FLOPs utilization",
        "host": f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, "
        f"Python {'.'.join(map(str, sys.version_info[:3]))}",
        "C compiler": shutil.which("gcc") or shutil.which("cc") or "none",
        "Python's headers": "there" if _headers() else "none",
    }
    for fact, value in facts.items():
        report.row("machine", fact=fact, value=value)
    versions = f"torch {torch.__version__}, triton {_version('triton') or 'none'}"
    report.figure = f"{name}, driver {driver}, {versions}"
    found = []
    if capability < _LEAST_CAPABILITY:
        found.append(f"compute capability {capability}: the kernels need 8.0")
    major = re.match(r"\d+", driver)
    if not pretend and major and int(major[0]) < _CUDA_13_DRIVER:
        found.append(f"driver {driver}: CUDA 13 needs {_CUDA_13_DRIVER}")
    return found


def _driver() -> str:
    """The version of NVIDIA's driver, "unknown" where nvidia-smi is missing."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return said.strip().splitlines()[0] if said.strip() else "unknown"


def _headers() -> bool:
    return Path(sysconfig.get_paths()["include"], "Python.h").exists()


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _packages(report: Report) -> list[str]:
    """Rows about the packages. A problem for each needed one that is missing and each optional one
    that is installed and cannot be used."""
    tested, found = pins(), []
    needed = (*EXPECTED, *CARRIED)
    for distribution in (*needed, *OPTIONAL):
        version = _version(distribution)
        pin = tested.get(distribution, "")
        report.row("packages", package=distribution, installed=version or "-", tested_with=pin)
        if not version and distribution in needed:
            found.append(f"{distribution} is not installed")
    for package in PACKAGES:
        problem = packages.problem(package)
        report.row("what the GPU can use", package=package, state=problem or "usable")
        if problem and problem != packages.NOT_INSTALLED and "." not in package:
            found.append(f"{package}: {problem}")
    return found


def _product(report: Report) -> str:
    """A BF16 product on the device against the CPU's in float64; the problem, or ""."""
    a, b = (torch.randn(256, 256, generator=torch.Generator().manual_seed(n)) for n in (1, 2))
    try:
        ours = (a.bfloat16().to("cuda") @ b.bfloat16().to("cuda")).float().cpu()
    except Exception as error:
        return f"a BF16 product fails: {first_line(error)}"
    truth = a.bfloat16().double() @ b.bfloat16().double()
    error = float((ours - truth).abs().max() / truth.abs().max())
    report.row("computes", what="BF16 product, largest error", value=f"{error:.1e}")
    return "" if error < 2.0**-8 else f"a BF16 product is wrong by {error:.1e}"


def _triton(report: Report) -> str:
    """Whether Triton compiles and runs a kernel of ours; the problem, or ""."""
    problem = available.failure(torch.device("cuda"))
    report.row("computes", what="a Triton kernel", value=problem or "right")
    return f"Triton: {problem}" if problem else ""
