"""`plan`'s bytes a step by kind of collective against those that a step hands to torch.distributed.

Second truth: counted_traffic.py, which wraps torch's own functions; byte for byte, after a step of
warm-up, on two ranks over gloo. Who gets the tokens is the router's choice, so the all-to-all of
experts is compared summed over the ranks. Not covered: layouts of more axes at once, experts that
are cut (expert_tensor), gathered operands of Transformer Engine, sizes on the wire.
"""

import json
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.memory import MODEL
from nemotron_train.compose import compose_config
from nemotron_train.config.communication import ALL_TO_ALL, rank_traffic
from nemotron_train.config.derive import derive

CHILD = Path(__file__).with_name("counted_traffic.py")
# What `plan` leaves out: counts, which are integers, and by who calls: losses, norms, routing.
CONTROL = {"sum_over", "get_grad_norm_fp32", "get_updated_expert_bias"}
AXES = {"tp": "tensor", "cp": "context", "ep": "expert", "expt_tp": "expert tensor"}
AXES |= {"pp": "pipeline", "dp_cp": "data", "expt_dp": "expert data", "embd": "embedding"}

QUICK = "tensor 2 + sequence, MTP"
CASES = {
    QUICK: ["parallel.tensor=2", "parallel.sequence=true", "model.mtp.depths=2"],
    "pipeline 2, MTP": ["parallel.pipeline=2", "model.mtp.depths=2"],
    "data 2, BF16": ["precision=bf16"],
    "expert 2": ["parallel.expert=2"],
    "context 2, BF16": ["parallel.context=2", "precision=bf16"],
}


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[] if c == QUICK else pytest.mark.layouts) for c in CASES]
)
def test_bytes_of_a_step(case: str, run_ranks, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    run_ranks([str(CHILD), str(tmp_path), *CASES[case]], root, 2)
    counted = [_counted(tmp_path / f"rank-{rank}.json") for rank in range(2)]
    config = compose_config([*MODEL, *CASES[case]])
    stages = rank_traffic(config, derive(config, 2))
    predicted: list[Counter] = []
    for rank in range(2):
        sums: Counter = Counter()
        for traffic in stages[rank * len(stages) // 2]:
            sums[traffic.group, traffic.collective] += traffic.size
        predicted.append(sums)
    routed = ("expert", ALL_TO_ALL)
    assert sum(c.pop(routed, 0) for c in counted) == sum(p.pop(routed, 0) for p in predicted)
    assert counted == predicted


def _counted(path: Path) -> Counter:
    """Bytes by axis and kind, control left out, which must be small."""
    sums: Counter = Counter()
    control = 0
    for call in json.loads(path.read_text(encoding="utf-8")):
        if call["size"] == 1:
            continue
        if "int" in call["dtype"] or call["caller"].rpartition(":")[2] in CONTROL:
            control += call["bytes"]
            continue
        # Two stages send the one way in a group of their own, the other way among all ranks.
        sends = call["kind"] == "send"
        names = ["pp"] if sends else call["group"]
        (axis,) = {AXES[name] for name in names if name in AXES}
        sums[axis, call["kind"]] += call["bytes"]
    assert control < 32 * 1024
    return sums
