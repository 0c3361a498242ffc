"""Speed of the Mamba-2 core on this CPU, forward and backward, against Hugging Face's mixer.

    python -m benchmarks.ssd [--rounds 15] [--threads 2] [--dtypes float32 bfloat16]

Rows: our core (convolution, dt, SSD, gated norm) alone; our whole mixer, which is the core between
two plain linears of the peer's sizes; the peer's NemotronHMamba2Mixer, which cannot be timed
without its projections. All run in turn in one process, with the same weight sizes and allocator
settings; medians. The share is the matrix products' FLOPs relative to the rate of a 1024-wide
product.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn
from torch.nn import functional as F

from nemotron_train.model.mamba.convolution import causal_conv
from nemotron_train.model.mamba.core import CPU_CHUNKS, ssd
from nemotron_train.model.mamba.gated_norm import gated_rms_norm
from nemotron_train.platform.allocator import keep_freed_memory

BATCH, LENGTH, HIDDEN = 4, 512, 256
HEADS, HEAD_DIM, STATE, GROUPS, TAPS, CHUNK = 16, 32, 64, 2, 4, 128
INNER = HEADS * HEAD_DIM
CONV = INNER + 2 * GROUPS * STATE
TOKENS = BATCH * LENGTH


class Mixer(nn.Module):
    """A Mamba-2 mixer with our kernels, initialized as in `assemble.initialize`."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_proj = nn.Linear(HIDDEN, INNER + CONV + HEADS, bias=False, dtype=dtype)
        self.out_proj = nn.Linear(INNER, HIDDEN, bias=False, dtype=dtype)
        for linear in (self.in_proj, self.out_proj):
            nn.init.normal_(linear.weight, std=0.02)
        self.conv_weight = nn.Parameter((torch.rand(CONV, TAPS) - 0.5).to(dtype))
        self.conv_bias = nn.Parameter(torch.zeros(CONV, dtype=dtype))
        dt = torch.exp(torch.empty(HEADS).uniform_(-6.9, -2.3))  # 0.001 ... 0.1
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
        self.A_log = nn.Parameter(torch.empty(HEADS).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(HEADS))
        self.norm_weight = nn.Parameter(torch.ones(INNER, dtype=dtype))

    def core(self, projected: Tensor) -> Tensor:
        """Convolution, dt, SSD and gated norm: [BATCH, LENGTH, INNER + CONV + HEADS] -> [...,
        INNER]."""
        z, xbc, dt = projected.split([INNER, CONV, HEADS], dim=-1)
        xbc = causal_conv(xbc, self.conv_weight, self.conv_bias)
        x, B, C = xbc.split([INNER, GROUPS * STATE, GROUPS * STATE], dim=-1)
        y = ssd(
            x.unflatten(-1, (HEADS, HEAD_DIM)),
            F.softplus(dt.float() + self.dt_bias),
            -torch.exp(self.A_log),
            B.unflatten(-1, (GROUPS, STATE)),
            C.unflatten(-1, (GROUPS, STATE)),
            self.D,
            chunk_size=CHUNK,
        )
        group_size = INNER // GROUPS
        return gated_rms_norm(
            y.flatten(2), z, self.norm_weight, group_size=group_size, epsilon=1e-5
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """[BATCH, LENGTH, HIDDEN] -> the same shape."""
        return self.out_proj(self.core(self.in_proj(hidden)))


def peer_mixer(dtype: torch.dtype) -> nn.Module:
    """Hugging Face's mixer with the same dimensions and random weights."""
    from transformers.models.nemotron_h import NemotronHConfig  # pyright: ignore[reportMissingImports]
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer  # pyright: ignore[reportMissingImports]

    config: Any = NemotronHConfig(
        hidden_size=HIDDEN,
        layers_block_type=["linear_attention"],
        mamba_num_heads=HEADS,
        mamba_head_dim=HEAD_DIM,
        ssm_state_size=STATE,
        n_groups=GROUPS,
        conv_kernel=TAPS,
        chunk_size=CHUNK,
    )
    return NemotronHMamba2Mixer(config, layer_idx=0).to(dtype).train()


def core_flops() -> int:
    """FLOPs of the SSD core's matrix products, forward and backward, at the longer chunk."""
    within = 3 * CPU_CHUNKS[0] * (GROUPS * STATE + INNER)  # scores, output and their gradients
    states = 6 * STATE * INNER
    return 2 * TOKENS * (within + states)


def projection_flops() -> int:
    """FLOPs of the two projections, forward and backward."""
    return 6 * TOKENS * HIDDEN * (INNER + CONV + HEADS + INNER)


def round_trip(function: Callable[[Tensor], Tensor], example: Tensor) -> Callable[[], None]:
    """A callable that runs forward and backward once on `example`."""
    x = example.detach().requires_grad_()
    gradient = torch.randn_like(function(x))

    def run() -> None:
        x.grad = None
        function(x).backward(gradient)

    return run


def seconds(function: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(dtype: torch.dtype, rounds: int) -> None:
    """Measures one dtype in turn and prints the results."""
    torch.manual_seed(0)
    ours, peer = Mixer(dtype), peer_mixer(dtype)
    a = torch.randn(1024, 1024).to(dtype)
    # Distributed like a normalized residual stream, so the decays are those of an untrained model:
    # the core's speed depends on them slightly.
    hidden = torch.randn(BATCH, LENGTH, HIDDEN).to(dtype)
    projected = ours.in_proj(hidden)
    cases: dict[str, tuple[Callable[[], Any], int]] = {
        "product": (lambda: a @ a, 2 * 1024**3),
        "core": (round_trip(ours.core, projected), core_flops()),
        "mixer": (round_trip(ours, hidden), core_flops() + projection_flops()),
        "peer": (round_trip(peer, hidden), 0),
    }
    times: dict[str, list[float]] = {name: [] for name in cases}
    for index in range(rounds + 2):
        for name, (function, _) in cases.items():
            elapsed = seconds(function)
            if index >= 2:  # the first two rounds are warm-up
                times[name].append(elapsed)
    median = {name: statistics.median(values) for name, values in times.items()}
    rate = cases["product"][1] / median["product"]
    print(f"{str(dtype)[6:]}: a 1024-wide product runs at {rate / 1e9:.0f} GFLOP/s")
    for name, label in (("core", "our core"), ("mixer", "our mixer"), ("peer", "peer's mixer")):
        tokens = TOKENS / median[name]
        share = cases[name][1] / median[name] / rate
        note = f", {share:.0%} of that rate" if share else ""
        print(f"  {label:12s} {median[name] * 1e3:7.1f} ms  {tokens:9,.0f} tokens/s{note}")
    ratios = [p / m for p, m in zip(times["peer"], times["mixer"], strict=True)]
    print(f"  mixer against peer, median of rounds: {statistics.median(ratios):.2f}x")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()  # hides the warning about missing fused kernels
    keep_freed_memory()
    torch.set_num_threads(arguments.threads)
    for name in arguments.dtypes:
        measure(getattr(torch, name), arguments.rounds)


if __name__ == "__main__":
    main()
