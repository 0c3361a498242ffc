"""The run card: which capabilities a run used, and what its folder proves of each. No torch.

Owns: the list of capabilities and the rule for their marks. Does not own: whether the results are
good. A mark is given on evidence in the run folder only: asked for in the configuration is not
enough.

    ran-on-GPU, ran-on-CPU   steps were taken with it on such a device
    emulated                 computed in the format's numbers by other arithmetic
    unverified               the folder does not show that it happened, or on what
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.schema import Config, GemmFormat, RecomputeMode
from nemotron_train.plan.precision.resolve import resolve_plan
from nemotron_train.report.runs.read import Run, read_objects

GPU, CPU, EMULATED, UNVERIFIED = "ran-on-GPU", "ran-on-CPU", "emulated", "unverified"
_PLACES = {"cuda": GPU, "cpu": CPU}


@dataclass(frozen=True)
class Capability:
    """marks: one, or two where starts ran on different machines; evidence: what shows it."""

    name: str
    marks: tuple[str, ...]
    evidence: str


@dataclass(frozen=True)
class _Facts:
    """What the folder says about where the run's steps were computed."""

    run: Run
    config: Config
    machines: list[dict[str, Any]]

    @property
    def places(self) -> tuple[str, ...]:
        """Devices that steps were taken on; none known: unverified."""
        kinds = {_PLACES.get(str(machine.get("device")), UNVERIFIED) for machine in self.machines}
        return tuple(sorted(kinds)) or (UNVERIFIED,)

    def seen(self, name: str, proof: bool, evidence: str, missing: str) -> Capability:
        """Where the run ran if there is `proof`, else unverified."""
        if proof:
            return Capability(name, self.places, evidence)
        return Capability(name, (UNVERIFIED,), missing)

    def says(self, field: str) -> str:
        """What the machines agree on, in words."""
        values = sorted({str(machine.get(field, "not recorded")) for machine in self.machines})
        return ", ".join(values) or "not recorded"


def run_card(run: Run, config: Config) -> list[Capability]:
    """By the order in which a run meets them. Old folders do not say on what they ran: there all
    is unverified."""
    machines = [start.get("machine") for start in run.starts if start.get("ended") != "refused"]
    known = [machine for machine in machines if isinstance(machine, dict) and machine]
    facts = _Facts(run, config, known)
    found = [*_model(facts), *_formats(facts), *_layout(facts), *_course(facts)]
    return found


def _model(facts: _Facts) -> Iterator[Capability]:
    run, model = facts.run, facts.config.model
    steps = f"{run.last('step'):,.0f} steps on {facts.says('device_name')}"
    yield facts.seen("training: forward, backward, AdamW", True, steps, "")
    letters = set(model.pattern)
    if "M" in letters:
        fused = [bool(machine.get("mamba_kernels")) for machine in facts.machines]
        scan = "mamba_ssm's kernels" if fused and all(fused) else "chunked scan in torch"
        yield facts.seen("Mamba-2 layers", True, scan if fused else "scan not recorded", "")
    if "*" in letters:
        yield facts.seen("attention layers", True, "part of every step", "")
    if "E" in letters:
        kind = "LatentMoE" if model.moe.latent_size else "mixture of experts"
        routed = bool(run.names("max_vio"))
        name = f"{kind}: {model.moe.experts_per_token} of {model.moe.experts} experts"
        yield facts.seen(name, routed, "their loads are logged", "no expert load is logged")
    if model.mtp.depths:
        name = f"multi-token prediction, {model.mtp.depths} deep"
        proof = f"mtp_loss_{model.mtp.depths}" in run.columns.numbers
        yield facts.seen(name, proof, "its losses are logged", "its losses are not logged")


def _formats(facts: _Facts) -> Iterator[Capability]:
    """Number formats of the products, phase by phase, as far as the run got."""
    trained = facts.run.last("tokens") or 0
    try:
        phases = resolve_plan(facts.config).phases
    except ConfigError as error:
        yield Capability("precision plan", (UNVERIFIED,), f"cannot be resolved: {error}")
        return
    yield facts.seen(
        f"{facts.config.precision.parameter_dtype.value} parameters", True, "every step", ""
    )
    ways = {str(machine.get("block_formats")) for machine in facts.machines}
    for form in (GemmFormat.nvfp4, GemmFormat.mxfp8):
        using = [
            phase.from_tokens
            for phase in phases
            if any(form in formats.products for formats in phase.formats.values())
        ]
        if not using:
            continue
        name = f"{form.upper()} products"
        if min(using) >= trained and min(using) > 0:
            late = f"its phase begins at {min(using):,} tokens, not reached"
            yield Capability(name, (UNVERIFIED,), late)
            continue
        marks: set[str] = set()
        marks |= {EMULATED} if "emulated" in ways else set()
        marks |= set(facts.places) if "native" in ways else set()
        evidence = f"block formats: {facts.says('block_formats')}"
        yield Capability(name, tuple(sorted(marks)) or (UNVERIFIED,), evidence)
    if facts.config.precision.telemetry.every:
        proof = any(event.get("kind") == "precision" for event in facts.run.events)
        yield facts.seen("precision telemetry", proof, "records are logged", "no record yet")


def _layout(facts: _Facts) -> Iterator[Capability]:
    parallel, ranks = facts.config.parallel, facts.says("ranks")
    for name, size in (
        ("tensor", parallel.tensor),
        ("pipeline", parallel.pipeline),
        ("context", parallel.context),
        ("expert", parallel.expert),
        ("expert-tensor", parallel.expert_tensor),
    ):
        if size > 1:
            proof = bool(facts.machines)
            evidence = f"{ranks} ranks"
            yield facts.seen(f"{name} parallelism over {size} ranks", proof, evidence, evidence)
    for kind in ("mamba", "attention", "moe"):
        mode = getattr(facts.config.train.recompute, kind)
        if mode != RecomputeMode.off:
            yield facts.seen(f"recomputation of {kind} layers, {mode}", True, "every step", "")


def _course(facts: _Facts) -> Iterator[Capability]:
    """What happens beside the steps."""
    run, train = facts.run, facts.config.train
    checked = "validation_loss" in run.columns.numbers
    yield facts.seen("validation", checked, "validation_loss is logged", "no validation loss yet")
    saved = read_objects(run.path / "checkpoints.jsonl")
    name = "checkpoints, written beside the training" if train.async_save else "checkpoints"
    yield facts.seen(name, bool(saved), f"{len(saved)} completed", "none completed")
    last = run.last("step") or 0
    resumed = [
        start
        for start in run.starts
        if isinstance(start.get("from_step"), int) and start.get("ended") != "refused"
    ][1:]
    if resumed:
        proof = any(0 < start["from_step"] < last for start in resumed)
        missing = "no step after a checkpoint"
        yield facts.seen("resuming", proof, f"{len(resumed)} more starts", missing)
    kinds = [str(event.get("kind")) for event in run.events]
    if facts.config.branch:
        proof = "branch" in kinds
        yield facts.seen("branch of another run", proof, facts.config.branch, "no branch recorded")
    if "switch" in kinds:
        yield facts.seen("switch of the precision plan", True, f"{kinds.count('switch')}", "")
    acted = [event for event in run.events if event.get("policy") in ("skip", "roll_back")]
    if acted:
        yield facts.seen("guard: skipped or rolled back", True, f"{len(acted)} times", "")
