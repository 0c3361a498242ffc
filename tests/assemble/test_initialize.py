"""Scale of the initial weights, by parameter name.

Second truth: Megatron-Core's init_method (normal, std) and output_layer_init_method. The latter
divides by the square root of twice the number of layers, for two sublayers per layer; here each
pattern letter is one sublayer. Not covered: that every layout draws the same weights
(tests/distributed).
"""

import math

import pytest
import torch

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
