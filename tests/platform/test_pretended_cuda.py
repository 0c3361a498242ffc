"""The GPU path from the first step to generation, on a CUDA device that is pretended.

Second truth: the same run on a CPU. The device refuses tensors on two devices, CPU tensors in an
NCCL collective and `.numpy()` of a CUDA tensor, and counts what makes the host wait. Not covered: a
CUDA kernel, streams, NCCL, memory, speed; Transformer Engine and mamba_ssm (their own tests).
"""

import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from nemotron_train.cli.main import main
from nemotron_train.platform.local_ranks import free_port

pytestmark = pytest.mark.usefixtures("in_small_run")

ROOT = Path(__file__).resolve().parents[2]
SHORT = ["train.validation_tokens=256", "train.micro_batch_sequences=2", "train.threads=1"]
# A layer of each kind, and both multi-token-prediction depths: every operator of a step.
LAYERS = "model.pattern=M*E"
FOUR_STEPS = [
    "train.total_tokens=1024",
    "optim.decay_tokens=256",
    "optim.warmup_tokens=256",
    LAYERS,
]
MOST_WAITS_A_STEP = 12
KERNELS = {"_twice", "_strip_amax", "_quantized_operand", "_grouped_product"}
KERNELS |= {"_grouped_outer_product", "_gather_rows", "_sum_rows"}
KERNELS |= {"_scores", "_chunk_sums", "_pass_states", "_outputs", "pass_gradients"}
KERNELS |= {"scores_backward", "input_gradients", "group_gradients"}
KERNELS |= {"_convolution_forward", "_convolution_backward", "_norm_forward", "_norm_backward"}


