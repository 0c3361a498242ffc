"""Distribution of the initial weights, by parameter name.

Second truth: Megatron-Core's init_method (normal, std) and output_layer_init_method. The latter
divides by the square root of twice the number of layers, for two sublayers per layer; here each
pattern letter is one sublayer. For Mamba-2's own parameters, the distribution functions of the
paper's code (state-spaces/mamba, mamba2.py). Not covered: that every layout draws the same weights
(tests/distributed).
"""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from nemotron_train.assemble.initialize import draw
from nemotron_train.compose.compose import compose_config

MODEL = compose_config(["model.init_std=0.02", "model.pattern=MEM*EMEMEM*EMEME"]).model
NUM_LAYERS = 16
SHAPE = (512, 512)


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("decoder.layers.1.mlp.fc1_latent_proj.weight", 1.0),
        ("decoder.layers.1.mlp.fc2_latent_proj.weight", NUM_LAYERS**-0.5),
        ("decoder.layers.0.mixer.in_proj.weight", 1.0),
        ("decoder.layers.0.mixer.out_proj.weight", NUM_LAYERS**-0.5),
        ("decoder.layers.3.self_attention.linear_qkv.weight", 1.0),
        ("decoder.layers.3.self_attention.linear_proj.weight", NUM_LAYERS**-0.5),
        ("decoder.layers.1.mlp.experts.linear_fc1.weight", 1.0),
        ("decoder.layers.1.mlp.experts.linear_fc2.weight", NUM_LAYERS**-0.5),
        ("embedding.word_embeddings.weight", 1.0),
    ],
)
def test_only_what_writes_to_the_residual_stream_is_scaled_down(name: str, factor: float) -> None:
    """The standard deviation of n draws has a relative error of 1 / sqrt(2 n), here 0.14 %."""
    weights = draw(name, SHAPE, MODEL, torch.Generator().manual_seed(0))
    assert float(weights.std()) == pytest.approx(0.02 * factor, rel=5 / math.sqrt(2 * 512 * 512))


def distance_to_uniform(values: torch.Tensor) -> float:
    """Kolmogorov and Smirnov's statistic: the largest distance between the share of values below a
    number and that of a uniform distribution on [0, 1], times the root of the number of values.
    Above 2 in one of 1,500 samples."""
    ordered = np.sort(values.double().numpy())
    shares = np.arange(len(ordered) + 1) / len(ordered)
    distance = max(np.abs(shares[1:] - ordered).max(), np.abs(shares[:-1] - ordered).max())
    return float(distance) * math.sqrt(len(ordered))


def mamba_parameter(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return draw(f"decoder.layers.0.mixer.{name}", shape, MODEL, generator).double()


def test_decays_are_uniform() -> None:
    """A = -exp(A_log), and -A is uniform between its two knobs."""
    mamba = MODEL.mamba
    decays = mamba_parameter("A_log", (4096,)).exp()
    share = (decays - mamba.A_init_min) / (mamba.A_init_max - mamba.A_init_min)
    assert distance_to_uniform(share) < 2


def test_time_steps_are_uniform_in_their_logarithm() -> None:
    """The layer adds the bias before softplus. With an input of zero dt is what was drawn: uniform
    in its logarithm between dt_min and dt_max."""
    mamba = MODEL.mamba
    dt = F.softplus(mamba_parameter("dt_bias", (4096,)))
    share = torch.log(dt / mamba.dt_min) / math.log(mamba.dt_max / mamba.dt_min)
    assert distance_to_uniform(share) < 2


def test_the_convolution_starts_as_torchs_does() -> None:
    """torch.nn.Conv1d: uniform within 1 / sqrt(inputs of an output), here the kernel's width."""
    width = MODEL.mamba.conv_kernel_size
    peer = torch.nn.Conv1d(1024, 1024, width, groups=1024).weight.detach().double()
    bound = width**-0.5
    for weights in (mamba_parameter("conv_weight", (1024, width)), peer):
        assert distance_to_uniform((weights.flatten() / bound + 1) / 2) < 2
