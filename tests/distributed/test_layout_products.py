"""Every layout of benchmarks/layouts.py, including products on four ranks: losses against one rank,
exact resume, and checkpoints that continue under another layout.

Second truths: the run on one rank, in FP32, with every ingredient; the uninterrupted run. A resumed
run uses new processes. Weights are compared whole, assembled from the shards of all ranks, and
ranks that hold the same part must hold the same numbers. Not covered: more than four ranks, context
ranks that share groups of heads (test_context.py), BF16. Losses are compared over ten steps, after
which rounding may send a token to another expert.
"""

import statistics
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.layouts import LAYOUTS, Job, Outcome, difference, run_world

pytestmark = pytest.mark.layouts

STEPS, SAVE_AT, LONGER = 10, 5, 15
TIMEOUT = 3000  # seconds per job, on a machine whose cores the ranks share

# Saved under the first layout, continued under the second: every dimension changes.
RESHARDED = {
    "TP2 PP2 -> EP2 DP2": ("TP2 PP2", "EP2 DP2"),
    "EP2 DP2 -> TP2 PP2 VPP2": ("EP2 DP2", "TP2 PP2 VPP2"),
    "ETP2 EP2 -> PP4": ("ETP2 EP2", "PP4"),
    "PP2 VPP2 EP2 -> TP2 ETP2 DP2": ("PP2 VPP2 EP2", "TP2 ETP2 DP2"),
    "PP4 -> EP4": ("PP4", "EP4"),
    "TP2 PP2 ETP2 -> DP4": ("TP2 PP2 ETP2", "DP4"),
    "TP2 EP2 DP2 -> one rank": ("TP2 EP2 DP2", "one rank"),
    "CP2 EP2 -> TP2 PP2": ("CP2 EP2", "TP2 PP2"),
    "CP2 PP2 -> one rank": ("CP2 PP2", "one rank"),
    "PP2 VPP2 DP2 -> one rank": ("PP2 VPP2 DP2", "one rank"),
    "one rank -> TP2 ETP2 EP2": ("one rank", "TP2 ETP2 EP2"),
    "one rank -> PP2 VPP2 EP2": ("one rank", "PP2 VPP2 EP2"),
}
# Emulated formats under FP32 parameters: one layout of each kind of sharding.
EMULATED = ("TP2 PP2", "TP2 ETP2 EP2", "PP2 VPP2 EP2", "EP2 DP2")
# Small buckets, so that there are many.
OVERLAP = ["parallel.overlap_gradient_reduce=true", "parallel.overlap_parameter_gather=true"]
OVERLAP += ["parallel.bucket_parameters=20000"]
OVERLAPPED = {
    "DP2": OVERLAP,
    "PP2 VPP2": [*OVERLAP, "parallel.overlap_pipeline=true"],
    "TP2 EP2 DP2": OVERLAP,
    "PP2 VPP2 DP2": [*OVERLAP, "parallel.overlap_pipeline=true"],
}


@dataclass(frozen=True)
class Runs:
    one: Outcome  # LONGER steps on one rank
    first: dict[str, Outcome]  # by layout: STEPS steps, a checkpoint at SAVE_AT
    resumed: dict[str, Outcome]  # by layout: from that checkpoint to STEPS
    resharded: dict[str, Outcome]  # by name in RESHARDED: from SAVE_AT to LONGER
    overlapped: dict[str, Outcome]  # by layout: STEPS steps, a checkpoint at SAVE_AT
    overlapped_resumed: dict[str, Outcome]  # by layout: from that checkpoint to STEPS


COMMON = ["train.micro_batch_sequences=1", "train.total_tokens=3840", "model.pattern=MEM*EME"]
NVFP4 = ["precision=nvfp4_all", "precision.parameter_dtype=float32"]
# Mamba's input projection has 352 rows, so that half of it is whole blocks.
NVFP4 += ["model.mamba.heads=32", "model.mamba.head_dim=4"]


@pytest.fixture(scope="module")
def emulated(small_run: tuple[Path, list[str]]) -> dict[str, Outcome]:
    """STEPS steps in NVFP4 by layout, "one rank" among them, and on one rank with other random
    words: the words of a rounding depend on the micro-batch."""
    folder, overrides = small_run
    base = [*overrides, *COMMON, *NVFP4]
    jobs = [Job("one rank", base, STEPS)]
    jobs += [Job(f"{n} rows", [*base, f"train.micro_batch_sequences={n}"], STEPS) for n in (2, 4)]
    found = {run.name: run for run in run_world(1, jobs, folder, TIMEOUT)}
    jobs = [Job(name, base + LAYOUTS[name][1], STEPS) for name in EMULATED]
    return found | {run.name: run for run in run_world(4, jobs, folder, TIMEOUT)}


