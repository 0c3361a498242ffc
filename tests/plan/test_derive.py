"""Every check across fields fails with its knob, and derived numbers agree with plain counting.

Not covered: that Megatron accepts each accepted layout, and checks of data folders, tokenizers and
checkpoints (tests of the code that opens them).
"""

import math
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nemotron_train.compose.compose import compose_config
from nemotron_train.config.errors import ConfigError
from nemotron_train.config.schema import Config, OptimConfig, TrainConfig
from nemotron_train.optim.schedule import learning_rate
from nemotron_train.plan.architecture.layers import Sharding
from nemotron_train.plan.cost.memory import heaviest_rank, stage_tensors
from nemotron_train.plan.derive import derive

RANKS = {
    "tiny": 1,
    "proxy_10m": 1,
    "proxy_100m": 1,
    "nano_30b_a3b": 8,
    "super_120b_a12b": 64,
    "ultra_550b_a55b": 768,
}


def tiny(*overrides: str) -> Config:
    return compose_config(list(overrides))


@pytest.mark.parametrize(
    ("overrides", "ranks", "said"),
    [
        # Signs and ranges.
        (["model.hidden_size=0"], 1, "model.hidden_size=0: must be a finite number above 0"),
        (["train.global_batch_tokens=-2048"], 1, "train.global_batch_tokens=-2048"),
        (["optim.peak_learning_rate=nan"], 1, "optim.peak_learning_rate=nan"),
        (["optim.weight_decay=-0.1"], 1, "optim.weight_decay=-0.1"),
        (["optim.beta2=1.0"], 1, "optim.beta2=1.0"),
        (["parallel.expert=0"], 1, "parallel.expert=0"),
        (["name=a/b"], 1, "name=a/b"),
        (["name=.."], 1, "name=.."),
        (["name='a b'"], 1, "name=a b"),
        # The model.
        (["model.pattern=MEX"], 1, "model.pattern=MEX: 'X' at position 3"),
        (["model.mtp.pattern=*F"], 1, "model.mtp.pattern=*F: 'F' at position 2"),
        (
            ["model.attention.heads=7"],
            1,
            "model.attention.heads=7 is not a multiple of model.attention.key_value_heads=2; "
            "6 or 8 would be",
        ),
        (["model.mamba.groups=5"], 1, "model.mamba.heads=32 is not a multiple of"),
        (["model.mamba.dt_min=0.5"], 1, "model.mamba.dt_min=0.5 must not exceed"),
        (["model.mamba.A_init_min=17"], 1, "model.mamba.A_init_min=17.0 must not exceed"),
        (["model.mamba.dt_limit_max=0.0"], 1, "model.mamba.dt_limit_min=0.0 must be below"),
        (
            ["model.moe.experts_per_token=17"],
            1,
            "model.moe.experts_per_token=17 must not exceed model.moe.experts=16",
        ),
        # The layout.
        (
            ["parallel.tensor=4", "parallel.sequence=true"],
            4,
            "model.attention.heads=6 is not a multiple of parallel.tensor=4",
        ),
        (
            ["parallel.tensor=4", "parallel.sequence=true", "model.attention.heads=8"],
            4,
            "model.mamba.groups=2 is not a multiple of parallel.tensor=4; 4 would be",
        ),
        (
            ["parallel.tensor=2", "parallel.sequence=true", "model.vocab_size=4095"],
            2,
            "model.vocab_size=4095 is not a multiple of parallel.tensor=2; 4094 or 4096",
        ),
        (
            [
                "parallel.tensor=2",
                "parallel.sequence=true",
                "model.moe.shared_expert_hidden_size=255",
            ],
            2,
            "model.moe.shared_expert_hidden_size=255",
        ),
        (
            [
                "parallel.tensor=2",
                "parallel.sequence=true",
                "model.attention.heads=12",
                "model.attention.key_value_heads=3",
            ],
            2,
            "model.attention.key_value_heads=3 must be a multiple or a divisor of "
            "parallel.tensor=2",
        ),
        (["parallel.expert=3"], 3, "model.moe.experts=16 is not a multiple of parallel.expert=3"),
        (["parallel.expert_tensor=3"], 3, "model.moe.expert_hidden_size=128"),
        (["parallel.sequence=true"], 1, "parallel.sequence=true needs parallel.tensor above 1"),
        (["parallel.tensor=2"], 2, "parallel.tensor=2 with E layers needs parallel.sequence=true"),
        (
            [
                "parallel.tensor=2",
                "parallel.sequence=true",
                "train.sequence_length=255",
                "train.global_batch_tokens=2040",
            ],
            2,
            "train.sequence_length=255 is not a multiple of parallel.tensor=2",
        ),
        (
            ["parallel.context=4"],
            4,
            "model.attention.heads=6 is not a multiple of parallel.tensor x parallel.context=4; "
            "4 or 8 would be",
        ),
        (
            [
                "parallel.context=4",
                "model.attention.heads=12",
                "model.mamba.heads=12",
                "model.mamba.groups=3",
            ],
            4,
            "model.mamba.groups=3 is 3 a tensor-parallel rank, which must be a multiple or a "
            "divisor of parallel.context=4",
        ),
        (
            ["parallel.context=2", "train.sequence_length=255", "train.global_batch_tokens=2040"],
            2,
            "train.sequence_length=255 is not a multiple of parallel.context=2; 254 or 256",
        ),
        (["train.short_share=0.5"], 1, "train.short_sequence_length=0 and train.short_share=0.5"),
        (
            ["train.short_sequence_length=100", "train.short_share=0.5"],
            1,
            "train.sequence_length=256 is not a multiple of train.short_sequence_length=100; "
            "200 or 300 would be",
        ),
        (["train.short_sequence_length=64", "train.short_share=2"], 1, "train.short_share=2"),
        (
            [
                "parallel.context=2",
                "train.sequence_length=258",
                "train.global_batch_tokens=2064",
                "train.short_sequence_length=43",
                "train.short_share=0.5",
            ],
            2,
            "train.short_sequence_length=43 is not a multiple of parallel.context=2; 42 or 44",
        ),
        (["fresh_data=true"], 1, "fresh_data=true: is for a branch"),
        (["model.pattern=MEM|*EME"], 1, "has 2 pipeline stage(s), separated by |, but"),
        (
            ["parallel.pipeline=2", "model.pattern=ME|M|*EME"],
            2,
            "but parallel.pipeline=2; without | FLOPs decide: 'MEM*EM|E'",
        ),
        (["parallel.pipeline=9"], 9, "parallel.pipeline=9 is more than the 7 layers"),
        (
            ["parallel.pipeline=2", "parallel.virtual_pipeline=4"],
            2,
            "parallel.pipeline=2 x parallel.virtual_pipeline=4 is more than the 7 layers",
        ),
        (["parallel.virtual_pipeline=2"], 1, "needs parallel.pipeline above 1"),
        (["parallel.overlap_parameter_gather=true"], 2, "needs parallel.distributed_optimizer"),
        (["parallel.overlap_pipeline=true"], 1, "needs parallel.virtual_pipeline above 1"),
        (["parallel.bucket_parameters=0"], 1, "parallel.bucket_parameters=0: must be"),
        (
            [
                "parallel.pipeline=2",
                "parallel.virtual_pipeline=2",
                "train.micro_batch_sequences=8",
            ],
            2,
            "parallel.pipeline=2 interleaved micro-batches x train.micro_batch_sequences=8 = 16",
        ),
        (
            ["parallel.tensor=2", "parallel.sequence=true"],
            3,
            "3 rank(s) cannot be divided by parallel.tensor x parallel.pipeline x "
            "parallel.context = 2",
        ),
        (["parallel.expert=4"], 2, "2 rank(s) cannot be divided by parallel.expert x"),
        ([], 0, "the number of ranks is 0"),
        # Batches and schedule.
        (
            ["train.global_batch_tokens=2000"],
            1,
            "train.global_batch_tokens=2000 is not a multiple of train.sequence_length=256; "
            "1792 or 2048 would be",
        ),
        (
            ["train.micro_batch_sequences=3"],
            1,
            "train.global_batch_tokens=2048 is 8 sequences of 256, which 1 data-parallel rank(s) "
            "x train.micro_batch_sequences=3 = 3 do not divide; 1536 or 2304 would do",
        ),
        ([], 3, "which 3 data-parallel rank(s) x train.micro_batch_sequences=8 = 24 do not divide"),
        (["train.validation_tokens=300"], 1, "train.validation_tokens=300 is not a multiple"),
        (["train.validation_tokens=256"], 1, "train.validation_tokens=256 is 1 sequences"),
        (
            ["optim.warmup_tokens=500000"],
            1,
            "optim.warmup_tokens=500000 + optim.decay_tokens=65536 exceed "
            "train.total_tokens=262144",
        ),
        (["optim.min_learning_rate=0.1"], 1, "optim.min_learning_rate=0.1 must not exceed"),
        # Data.
        (["data=prepared", "data.tokenizer=t"], 1, "data.phases is empty"),
        (
            ["data=prepared", "data.tokenizer=t", "data.phases=[{blend: [{path: a}]}]"],
            1,
            "data.validation is empty",
        ),
        (["data.phases=[{blend: []}]"], 1, "data.phases[0].blend is empty"),
        (
            ["data.phases=[{from_tokens: 5, blend: [{path: a}]}]"],
            1,
            "data.phases: from_tokens are [5]",
        ),
        (
            ["data.phases=[{blend: [{path: a}]}, {blend: [{path: b}]}]"],
            1,
            "data.phases: from_tokens are [0, 0]",
        ),
        (["data.validation=[{path: a, weight: 0}]"], 1, "data.validation: weight=0.0 of a"),
        (["train.frozen=['*.routr.weight']"], 1, "'*.routr.weight' is the name of no parameter"),
        (["train.frozen=['*']"], 1, "leaves nothing to train"),
    ],
)
def test_each_violation_names_its_knob(overrides: list[str], ranks: int, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        derive(tiny(*overrides), ranks)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_checks_of_absent_layers_are_not_made() -> None:
    """A model with attention only needs no check that two tensor ranks share a Mamba group."""
    alone = ["model.mtp.depths=0", "parallel.tensor=2", "model.mamba.groups=1"]
    assert derive(tiny(*alone, "model.pattern=**"), 2).num_layers == 2
    with pytest.raises(ConfigError, match=r"model\.mamba\.groups=1"):
        derive(tiny(*alone, "model.pattern=M*"), 2)


def test_stages_come_from_the_pattern_or_from_flops() -> None:
    derived = derive(tiny("parallel.pipeline=2", "model.pattern='MEM*|EME'"), 2)
    assert derived.layers_per_stage == (4, 3)
    assert derived.num_layers == 7
    derived = derive(tiny("parallel.pipeline=2"), 2)
    assert derived.layers_per_stage == (6, 1)
    assert derived.num_layers == 7


def test_more_tensor_ranks_than_key_value_heads_share_one() -> None:
    derived = derive(
        tiny(
            "parallel.tensor=4",
            "parallel.sequence=true",
            "model.attention.heads=8",
            "model.mamba.groups=4",
        ),
        4,
    )
    assert derived.key_value_heads_per_rank == 1
    assert derived.attention_heads_per_rank == 2


@pytest.mark.parametrize(("run", "ranks"), RANKS.items())
def test_every_run_recipe_derives(run: str, ranks: int) -> None:
    config = compose_config([f"run={run}"])
    derived = derive(config, ranks)
    parallel = config.parallel
    layout = parallel.tensor * parallel.pipeline * parallel.context * derived.data_parallel
    experts = parallel.expert * parallel.expert_tensor * parallel.pipeline
    assert layout == ranks == experts * derived.expert_data_parallel
    assert config.model.name == run


def test_published_batches() -> None:
    """Nano and Super: 3,072 sequences of 8,192. Super's recipe lists 993,404 iterations, of which
    7,949 warm up and 198,682 decay (each rounded by its authors' own rule)."""
    derived = derive(compose_config(["run=super_120b_a12b"]), 64)
    assert derived.sequences_per_step == 3072
    assert derived.tokens_per_step == 8192 * 3072
    assert derived.total_steps == pytest.approx(993_404, abs=10)
    assert derived.warmup_steps == pytest.approx(7_949, abs=1)
    assert derived.decay_steps == pytest.approx(198_682, abs=1)


@given(
    data_parallel=st.integers(1, 8),
    micro=st.integers(1, 8),
    accumulation=st.integers(1, 8),
    length=st.integers(1, 64),
    total=st.integers(1, 100_000),
    warmup=st.floats(0, 1),
    decay=st.floats(0, 1),
)
@settings(deadline=None, max_examples=100)
def test_steps_against_a_loop(
    data_parallel: int,
    micro: int,
    accumulation: int,
    length: int,
    total: int,
    warmup: float,
    decay: float,
) -> None:
    """Steps as a loop over tokens counts them, phases as the schedule's rates show them."""
    warmup_tokens = int(total * warmup)
    decay_tokens = int((total - warmup_tokens) * decay)
    batch = data_parallel * micro * accumulation * length
    assume(total / batch < 3000)
    config = replace(
        BASE,
        optim=OptimConfig(1.0, 0.1, warmup_tokens=warmup_tokens, decay_tokens=decay_tokens),
        train=TrainConfig(total, length, batch, micro, validation_tokens=batch),
    )
    derived = derive(config, data_parallel)
    assert derived.micro_batches_per_step == accumulation
    assert derived.validation_sequences == derived.sequences_per_step == batch // length
    ends = []
    while not ends or ends[-1] < total:
        ends.append((ends[-1] if ends else 0) + batch)
    assert derived.total_steps == len(ends)
    assert derived.decay_steps == sum(end > total - decay_tokens for end in ends) * bool(
        decay_tokens
    )
    assert derived.warmup_steps == math.ceil(warmup_tokens / batch)
    rates = [learning_rate(end, config.optim, total) for end in ends]
    if derived.decay_steps and derived.warmup_steps < len(ends) - derived.decay_steps:
        assert rates[-derived.decay_steps - 1] == 1.0 > rates[-derived.decay_steps]


BASE = tiny()


# Memory -------------------------------------------------------------------------------------


def test_one_rank_holds_the_whole_model() -> None:
    """FP32: 4 bytes of parameter, 4 of gradient, 8 of moments, nothing else."""
    derived = derive(BASE, 1)
    memory = heaviest_rank(BASE, derived)
    assert memory.parameters == derived.parameters
    assert memory.state_bytes == 16 * derived.parameters


def test_bf16_adds_a_master_copy_and_sharding_divides_it() -> None:
    config = tiny("precision=bf16")
    whole = heaviest_rank(config, derive(config, 1))
    halves = heaviest_rank(
        config, derive(tiny("precision=bf16", "train.micro_batch_sequences=4"), 2)
    )
    assert whole.state_bytes == (2 + 4 + 12) * whole.parameters
    assert halves.parameters == whole.parameters
    assert halves.optimizer_bytes == pytest.approx(whole.optimizer_bytes / 2, abs=24)
    derived = derive(config, 1)
    config.parallel.distributed_optimizer = False
    assert heaviest_rank(config, derived) == whole


def test_stages_hold_the_model_and_a_second_embedding() -> None:
    """With multi-token prediction the last stage embeds the shifted tokens itself."""
    config = tiny("parallel.pipeline=2", "model.pattern='MEM*|EME'")
    derived = derive(config, 2)
    stages = stage_tensors(config, derived)
    held = sum(tensor.parameters for stage in stages for tensor in stage)
    embedding = config.model.vocab_size * config.model.hidden_size
    assert held == derived.parameters + embedding
    config.model.mtp.depths = 0
    derived = derive(config, 2)
    stages = stage_tensors(config, derived)
    assert sum(tensor.parameters for stage in stages for tensor in stage) == derived.parameters


def test_expert_and_tensor_ranks_hold_their_share() -> None:
    config = tiny("parallel.tensor=2", "parallel.sequence=true", "parallel.expert=2")
    derived = derive(config, 2)
    (tensors,) = stage_tensors(config, derived)
    whole = dict.fromkeys(Sharding, 0)
    for tensor in tensors:
        whole[tensor.sharding] += tensor.parameters
    memory = heaviest_rank(config, derived)
    assert memory.parameters == whole[Sharding.replicated] + (
        (whole[Sharding.tensor] + whole[Sharding.expert]) // 2
    )
