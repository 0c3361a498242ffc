"""The data of the page's charts, thinned to screen resolution. No torch.

Owns: which curves and heat maps exist, and their format for page.js. Does not own: the HTML
(`page`), comparisons (`gap`). Runs are added one by one and only their thinned curves are kept, so
twenty runs of a hundred thousand steps fit in a laptop's memory.

A chart is a dict: id, group, title, y (axis title), x ("tokens", "steps" or "hours"), log, lines,
and `options` instead of lines if the reader selects one of several. A line: run (its number), name,
x (index into `xs`), y, lo and hi (minimum and maximum of each bucket of several points), and the
flags that page.js reads: dots, raw, fixed (not smoothed). A heat map: id, group, title, options,
each with rows, columns and cells.
"""

from collections.abc import Collection
from typing import Any

import numpy as np

from nemotron_train.config.schema import GemmFormat
from nemotron_train.report.runs.read import Run
from nemotron_train.report.runs.telemetry import kind_of, layer_of, telemetry_records
from nemotron_train.report.runs.thin import rounded, thin
from nemotron_train.report.runs.timeline import timeline
from nemotron_train.run_folder.metric_groups import group_of

MAX_POINTS, ALL_POINTS = 1000, 16_000  # per curve; for all curves of a chart together
MAX_HEAT_COLUMNS, MANY_RUNS, FEW_COLUMNS = 60, 8, 30
MAX_MARKS = 400  # starts, checkpoints and events per run
MAX_CELLS = 40_000  # per option of a heat map
MAX_STATES = 8  # expert loads of earlier steps that the reader can select

# Metric -> (title, axis title, logarithmic). Other metrics are drawn too, under their own name.
TITLES: dict[str, tuple[str, str, bool]] = {
    "loss": ("Training loss", "nats a token", False),
    "validation_loss": ("Validation loss", "nats a token", False),
    "zero_weight_gradients": ("Weight gradients that are exactly zero", "elements", False),
    "max_vio": ("MaxVio of the worst layer", "fullest expert / mean", False),
    "load_balance_loss": ("Load-balance loss, mean over layers", "", False),
    "grad_norm": ("Gradient norm before clipping", "norm, log scale", True),
    "tokens_per_second": ("Throughput", "tokens/s", False),
    "model_flops_utilization": ("Model FLOPs utilization (MFU)", "share of BF16 peak", False),
    "step_seconds": ("Step time", "s", False),
    "straggler_ratio": ("Slowest rank over median rank", "ratio", False),
    "lr": ("Learning rate", "", False),
    "skipped_updates": ("Updates dropped by the guard", "count", False),
    "reward": ("Reward, mean over rollouts", "", False),
    "pass": ("Rollouts that passed", "share", False),
    "groups_trivial": ("Groups whose rewards are all equal", "share", False),
    "entropy": ("Entropy of the policy", "nats a token", False),
    "rate_mean": ("Pass rate that the curriculum aims at", "share", False),
    "truncated": ("Rollouts cut off by the length limit", "share", False),
    "malformed": ("Rollouts not in the chat format", "share", False),
    "forced_closes": ("Rollouts whose thinking a budget closed", "share", False),
    "logprob_gap_max": ("Largest gap of trainer's and sampler's log-probability", "nats", True),
    "masked_tokens": ("Sampled tokens that a correction left out", "share", False),
    "masked_sequences": ("Rollouts that a correction left out", "share", False),
    "rollouts_per_second": ("Rollouts while sampling", "rollouts/s", False),
}
LEFT_OUT = {"step", "tokens", "time", "slowest_rank"}
EXTREMES = {"loss", "grad_norm", "tokens_per_second", "step_seconds", "max_vio"}
DOTS = ("validation_", "straggler_")
# Parts of the step time, in the order in which they are stacked.
STEP_PARTS = ("data", "forward_backward", "gradient_reduce", "optimizer", "validation", "save")


