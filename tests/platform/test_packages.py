"""Optional packages that are absent, broken or half there, as real files on sys.path.

The fakes raise what the real packages raise without their compiled half. Not covered: the real
packages, and a package that ends the process when it is imported.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nemotron_train.plan.switches import (
    APEX_GRADIENTS,
    CAUSAL_CONV1D,
    DEEP_EP,
    HYBRID_EP,
    MAMBA_SSM,
    PACKAGES,
    PERMUTATION,
    TRANSFORMER_ENGINE,
    VARIABLE_LENGTH,
)
from nemotron_train.platform import packages

ROOTS = {package.partition(".")[0] for package in PACKAGES} - {"torch"}
Write = Callable[[dict[str, str]], None]


def _forget() -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] in ROOTS:
            del sys.modules[name]
    packages.problem.cache_clear()
    importlib.invalidate_caches()


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Writes files into a folder on sys.path. No real package is visible."""
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] in ROOTS}
    _forget()
    monkeypatch.syspath_prepend(str(tmp_path))

    def write_files(files: dict[str, str]) -> None:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        _forget()

    yield write_files
    _forget()
    sys.modules.update(before)


def engine(init: str = "", pytorch: str = "", permutation: str = "moe_permute_with_probs = 1"):
    return {
        "transformer_engine/__init__.py": init,
        "transformer_engine/pytorch/__init__.py": pytorch,
        "transformer_engine/pytorch/permutation.py": permutation,
    }


def mamba(init: str, scan: str = "mamba_chunk_scan_combined = 1") -> dict[str, str]:
    return {
        "mamba_ssm/__init__.py": init,
        "mamba_ssm/ops/__init__.py": "",
        "mamba_ssm/ops/triton/__init__.py": "",
        "mamba_ssm/ops/triton/ssd_combined.py": scan,
    }


WHOLE = engine() | mamba("") | {"causal_conv1d/__init__.py": "causal_conv1d_fn = 1"}
WHOLE |= {"fused_weight_gradient_mlp_cuda.py": "wgrad_gemm_accum_fp32 = 1"}
WHOLE |= {"deep_ep/__init__.py": "Buffer = HybridEPBuffer = 1"}


def test_whole_packages_have_no_problem(write: Write) -> None:
    write(WHOLE)
    assert packages.problems() == {}


def test_absent_packages_are_not_reported(write: Write) -> None:
    write({})
    found = packages.problems()
    absent = [package for package in PACKAGES if package != VARIABLE_LENGTH]
    assert found == dict.fromkeys(absent, packages.NOT_INSTALLED)
    assert packages.unusable_lines(found) == []


@pytest.mark.parametrize(
    ("raised", "reason"),
    [
        (
            "raise ImportError('libnccl.so.2: cannot open shared object file')",
            "ImportError: libnccl.so.2: cannot open shared object file",
        ),
        ("raise OSError('undefined symbol: _ZN3c10')", "OSError: undefined symbol: _ZN3c10"),
        ("raise RuntimeError('first line\\nsecond line')", "RuntimeError: first line"),
        ("raise AssertionError", "AssertionError"),
        ("import no_such_half", "ModuleNotFoundError: No module named 'no_such_half'"),
        ("raise ImportError('\\x1b[31mred')", "ImportError: \\x1b[31mred"),
    ],
)
def test_a_broken_package_is_named_with_its_own_reason(
    write: Write, raised: str, reason: str
) -> None:
    write(WHOLE | {"causal_conv1d/__init__.py": raised})
    found = packages.problems()
    assert found == {CAUSAL_CONV1D: reason}
    (line,) = packages.unusable_lines(found)
    assert line.startswith(f"causal_conv1d is installed but cannot be used: {reason}; ")


def test_a_broken_package_is_absent_for_everybody(write: Write) -> None:
    """Megatron-Core catches ImportError only, and in places imports the package alone."""
    write(WHOLE | engine(pytorch="raise OSError('libcudnn.so.9')"))
    found = packages.problems()
    assert set(found) == {TRANSFORMER_ENGINE, PERMUTATION}
    assert len(packages.unusable_lines(found)) == 1, "the permutation is no package of its own"
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("transformer_engine.pytorch")
    assert not packages.is_installed("transformer_engine")


def test_an_old_engine_has_no_permutation(write: Write) -> None:
    write(WHOLE | engine(permutation=""))
    assert set(packages.problems()) == {PERMUTATION}


def test_a_kernel_without_a_parameter_of_ours_is_not_used(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch 2.11's kernel has windows and no enable_gqa; called with it, it raises TypeError."""
    write({})
    varlen = importlib.import_module(VARIABLE_LENGTH)

    def of_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1)):
        raise AssertionError

    monkeypatch.setattr(varlen, "varlen_attn", of_2_11)
    reason = packages.problem(VARIABLE_LENGTH)
    assert reason == "torch.nn.attention.varlen.varlen_attn has no enable_gqa in this release"


def test_the_scan_is_imported_without_the_compiled_half(write: Write) -> None:
    """`import mamba_ssm` fails without selective_scan_cuda; its Triton scan needs only torch."""
    write(WHOLE | mamba("import mamba_ssm.ops\nimport selective_scan_cuda"))
    assert packages.problems() == {}
    scan = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
    assert scan.mamba_chunk_scan_combined == 1
    assert packages.is_installed("mamba_ssm")


def test_a_broken_scan_gives_the_first_reason(write: Write) -> None:
    """The bare package must not hide that the scan itself cannot be imported."""
    write(WHOLE | mamba("import selective_scan_cuda", "import no_triton"))
    assert packages.problems() == {
        MAMBA_SSM: "ModuleNotFoundError: No module named 'selective_scan_cuda'"
    }
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("mamba_ssm")


def test_a_package_can_be_refused(write: Write) -> None:
    write(WHOLE)
    found = packages.problems([TRANSFORMER_ENGINE])
    expected = dict.fromkeys([TRANSFORMER_ENGINE, PERMUTATION], "gpu.transformer_engine=off")
    assert found == expected
    assert packages.unusable_lines(found) == [], "the user knows"
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("transformer_engine")


def test_only_hybrid_ep_needs_its_branch(write: Write) -> None:
    write(WHOLE | {"deep_ep/__init__.py": "Buffer = 1"})
    assert packages.problems() == {HYBRID_EP: "deep_ep has no HybridEPBuffer"}
    assert packages.is_usable(DEEP_EP)


def test_another_extension_of_the_same_name_is_not_apex(write: Write) -> None:
    write(WHOLE | {"fused_weight_gradient_mlp_cuda.py": ""})
    assert set(packages.problems()) == {APEX_GRADIENTS}
