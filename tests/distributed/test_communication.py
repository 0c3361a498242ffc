"""The bytes per step and kind of collective in `plan`, against those passed to torch.distributed.

Second truth: counted_traffic.py, which wraps torch's own functions; byte for byte, after one
warm-up step, on two ranks over gloo. The router chooses where tokens go, so the all-to-all of
experts is summed over the ranks before it is compared. Not covered: what Transformer Engine
gathers, the padding of several buckets, experts sharded by tensor and expert parallelism at once,
sizes on the wire.
"""

import json
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.memory import MODEL
from nemotron_train.compose.compose import compose_config
from nemotron_train.plan.cost.communication import ALL_TO_ALL, REDUCE_SCATTER, rank_traffic
from nemotron_train.plan.derive import derive

CHILD = Path(__file__).with_name("counted_traffic.py")
# Excluded from `plan`: integer counts, and by caller: losses, norms, routing.
CONTROL = {"sum_over", "get_grad_norm_fp32", "get_updated_expert_bias", "_largest_over"}
AXES = {"tp": "tensor", "cp": "context", "ep": "expert", "expt_tp": "expert tensor"}
AXES |= {"pp": "pipeline", "dp_cp": "data", "expt_dp": "expert data", "embd": "embedding"}

TENSOR = ["parallel.tensor=2", "parallel.sequence=true"]
PIPELINE = ["parallel.pipeline=2"]
OVERLAP = ["parallel.overlap_gradient_reduce=true", "parallel.overlap_parameter_gather=true"]
MTP = ["model.mtp.depths=2"]
# Heads that give a rank whole blocks of 16 rows.
NVFP4 = ["precision=nvfp4_nemotron3", "model.mamba.heads=32", "model.mamba.head_dim=16"]


def _recompute(mode: str) -> list[str]:
    return [f"train.recompute.{kind}={mode}" for kind in ("mamba", "attention", "moe")]


QUICK = "tensor 2 + sequence, MTP"
# Number of ranks, and the overrides of the benchmark's model.
CASES = {
    QUICK: (2, [*TENSOR, *MTP]),
    "tensor 2 + sequence, full recomputation": (2, [*TENSOR, *_recompute("full")]),
    "tensor 2 + sequence, NVFP4 emulated": (2, [*TENSOR, *NVFP4]),
    "tensor 2 without sequence": (2, ["parallel.tensor=2", "model.pattern=MM*M"]),
    "expert tensor 2": (2, [*TENSOR, "parallel.expert_tensor=2"]),
    "pipeline 2, MTP": (2, [*PIPELINE, *MTP]),
    "pipeline 2, virtual 2, MTP": (2, [*PIPELINE, "parallel.virtual_pipeline=2", *MTP]),
    "data 2, BF16": (2, ["precision=bf16"]),
    "data 2, optimizer not sharded": (2, ["parallel.distributed_optimizer=false"]),
    "expert 2": (2, ["parallel.expert=2"]),
    "expert 2, overlap": (2, ["parallel.expert=2", "precision=bf16", *OVERLAP]),
    "expert 2, full recomputation": (2, ["parallel.expert=2", *_recompute("full")]),
    "context 2, BF16": (2, ["parallel.context=2", "precision=bf16"]),
    "context 2, selective recomputation": (2, ["parallel.context=2", *_recompute("selective")]),
    "context 2, full recomputation": (2, ["parallel.context=2", *_recompute("full")]),
    "tensor 2 x pipeline 2, expert 2, MTP": (4, [*TENSOR, *PIPELINE, "parallel.expert=2", *MTP]),
}


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[] if c == QUICK else pytest.mark.layouts) for c in CASES]
)
def test_bytes_of_a_step(case: str, run_ranks, tmp_path: Path) -> None:
    num_ranks, overrides = CASES[case]
    run_ranks([str(CHILD), str(tmp_path), *overrides], Path(__file__).parents[2], num_ranks)
    counted = [_counted(tmp_path / f"rank-{rank}.json") for rank in range(num_ranks)]
    predicted = _predicted(overrides, num_ranks)
    routed = ("expert", ALL_TO_ALL)
    assert sum(c.pop(routed, 0) for c in counted) == sum(p.pop(routed, 0) for p in predicted)
    assert counted == predicted


def _predicted(overrides: list[str], num_ranks: int) -> list[Counter]:
    """Bytes by axis and kind, of every rank."""
    config = compose_config([*MODEL, *overrides])
    stages = rank_traffic(config, derive(config, num_ranks))
    found = []
    for rank in range(num_ranks):
        sums: Counter = Counter()
        for traffic in stages[rank * len(stages) // num_ranks]:
            sums[traffic.group, traffic.collective] += traffic.size
        found.append(sums)
    return found


def _counted(path: Path) -> Counter:
    """Bytes by axis and kind, without control traffic, which must be small."""
    sums: Counter = Counter()
    control = 0
    for call in json.loads(path.read_text(encoding="utf-8")):
        if call["size"] == 1:
            continue
        if "int" in call["dtype"] or call["caller"].rpartition(":")[2] in CONTROL:
            control += call["bytes"]
            continue
        # With two stages, one direction uses its own group, the other the group of all ranks.
        names = ["pp"] if call["kind"] == "send" else call["group"]
        (axis,) = {AXES[name] for name in names if name in AXES}
        # On a CPU an all-reduce replaces the collective if the parts are uneven
        # (platform.megatron_cpu).
        stands_in = call["caller"].endswith("megatron_cpu.py:reduce_scatter")
        sums[axis, REDUCE_SCATTER if stands_in else call["kind"]] += call["bytes"]
    assert control < 32 * 1024
    return sums
