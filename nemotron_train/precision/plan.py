"""The precision plan: which format every linear's three matrix products are computed in.

Owns the resolution of the configuration to one format per module and role, and its text
(`precision.txt` in the run folder, the precision part of `plan`). Owns no arithmetic of formats
and builds no module. No torch.

A linear has three products: `fprop` y = x W^T, `dgrad` dx = dy W, `wgrad` dW = dy^T x.
"""

from dataclasses import dataclass

from nemotron_train.config.schema import Config
from nemotron_train.model.shape import linears


@dataclass(frozen=True)
class LinearPrecision:
    """The format of each product of one linear module, and the rule that chose it. `flops` is
    the forward cost a token: each of the three products costs as much."""

    path: str
    fprop: str
    dgrad: str
    wgrad: str
    rule: str
    flops: int


# A wrong choice of experts cannot be averaged away, and the product is small: scores are always
# computed in FP32 (arXiv 2512.20856; Megatron-Core's moe_router_dtype="fp32").
_ROUTER_RULE = "router: always float32"
_ROUTER_FORMAT = "float32"


def resolve(config: Config) -> list[LinearPrecision]:
    """One entry for every linear of the model, in forward order (see `shape.linears`)."""
    chosen = config.precision.parameter_dtype.value
    found = []
    for linear in linears(config.model):
        if linear.path.endswith(".mlp.router"):
            format_name, rule = _ROUTER_FORMAT, _ROUTER_RULE
        else:
            format_name, rule = chosen, "precision.parameter_dtype"
        found.append(
            LinearPrecision(
                path=linear.path,
                fprop=format_name,
                dgrad=format_name,
                wgrad=format_name,
                rule=rule,
                flops=linear.flops,
            )
        )
    return found


def share_of_flops(plan: list[LinearPrecision]) -> dict[str, float]:
    """Format -> its share of the training FLOPs of all linears, largest first; sums to 1."""
    flops: dict[str, int] = {}
    for linear in plan:
        for format_name in (linear.fprop, linear.dgrad, linear.wgrad):
            flops[format_name] = flops.get(format_name, 0) + linear.flops
    total = sum(flops.values())
    ordered = sorted(flops.items(), key=lambda item: -item[1])
    return {format_name: count / total for format_name, count in ordered}


def plan_text(config: Config) -> str:
    """The whole plan as aligned plain text: what `precision.txt` in the run folder holds."""
    plan = resolve(config)
    header = ("linear", "fprop", "dgrad", "wgrad", "rule")
    rows = [header, *((p.path, p.fprop, p.dgrad, p.wgrad, p.rule) for p in plan)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = [f"precision plan {config.precision.name}, model {config.model.name}"]
    lines += [
        f"{share:8.3%} of the linears' training FLOPs in {format_name}"
        for format_name, share in share_of_flops(plan).items()
    ]
    lines.append("")
    lines += [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join(lines) + "\n"
