"""The charts of a run that trained on rollouts, beside those that every run has. No torch.

Owns: which curves share a chart. Does not own: the metrics (docs/grpo.md), drawing (page.js).
"""

from nemotron_train.report.html.data import PageData
from nemotron_train.report.runs.policy import GROUPS
from nemotron_train.report.runs.read import Run
from nemotron_train.run_folder.metric_groups import group_of

# Groups of metrics whose NAME/ENVIRONMENT are curves of one chart.
_BY_ENVIRONMENT = ("policy", "rollouts", "correction")
_TITLES = {
    "reward": "Reward in each environment",
    "pass": "Share that passed in each environment",
}


def add_policy(data: PageData, run: Run) -> int:
    """Adds a run and these charts; returns its number. Each has the reader select one of several
    runs. Its loss is shown as what it is: the objective, which is no cross entropy."""
    number = data.add(run, left_out={"loss", *GROUPS})
    x, values = data.series(run, "loss")
    if len(x):
        chart = data.chart("objective", "policy", "Objective that the update minimizes", "")
        chart["lines"].append(data.line(x, values, run=number, name=run.name))
    _add_environments(data, run)
    _add_groups(data, run)
    return number


def _add_environments(data: PageData, run: Run) -> None:
    families: dict[str, list[str]] = {}
    for name in sorted(run.columns.numbers):
        family, slash, _ = name.partition("/")
        if slash and group_of(name) in _BY_ENVIRONMENT:
            families.setdefault(family, []).append(name)
    for family, names in families.items():
        lines = []
        for name in names:
            x, values = data.series(run, name)
            if len(x):
                lines.append(data.line(x, values, name=name.partition("/")[2]))
        if lines:
            words = family.replace("_", " ")
            title = _TITLES.get(family, f"{words[:1].upper()}{words[1:]} in each environment")
            chart = data.chart(f"{family}/", group_of(names[0]), title, "")
            chart.setdefault("options", []).append({"label": run.name, "lines": lines})


def _add_groups(data: PageData, run: Run) -> None:
    lines = [
        data.line(*data.filled(run, name), name=label)
        for name, label in GROUPS.items()
        if name in run.columns.numbers
    ]
    if lines:
        title = "Groups, the samples of one prompt, by their rewards"
        chart = data.chart("groups", "policy", title, "share", stack=True)
        chart.setdefault("options", []).append({"label": run.name, "lines": lines})
