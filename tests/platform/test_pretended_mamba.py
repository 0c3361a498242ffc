"""A training step with mamba_ssm's real Triton kernels, interpreted, on a pretended CUDA device.

Second truth: the same step with the chunked scan on a CPU. Not covered: what
tests/model/mamba/mamba_ssm_interpreted.py does not cover; our own Triton kernels, which are off.
"""

import json
from pathlib import Path

import pytest

from nemotron_train.cli.main import main
from tests.platform.pretend import packages
from tests.platform.test_pretended_cuda import pretend, train

pytestmark = pytest.mark.usefixtures("in_small_run")


@pytest.mark.skipif(
    packages.folder("mamba_ssm") is None,
    reason="mamba_ssm is absent: make env installs it for this test",
)
def test_the_trainer_chooses_mamba_ssm(small_run: tuple[Path, list[str]]) -> None:
    """By default, forward and backward."""
    words = ["precision=bf16", "model.pattern=ME", "model.mtp.depths=0"]
    words += ["model.mamba.chunk_size=32", "train.micro_batch_sequences=4"]
    words += ["train.total_tokens=256", "optim.decay_tokens=0", "optim.warmup_tokens=0"]
    (record,) = pretend(
        train(small_run, "mamba_ssm", *words),
        PRETEND_MAMBA="1",
        TRITON_INTERPRET="1",
        MAMBA_DETERMINISTIC="1",
    )
    assert {"_chunk_scan_fwd_kernel", "_chunk_scan_bwd_dcb_kernel"} <= set(record["launches"])
    assert main(train(small_run, "chunked", *words)) == 0
    theirs, ours = (
        json.loads(Path(f"runs/gpu_{name}/metrics.jsonl").read_text().splitlines()[0])
        for name in ("mamba_ssm", "chunked")
    )
    for what, bound in (("loss", 2e-3), ("grad_norm", 0.02), ("validation_loss", 0.01)):
        assert theirs[what] == pytest.approx(ours[what], abs=bound), what
