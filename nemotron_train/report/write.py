"""`report`: reads run folders, prints tables, draws plots, writes the HTML page. No torch.

Owns: which folders are reported on, which files are written and where. Does not own: any number.
"""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from rich.console import Console

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.schema import Config
from nemotron_train.report.gap.pairs import (
    cell_folders,
    config_in,
    find_pairs,
    is_sweep,
    read_sweep,
)
from nemotron_train.report.html.data import PageData
from nemotron_train.report.html.page import ReportedRun, build_page, write_page
from nemotron_train.report.html.policy import add_policy
from nemotron_train.report.plot.gap import plot_gaps
from nemotron_train.report.plot.loss import plot_loss, plot_runs
from nemotron_train.report.plot.precision import plot_precision
from nemotron_train.report.plot.reward import plot_reward, plot_rewards
from nemotron_train.report.runs.card import Capability, run_card
from nemotron_train.report.runs.policy import METRICS, is_policy, split
from nemotron_train.report.runs.read import Run, label_runs, read_run
from nemotron_train.report.runs.rollouts import Rollout, sample_rollouts
from nemotron_train.report.runs.table import print_runs, run_tables
from nemotron_train.report.write_gaps import print_gaps, write_gaps

PAGE = "report.html"
READ_AHEAD = min(4, os.cpu_count() or 1)  # runs read in the background while one is processed
MAX_PICTURED = 8  # with more runs, only the plots that show them together are drawn
MAX_SAMPLED = 8  # runs of which rollouts are shown
# Metrics that comparisons and tables need. The others are dropped once a run's curves are thinned.
KEPT = ("step", "tokens", "loss", "validation_loss", "tokens_per_second", "time")
KEPT += ("model_flops_utilization", *METRICS)


def report(folders: Sequence[Path], output: Path | None, console: Console) -> list[Path]:
    """Prints tables and writes plots and the HTML page; returns the paths of the written files.

    `output`: path of the page, None for report.html in or above the folders. A run that cannot be
    read is named and left out. Raises ConfigError if no run can be read or has logged a step, and
    if the page cannot be written."""
    plain, sweeps = _split_folders(folders)
    order = [*plain, *(cell for folder in sweeps for cell in cell_folders(folder))]
    order = [folder for folder in order if folder in plain or (folder / "metrics.jsonl").exists()]
    configs: dict[Path, Config | None] = {}
    data = PageData(len(order), _over(order, configs))
    with ThreadPoolExecutor(READ_AHEAD) as threads:
        reader = _Reader(data, order, threads, configs, draws=len(order) <= MAX_PICTURED)
        runs, problems = _read_all(reader, plain)
        swept = [read_sweep(folder, reader) for folder in sweeps]
    pairs = find_pairs(runs)
    if not reader.runs:
        raise (
            problems[0]
            if problems
            else ConfigError(f"{folders[0]}: no run in it has logged a step yet")
        )
    for problem in problems:
        text = f"left out: {problem}"
        console.print(text, soft_wrap=True)
    page = output or _page_path(plain, sweeps)
    written = list(reader.pictures)
    labels = label_runs(reader.runs)
    print_runs(run_tables(labels, reader.runs, reader.policies), console)
    for folder, comparisons in zip(sweeps, swept, strict=True):
        written += write_gaps(folder, comparisons, console)
    if pairs and print_gaps(pairs, console)[0]:
        name = "gap.png" if not sweeps else "gap_pairs.png"
        written.append(plot_gaps(page.with_name(name), pairs))
    written += _plot_together(page, labels, reader)
    all_comparisons = [comparison for comparisons in [*swept, pairs] for comparison in comparisons]
    shown = [
        ReportedRun(*values)
        for values in zip(
            labels, reader.runs, reader.configs, reader.cards, reader.rollouts, strict=True
        )
    ]
    html = build_page(_title(folders), shown, all_comparisons, data)
    try:
        written.append(write_page(page, html))
    except OSError as error:
        raise ConfigError(f"--output {page}: cannot be written ({error.strerror})") from None
    return written


def _over(order: Sequence[Path], configs: dict[Path, Config | None]) -> str:
    """What the page's curves are drawn over: steps if each run trains on rollouts, whose tokens
    only the schedule counts; else tokens. Keeps the configurations that it read."""
    for folder in order:
        configs[folder] = config_in(folder)
        config = configs[folder]
        if config is None or not config.grpo.steps:
            return "tokens"
    return "steps"


