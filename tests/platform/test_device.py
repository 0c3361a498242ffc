"""Facts and flags of a GPU on a machine without one. Not covered: a GPU."""

from dataclasses import replace

import pytest
import torch

from nemotron_train.plan.hardware import PEAK_BF16_FLOPS, peak_bf16_flops
from nemotron_train.plan.switches import MAMBA_SSM, PACKAGES, TRANSFORMER_ENGINE
from nemotron_train.platform import device
from nemotron_train.platform.cores import usable_cores

# Names as CUDA reports them, and the vendors' data sheets: dense BF16 in TFLOP/s (half the figure
# with sparsity).
DATA_SHEETS = {
    "NVIDIA A100-SXM4-80GB": 624 / 2,
    "NVIDIA A100 80GB PCIe": 624 / 2,
    "NVIDIA H100 80GB HBM3": 1979 / 2,
    "NVIDIA H100 PCIe": 1513 / 2,
    "NVIDIA H100 NVL": 1671 / 2,
    "NVIDIA H200": 1979 / 2,
    "NVIDIA H200 NVL": 1671 / 2,
    "NVIDIA GH200 480GB": 1979 / 2,
    "NVIDIA B200": 4500 / 2,
    "NVIDIA GB200": 5000 / 2,
    "NVIDIA B300 SXM6 AC": 4500 / 2,
    "NVIDIA GB300": 5000 / 2,
}


@pytest.mark.parametrize(("name", "teraflops"), DATA_SHEETS.items())
def test_peaks_are_those_of_the_data_sheets(name: str, teraflops: float) -> None:
    assert peak_bf16_flops(name) == pytest.approx(teraflops * 1e12, rel=2e-3)


@pytest.mark.parametrize("name", ["CPU, 2 threads a rank", "NVIDIA GeForce RTX 4090", ""])
def test_other_devices_have_no_peak(name: str) -> None:
    assert peak_bf16_flops(name) == 0.0


def test_no_line_of_the_table_is_hidden_by_an_earlier_one() -> None:
    for number, (words, _) in enumerate(PEAK_BF16_FLOPS):
        name = " ".join(words)
        earlier = [other for other, _ in PEAK_BF16_FLOPS[:number]]
        assert not any(all(word in name for word in other) for other in earlier), words


def test_products_use_no_shortcut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both flags change results on a GPU only."""
    flags = torch.backends.cuda.matmul
    before = (flags.allow_tf32, flags.allow_bf16_reduced_precision_reduction)
    try:
        flags.allow_tf32, flags.allow_bf16_reduced_precision_reduction = True, True
        device._state_product_precision()
        assert not flags.allow_tf32
        assert not flags.allow_bf16_reduced_precision_reduction
    finally:
        flags.allow_tf32, flags.allow_bf16_reduced_precision_reduction = before


def test_only_usable_packages_count() -> None:
    gpu = replace(device.prepare(), device="cuda")
    whole = device.with_packages(gpu, {})
    assert whole.transformer_engine and whole.mamba_kernels
    none = device.with_packages(gpu, dict.fromkeys(PACKAGES, "it is not installed"))
    assert not none.transformer_engine and not none.mamba_kernels
    some = device.with_packages(gpu, {TRANSFORMER_ENGINE: "broken"})
    assert not some.transformer_engine and some.mamba_kernels
    assert "linears: Megatron-Core · Mamba-2: mamba_ssm" in some.describe()
    assert not device.with_packages(gpu, {MAMBA_SSM: "broken"}).mamba_kernels


def test_a_cpu_has_no_device_number() -> None:
    assert device.own_device() is None


def test_a_run_does_not_inherit_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums depend on the number of threads, so a second run in one process (a notebook, these
    tests) would differ from the same run in a process of its own."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    before = torch.get_num_threads()
    try:
        for asked, expected in ((3, 3), (0, usable_cores()), (1, 1), (0, usable_cores())):
            platform = device.prepare(asked)
            assert torch.get_num_threads() == expected
            assert platform.device_name == f"CPU, {expected} threads a rank"
    finally:
        torch.set_num_threads(before)