def pretend(*verbs: list[str], ranks: int = 1, **environment: str) -> list[dict[str, Any]]:
    """Run the verbs in one process a rank; the first rank's records."""
    words = [word for verb in verbs for word in ("---", *verb)][1:]
    command = [sys.executable, "-m", "tests.platform.pretend.run", *words]
    ports = " ".join(str(free_port()) for _ in verbs)
    processes = []
    for rank in range(ranks):
        place = {"PYTHONPATH": str(ROOT), "PRETEND_REPORT": "report.json", "OMP_NUM_THREADS": "1"}
        if ranks > 1:
            place |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            place |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
            place |= {"PRETEND_PORTS": ports}
        processes.append(
            subprocess.Popen(
                command,
                env=os.environ | place | environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        outputs = [process.communicate(timeout=900)[0] for process in processes]
    finally:
        for process in processes:  # a rank waits for ever for one that ended
            process.kill()
    assert Path("report.json").exists(), "\n".join(outputs)
    records = json.loads(Path("report.json").read_text())
    Path("report.json").unlink()
    for record in records:
        expected = 3 if any("stop_after" in word for word in record["verb"]) else 0
        said = "\n".join(outputs)[-3000:]
        assert record["exit"] == expected, f"{' '.join(record['verb'])}\n{said}"
        assert record["mismatches"] == {} and record["operators"] > 0
    return records


def losses(name: str) -> list[float]:
    rows = [
        json.loads(line) for line in Path(f"runs/gpu_{name}/metrics.jsonl").read_text().splitlines()
    ]
    return [row["loss"] for row in rows if "loss" in row]


def train(small_run: tuple[Path, list[str]], name: str, *words: str) -> list[str]:
    return ["pretrain", *small_run[1], *SHORT, f"name=gpu_{name}", *words]


@pytest.fixture(scope="module")
def first(small_run: tuple[Path, list[str]], in_small_run: None) -> str:
    """A run stopped after two steps, with its checkpoint, and what the verbs do with it."""
    begin = train(small_run, "pretended", "precision=bf16", *FOUR_STEPS)
    pretend(
        [*begin, "train.stop_after_steps=2"],
        begin,
        train(small_run, "whole", "precision=bf16", *FOUR_STEPS, "train.async_save=true"),
        ["pretrain", "branch=runs/gpu_pretended@2", "name=gpu_branched"],
        [
            "generate",
            "runs/gpu_pretended",
            "prompt=import ",
            "max_new_tokens=4",
            "end_of_document=false",
            "output=plain.jsonl",
            "temperature=0",
        ],
        [
            "generate",
            "runs/gpu_pretended",
            "prompt=import ",
            "max_new_tokens=4",
            "temperature=0",
            "speculative=true",
            "end_of_document=false",
            "output=fast.jsonl",
        ],
        ["evaluate", "loss", "runs/gpu_pretended", "max_tokens=512"],
    )
    return "pretended"


def test_save_resume_and_branch(first: str, small_run: tuple[Path, list[str]]) -> None:
    """A resumed run and a branch go on as if nothing had happened, and a CPU computes the same
    losses up to the order of its sums."""
    assert losses("whole") == losses(first) and len(losses(first)) == 4
    assert losses("branched") == losses(first)[2:]
    assert main(train(small_run, "cpu", "precision=bf16", *FOUR_STEPS)) == 0
    assert losses("cpu") == pytest.approx(losses(first), abs=0.01)


def test_generation_is_greedy_either_way(first: str) -> None:
    plain, fast = (json.loads(Path(f).read_text()) for f in ("plain.jsonl", "fast.jsonl"))
    assert plain["tokens"] == fast["tokens"] and len(plain["tokens"]) == 4


def test_a_checkpoint_goes_to_a_cpu_and_back(first: str, small_run: tuple[Path, list[str]]) -> None:
    """The state of a device's generator stays on its kind of device."""
    words = ["precision=bf16", *FOUR_STEPS]
    assert main(["pretrain", f"branch=runs/gpu_{first}@2", "name=gpu_on_cpu"]) == 0
    assert losses("on_cpu") == pytest.approx(losses(first)[2:], abs=0.01)
    assert main(train(small_run, "from_cpu", *words, "train.stop_after_steps=2")) == 3
    pretend(train(small_run, "from_cpu", *words))
    assert losses("from_cpu") == pytest.approx(losses(first), abs=0.01)


def test_emulated_formats_and_measurements(small_run: tuple[Path, list[str]]) -> None:
    words = ["train.total_tokens=512", "optim.decay_tokens=256", "optim.warmup_tokens=256", LAYERS]
    measured = ["precision.telemetry.every=1", "guard.health_every=1"]
    pretend(
        train(small_run, "nvfp4", "precision=nvfp4_nemotron3", *words, *measured),
        train(
            small_run,
            "unbalanced",
            "precision=mxfp8",
            *words,
            "model.moe.load_balance_loss_coefficient=0",
            "train.recompute.moe=selective",
            "train.recompute.mamba=selective",
        ),
        train(small_run, "fp32", "precision=fp32", *words),
    )
    assert all(math.isfinite(x) for name in ("nvfp4", "unbalanced", "fp32") for x in losses(name))


def test_causal_conv1d_gets_what_it_takes(small_run: tuple[Path, list[str]]) -> None:
    """With one document a row, x is a view of the input projection, here 236 wide: no multiple of
    eight. The stand-in refuses what the package would refuse."""
    words = ["precision=bf16", "train.total_tokens=512", "optim.decay_tokens=256"]
    words += ["optim.warmup_tokens=256", "model.mamba.heads=4"]
    pretend(train(small_run, "convolved", *words), PRETEND_CONVOLUTION="1")
    assert main(train(small_run, "plain", *words)) == 0
    assert losses("convolved") == pytest.approx(losses("plain"), abs=0.01)


def test_the_host_hardly_waits(small_run: tuple[Path, list[str]]) -> None:
    """Waits a step, as the difference of runs that are equal but for two steps: a few, whatever the
    number of layers and micro-batches. No kernel of a package or of Triton is used: these are the
    torch forms of convolution, scan and experts."""
    words = ["precision=bf16", "optim.decay_tokens=256", "optim.warmup_tokens=256"]
    words += ["train.total_tokens=8192", "guard.health_every=0"]
    patterns = (LAYERS, "model.pattern=MEM*EME*E")
    records = pretend(
        *(
            train(
                small_run,
                f"waits{steps}_{number}",
                *words,
                pattern,
                f"train.stop_after_steps={steps}",
            )
            for number, pattern in enumerate(patterns)
            for steps in (1, 3)
        )
    )
    waits = [sum((Counter(record["waits"]) - Counter()).values()) for record in records]
    a_step = [(waits[1] - waits[0]) / 2, (waits[3] - waits[2]) / 2]
    assert a_step[0] == a_step[1] <= MOST_WAITS_A_STEP, [r["by_line"] for r in records[1::2]]


def test_a_step_on_our_triton_kernels(small_run: tuple[Path, list[str]]) -> None:
    """A step in emulated MXFP8 under Triton's interpreter: each of our kernels is called without
    being asked for, the loss is that of torch's operators, and no layer or product waits for the
    device or copies from pageable memory."""
    words = ["precision=mxfp8", "model.pattern=E*M", "model.hidden_size=32", "model.mamba.heads=2"]
    words += ["model.mamba.groups=1", "model.attention.heads=2", "model.moe.experts=4"]
    words += ["model.attention.key_value_heads=1", "model.mtp.depths=0", "guard.health_every=0"]
    words += ["train.sequence_length=32", "train.global_batch_tokens=32", "train.total_tokens=32"]
    words += ["train.micro_batch_sequences=1", "train.validation_tokens=32"]
    words += ["optim.decay_tokens=0", "optim.warmup_tokens=0"]
    (record,) = pretend(train(small_run, "kernels", *words), TRITON_INTERPRET="1")
    assert set(record["launches"]) == KERNELS
    lines = [line for line in record["by_line"] if re.search(r"@ (model|precision|kernels)/", line)]
    assert not [line for line in lines if "triton/available.py" not in line]  # the trial
    assert main(train(small_run, "operators", *words)) == 0
    assert losses("kernels") == pytest.approx(losses("operators"), abs=0.01)


@pytest.mark.parametrize(
    "names",
    [
        ("tensor", "expert"),
        pytest.param(("data", "pipeline", "context"), marks=pytest.mark.layouts),
    ],
    ids=" ".join,
)
def test_two_ranks_in_each_layout(
    names: tuple[str, ...], small_run: tuple[Path, list[str]]
) -> None:
    """NCCL takes no CPU tensor, and all layouts compute the same."""
    layouts = {
        "data": ["parallel.distributed_optimizer=true", "train.micro_batch_sequences=1"],
        "tensor": ["parallel.tensor=2", "parallel.sequence=true"],
        "pipeline": [
            "parallel.pipeline=2",
            "model.pattern=MEM|*E",
            "train.micro_batch_sequences=1",
        ],
        "context": ["parallel.context=2"],
        "expert": ["parallel.expert=2", "train.micro_batch_sequences=1"],
    }
    words = ["precision=bf16", "model.pattern=MEM*E", "train.total_tokens=512"]
    words += ["optim.decay_tokens=256", "optim.warmup_tokens=256"]
    pretend(
        *(train(small_run, f"two_{name}", *words, *layouts[name]) for name in names),
        ranks=2,
    )
    one = f"one_for_{names[0]}"
    assert main(train(small_run, one, *words)) == 0
    for name in names:
        assert losses(f"two_{name}") == pytest.approx(losses(one), abs=0.01), name
