"""The numbers behind the page's charts, cut down to what a screen shows. No torch.

Owns: which curves and heat maps there are, and their form for page.js. Does not own: the HTML
(`page`), comparisons (`page_gap`). Runs are added one after the other and only their thinned curves
stay, so that twenty runs of a hundred thousand steps fit a laptop.

A chart is a dict: id, group, title, y (axis title), x ("tokens" or "hours"), log, lines, and
`options` in place of lines where a person picks one of several. A line: run (its number), name, x
(place in `xs`), y, lo and hi (of each bucket, where it has several points), and the switches that
page.js reads: dots, raw, fixed (not to be smoothed). A heat map: id, group, title, options, each
with rows, columns and cells.
"""

from typing import Any

import numpy as np

from nemotron_train.report.runs.read import Run
from nemotron_train.report.runs.telemetry import kind_of, layer_of, telemetry_records
from nemotron_train.report.runs.thin import rounded, thin
from nemotron_train.report.runs.timeline import timeline
from nemotron_train.run_folder.metric_groups import group_of

MAX_POINTS, ALL_POINTS = 1000, 16_000  # of a curve; of all curves of a chart
MAX_HEAT_COLUMNS, MANY_RUNS, FEW_COLUMNS = 60, 8, 30
MAX_MARKS = 400  # a run's starts, checkpoints and events
MAX_CELLS = 40_000  # of a heat map's option
MAX_STATES = 8  # telemetry records and expert loads that a person can go back to

# Name -> (title, axis title, logarithmic). Others are drawn too, under their own name.
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
}
LEFT_OUT = {"step", "tokens", "time", "slowest_rank"}
EXTREMES = {"loss", "grad_norm", "tokens_per_second", "step_seconds", "max_vio"}
DOTS = ("validation_", "straggler_")
# What zooming and smoothing make no sense for is left as logged.
STEP_PARTS = ("data", "forward_backward", "gradient_reduce", "optimizer", "validation", "save")


