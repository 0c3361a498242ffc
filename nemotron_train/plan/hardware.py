"""What a run may find out about its machine without torch: the device's name and capability, and
the versions of installed packages.

Owns these facts and their text. Does not own asking CUDA (`platform.device.hardware` does), nor
what follows from the facts (`plan.guards`, `precision.backend`). No torch.
"""

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass

# Distribution names, the wheel's and its parts', that hold Transformer Engine's version.
_TRANSFORMER_ENGINE = ("transformer-engine", "transformer-engine-torch")
_TRANSFORMER_ENGINE += ("transformer-engine-cu13", "transformer-engine-cu12")
_PACKAGES = {
    "torch": ("torch",),
    "megatron-core": ("megatron-core",),
    "mamba-ssm": ("mamba-ssm",),
    "transformer-engine": _TRANSFORMER_ENGINE,
}


@dataclass(frozen=True)
class Hardware:
    """One process's device. capability: CUDA's compute capability, None without a CUDA device;
    transformer_engine: its version, None where it is not installed."""

    device_name: str
    capability: tuple[int, int] | None
    transformer_engine: str | None

    @property
    def cuda(self) -> bool:
        return self.capability is not None

    def describe(self) -> str:
        """`NVIDIA B200, compute capability 10.0, Transformer Engine 2.17.1`."""
        device = "no CUDA device"
        if self.capability is not None:
            device = "compute capability {}.{}".format(*self.capability)
        engine = f"Transformer Engine {self.transformer_engine or 'not installed'}"
        return f"{self.device_name}, {device}, {engine}"


def installed_versions() -> Mapping[str, str]:
    """Version of each package that `plan.guards` asks about, where it is installed; read from
    its metadata, nothing is imported."""
    found = {}
    for package, distributions in _PACKAGES.items():
        for distribution in distributions:
            try:
                found[package] = importlib.metadata.version(distribution)
                break
            except importlib.metadata.PackageNotFoundError:
                continue
    return found
