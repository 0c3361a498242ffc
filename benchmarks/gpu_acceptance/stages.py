"""The ten stages, in order.

The seconds are planned for one H200 with a cold disk, to sum to less than eight minutes. They were
never measured there; a stage gets its share of the time that is left (`runner`).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """A stage. target: "module:function" that takes a `results.Report`; seconds: its planned share;
    checks: what a PASS says; interprets: on the pretended device, Triton's interpreter computes the
    kernels."""

    name: str
    title: str
    target: str
    seconds: float
    checks: str
    interprets: bool = False


_HERE = "benchmarks.gpu_acceptance"

STAGES = (
    Stage(
        "environment",
        "environment",
        f"{_HERE}.environment:run",
        35,
        "The GPU, its driver, torch and Triton compute; every package that is installed loads.",
        interprets=True,
    ),
    Stage(
        "kernels",
        "Triton kernels against torch",
        f"{_HERE}.kernels:run",
        45,
        "Our own kernels give torch's numbers: quantizers and gathers bit for bit, the others "
        "within BF16's roundings.",
        interprets=True,
    ),
    Stage(
        "scan",
        "mamba_ssm's scan against ours",
        f"{_HERE}.scan:run",
        35,
        "Result, final state and all gradients of both scans against the chunked form in float64, "
        "with documents and an initial state.",
        interprets=True,
    ),
    Stage(
        "resume",
        "save, kill, resume",
        f"{_HERE}.resume:run",
        120,
        "The default recipe, shortened: a run that is killed with SIGKILL and resumed has the "
        "losses and the last checkpoint of the uninterrupted run, bit for bit.",
    ),
    Stage(
        "formats",
        "NVFP4 and MXFP8 codes, GPU against CPU",
        f"{_HERE}.formats:run",
        25,
        "Emulated formats give the same bits on both: every layout, to nearest and at random.",
        interprets=True,
    ),
    Stage(
        "profile",
        "waits and profile of a step",
        f"{_HERE}.step_profile:run",
        40,
        "The host waits a small number of times a step, whatever the number of layers.",
    ),
    Stage(
        "utilization",
        "model FLOPs utilization in BF16",
        f"{_HERE}.utilization:run",
        70,
        "Finite losses. The figure has no bound: no earlier one exists.",
    ),
    Stage(
        "floors",
        "scan and kernels against their floors",
        f"{_HERE}.floors:run",
        40,
        "Time over the time that the bytes need at the rate of a large copy. The bound is a guess.",
        interprets=True,
    ),
    Stage(
        "generation",
        "generation against transformers",
        f"{_HERE}.generation:run",
        40,
        "The exported checkpoint gives the same logits, and every greedy token of ours is one that "
        "transformers would choose.",
    ),
    Stage(
        "memory",
        "memory against plan",
        f"{_HERE}.memory:run",
        25,
        "The peak that torch allocated in a step, against the prediction.",
    ),
)
