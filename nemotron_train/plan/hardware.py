"""Facts about the machine: name and compute capability of the device, versions of packages.

Owns: these facts and their text. Does not own: the CUDA query (`platform.device.hardware`), or the
decisions based on the facts (`plan.guards`, `plan.backend`). No torch.
"""

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass

# Distributions (the wheel and its parts) whose version is Transformer Engine's version.
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
    """The device of one process. capability: CUDA compute capability, None without a CUDA device;
    transformer_engine: version of Transformer Engine, None if it is not installed."""

    device_name: str
    capability: tuple[int, int] | None
    transformer_engine: str | None

    @property
    def cuda(self) -> bool:
        """Whether the device is a CUDA GPU."""
        return self.capability is not None

    def describe(self) -> str:
        """One line, such as `NVIDIA B200, compute capability 10.0, Transformer Engine 2.17.1`."""
        device = "no CUDA device"
        if self.capability is not None:
            device = "compute capability {}.{}".format(*self.capability)
        engine = f"Transformer Engine {self.transformer_engine or 'not installed'}"
        return f"{self.device_name}, {device}, {engine}"


# Dense BF16 peak in FLOP/s (vendors' data sheets) of a device whose name has all of these words.
# The first match counts, so that a board precedes the chip that it is named after.
PEAK_BF16_FLOPS: tuple[tuple[tuple[str, ...], float], ...] = (
    (("GB300",), 2.5e15),
    (("B300",), 2.25e15),
    (("GB200",), 2.5e15),
    (("B200",), 2.25e15),
    (("GH200",), 990e12),
    (("H200", "NVL"), 835.5e12),
    (("H200",), 989.5e12),
    (("H100", "NVL"), 835.5e12),
    (("H100", "PCIe"), 756e12),
    (("H100",), 989.5e12),
    (("A100",), 312e12),
)


def peak_bf16_flops(device_name: str) -> float:
    """Dense BF16 peak of the device in FLOP/s; 0.0 if unknown. device_name: as CUDA reports it."""
    for words, rate in PEAK_BF16_FLOPS:
        if all(word in device_name for word in words):
            return rate
    return 0.0


def installed_versions() -> Mapping[str, str]:
    """Versions of the installed packages that `plan.guards` checks, from package metadata. Does not
    import the packages."""
    versions = {}
    for package, distributions in _PACKAGES.items():
        for distribution in distributions:
            try:
                versions[package] = importlib.metadata.version(distribution)
                break
            except importlib.metadata.PackageNotFoundError:
                continue
    return versions
