"""`report`: reads run folders, prints the tables, draws the pictures, writes the page. No torch.

Owns: which folders are meant and which files are written where. Does not own: any number.
"""

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from rich.console import Console

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.schema import Config
from nemotron_train.report.gap.pairs import (
    cell_folders,
    config_of,
    find_pairs,
    is_sweep,
    read_sweep,
)
from nemotron_train.report.html.data import PageData
from nemotron_train.report.html.page import Shown, build_page, write_page
from nemotron_train.report.plot.gap import plot_gaps
from nemotron_train.report.plot.loss import plot_loss, plot_runs
from nemotron_train.report.plot.precision import plot_precision
from nemotron_train.report.runs.card import Capability, run_card
from nemotron_train.report.runs.read import Run, label_runs, read_run
from nemotron_train.report.runs.table import print_runs
from nemotron_train.report.write_gaps import print_gaps, write_gaps

PAGE = "report.html"
READ_AHEAD = min(4, os.cpu_count() or 1)  # runs read while one is worked on
MAX_PICTURED = 8  # of more runs at once only the pictures that show them together are drawn
# What comparisons and tables need of a run once its curves are cut down.
KEPT = ("step", "tokens", "loss", "validation_loss", "tokens_per_second", "time")
KEPT += ("model_flops_utilization",)


def report(folders: Sequence[Path], output: Path | None, console: Console) -> list[Path]:
    """Tables on the terminal, pictures and the page; what was written. Raises ConfigError."""
    plain, sweeps = _sorted(folders)
    order = [*plain, *(cell for folder in sweeps for cell in cell_folders(folder))]
    order = [folder for folder in order if folder in plain or (folder / "metrics.jsonl").exists()]
    data = PageData(len(order))
    with ThreadPoolExecutor(READ_AHEAD) as threads:
        reader = _Reader(data, order, threads, draws=len(order) <= MAX_PICTURED)
        runs = [reader(folder) for folder in plain]
        swept = [read_sweep(folder, reader) for folder in sweeps]
    found = find_pairs(runs)
    if not reader.runs:
        raise ConfigError(f"{folders[0]}: no run in it has logged a step yet")
    page = output or _page_path(plain, sweeps)
    written = list(reader.pictures)
    labels = label_runs(reader.runs)
    print_runs(labels, reader.runs, console)
    for folder, comparisons in zip(sweeps, swept, strict=True):
        written += write_gaps(folder, comparisons, console)
    if found and print_gaps(found, console)[0]:
        name = "gap.png" if not sweeps else "gap_pairs.png"
        written.append(plot_gaps(page.with_name(name), found))
    if len(reader.runs) > 1:
        written.append(plot_runs(page.with_name("losses.png"), labels, reader.runs))
    every = [comparison for comparisons in [*swept, found] for comparison in comparisons]
    shown = [
        Shown(*each) for each in zip(labels, reader.runs, reader.configs, reader.cards, strict=True)
    ]
    html = build_page(_title(folders), shown, every, data)
    try:
        written.append(write_page(page, html))
    except OSError as error:
        raise ConfigError(f"--output {page}: cannot be written ({error.strerror})") from None
    return written


class _Reader:
    """Reads run folders, once each: their curves go into the page, their pictures are drawn where
    they are older than the numbers, and what tables and comparisons need is kept. The next ones in
    `order` are read meanwhile: Arrow, which does most of the work, leaves Python free."""

    def __init__(
        self, data: PageData, order: Sequence[Path], threads: ThreadPoolExecutor, *, draws: bool
    ) -> None:
        self._data, self._draws = data, draws
        self._order, self._threads = list(order), threads
        self._ahead: dict[Path, Future[Run]] = {}
        self.runs: list[Run] = []
        self.configs: list[Config | None] = []
        self.cards: list[list[Capability]] = []
        self.pictures: list[Path] = []

    def __call__(self, folder: Path) -> Run:
        run = self._read(folder)
        self._data.add(run)
        for name, draw in (("loss.png", plot_loss), ("precision.png", plot_precision)):
            if self._draws and not _is_fresh(folder / name, run):
                picture = draw(folder, run)
                self.pictures += [picture] if picture is not None else []
        config = config_of(run)
        self.configs.append(config)
        self.cards.append(run_card(run, config) if config is not None else [])
        slim = run.only(KEPT)
        self.runs.append(slim)
        return slim

    def _read(self, folder: Path) -> Run:
        if folder in self._order:
            place = self._order.index(folder)
            for path in self._order[place : place + READ_AHEAD + 1]:
                if path not in self._ahead:
                    self._ahead[path] = self._threads.submit(read_run, path)
            self._order[place] = Path()  # read once
        return self._ahead.pop(folder).result() if folder in self._ahead else read_run(folder)


def _is_fresh(picture: Path, run: Run) -> bool:
    try:
        return picture.stat().st_mtime >= run.written
    except OSError:
        return False


def _sorted(folders: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Run folders and sweeps' folders, each once; a folder of runs stands for all runs in it."""
    plain: dict[Path, Path] = {}
    sweeps: dict[Path, Path] = {}
    for folder in folders:
        inside = []
        if not is_sweep(folder) and not (folder / "metrics.jsonl").is_file() and folder.is_dir():
            inside = sorted(path.parent for path in folder.glob("*/metrics.jsonl"))
        if is_sweep(folder):
            sweeps[folder.resolve()] = folder
        for run in inside or [folder]:
            if not is_sweep(run):
                plain[run.resolve()] = run
    # A sweep's own runs, given beside it, are in it already.
    plain = {path: run for path, run in plain.items() if path.parent not in sweeps}
    return list(plain.values()), list(sweeps.values())


def _page_path(plain: Sequence[Path], sweeps: Sequence[Path]) -> Path:
    """Beside what it shows: in the run's or the sweep's folder, or, of several, the one above."""
    folders = [*plain, *sweeps]
    if len(folders) == 1:
        return folders[0] / PAGE
    parents = {folder.resolve().parent for folder in folders}
    return (folders[0].parent if len(parents) == 1 else Path.cwd()) / PAGE


def _title(folders: Sequence[Path]) -> str:
    names = [folder.resolve().name for folder in folders]
    if len(names) <= 3:
        return ", ".join(names)
    return f"{', '.join(names[:2])} and {len(names) - 2} more"
