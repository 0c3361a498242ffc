"""The run card: which capabilities a run used, and what its folder proves about each. No torch.

Owns: the list of capabilities and the rule for their marks. Does not own: whether the results are
good. A mark needs evidence in the run folder; a setting in the configuration is not enough.

    ran-on-GPU, ran-on-CPU   steps were taken with it on such a device
    emulated                 values of the format, computed with other arithmetic
    unverified               the folder does not show that it was used, or on which device
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.schema import Config, GemmFormat, RecomputeMode
from nemotron_train.plan.precision.resolve import resolve_plan
from nemotron_train.report.runs.read import Run, read_objects

GPU, CPU, EMULATED, UNVERIFIED = "ran-on-GPU", "ran-on-CPU", "emulated", "unverified"
_DEVICE_MARKS = {"cuda": GPU, "cpu": CPU}


@dataclass(frozen=True)
class Capability:
    """One line of the card. marks: one, or several if starts ran on different devices; evidence:
    what in the run folder shows it."""

    name: str
    marks: tuple[str, ...]
    evidence: str


@dataclass(frozen=True)
class _Facts:
    """The run, its configuration, and the machines that its starts recorded."""

    run: Run
    config: Config
    machines: list[dict[str, Any]]

    @property
    def device_marks(self) -> tuple[str, ...]:
        """Marks of the devices that steps ran on; (UNVERIFIED,) if none is recorded."""
        kinds = {
            _DEVICE_MARKS.get(str(machine.get("device")), UNVERIFIED) for machine in self.machines
        }
        return tuple(sorted(kinds)) or (UNVERIFIED,)

    def capability(self, name: str, proof: bool, evidence: str, missing: str) -> Capability:
        """With the device marks and `evidence` if there is `proof`, else unverified with
        `missing`."""
        if proof:
            return Capability(name, self.device_marks, evidence)
        return Capability(name, (UNVERIFIED,), missing)

    def recorded(self, field: str) -> str:
        """All values of `field` that the machines recorded, as text."""
        values = sorted({str(machine.get(field, "not recorded")) for machine in self.machines})
        return ", ".join(values) or "not recorded"


def run_card(run: Run, config: Config) -> list[Capability]:
    """The capabilities in a fixed order: model, formats, layout, events of the run. Folders of old
    versions record no machine, so everything there is unverified."""
    machines = [start.get("machine") for start in run.starts if start.get("ended") != "refused"]
    known = [machine for machine in machines if isinstance(machine, dict) and machine]
    facts = _Facts(run, config, known)
    capabilities = [*_model(facts), *_formats(facts), *_layout(facts), *_events(facts)]
    return capabilities


def _model(facts: _Facts) -> Iterator[Capability]:
    run, model = facts.run, facts.config.model
    steps = f"{run.last('step'):,.0f} steps on {facts.recorded('device_name')}"
    yield facts.capability("training: forward, backward, AdamW", True, steps, "")
    letters = set(model.pattern)
    if "M" in letters:
        fused = [bool(machine.get("mamba_kernels")) for machine in facts.machines]
        scan = "mamba_ssm's kernels" if fused and all(fused) else "chunked scan in torch"
        yield facts.capability("Mamba-2 layers", True, scan if fused else "scan not recorded", "")
    if "*" in letters:
        yield facts.capability("attention layers", True, "part of every step", "")
    if "E" in letters:
        kind = "LatentMoE" if model.moe.latent_size else "mixture of experts"
        routed = bool(run.names("max_vio"))
        name = f"{kind}: {model.moe.experts_per_token} of {model.moe.experts} experts"
        yield facts.capability(name, routed, "their loads are logged", "no expert load is logged")
    if model.mtp.depths:
        name = f"multi-token prediction, {model.mtp.depths} deep"
        proof = f"mtp_loss_{model.mtp.depths}" in run.columns.numbers
        yield facts.capability(name, proof, "its losses are logged", "its losses are not logged")


def _formats(facts: _Facts) -> Iterator[Capability]:
    """Number formats of the matrix products, for the precision phases that the run reached."""
    trained = facts.run.last("tokens") or 0
    try:
        phases = resolve_plan(facts.config).phases
    except ConfigError as error:
        yield Capability("precision plan", (UNVERIFIED,), f"cannot be resolved: {error}")
        return
    yield facts.capability(
        f"{facts.config.precision.parameter_dtype.value} parameters", True, "every step", ""
    )
    modes = {str(machine.get("block_formats")) for machine in facts.machines}
    for form in (GemmFormat.nvfp4, GemmFormat.mxfp8):
        starts = [
            phase.from_tokens
            for phase in phases
            if any(form in formats.products for formats in phase.formats.values())
        ]
        if not starts:
            continue
        name = f"{form.upper()} products"
        if min(starts) >= trained and min(starts) > 0:
            reason = f"its phase begins at {min(starts):,} tokens, not reached"
            yield Capability(name, (UNVERIFIED,), reason)
            continue
        marks: set[str] = set()
        marks |= {EMULATED} if "emulated" in modes else set()
        marks |= set(facts.device_marks) if "native" in modes else set()
        evidence = f"block formats: {facts.recorded('block_formats')}"
        yield Capability(name, tuple(sorted(marks)) or (UNVERIFIED,), evidence)
    if facts.config.precision.telemetry.every:
        proof = any(event.get("kind") == "precision" for event in facts.run.events)
        yield facts.capability("precision telemetry", proof, "records are logged", "no record yet")


def _layout(facts: _Facts) -> Iterator[Capability]:
    parallel, ranks = facts.config.parallel, facts.recorded("ranks")
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
            yield facts.capability(
                f"{name} parallelism over {size} ranks", proof, evidence, evidence
            )
    for kind in ("mamba", "attention", "moe"):
        mode = getattr(facts.config.train.recompute, kind)
        if mode != RecomputeMode.off:
            yield facts.capability(
                f"recomputation of {kind} layers, {mode}", True, "every step", ""
            )


def _events(facts: _Facts) -> Iterator[Capability]:
    """Validation, checkpoints, resuming, branches, plan switches, guard actions."""
    run, train = facts.run, facts.config.train
    has_validation = "validation_loss" in run.columns.numbers
    yield facts.capability(
        "validation", has_validation, "validation_loss is logged", "no validation loss yet"
    )
    saved = read_objects(run.path / "checkpoints.jsonl")
    name = "checkpoints, written beside the training" if train.async_save else "checkpoints"
    yield facts.capability(name, bool(saved), f"{len(saved)} completed", "none completed")
    last = run.last("step") or 0
    resumed = [
        start
        for start in run.starts
        if isinstance(start.get("from_step"), int) and start.get("ended") != "refused"
    ][1:]
    if resumed:
        proof = any(0 < start["from_step"] < last for start in resumed)
        missing = "no step after a checkpoint"
        yield facts.capability("resuming", proof, f"{len(resumed)} more starts", missing)
    kinds = [str(event.get("kind")) for event in run.events]
    if facts.config.branch:
        proof = "branch" in kinds
        yield facts.capability(
            "branch of another run", proof, facts.config.branch, "no branch recorded"
        )
    if "switch" in kinds:
        yield facts.capability("switch of the precision plan", True, f"{kinds.count('switch')}", "")
    actions = [event for event in run.events if event.get("policy") in ("skip", "roll_back")]
    if actions:
        yield facts.capability("guard: skipped or rolled back", True, f"{len(actions)} times", "")