@pytest.fixture(scope="module")
def runs(small_run: tuple[Path, list[str]]) -> Runs:
    folder, overrides = small_run
    common = [*overrides, *COMMON]
    layouts = {"one rank": (1, []), **LAYOUTS}

    def job(name: str, layout: str, steps: int, base: list[str], **more: object) -> Job:
        return Job(name, base + layouts[layout][1], steps, **more)  # type: ignore[arg-type]

    def checkpoint(layout: str) -> str:
        return f"layouts/{layout.replace(' ', '_')}/checkpoints/step_{SAVE_AT:08d}"

    found: dict[str, Outcome] = {}
    for num_ranks in (1, 2, 4):
        names = [name for name, (ranks, _) in layouts.items() if ranks == num_ranks]
        steps = LONGER if num_ranks == 1 else STEPS
        jobs = [job(name, name, steps, common, save_at=SAVE_AT) for name in names]
        jobs += [
            job(f"{name} overlapped", name, STEPS, [*common, *OVERLAPPED[name]], save_at=SAVE_AT)
            for name in names
            if name in OVERLAPPED
        ]
        found |= {run.name: run for run in run_world(num_ranks, jobs, folder, TIMEOUT)}
    for num_ranks in (1, 2, 4):
        jobs = [
            job(f"{name} resumed", name, STEPS, common, load=checkpoint(name))
            for name in LAYOUTS
            if layouts[name][0] == num_ranks
        ]
        jobs += [
            job(name, after, LONGER, common, load=checkpoint(before))
            for name, (before, after) in RESHARDED.items()
            if layouts[after][0] == num_ranks
        ]
        jobs += [
            job(
                f"{name} overlapped resumed",
                name,
                STEPS,
                [*common, *more],
                load=checkpoint(f"{name} overlapped"),
            )
            for name, more in OVERLAPPED.items()
            if layouts[name][0] == num_ranks
        ]
        found |= {run.name: run for run in run_world(num_ranks, jobs, folder, TIMEOUT)}
    return Runs(
        found["one rank"],
        {name: found[name] for name in LAYOUTS},
        {name: found[f"{name} resumed"] for name in LAYOUTS},
        {name: found[name] for name in RESHARDED},
        {name: found[f"{name} overlapped"] for name in OVERLAPPED},
        {name: found[f"{name} overlapped resumed"] for name in OVERLAPPED},
    )


def largest(ours: Outcome, reference: Outcome, name: str, first: int, last: int) -> float:
    """`difference` over the steps after `first` up to `last`."""
    return difference(ours.between(first, last), reference.between(first, last), name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_initial_weights_are_one_ranks(layout: str, runs: Runs) -> None:
    assert runs.first[layout].weights_at_start == runs.one.weights_at_start


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_are_one_ranks(layout: str, runs: Runs) -> None:
    ours = runs.first[layout]
    assert ours.sample_ids == runs.one.sample_ids[:STEPS]
    for name in ("loss", "mtp_loss_1", "mtp_loss_2", "load_balance_loss"):
        assert largest(ours, runs.one, name, 0, STEPS) <= 1e-5, name
    assert largest(ours, runs.one, "grad_norm", 0, STEPS) <= 1e-4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resume_is_exact(layout: str, runs: Runs) -> None:
    """Bit for bit: the logged numbers of every step after the checkpoint, the samples, the
    weights."""
    whole, resumed = runs.first[layout], runs.resumed[layout]
    assert resumed.rows == whole.between(SAVE_AT, STEPS).rows
    assert resumed.sample_ids == whole.sample_ids[SAVE_AT:]
    assert resumed.weights_at_end == whole.weights_at_end
    assert resumed.validation == whole.validation


@pytest.mark.parametrize("change", RESHARDED)
def test_goes_on_under_another_layout(change: str, runs: Runs) -> None:
    ours = runs.resharded[change]
    assert ours.sample_ids == runs.one.sample_ids[SAVE_AT:]
    for name in ("loss", "mtp_loss_1", "mtp_loss_2"):
        assert largest(ours, runs.one, name, SAVE_AT, LONGER) <= 1e-4, name


@pytest.mark.parametrize("layout", EMULATED)
def test_emulated_formats_agree(layout: str, emulated: dict[str, Outcome]) -> None:
    """The losses of the first step come from the same codes, summed in another order. Afterwards a
    number that crosses the border between two codes moves by a whole step. Over the other steps the
    runs differ on average by at most twice the effect of other random words on one rank."""
    ours, one = emulated[layout], emulated["one rank"]
    assert largest(ours, one, "loss", 0, 1) <= 1e-5
    assert mean_apart(ours, one) <= 2 * max(mean_apart(emulated[f"{n} rows"], one) for n in (2, 4))


def mean_apart(ours: Outcome, one: Outcome) -> float:
    """Mean relative difference of the losses after the first step."""
    pairs = zip(ours.rows[1:], one.rows[1:], strict=True)
    return statistics.fmean(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in pairs)


@pytest.mark.parametrize("layout", OVERLAPPED)
def test_overlap_changes_no_loss(layout: str, runs: Runs) -> None:
    """Against the same layout without overlap. Only the summation order of the norm differs.
    This does not detect a missing wait: over gloo a gather has mostly ended when the weights are
    read."""
    ours = runs.overlapped[layout]
    for name in ("loss", "mtp_loss_1", "mtp_loss_2", "grad_norm"):
        assert difference(ours, runs.first[layout], name) <= 1e-6, name


@pytest.mark.parametrize("layout", OVERLAPPED)
def test_overlapped_resume_is_exact(layout: str, runs: Runs) -> None:
    """The checkpoint contains the weights of the last update, whose gather waits for the next
    forward pass."""
    whole, resumed = runs.overlapped[layout], runs.overlapped_resumed[layout]
    assert resumed.rows == whole.between(SAVE_AT, STEPS).rows
    assert resumed.weights_at_end == whole.weights_at_end
