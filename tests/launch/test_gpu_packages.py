"""The optional GPU packages: what the scripts do, and that all files name the same versions.

Second truths: pip's own parser of requirements, make's own dry run, bash's own parser. The
installer runs with a stand-in for Python that writes down what pip is asked to do. Not covered: the
builds themselves, which need minutes to an hour, and the container images, which were never built.
"""

import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
CONTAINER = ROOT / "launch" / "container"
PACKAGES = ("mamba-ssm", "transformer-engine", "causal-conv1d")

# Answers as Python with torch would, and writes down each call of pip with its build environment.
STAND_IN = r"""#!/usr/bin/env bash
if [[ $1 == -m ]]; then
    what="$TORCH_CUDA_ARCH_LIST | $NVTE_CUDA_ARCHS | $MAX_JOBS | $MAMBA_SKIP_CUDA_BUILD"
    echo "$* | $what" >>CALLS
    if [[ $* == *" $FAILS"* ]]; then
        echo "copying a.py"
        echo "a.cpp:3: fatal error: no_such_header.h: No such file"
        echo "ERROR: Could not build wheels"
        exit 1
    fi
    exit 0
fi
case $2 in
    *torch.version.cuda*) echo 13.0 ;;
    *torch.__version__*) echo "$TORCH" ;;
    *sys.prefix*) echo FOLDER ;;
    *"import torch, ${BROKEN-nothing}"*) echo "ImportError: undefined symbol: f" >&2 && exit 1 ;;
esac
"""
NVCC = '#!/usr/bin/env bash\necho "release 13.0, V13.0.88"\necho "$*" >>CALLS\n'


class Ended(NamedTuple):
    code: int
    lines: list[str]
    calls: list[str]  # of pip

    def of(self, package: str) -> list[str]:
        """The lines about a package, without the prefix."""
        begin = f"gpu_packages: {package} "
        return [line.removeprefix(begin) for line in self.lines if line.startswith(begin)]


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.replace("CALLS", f"{path}.calls").replace("FOLDER", f"{path.parent}"))
    path.chmod(0o755)
    return path


