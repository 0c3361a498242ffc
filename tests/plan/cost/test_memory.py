"""The order of a step in `plan.cost.memory`: hand-made tapes, micro-batches in flight, and the
effect of recomputation and layouts on the prediction.

Second truth: sums written out here. tests/distributed/test_memory.py measures that operators hold
the predicted bytes.
"""

from dataclasses import replace

import pytest

from nemotron_train.compose.compose import compose_config
from nemotron_train.config.schema import RecomputeMode
from nemotron_train.plan.cost.memory import RankMemory, in_flight, rank_memory, walk
from nemotron_train.plan.cost.operators import CPU, GPU, Op, Part
from nemotron_train.plan.derive import derive

A = Op("a", keeps=10, forward=12, gradient=3, backward=5)
B = Op("b", keeps=20, forward=50, gradient=4, backward=7)


def predicted(*overrides: str, ranks: int = 1) -> list[RankMemory]:
    config = compose_config(list(overrides))
    return rank_memory(config, derive(config, ranks))


def test_a_tape_is_walked_forward_and_back() -> None:
    """10 + 50 while b runs forward, 30 kept, 30 + 7 while b runs backward, 10 + 4 + 5 in a's
    backward."""
    assert walk([Part((A, B))]) == (30, 60)
    assert walk([Part((A, replace(B, forward=20)))]) == (30, 37)
    assert walk([Part((A, Op("b", 1, 1, 40, 2)))]) == (11, 10 + 40 + 5)


def test_a_part_that_runs_again_keeps_its_ends_only() -> None:
    """2 of b's 20 bytes kept and 1 more for the input. a and b run forward again on top of them (10
    + 50), then backward on top of 3 - 2 + 30."""
    assert walk([Part((A, B), recompute=True, output=2, inputs=1)]) == (3, 3 + 60)
    assert walk([Part((A, replace(B, forward=20)), True, 2, 1)]) == (3, 3 - 2 + 30 + 7)


def test_gradients_that_wait_count_until_they_join() -> None:
    tape = [
        Part((A,), pending_gradients=-100),
        Part((replace(B, forward=20),), pending_gradients=100),
    ]
    assert walk(tape) == (30, 10 + 100 + 4 + 5)


@pytest.mark.parametrize(
    ("pipeline", "virtual", "rank", "micro_batches", "expected"),
    [
        (1, 1, 0, 8, 1),
        (4, 1, 0, 8, 4),
        (4, 1, 3, 8, 1),
        (4, 1, 0, 2, 2),
        # Warm-up of 2 (4 - 1) + 4 forward passes, and one more.
        (4, 2, 0, 8, 11),
        (4, 2, 3, 8, 5),
    ],
)
def test_micro_batches_in_flight(
    pipeline: int, virtual: int, rank: int, micro_batches: int, expected: int
) -> None:
    assert in_flight(pipeline, virtual, rank, micro_batches) == expected


def test_more_recomputation_keeps_less() -> None:
    kept = []
    for mode in RecomputeMode:
        knobs = [f"train.recompute.{kind}='{mode}'" for kind in ("mamba", "attention", "moe")]
        kept.append(predicted(*knobs)[0].kept_bytes)
    assert kept[0] > kept[1] > kept[2]


def test_a_layer_in_full_keeps_its_input() -> None:
    """Two more layers of the same kind keep two more residual streams, whatever the kind."""
    knobs = [f"train.recompute.{kind}=full" for kind in ("mamba", "attention", "moe")]
    stream = 8 * 256 * 192 * 4  # tokens x width x FP32 of the tiny recipe
    short, long = (
        predicted(f"model.pattern={pattern}", *knobs)[0].kept_bytes for pattern in ("M*E", "M*EM*E")
    )
    assert long - short == 3 * stream


def test_tensor_and_sequence_parallelism_halve_activations() -> None:
    one = predicted("parallel.tensor=1")[0].kept_bytes
    two = predicted("parallel.tensor=2", "parallel.sequence=true", ranks=2)[0].kept_bytes
    assert 0.5 <= two / one < 0.56  # not sharded: the scale of a gathered embedding, masks


def test_a_gpu_copies_less() -> None:
    for precision in ("bf16", "fp32"):
        config = compose_config([f"precision={precision}"])
        derived = derive(config, 1)
        (on_cpu,), (on_gpu,) = (rank_memory(config, derived, machine) for machine in (CPU, GPU))
        if precision == "bf16":  # chained products are kept as they are multiplied, in FP32
            assert on_gpu.peak_bytes < on_cpu.peak_bytes
            assert on_gpu.kept_bytes < on_cpu.kept_bytes
        else:
            assert on_gpu.kept_bytes == on_cpu.kept_bytes