class PageData:
    """Everything page.js draws."""

    def __init__(self, num_runs: int) -> None:
        self._points = max(100, min(MAX_POINTS, ALL_POINTS // max(num_runs, 1)))
        self._columns = MAX_HEAT_COLUMNS if num_runs <= MANY_RUNS else FEW_COLUMNS
        self._places: dict[bytes, int] = {}
        self.xs: list[list[float | None]] = []
        self.runs: list[dict[str, Any]] = []
        self.charts: dict[str, dict[str, Any]] = {}
        self.heats: dict[str, dict[str, Any]] = {}

    def as_json(self) -> dict[str, Any]:
        """For page.js; charts in the order of their group and then of their adding."""
        charts, heats = list(self.charts.values()), list(self.heats.values())
        return {"xs": self.xs, "runs": self.runs, "charts": charts, "heats": heats}

    def add(self, run: Run) -> int:
        """Takes in a run; returns its number."""
        number = len(self.runs)
        marks = [
            {"kind": h.kind, "x": h.tokens, "text": h.text} for h in timeline(run)[-MAX_MARKS:]
        ]
        self.runs.append({"label": run.name, "color": number, "dash": 0, "marks": marks})
        for name in run.columns.numbers:
            if name not in LEFT_OUT and "/" not in name:
                self._add_number(run, number, name)
        self._add_step_parts(run, number)
        self._add_clock(run, number)
        self._add_layers(run, number)
        self._add_loads(run, number)
        self._add_telemetry(run, number)
        return number

    def place(self, x: np.ndarray) -> int:
        """Where a curve's x stands in `xs`; most curves of a run share one."""
        key = x.tobytes()
        if key not in self._places:
            self._places[key] = len(self.xs)
            self.xs.append(rounded(x, 7))
        return self._places[key]

    def line(
        self, x: np.ndarray, y: np.ndarray, *, extremes: bool = False, **about: Any
    ) -> dict[str, Any]:
        """A curve cut down; `about` as in the module's docstring."""
        cut = thin(x, y, self._points)
        found = {**about, "x": self.place(cut.x), "y": rounded(cut.mean)}
        if extremes and cut.size > 1:
            found |= {"lo": rounded(cut.low), "hi": rounded(cut.high)}
        return found

    def chart(self, name: str, group: str, title: str, y: str, **about: Any) -> dict[str, Any]:
        """The chart of this id, made where it is new."""
        new = {"id": name, "group": group, "title": title, "y": y, "x": "tokens", "lines": []}
        return self.charts.setdefault(name, new | about)

    def heat(self, name: str, group: str, title: str, **about: Any) -> dict[str, Any]:
        new = {"id": name, "group": group, "title": title, "options": []}
        return self.heats.setdefault(name, new | about)

    def _add_number(self, run: Run, number: int, name: str) -> None:
        tokens, values = run.series(name)
        if not len(tokens) or (name == "skipped_updates" and not values.any()):
            return
        title, axis, log = TITLES.get(name, (_words(name), _unit(name), False))
        chart = self.chart(name, group_of(name), title, axis, log=log)
        about: dict[str, Any] = {"run": number, "name": run.name}
        if name.startswith(DOTS):
            about |= {"dots": True, "fixed": True}
        if name in ("lr", "skipped_updates"):
            about["fixed"] = True
        chart["lines"].append(self.line(tokens, values, extremes=name in EXTREMES, **about))

    def _add_step_parts(self, run: Run, number: int) -> None:
        lines = []
        for part in STEP_PARTS:
            seconds = run.columns.numbers.get(f"step_time/{part}")
            if seconds is not None:
                # A stack needs every part at the same places.
                tokens = run.columns.numbers.get("tokens", np.full(len(seconds), np.nan))
                keep = np.isfinite(tokens)
                filled = np.nan_to_num(seconds[keep])
                lines.append(self.line(tokens[keep], filled, name=part.replace("_", " ")))
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
        """Heat maps of layers over tokens."""
        for prefix, group, title, log in (
            ("max_vio/", "experts", "MaxVio of each layer", False),
            ("gradient_norm/", "norms", "Gradient norm of each part of the model", True),
            ("residual_rms/", "norms", "Size of the residual stream after each layer (RMS)", True),
        ):
            names = run.names(prefix)
            rows, columns = [], None
            for name in names:
                tokens, values = run.series(name)
                cut = thin(tokens, values, self._columns)
                columns = cut.x if columns is None else columns
                if len(cut.x) == len(columns):
                    rows.append((_layer(name.removeprefix(prefix)), rounded(cut.mean, 3)))
            if rows and columns is not None and len(columns):
                heat = self.heat(prefix.rstrip("/"), group, title, log=log, over="tokens")
                option = {"label": run.name, "rows": [row for row, _ in rows]}
                option |= {"columns": rounded(columns, 4), "cells": [cells for _, cells in rows]}
                heat["options"].append(option)

    def _add_loads(self, run: Run, number: int) -> None:
        """Expert load, each expert's share over the even share, at some of the logged steps."""
        loads = {n: v for n, v in run.columns.lists.items() if n.startswith("expert_load/")}
        if not loads:
            return
        steps = run.columns.numbers["step"]
        places = sorted({row for rows, _ in loads.values() for row in rows})
        num_cells = sum(len(values[-1]) for _, values in loads.values())
        states = max(1, min(MAX_STATES, MAX_CELLS // num_cells))
        picked = {int(i) for i in np.linspace(len(places) - 1, 0, states).round()}
        heat = self.heat("expert_load", "experts", "Load of each expert, over an even share")
        for place in sorted((places[i] for i in picked), reverse=True):
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
        form = "nvfp4" if any("nvfp4" in m for m in last.modules.values()) else "mxfp8"
        for measure, name, title, factor in (
            ("flush_to_zero", "flush_to_zero", "Flushed to zero by layer and role, %", 100.0),
            ("snr_db", "snr", "Signal to noise by layer and role, dB", 1.0),
        ):
            operands = list(_ROLES)
            rows, cells = [], []
            for path in last.modules:
                found = [last.number(path, form, operand, measure) for operand in operands]
                if any(value is not None for value in found):
                    rows.append(f"{layer_of(path)}  {kind_of(path)}")
                    cells.append([None if v is None else float(f"{factor * v:.3g}") for v in found])
            heat = self.heat(name, "precision", title, over="role")
            option = {"rows": rows, "columns": list(_ROLES.values()), "cells": cells}
            where = _where(last.modules, form)
            option["label"] = f"{run.name}, {form.upper()} {where}, step {last.step:,}"
            heat["options"].append(option)
        self._add_flushing(run, records, form)

    def _add_flushing(self, run: Run, records: list, form: str) -> None:
        """Mean over the linears of a kind, activations in the forward product, over tokens."""
        points: dict[str, tuple[list[float], list[float]]] = {}
        for record in records:
            by_kind: dict[str, list[float]] = {}
            for path in record.modules:
                value = record.number(path, form, "fprop_activation", "flush_to_zero")
                if value is not None:
                    by_kind.setdefault(kind_of(path), []).append(100 * value)
            for kind, values in by_kind.items():
                tokens, means = points.setdefault(kind, ([], []))
                tokens.append(float(record.tokens))
                means.append(sum(values) / len(values))
        lines = [
            self.line(np.array(tokens), np.array(means), name=kind, fixed=True, dots=True)
            for kind, (tokens, means) in points.items()
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
    trained = [form in module["formats"].values() for module in modules.values()]
    return "in training" if all(trained) else "in part probed" if any(trained) else "probed"


def _layer(path: str) -> str:
    """`decoder.layers.3` as `layer 3`: a row's label has little room."""
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
