"""`check precision`: compares the formats of the built model's linears with the plan, by phase.

Owns: the comparison and its printed text. Does not own: the plan (`plan.precision.resolve`), how it
is attached (`precision.attach`), ranks (`check.ranks`). No torch in this process.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from nemotron_train.check.data import write_sources
from nemotron_train.check.parallel import print_shrunk, read_values
from nemotron_train.check.ranks import Ranks
from nemotron_train.config.schema import Config, GemmFormat
from nemotron_train.plan.precision.resolve import resolve_plan
from nemotron_train.plan.shrink import shrink

# Format without quantization -> torch dtype of the weight.
_DTYPES = {"bf16": "torch.bfloat16", "float32": "torch.float32"}


def check_precision(
    config: Config, folder: Path, max_ranks: int, console: Console, ranks: Ranks
) -> bool:
    """Whether every linear of `config`, shrunk, has its planned formats in every phase.

    Prints one table a phase. Raises ConfigError if the configuration cannot be shrunk, RanksFailed
    if a rank fails.
    """
    data = folder / "data"
    shrunk = shrink(config, data, max_ranks=max_ranks, steps=8, own_precision=True)
    print_shrunk(shrunk, console)
    write_sources(data, shrunk.sources)
    path = folder / "model.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.structured(shrunk.config), path)
    plan = resolve_plan(shrunk.config)
    starts = plan.boundaries
    task: dict[str, Any] = {"kind": "precision", "config": str(path), "starts": starts}
    records = read_values(
        ranks.run("formats", task | {"run_folder": str(folder / "run")}, shrunk.num_ranks)
    )
    wrong = 0
    for number, start in enumerate(starts):
        planned = {name: asdict(f) for name, f in plan.phases[number].formats.items()}
        carried = [(record["weights"], record["formats"][number]) for record in records]
        rows = [
            (name, planned_formats, problem_of(name, planned_formats, carried))
            for name, planned_formats in planned.items()
        ]
        wrong += sum(bool(problem) for _, _, problem in rows)
        _print_phase(f"from {start:,} tokens", rows, console)
    console.print("as planned" if not wrong else f"{wrong} linears are not as planned")
    return wrong == 0


def problem_of(
    path: str, planned: dict[str, Any], carried: list[tuple[dict[str, str], dict[str, Any]]]
) -> str:
    """The problem with the linear at `path` on any rank; "" if there is none.

    planned: the linear's formats by role ("fprop", "dgrad", "wgrad", ...). carried: for each rank,
    the dtypes of its weights by path and the formats of its linears by path.
    """
    holders = [(dtypes, formats) for dtypes, formats in carried if path in dtypes]
    if not holders:
        return "in no rank's model"
    products = [planned[role] for role in ("fprop", "dgrad", "wgrad")]
    quantized = any(GemmFormat(product).is_block_scaled for product in products)
    for dtypes, formats in holders:
        if path in formats:
            if formats[path] != planned:
                return f"carries {_products(formats[path])}"
        elif quantized:
            return "cannot carry a format"
        elif not path.endswith(".router") and dtypes[path] != _DTYPES[products[0]]:
            return f"its weight is {dtypes[path]}"
    return ""


def _products(formats: dict[str, Any]) -> str:
    return "/".join(formats[role] for role in ("fprop", "dgrad", "wgrad"))


def _print_phase(title: str, rows: list[tuple[str, dict[str, Any], str]], console: Console) -> None:
    table = Table(title=title, title_justify="left")
    for heading in ("linear", "planned (fprop/dgrad/wgrad)", "carried"):
        table.add_column(heading, overflow="fold")
    for path, formats, problem in rows:
        table.add_row(path, _products(formats), problem or "the same")
    console.print(table)