def _plot_together(page: Path, labels: Sequence[str], reader: "_Reader") -> list[Path]:
    """losses.png and rewards.png beside the page, each if there are several runs of its kind."""
    written = []
    for indices, name, draw in zip(
        split(reader.policies),
        ("losses.png", "rewards.png"),
        (plot_runs, plot_rewards),
        strict=True,
    ):
        if len(indices) > 1:
            names, runs = [labels[i] for i in indices], [reader.runs[i] for i in indices]
            written.append(draw(page.with_name(name), names, runs))
    return written


def _read_all(reader: "_Reader", folders: Sequence[Path]) -> tuple[list[Run], list[ConfigError]]:
    """The runs that can be read, and why the others cannot: one bad run does not hide the rest."""
    runs, problems = [], []
    for folder in folders:
        try:
            runs.append(reader(folder))
        except ConfigError as problem:
            problems.append(problem)
    return runs, problems


class _Reader:
    """Reads each run folder once. Adds its curves to the page, redraws plots that are older than
    its metrics, and keeps the columns that tables and comparisons need.

    known: configurations that were read already. Reads the next folders of `order` in background
    threads. This overlaps with the processing because Arrow, which does most of the reading,
    releases the GIL."""

    def __init__(
        self,
        data: PageData,
        order: Sequence[Path],
        threads: ThreadPoolExecutor,
        known: Mapping[Path, Config | None],
        *,
        draws: bool,
    ) -> None:
        self._known = known
        self._data = data
        self._draws = draws
        self._order = list(order)
        self._threads = threads
        self._ahead: dict[Path, Future[Run]] = {}
        self.runs: list[Run] = []
        self.configs: list[Config | None] = []
        self.policies: list[bool] = []  # whether each run trained on rollouts
        self.cards: list[list[Capability]] = []
        self.rollouts: list[list[Rollout]] = []
        self.pictures: list[Path] = []

    def __call__(self, folder: Path) -> Run:
        run = self._read(folder)
        config = self._known[folder] if folder in self._known else config_in(folder)
        on_rollouts = is_policy(run, config)
        (add_policy(self._data, run) if on_rollouts else self._data.add(run))
        main = ("reward.png", plot_reward) if on_rollouts else ("loss.png", plot_loss)
        for name, draw in (main, ("precision.png", plot_precision)):
            if self._draws and not _is_fresh(folder / name, run):
                picture = draw(folder, run)
                self.pictures += [picture] if picture is not None else []
        self.configs.append(config)
        self.policies.append(on_rollouts)
        self.cards.append(run_card(run, config) if config is not None else [])
        tokenizer = Path(config.data.tokenizer) if config is not None else None
        takes = on_rollouts and sum(map(bool, self.rollouts)) < MAX_SAMPLED
        last = run.last("step") or 0.0
        self.rollouts.append(sample_rollouts(folder, last, tokenizer) if takes else [])
        slim = run.only(KEPT)
        self.runs.append(slim)
        return slim

    def _read(self, folder: Path) -> Run:
        if folder in self._order:
            index = self._order.index(folder)
            for path in self._order[index : index + READ_AHEAD + 1]:
                if path not in self._ahead:
                    self._ahead[path] = self._threads.submit(read_run, path)
            self._order[index] = Path()  # never read the same folder ahead twice
        return self._ahead.pop(folder).result() if folder in self._ahead else read_run(folder)


def _is_fresh(picture: Path, run: Run) -> bool:
    """Whether the plot exists and is at least as new as the run's metrics."""
    try:
        return picture.stat().st_mtime >= run.written
    except OSError:
        return False


def _split_folders(folders: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Returns (run folders, sweep folders) without duplicates. A folder that contains runs is
    replaced by those runs."""
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
    # Drop runs that belong to a listed sweep: the sweep already includes them.
    plain = {path: run for path, run in plain.items() if path.parent not in sweeps}
    return list(plain.values()), list(sweeps.values())


def _page_path(plain: Sequence[Path], sweeps: Sequence[Path]) -> Path:
    """The page goes into the folder itself if there is only one; otherwise into the common parent
    folder, or the working directory if the parents differ."""
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