def install(folder: Path, gpus: str = "", **choices: str) -> Ended:
    """Runs the installer. gpus: what nvidia-smi prints; empty: the machine has no GPU."""
    python = program(folder / "python", STAND_IN)
    program(folder / "cuda" / "bin" / "nvcc", NVCC)
    program(folder / "bin" / "nvidia-smi", f"#!/bin/sh\nprintf '{gpus}'\n[ '{gpus}' ]\n")
    environment = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "FAILS": "nothing fails"}
    environment |= {"CUDA_HOME": f"{folder / 'cuda'}"}
    environment |= {"MAX_JOBS": "3", "TORCH": "2.13.0+cu130"}
    environment |= choices
    done = subprocess.run(
        [ROOT / "launch" / "gpu_packages.sh", python],
        env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    calls = Path(f"{python}.calls")
    lines = (done.stdout + done.stderr).splitlines()
    return Ended(done.returncode, lines, calls.read_text().splitlines() if calls.exists() else [])


def pins(name: str) -> dict[str, str]:
    """Version of each package in a file of constraints. Only exact ones are allowed."""
    found = {}
    for line in (ROOT / name).read_text("utf-8").splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            (specifier,) = requirement.specifier
            assert specifier.operator == "==" and not requirement.extras, line
            found[canonicalize_name(requirement.name)] = specifier.version
    return found


def asked(calls: list[str]) -> set[str]:
    """Names that pip was asked to install."""
    words = [word for call in calls for word in call.split(" | ")[0].split()[3:]]
    return {word for word in words if not word.startswith("-") and not word.endswith(".txt")}


def copy_makefile(folder: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "constraints-gpu.txt"):
        (folder / name).write_text((ROOT / name).read_text("utf-8"))


def make(folder: Path, *words: str) -> str:
    """What `make` would run, in a folder without an environment."""
    copy_makefile(folder)
    command = ["make", "--dry-run", "-C", f"{folder}", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def steps(text: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile as (name, rest)."""
    plain = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    lines = plain.replace("\\\n", " ").splitlines()
    return [(line.split()[0], " ".join(line.split()[1:])) for line in lines if line.strip()]


def test_what_is_installed_is_what_is_pinned(tmp_path: Path) -> None:
    names = asked(install(tmp_path, GPU_ARCH="90").calls)
    ours, base = pins("constraints-gpu.txt"), pins("constraints.txt")
    assert names - {"setuptools"} == set(ours)
    assert "setuptools" in base and not set(ours) & set(base)


def test_the_extra_names_the_packages() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extra = [Requirement(text) for text in project["optional-dependencies"]["gpu"]]
    assert {requirement.name for requirement in extra} == set(PACKAGES)
    engine = next(r for r in extra if r.name == "transformer-engine")
    parts = {"core-cu13": "transformer-engine-cu13", "pytorch": "transformer-engine-torch"}
    versions = {pins("constraints-gpu.txt")[parts[part]] for part in engine.extras}
    assert engine.extras == set(parts)
    assert versions == {pins("constraints-gpu.txt")["transformer-engine"]}


def test_nothing_brings_its_own_torch(tmp_path: Path) -> None:
    """Every call of pip: no isolated build, no dependencies, both files of pins, no cache."""
    ended = install(tmp_path, GPU_ARCH="90,100")
    assert ended.code == 0 and len(ended.calls) == 4
    for call in ended.calls:
        words, dotted, plain, jobs, skip = call.split(" | ")
        assert {"--no-build-isolation", "--no-deps", "--no-cache-dir"} <= set(words.split())
        assert re.findall(r"--constraint (\S+)", words) == [
            "constraints.txt",
            "constraints-gpu.txt",
        ]
        assert (dotted, plain, jobs, skip) == ("9.0;10.0", "90;100", "3", "TRUE")
    assert [ended.of(package)[-1] for package in PACKAGES] == ["is installed"] * 3


@pytest.mark.parametrize(
    "gpus, choice, dotted",
    [
        (r"9.0\n9.0\n", "", "9.0"),
        (r"8.0\n10.3\n", "", "8.0;10.3"),
        ("", "", "9.0;10.0"),
        (r"9.0\n", "100", "10.0"),
        ("", "120;90 100", "9.0;10.0;12.0"),
        (r"[N/A]\n", "", "9.0;10.0"),
    ],
)
def test_the_architecture(gpus: str, choice: str, dotted: str, tmp_path: Path) -> None:
    ended = install(tmp_path, gpus, GPU_ARCH=choice, GPU_PACKAGES="mamba-ssm")
    assert ended.code == 0 and {call.split(" | ")[1] for call in ended.calls} == {dotted}
    no_gpu = [line for line in ended.lines if "no GPU here: building for GPU_ARCH=90,100" in line]
    assert len(no_gpu) == (not choice and dotted == "9.0;10.0")


@pytest.mark.parametrize(
    "choices, line",
    [
        ({"GPU_ARCH": "9.0"}, "GPU_ARCH=9.0: must be compute capabilities without the dot"),
        ({"GPU_ARCH": "sm_90"}, "GPU_ARCH=sm_90: must be compute capabilities without the dot"),
        ({"GPU_ARCH": "90,70"}, "GPU_ARCH=70: the kernels need 80"),
        ({"GPU_ARCH": ", "}, "GPU_ARCH=, : names no architecture"),
        ({"GPU_ARCH": "90", "MAX_JOBS": "two"}, "MAX_JOBS=two: must be 1 or more"),
        ({"GPU_PACKAGES": "apex"}, "GPU_PACKAGES: apex is none of mamba-ssm"),
        ({"GPU_ARCH": "90", "FAILS": "ninja"}, "what the packages need cannot be installed: a.cpp"),
    ],
)
def test_a_wrong_choice_is_one_line(choices: dict[str, str], line: str, tmp_path: Path) -> None:
    ended = install(tmp_path, **choices)
    assert ended.code == 2 and ended.lines[-1].startswith(f"gpu_packages: {line}")
    assert sum(": must be" in text or "none of" in text for text in ended.lines) <= 1


@pytest.mark.parametrize("failing", PACKAGES)
@pytest.mark.parametrize("strict", ["", "1"])
def test_one_failure_is_one_line_and_the_others_install(
    failing: str, strict: str, tmp_path: Path
) -> None:
    ended = install(tmp_path, GPU_ARCH="90", FAILS=failing, GPU_STRICT=strict)
    assert ended.code == (1 if strict else 0)
    reason = "is not installed: a.cpp:3: fatal error: no_such_header.h: No such file; whole log: "
    assert ended.of(failing)[-1].startswith(reason)
    assert ended.of(failing)[-1].endswith("(docs/gpu.md)")
    others = [package for package in PACKAGES if package != failing]
    assert [ended.of(package)[-1] for package in others] == ["is installed"] * 2


def test_what_does_not_import_is_removed(tmp_path: Path) -> None:
    """Found but not usable would end a run in its first step."""
    ended = install(tmp_path, GPU_ARCH="90", BROKEN="transformer_engine")
    assert "it does not import: ImportError: undefined symbol: f" in ended.of(PACKAGES[1])[-1]
    parts = "transformer-engine transformer-engine-cu13 transformer-engine-torch"
    assert any(f"pip uninstall --yes {parts} |" in call for call in ended.calls)


@pytest.mark.parametrize(
    "change, rebuilt",
    [
        ({}, set()),
        ({"GPU_ARCH": "100"}, {"causal-conv1d"}),  # only it has code for one GPU
        ({"TORCH": "2.14.0+cu130"}, set(PACKAGES)),
        ({"BROKEN": "causal_conv1d"}, {"causal-conv1d"}),
    ],
)
def test_what_no_longer_fits_is_built_again(
    change: dict[str, str], rebuilt: set[str], tmp_path: Path
) -> None:
    before = len(install(tmp_path, GPU_ARCH="90").calls)
    calls = install(tmp_path, **{"GPU_ARCH": "90", **change}).calls[before:]
    assert asked([call for call in calls if "--force-reinstall" in call]) & set(PACKAGES) == rebuilt


@pytest.mark.parametrize("missing", ["folder", "release"])
def test_without_the_toolkit_the_scan_is_still_installed(missing: str, tmp_path: Path) -> None:
    """No nvcc at all, and one of another CUDA than torch's."""
    other = program(tmp_path / "other" / "bin" / "nvcc", NVCC.replace("13.0", "12.8"))
    home = other.parents[1] if missing == "release" else tmp_path / "nowhere"
    ended = install(tmp_path, GPU_ARCH="90", CUDA_HOME=f"{home}")
    text = "has CUDA 12.8 and torch 13.0" if missing == "release" else "no nvcc: install the CUDA"
    assert ended.code == 0 and ended.of("mamba-ssm")[-1] == "is installed"
    assert all(text in ended.of(package)[-1] for package in PACKAGES[1:])
    assert asked(ended.calls) & set(PACKAGES) == {"mamba-ssm"}


@pytest.mark.parametrize(
    "given, passed",
    [
        ("-O3 -gencode arch=compute_75,code=sm_75 -gencode arch=compute_90,code=sm_90 -c a.cu",
         "-O3 -c a.cu -gencode arch=compute_90,code=sm_90 -gencode arch=compute_103,code=sm_103"),
        ("-gencode=arch=compute_80,code=sm_80 a.cu",
         "a.cu -gencode arch=compute_90,code=sm_90 -gencode arch=compute_103,code=sm_103"),
        ("--version", "--version"),
    ],
)  # fmt: skip
def test_nvcc_gets_the_selected_architectures(given: str, passed: str, tmp_path: Path) -> None:
    nvcc = program(tmp_path / "bin" / "nvcc", NVCC)
    environment = {**os.environ, "CUDA_HOME": f"{tmp_path}", "NVCC_SELECTED": "90 103"}
    command = [ROOT / "launch" / "nvcc_selected.sh", *given.split()]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert Path(f"{nvcc}.calls").read_text().strip() == passed


@pytest.mark.parametrize(
    "extras, bracket",
    [("dev", "[dev]"), ("dev,gpu", "[dev]"), ("gpu,dev,evaluate", "[dev,evaluate]"), ("gpu", "")],
)
def test_make_installs_the_base_first(extras: str, bracket: str, tmp_path: Path) -> None:
    text = make(tmp_path, "env", f"EXTRAS={extras}")
    base = text.index(f"--editable '.{bracket}'")
    calls = [found.start() for found in re.finditer("gpu_packages.sh", text)]
    for_tests = [call for call in calls if "PIP_TARGET=" in text[:call].rpartition("env -u")[2]]
    assert len(for_tests) == ("dev" in extras.split(","))
    assert len(calls) - len(for_tests) == ("gpu" in extras.split(","))
    assert all(call > base for call in calls)
    assert "gpu]" not in make(tmp_path, "benchmark", f"EXTRAS={extras}")


def test_the_kernels_for_tests_stay_out_of_the_environment(tmp_path: Path) -> None:
    """They go to a folder of their own. A failed download is one line and no failed make, and the
    next make tries again."""
    copy_makefile(tmp_path)
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    python = program(tmp_path / ".venv" / "bin" / "python", STAND_IN)
    (tmp_path / ".venv" / ".installed").touch()
    stamp = tmp_path / ".venv" / "test_packages" / "mamba_ssm" / ".installed"
    environment = {"PATH": os.environ["PATH"], "TORCH": "2.13.0+cu130"}
    for fails in ("mamba-ssm", "einops", "nothing fails"):
        assert not stamp.exists()
        done = subprocess.run(
            ["make", "-C", f"{tmp_path}", "--no-print-directory", "env"],
            env=environment | {"FAILS": fails}, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        lines = (done.stdout + done.stderr).splitlines()
        assert done.returncode == 0 and len(lines) == (fails != "nothing fails"), lines
        assert all("mamba_ssm's kernels will not be tested: gpu_pack" in line for line in lines)
    assert stamp.exists()
    calls = Path(f"{python}.calls").read_text().splitlines()
    assert asked(calls) == {"einops", "mamba-ssm", "ninja", "pybind11", "setuptools", "wheel"}


def test_the_images_agree_with_the_pins() -> None:
    base = pins("constraints.txt")
    text = (ROOT / "constraints-gpu.txt").read_text("utf-8").replace("\n# ", " ")
    found = re.search(r"torch (\S+) with CUDA (\S+) and megatron-core (\d+\.\d+\.\d+)", text)
    assert found and (found[1], found[3]) == (base["torch"], base["megatron-core"])
    docker = (CONTAINER / "Dockerfile").read_text("utf-8")
    definition = (CONTAINER / "nemotron_train.def").read_text("utf-8")
    image = dict(steps(docker))["FROM"]
    assert re.fullmatch(rf"nvidia/cuda:{re.escape(found[2])}\.\d+-devel-ubuntu24\.04", image)
    assert f"\nFrom: {image}\n" in definition

    def packages(recipe: str) -> set[str]:
        listed = re.search(r"install --yes --no-install-recommends \\\n(.*)", recipe)
        assert listed
        return set(listed[1].strip(" \\").split())

    assert packages(docker) == packages(definition) >= {"python3.12-dev", "build-essential"}
    for recipe in (docker, definition):
        assert "make env EXTRAS=gpu GPU_ARCH=" in recipe and "GPU_STRICT=1" in recipe
        assert "/opt/nemotron_train/.venv/bin:$PATH" in recipe


def test_the_images_copy_what_exists_and_is_sent() -> None:
    """The ignore file lets through what the Dockerfile and the definition copy, and no more."""
    allowed = (CONTAINER / "Dockerfile.dockerignore").read_text("utf-8").splitlines()
    sent = {line.removeprefix("!") for line in allowed if line.startswith("!")}
    docker = steps((CONTAINER / "Dockerfile").read_text("utf-8"))
    copied = {word for name, rest in docker if name == "COPY" for word in rest.split()[:-1]}
    assert {Path(word).parts[0] for word in copied} == sent
    definition = (CONTAINER / "nemotron_train.def").read_text("utf-8")
    files = definition.split("%files\n")[1].split("\n\n")[0].splitlines()
    assert {line.split()[0] for line in files} == sent
    assert all((ROOT / word).exists() for word in copied | sent)


def test_every_step_is_a_shell_command() -> None:
    docker = (CONTAINER / "Dockerfile").read_text("utf-8")
    scripts = [rest for name, rest in steps(docker) if name == "RUN"]
    definition = (CONTAINER / "nemotron_train.def").read_text("utf-8")
    scripts += [part.split("\n", 1)[1] for part in definition.split("\n%")[3:]]
    scripts += [path.read_text("utf-8") for path in ROOT.glob("launch/**/*.sh")]
    assert len(scripts) >= 10
    for script in scripts:
        done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
        assert done.returncode == 0, (script, done.stderr)


def test_the_page_names_what_there_is() -> None:
    page = (ROOT / "docs" / "gpu.md").read_text("utf-8")
    versions = pins("constraints-gpu.txt")
    for package in PACKAGES:
        assert f"| {package} {versions[package]} |" in page
    base = pins("constraints.txt")
    assert f"torch {base['torch']}" in page and f"megatron-core {base['megatron-core']}" in page
    script = (ROOT / "launch" / "gpu_packages.sh").read_text("utf-8")
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for knob in ("GPU_ARCH", "GPU_PACKAGES", "GPU_STRICT", "MAX_JOBS"):
        assert f"`{knob}" in page and f"# {knob}" in script and f"{knob}=" in makefile
    for image in ("Dockerfile", "nemotron_train.def", "apptainer_python.sh"):
        assert f"launch/container/{image}" in page
    assert dict(steps((CONTAINER / "Dockerfile").read_text("utf-8")))["FROM"] in page
    for reader in ("README.md", "docs/cluster.md"):
        assert re.search(r"\]\([^)]*gpu\.md", (ROOT / reader).read_text("utf-8"))
