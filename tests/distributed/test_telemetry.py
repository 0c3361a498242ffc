"""Telemetry over whole runs: it changes no number of the training, and two ranks count the same as
one.

Second truth: the same run without telemetry, bit for bit; the same run on one rank. In the first
step the weights are equal under every layout, so the counts agree up to BF16 sums in another order.
Not covered: pipeline and expert parallelism, native products.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nemotron_train.run_folder.metric_groups import is_timing
from tests import warm_process

Small = tuple[Path, list[str]]
ON = ["precision=nvfp4_all", "precision.telemetry.every=1", "train.total_tokens=512"]
SHORT = [
    "train.total_tokens=768",  # three steps of two micro-batches
    "optim.warmup_tokens=256",
    "optim.decay_tokens=256",
    "model.pattern=MEM*EME",
    "train.micro_batch_sequences=2",
    "model.mamba.heads=8",  # a rank's rows of the input projection are whole blocks
    "model.mamba.head_dim=8",
    "model.mamba.state_size=22",
]


def train(small_run: Small, name: str, overrides: list[str], ranks: int = 1) -> list[dict]:
    """Lines of metrics.jsonl, without the times."""
    folder, common = small_run
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "nemotron_train", "pretrain", f"name={name}", *common]
    command += [*SHORT, "train.threads=1", *overrides]
    processes = []
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = os.environ | {key: str(value) for key, value in place.items()}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes.append(warm_process.Popen(command, cwd=folder, env=environment, **pipes))
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * ranks, "\n".join(outputs)
    text = (folder / "runs" / name / "metrics.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    return [{key: value for key, value in row.items() if not is_timing(key)} for row in rows]


def split(rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """Lines of steps, telemetry records."""
    records = [row for row in rows if row.get("kind") == "precision"]
    return [row for row in rows if row not in records], records


@pytest.fixture(scope="module")
def one_rank(small_run: Small) -> dict:
    return first_record(small_run, "one", [])


def first_record(small_run: Small, name: str, overrides: list[str], ranks: int = 1) -> dict:
    """Numbers of the first step's linears."""
    _, records = split(train(small_run, name, [*ON, *overrides], ranks))
    assert records[0]["step"] == 1
    return records[0]["precision_telemetry"]


@pytest.mark.parametrize(
    ("plan", "probe"),
    [
        ("nvfp4_nemotron3", "nvfp4"),
        pytest.param("bf16", "nvfp4", marks=pytest.mark.layouts),
    ],
)
def test_training_does_not_notice(plan: str, probe: str, small_run: Small) -> None:
    """Measured steps are not the first ones. Other steps come before and after them."""
    knobs = ["precision.telemetry.every=2", f"precision.telemetry.probe={probe}"]
    plain, none = split(train(small_run, f"{plan}_off", [f"precision={plan}"]))
    steps, records = split(train(small_run, f"{plan}_on", [f"precision={plan}", *knobs]))
    assert steps == plain and not none
    assert [record["step"] for record in records] == [2, 3]  # the last step is due too
    folder = small_run[0] / "runs"
    assert (folder / f"{plan}_on" / "precision.png").exists()
    assert not (folder / f"{plan}_off" / "precision.png").exists()
    modules = records[-1]["precision_telemetry"]
    assert len(modules) == 3 * 2 + 2 + 3 * 6 + 1 + 2 + 6
    assert all(len(module[probe]) == 6 for module in modules.values())
    if plan == "nvfp4_nemotron3":
        out_proj = modules["decoder.layers.0.mixer.out_proj"]
        assert set(out_proj["formats"].values()) == {"mxfp8"}
        assert out_proj["mxfp8"]["fprop_activation"]["snr_db"] > 25
        assert out_proj["nvfp4"]["fprop_activation"]["snr_db"] < 25
        rate = out_proj["mxfp8"]["fprop_activation"]["flush_to_zero"]
        path = "flush_to_zero/decoder.layers.0.mixer.out_proj/fprop_activation"
        assert records[-1][path] == rate
    else:
        assert not any(key.startswith("flush_to_zero") for key in records[-1])


def assert_close(ours: dict, reference: dict) -> None:
    """Rates and errors of all operands. Counts differ in a few elements only."""
    assert set(ours) == set(reference)
    for path, module in reference.items():
        for operand, numbers in module["nvfp4"].items():
            for name in ("flush_to_zero", "relative_error"):
                seen = ours[path]["nvfp4"][operand][name]
                assert seen == pytest.approx(numbers[name], abs=0.03), (path, operand, name)


def test_data_parallel_ranks_count_together(small_run: Small, one_rank: dict) -> None:
    """One rank measures its first micro-batch; two ranks measure one each: twice the blocks, other
    tokens of the same text. The gradients, distributed over the ranks, are those of all tokens."""
    ours, reference = first_record(small_run, "telemetry_data", [], ranks=2), one_rank
    assert_close(ours, reference)
    first = "decoder.layers.0.mixer.in_proj"
    seen, wanted = (modules[first]["nvfp4"] for modules in (ours, reference))
    for operand, numbers in wanted.items():
        blocks = sum(numbers["scale_histogram"])
        assert sum(seen[operand]["scale_histogram"]) == 2 * blocks, operand
    assert seen["fprop_weight"]["amax"] == wanted["fprop_weight"]["amax"]
    assert seen["fprop_weight"]["flush_to_zero"] == wanted["fprop_weight"]["flush_to_zero"]
    for path, module in reference.items():
        zeros = ours[path]["zero_weight_gradients"]
        assert zeros == pytest.approx(module["zero_weight_gradients"], abs=0.02), path


@pytest.mark.layouts
def test_tensor_parallel_ranks_count_together(small_run: Small, one_rank: dict) -> None:
    """Shards of one tensor, with the largest magnitude of the whole. Their blocks are those of the
    whole tensor, each counted once. Tensors that both ranks hold whole are counted twice."""
    layout = ["parallel.tensor=2", "parallel.sequence=true"]
    ours, reference = first_record(small_run, "telemetry_tensor", layout, ranks=2), one_rank
    assert_close(ours, reference)
    path = "decoder.layers.0.mixer.out_proj"  # sharded along its inputs
    seen, wanted = (modules[path]["nvfp4"] for modules in (ours, reference))
    assert seen["fprop_weight"] == wanted["fprop_weight"]
    for operand, times in (("fprop_activation", 1), ("dgrad_gradient", 2)):
        blocks = sum(wanted[operand]["scale_histogram"])
        assert sum(seen[operand]["scale_histogram"]) == times * blocks, operand


@pytest.mark.layouts
def test_context_parallel_ranks_count_together(small_run: Small, one_rank: dict) -> None:
    """Pieces of one sequence. Operands along the tokens are counted once, block by block as on one
    rank. A weight, whole on both ranks, is counted twice."""
    ours = first_record(small_run, "telemetry_context", ["parallel.context=2"], ranks=2)
    assert_close(ours, one_rank)
    path = "decoder.layers.0.mixer.in_proj"
    seen, wanted = (modules[path]["nvfp4"] for modules in (ours, one_rank))
    for operand in ("fprop_activation", "wgrad_activation"):
        assert seen[operand] == wanted[operand], operand
    for operand, times in (("dgrad_gradient", 1), ("fprop_weight", 2)):
        blocks = sum(wanted[operand]["scale_histogram"])
        assert sum(seen[operand]["scale_histogram"]) == times * blocks, operand
    for path, module in one_rank.items():
        zeros = ours[path]["zero_weight_gradients"]
        assert zeros == pytest.approx(module["zero_weight_gradients"], abs=0.02), path