class PageData:
    """Collects all data that page.js draws. `num_runs`: the expected number of runs; it sets the
    resolution of the curves. `over`: what curves are drawn over, "tokens" or "steps"."""

    def __init__(self, num_runs: int, over: str = "tokens") -> None:
        self.over = over
        self._points = max(100, min(MAX_POINTS, ALL_POINTS // max(num_runs, 1)))
        self._columns = MAX_HEAT_COLUMNS if num_runs <= MANY_RUNS else FEW_COLUMNS
        self._places: dict[bytes, int] = {}
        self.xs: list[list[float | None]] = []
        self.runs: list[dict[str, Any]] = []
        self.charts: dict[str, dict[str, Any]] = {}
        self.heats: dict[str, dict[str, Any]] = {}

    def as_json(self) -> dict[str, Any]:
        """The data as page.js reads it, in the order of adding."""
        charts, heats = list(self.charts.values()), list(self.heats.values())
        return {"xs": self.xs, "runs": self.runs, "charts": charts, "heats": heats}

    def add(self, run: Run, left_out: Collection[str] = ()) -> int:
        """Adds a run with its curves, heat maps and marks; returns its number. left_out: metrics
        that get no chart of their own."""
        number = len(self.runs)
        marks = [
            {"kind": h.kind, "x": h.step if self.over == "steps" else h.tokens, "text": h.text}
            for h in timeline(run)[-MAX_MARKS:]
        ]
        self.runs.append({"label": run.name, "color": number, "dash": 0, "marks": marks})
        for name in run.columns.numbers:
            if name not in LEFT_OUT and name not in left_out and "/" not in name:
                self._add_number(run, number, name)
        self._add_step_parts(run, number)
        self._add_clock(run, number)
        self._add_layers(run, number)
        self._add_loads(run, number)
        self._add_telemetry(run, number)
        return number

    @property
    def _x(self) -> str:
        """The metric that curves are drawn over."""
        return "step" if self.over == "steps" else "tokens"

    def series(self, run: Run, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(x, values) of a metric, float64 [n] each, over what the page is drawn over."""
        return run.series(name, along=self._x)

    def filled(self, run: Run, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The same at every logged step, 0 where the metric is missing: for stacked charts, which
        need every part at the same x."""
        numbers = run.columns.numbers
        missing = np.full(len(numbers["step"]), np.nan)
        x = numbers.get(self._x, missing)
        keep = np.isfinite(x)
        return x[keep], np.nan_to_num(numbers.get(name, missing)[keep])

    def place(self, x: np.ndarray) -> int:
        """Index of a curve's x values in `xs`. Most curves of a run share one entry."""
        key = x.tobytes()
        if key not in self._places:
            self._places[key] = len(self.xs)
            self.xs.append(rounded(x, 7))
        return self._places[key]

    def line(
        self, x: np.ndarray, y: np.ndarray, *, extremes: bool = False, **about: Any
    ) -> dict[str, Any]:
        """A thinned curve as a line dict. `extremes`: with minimum and maximum of each bucket;
        `about`: further fields, listed in the module docstring."""
        cut = thin(x, y, self._points)
        fields = {**about, "x": self.place(cut.x), "y": rounded(cut.mean)}
        if extremes and cut.size > 1:
            fields |= {"lo": rounded(cut.low), "hi": rounded(cut.high)}
        return fields

    def chart(self, name: str, group: str, title: str, y: str, **about: Any) -> dict[str, Any]:
        """The chart with the id `name`, created if it does not exist. `about`: further fields,
        listed in the module docstring."""
        new = {"id": name, "group": group, "title": title, "y": y, "x": self.over, "lines": []}
        return self.charts.setdefault(name, new | about)

    def heat(self, name: str, group: str, title: str, **about: Any) -> dict[str, Any]:
        """The heat map with the id `name`, created if it does not exist."""
        new = {"id": name, "group": group, "title": title, "options": []}
        return self.heats.setdefault(name, new | about)

    def _add_number(self, run: Run, number: int, name: str) -> None:
        x, values = self.series(run, name)
        if not len(x) or (name == "skipped_updates" and not values.any()):
            return
        title, axis, log = TITLES.get(name, (_words(name), _unit(name), False))
        chart = self.chart(name, group_of(name), title, axis, log=log)
        about: dict[str, Any] = {"run": number, "name": run.name}
        if name.startswith(DOTS):
            about |= {"dots": True, "fixed": True}
        if name in ("lr", "skipped_updates"):
            about["fixed"] = True
        chart["lines"].append(self.line(x, values, extremes=name in EXTREMES, **about))

    def _add_step_parts(self, run: Run, number: int) -> None:
        lines = []
        for part in STEP_PARTS:
            if f"step_time/{part}" in run.columns.numbers:
                x, seconds = self.filled(run, f"step_time/{part}")
                lines.append(self.line(x, seconds, name=part.replace("_", " ")))
        if lines:
            chart = self.chart(
                "step_time", "speed", "Where a step's time goes", "s a step", stack=True
            )
            chart.setdefault("options", []).append({"label": run.name, "lines": lines})

    def _add_clock(self, run: Run, number: int) -> None:
        times, tokens = run.series("tokens", along="time")
        if not len(times):
            return
        begin = min([h.time for h in timeline(run) if h.time is not None] + [float(times[0])])
        chart = self.chart(
            "clock", "progress", "Tokens over wall-clock time", "tokens", x="hours", tokens_y=True
        )
        hours = (times - begin) / 3600
        chart["lines"].append(self.line(hours, tokens, run=number, name=run.name, fixed=True))
        self.runs[number]["clock"] = [
            {"kind": h.kind, "x": (h.time - begin) / 3600, "text": h.text}
            for h in timeline(run)[-MAX_MARKS:]
            if h.time is not None
        ]

    def _add_layers(self, run: Run, number: int) -> None:
        """Adds heat maps of per-layer metrics over tokens or steps."""
        for prefix, group, title, log in (
            ("max_vio/", "experts", "MaxVio of each layer", False),
            ("gradient_norm/", "norms", "Gradient norm of each part of the model", True),
            ("residual_rms/", "norms", "Size of the residual stream after each layer (RMS)", True),
        ):
            names = run.names(prefix)
            rows, columns = [], None
            for name in names:
                cut = thin(*self.series(run, name), self._columns)
                columns = cut.x if columns is None else columns
                if len(cut.x) == len(columns):
                    rows.append((_layer(name.removeprefix(prefix)), rounded(cut.mean, 3)))
            if rows and columns is not None and len(columns):
                heat = self.heat(prefix.rstrip("/"), group, title, log=log, over=self.over)
                option = {"label": run.name, "rows": [row for row, _ in rows]}
                option |= {"columns": rounded(columns, 4), "cells": [cells for _, cells in rows]}
                heat["options"].append(option)

    def _add_loads(self, run: Run, number: int) -> None:
        """Adds the expert load at some of the logged steps: each expert's share relative to an even
        share."""
        loads = {n: v for n, v in run.columns.lists.items() if n.startswith("expert_load/")}
        if not loads:
            return
        steps = run.columns.numbers["step"]
        logged_rows = sorted({row for rows, _ in loads.values() for row in rows})
        num_cells = sum(len(values[-1]) for _, values in loads.values())
        states = max(1, min(MAX_STATES, MAX_CELLS // num_cells))
        picked = {int(i) for i in np.linspace(len(logged_rows) - 1, 0, states).round()}
        heat = self.heat("expert_load", "experts", "Load of each expert, over an even share")
        for place in sorted((logged_rows[i] for i in picked), reverse=True):
            rows, cells = [], []
            for name, (lines, values) in loads.items():
                if place in lines:
                    share = np.asarray(values[lines.index(place)], dtype=np.float64)
                    rows.append(_layer(name.removeprefix("expert_load/")))
                    cells.append(rounded(share * len(share), 3))
            columns = list(range(max(map(len, cells))))
            label = f"{run.name}, step {steps[place]:,.0f}"
            option = {"label": label, "rows": rows, "columns": columns, "cells": cells}
            heat["options"].append(option | {"run": number})
        heat |= {"over": "expert", "middle": 1.0}

    def _add_telemetry(self, run: Run, number: int) -> None:
        records = telemetry_records(run)
        if not records:
            return
        last = records[-1]
        is_nvfp4 = any(GemmFormat.nvfp4 in measured for measured in last.modules.values())
        form = GemmFormat.nvfp4 if is_nvfp4 else GemmFormat.mxfp8
        for measure, name, title, factor in (
            ("flush_to_zero", "flush_to_zero", "Flushed to zero by layer and role, %", 100.0),
            ("snr_db", "snr", "Signal to noise by layer and role, dB", 1.0),
        ):
            operands = list(_ROLES)
            rows, cells = [], []
            for path in last.modules:
                numbers = [last.number(path, form, operand, measure) for operand in operands]
                if any(value is not None for value in numbers):
                    rows.append(f"{layer_of(path)}  {kind_of(path)}")
                    cells.append(
                        [None if v is None else float(f"{factor * v:.3g}") for v in numbers]
                    )
            heat = self.heat(name, "precision", title, over="role")
            option = {"rows": rows, "columns": list(_ROLES.values()), "cells": cells}
            origin = _where(last.modules, form)
            option["label"] = f"{run.name}, {form.upper()} {origin}, step {last.step:,}"
            heat["options"].append(option)
        self._add_flushing(run, records, form)

    def _add_flushing(self, run: Run, records: list, form: str) -> None:
        """Adds the share of flushed activations in fprop, mean over the linears of a kind."""
        points: dict[str, tuple[list[float], list[float]]] = {}
        for record in records:
            by_kind: dict[str, list[float]] = {}
            for path in record.modules:
                value = record.number(path, form, "fprop_activation", "flush_to_zero")
                if value is not None:
                    by_kind.setdefault(kind_of(path), []).append(100 * value)
            for kind, values in by_kind.items():
                xs, means = points.setdefault(kind, ([], []))
                xs.append(float(record.step if self.over == "steps" else record.tokens))
                means.append(sum(values) / len(values))
        lines = [
            self.line(np.array(xs), np.array(means), name=kind, fixed=True, dots=True)
            for kind, (xs, means) in points.items()
        ]
        title = "Activations flushed to zero, by kind of linear"
        chart = self.chart(
            "flushing", "precision", title, "% of the non-zero numbers, forward product"
        )
        chart.setdefault("options", []).append({"label": run.name, "lines": lines})


_ROLES = {
    "fprop_activation": "fprop activation",
    "fprop_weight": "fprop weight",
    "dgrad_gradient": "dgrad gradient",
    "dgrad_weight": "dgrad weight",
    "wgrad_gradient": "wgrad gradient",
    "wgrad_activation": "wgrad activation",
}


def _where(modules: dict[str, dict[str, Any]], form: str) -> str:
    """Whether the format was used in training, only probed, or both."""
    is_trained = [form in module["formats"].values() for module in modules.values()]
    return "in training" if all(is_trained) else "in part probed" if any(is_trained) else "probed"


def _layer(path: str) -> str:
    """`decoder.layers.3` -> `layer 3`, short enough for a row label."""
    if path.startswith("decoder.layers."):
        return f"layer {path.rpartition('.')[2]}"
    if path.startswith("mtp.layers.0.mtp_model_layer.layers."):
        return f"mtp {path.rpartition('.')[2]}"
    return path.removeprefix("decoder.").replace("_", " ")


def _words(name: str) -> str:
    depth = name.rpartition("_")[2]
    if name.startswith(("mtp_loss_", "validation_mtp_loss_")):
        return f"{'Validation loss' if name[0] == 'v' else 'Loss'} of prediction depth {depth}"
    return name.replace("_", " ")


def _unit(name: str) -> str:
    return "nats a token" if "loss" in name else ""
