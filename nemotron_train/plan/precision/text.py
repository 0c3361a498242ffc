"""The precision plan as text: `precision.txt` in the run folder, the precision part of `plan`.

Owns: the wording. Does not own: the plan itself (`resolve`). No torch.
"""

from nemotron_train.config.schema import GemmFormat
from nemotron_train.plan.precision.blocking import EXPERT_ROWS
from nemotron_train.plan.precision.resolve import (
    LinearFormats,
    LinearPrecision,
    PlanPhase,
    PrecisionPlan,
    share_of_flops,
)
from nemotron_train.plan.precision.rules import NVFP4_OPTIONS, ROLES


def plan_text(plan: PrecisionPlan) -> str:
    """The whole plan as aligned plain text: the contents of `precision.txt` in the run folder."""
    lines = [f"precision plan {plan.name}, model {plan.model_name}", ""]
    lines += ["Rules; the first that matches a linear chooses its formats."]
    lines += _aligned(
        [
            ("rule", "matches", *ROLES, "linears"),
            *(
                (
                    claim.name,
                    claim.condition or "what no rule matches",
                    *(getattr(claim.format, role).value for role in ROLES),
                    str(len(claim.linears)),
                )
                for claim in plan.claims
            ),
        ]
    )
    lines += [
        "NVFP4 has 16x16 weight blocks, a Hadamard transform of wgrad's operands and stochastic",
        "rounding of gradients, unless a linear says without.",
        f"Shares are of the linears' training FLOPs, {plan.linears_share:.1%} of the model's.",
    ]
    for phase in plan.phases:
        lines += ["", f"Phase {phase_text(plan, phase)}"]
        lines += _aligned([("share of FLOPs", *ROLES, "all three"), *share_rows(phase)])
        lines += padding_lines(phase)
        rows = [(e.path, *e.formats.products, rule_text(e)) for e in phase.linears]
        lines += ["", *_aligned([("linear", *ROLES, "rule"), *rows])]
    return "\n".join(lines) + "\n"


def options_text(formats: LinearFormats) -> str:
    """The NVFP4 options that are off for a linear, such as `without hadamard`, or ""."""
    missing = [
        option
        for option, roles in NVFP4_OPTIONS.items()
        if not getattr(formats, option)
        and any(getattr(formats, role) == GemmFormat.nvfp4 for role in roles)
    ]
    return f"without {', '.join(missing)}" if missing else ""


def rule_text(entry: LinearPrecision) -> str:
    """The rule that chose the formats, and the NVFP4 options that are off."""
    return "; ".join(filter(None, (entry.rule, options_text(entry.formats))))


def phase_text(plan: PrecisionPlan, phase: PlanPhase) -> str:
    """One line about a phase: its range in trained tokens and its lower bound on formats."""
    reach = f"from {phase.from_tokens:,}"
    later = [start for start in plan.boundaries if start > phase.from_tokens]
    if later:
        reach += f" to {later[0]:,}"
    if phase.at_least is None:
        return f"{reach} tokens: the rules as they are"
    bounds = {role: getattr(phase.at_least, role) for role in ROLES}
    if len(set(bounds.values())) == 1:
        bounds = {"all three products": phase.at_least.fprop}
    raised = [f"{value} in {role}" for role, value in bounds.items() if value != GemmFormat.nvfp4]
    bound = f"at least {', '.join(raised)}" if raised else "the rules as they are"
    return f"{reach} tokens: {bound}"


def padding_lines(phase: PlanPhase) -> list[str]:
    """One line per matrix product whose summed dimension is padded with zeros to whole blocks, and
    one line for the tokens of routed experts."""
    lines = [
        f"{p.path}: {p.role} in {p.format} sums over {p.size}, padded to {p.padded}"
        for p in phase.paddings
    ]
    experts = [linear for linear in phase.linears if ".mlp.experts." in linear.path]
    if any(linear.formats.wgrad.is_block_scaled for linear in experts):
        lines.append(
            "routed experts: wgrad sums over an expert's tokens, padded to a multiple of "
            f"{EXPERT_ROWS}, whole blocks in either format"
        )
    return lines


def share_rows(phase: PlanPhase) -> list[tuple[str, ...]]:
    """Table rows: a format and its share of FLOPs in fprop, dgrad, wgrad and all three products, in
    order of the last, largest first."""
    roles = (*((role,) for role in ROLES), ROLES)
    columns = [share_of_flops(phase.linears, role) for role in roles]
    return [(name, *(f"{shares.get(name, 0):.3%}" for shares in columns)) for name in columns[-1]]


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
