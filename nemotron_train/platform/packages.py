"""Optional packages of a GPU, really imported: which can be used, and why the others cannot.

Owns: the imports, once a process and only with a GPU; the package's own reason; and that a package
that cannot be used, or must not be (`gpu.<package>=off`), is absent for everybody else, too. Does
not own: what follows from it (`plan.switches`).

A package that is found may still fail to load: another CUDA, another torch, or only its Python half
is there. Megatron-Core catches ImportError only, and then continues with stand-ins or ends in a
traceback.
"""

import importlib
import importlib.machinery
import importlib.util
import inspect
import sys
import types
from collections.abc import Iterable
from functools import cache

from nemotron_train.config.visible import one_line
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

# The module that is imported for a package, and the attribute that must be in it.
_NEEDED = {
    TRANSFORMER_ENGINE: ("transformer_engine.pytorch", ""),
    PERMUTATION: ("transformer_engine.pytorch.permutation", "moe_permute_with_probs"),
    MAMBA_SSM: ("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined"),
    CAUSAL_CONV1D: ("causal_conv1d", "causal_conv1d_fn"),
    APEX_GRADIENTS: ("fused_weight_gradient_mlp_cuda", "wgrad_gemm_accum_fp32"),
    DEEP_EP: ("deep_ep", "Buffer"),
    HYBRID_EP: ("deep_ep", "HybridEPBuffer"),
    VARIABLE_LENGTH: ("torch.nn.attention.varlen", "varlen_attn"),
}
# Parameters that we pass and older releases lack: torch 2.11's kernel has no enable_gqa.
_PARAMETERS = {VARIABLE_LENGTH: ("window_size", "enable_gqa")}
NOT_INSTALLED = "it is not installed"


def problems(refused: Iterable[str] = ()) -> dict[str, str]:
    """Package -> why it cannot be used, for each package of `plan.switches.PACKAGES` that cannot.

    refused: packages that the configuration switches off. Call it before Megatron-Core is imported,
    and with Transformer Engine's environment variables set: it reads them when it is imported.
    """
    found = {}
    for package in PACKAGES:
        root = package.partition(".")[0]
        reason = f"gpu.{root}=off" if root in refused else problem(package)
        if reason:
            found[package] = reason
        if reason and package in (TRANSFORMER_ENGINE, MAMBA_SSM, CAUSAL_CONV1D):
            _make_absent(package)
    return found


@cache
def problem(package: str) -> str:
    """Why the package cannot be used, one line; "" if it can. Imports it on the first call."""
    module, attribute = _NEEDED[package]
    root = module.partition(".")[0]
    if not is_installed(root):
        return NOT_INSTALLED
    try:
        loaded = importlib.import_module(module)
    except Exception as error:
        if package != MAMBA_SSM:
            return _reason(error)
        try:
            loaded = _import_without_init(module, root)
        except Exception:
            return _reason(error)
    if attribute and not hasattr(loaded, attribute):
        return f"{module} has no {attribute}"
    parameters = _PARAMETERS.get(package, ())
    found = inspect.signature(getattr(loaded, attribute)).parameters if parameters else {}
    missing = [name for name in parameters if name not in found]
    return f"{module}.{attribute} has no {missing[0]} in this release" if missing else ""


def is_usable(package: str) -> bool:
    """Whether the package can be used in this process."""
    return not problem(package)


def unusable_lines(found: dict[str, str]) -> list[str]:
    """One line for each package that is installed but cannot be used. A part of a package, which an
    older release lacks, gets none."""
    return [
        f"{package} is installed but cannot be used: {reason}; the run goes on without it"
        for package, reason in found.items()
        if reason != NOT_INSTALLED and not reason.endswith("=off") and "." not in package
    ]


def is_installed(root: str) -> bool:
    """Whether the top-level package `root` is found. It may not load."""
    try:
        return importlib.util.find_spec(root) is not None
    except (ImportError, ValueError):  # ValueError: a stand-in in sys.modules without a spec
        return sys.modules.get(root) is not None


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return one_line(f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__)


def _import_without_init(module: str, root: str) -> types.ModuleType:
    """Import `module` through a bare package, without running the package's `__init__`.

    UPSTREAM(mamba-ssm 2.3): `import mamba_ssm` needs its compiled half, selective_scan_cuda, which
    Mamba-1 uses. The Triton kernels of Mamba-2 do not need it, and a build without a compiler
    (MAMBA_SKIP_CUDA_BUILD=TRUE) has them.
    """
    spec = importlib.util.find_spec(root)
    assert spec is not None and spec.submodule_search_locations is not None
    _forget(root)
    bare = types.ModuleType(root)
    bare.__spec__ = importlib.machinery.ModuleSpec(root, None, is_package=True)
    bare.__spec__.submodule_search_locations = list(spec.submodule_search_locations)
    bare.__path__ = list(spec.submodule_search_locations)
    sys.modules[root] = bare
    try:
        return importlib.import_module(module)
    except Exception:
        _forget(root)
        raise


def _forget(root: str) -> None:
    """Drop what a failed import left in sys.modules."""
    for name in [name for name in sys.modules if name == root or name.startswith(f"{root}.")]:
        del sys.modules[name]


def _make_absent(root: str) -> None:
    """Make `import root` raise ModuleNotFoundError from now on, as if it were not installed."""
    _forget(root)
    sys.modules[root] = None  # type: ignore[assignment]
