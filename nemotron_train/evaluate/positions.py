"""`evaluate nll-by-position`: does a model use what lies far back?

Owns: the documents, the bins, the fit, table and files. Does not own: the forward pass (`generate.
engine`: chunked prefill, so memory does not grow but by the attention layers' cache).

Every document is cut to the same length, so that all positions are of the same documents: a curve
that falls is the model's doing and not the documents'. As the Nemotron 3 white paper (figure 6)
draws it, the cumulative mean of the negative log-likelihood over the token's index, both on log
scales, with the power law fitted to it; beside it the mean in each octave, on which the early
tokens do not weigh.
"""

import json
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from nemotron_train.config.errors import ConfigError
from nemotron_train.data.indexed import ShardReader
from nemotron_train.data.manifest import FILE_NAME, load_manifest
from nemotron_train.evaluate.acceptance import validation_folders
from nemotron_train.evaluate.knobs import PositionsConfig, check_reading
from nemotron_train.generate.checkpoint import LoadedCheckpoint, open_checkpoint, resolve_checkpoint
from nemotron_train.generate.engine import Engine

POINTS_AN_OCTAVE = (
    8  # of the cumulative curve, evenly on the log scale, for the fit and the picture
)


@dataclass(frozen=True)
class Curve:
    """A checkpoint's mean NLL, nats a token, over the positions of some documents.

    Position p is a token's index in its document; 0 is not predicted. `octaves`: [first, last
    position, mean, standard error over documents] of positions 2^k .. 2^(k+1) - 1. `cumulative`:
    [p, mean over positions 1 .. p]. The fit: log mean = intercept + slope log p from
    `first_position` on, and its R^2.
    """

    run: str
    sequence_length: int  # that it was trained with
    documents: int
    tokens: int  # of each
    octaves: list[list[float]]
    cumulative: list[list[float]]
    slope: float
    intercept: float
    r_squared: float

    @property
    def falls_to(self) -> int:
        """The last position of the octaves up to which each mean is below the one before."""
        last = self.octaves[0][1]
        for before, octave in pairwise(self.octaves):
            if octave[2] >= before[2]:
                break
            last = octave[1]
        return int(last)


def evaluate_positions(runs: Sequence[str], knobs: PositionsConfig) -> list[Curve]:
    """Measure, print and draw the checkpoints `runs` on the same documents. Raises ConfigError for
    knobs out of range, data without documents that long, another tokenizer."""
    check_reading(knobs)
    for run in runs:  # the last one's mistake shows before the first one's hours
        resolve_checkpoint(run, knobs)
    console, curves = Console(width=120), []
    documents: list[list[int]] = []
    for run in runs:
        with open_checkpoint(run, knobs, console.print) as model:
            console.quiet = not model.is_first_rank
            folders = [Path(path) for path in knobs.data] or validation_folders(model.config)
            check_tokenizer(model, folders)
            documents = documents or long_documents(folders, knobs)
            engine = Engine(model.model, None, model.platform.device)
            nll_DT = np.array([measured(engine, tokens, knobs, console) for tokens in documents])
            curve = curve_of(
                str(model.checkpoint),
                model.config.train.sequence_length,
                nll_DT,
                knobs.first_position,
            )
            is_first = model.is_first_rank
        curves.append(curve)
    console.print(_table(curves))
    for curve in curves:
        console.print(_verdict(curve), highlight=False, soft_wrap=True)
    if is_first:
        for path in write(curves, Path(knobs.output)):
            console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    return curves


def measured(
    engine: Engine, tokens: list[int], knobs: PositionsConfig, console: Console
) -> list[float]:
    """NLL of every token of a document but the first."""
    console.print(f"  document of {len(tokens):,} tokens", highlight=False)
    (values,) = engine.log_probabilities([tokens], knobs.prefill_chunk)
    return [-value for value in values]


def check_tokenizer(model: LoadedCheckpoint, folders: Sequence[Path]) -> None:
    """Raises ConfigError where ids of a folder are not those that the model was trained on."""
    trained = json.loads((model.checkpoint / "data.json").read_text()).get("tokenizer", "")
    for folder in folders:
        theirs = load_manifest(folder).tokenizer.sha256
        if trained and theirs != trained:
            raise ConfigError(
                f"data={folder}: was prepared with another tokenizer ({theirs[:12]}) than "
                f"{model.checkpoint} was trained with ({trained[:12]}); prepare it with that one"
            )


def long_documents(folders: Sequence[Path], knobs: PositionsConfig) -> list[list[int]]:
    """The first `knobs.documents` documents of `knobs.max_tokens` or more, by folder, in file
    order, cut to that. Raises ConfigError, naming the longest, where there are fewer."""
    cut: list[list[int]] = []
    lengths: list[int] = []
    for folder in folders:
        split = load_manifest(folder).splits.get(knobs.split)
        if split is None:
            raise ConfigError(f"{folder / FILE_NAME}: has no {knobs.split} split")
        for shard in split.shards:
            reader = ShardReader(folder, shard.name)
            lengths += reader.lengths.tolist()
            for number in (reader.lengths >= knobs.max_tokens).nonzero()[0]:
                if len(cut) < knobs.documents:
                    cut.append(reader.document(int(number))[: knobs.max_tokens].tolist())
    if len(cut) < knobs.documents:
        longest = sorted(lengths, reverse=True)[: knobs.documents]
        raise ConfigError(
            f"max_tokens={knobs.max_tokens} documents={knobs.documents}: the {knobs.split} split "
            f"has {len(cut)} documents that long; the longest have "
            f"{', '.join(map(str, longest))} tokens"
        )
    return cut


def curve_of(run: str, length: int, nll_DT: np.ndarray, first_position: int) -> Curve:
    """nll_DT: float [documents, tokens - 1], of positions 1, 2, ..."""
    num_documents, num_predicted = nll_DT.shape
    octaves = []
    for power in range(int(math.log2(num_predicted)) + 1):
        first, last = 2**power, min(2 ** (power + 1) - 1, num_predicted)
        means_D = nll_DT[:, first - 1 : last].mean(axis=1)
        error = statistics.stdev(means_D) / math.sqrt(num_documents) if num_documents > 1 else 0.0
        octaves.append([first, last, float(means_D.mean()), float(error)])
    means_T = nll_DT.mean(axis=0).cumsum() / np.arange(1, num_predicted + 1)
    count = int(POINTS_AN_OCTAVE * math.log2(num_predicted)) + 1
    positions = np.unique(np.geomspace(1, num_predicted, count).round().astype(int))
    cumulative = [[int(p), float(means_T[p - 1])] for p in positions]
    fitted = np.log([point for point in cumulative if point[0] >= first_position])
    slope, intercept = np.polyfit(fitted[:, 0], fitted[:, 1], 1)
    rest = fitted[:, 1] - (intercept + slope * fitted[:, 0])
    spread = ((fitted[:, 1] - fitted[:, 1].mean()) ** 2).sum()
    return Curve(
        run,
        length,
        num_documents,
        num_predicted + 1,
        octaves,
        cumulative,
        float(slope),
        float(intercept),
        float(1 - (rest**2).sum() / spread) if spread > 0 else 1.0,
    )


def _table(curves: Sequence[Curve]) -> Table:
    table = Table("positions", header_style="bold", title=None)
    for curve in curves:
        table.add_column(f"{curve.run}\nrows of {curve.sequence_length:,}", justify="right")
    for number, (first, last, *_) in enumerate(curves[0].octaves):
        cells = []
        for curve in curves:
            _, _, mean, error = curve.octaves[number]
            cells.append(f"{mean:.4f} ± {error:.4f}")
        table.add_row(f"{int(first):,}-{int(last):,}", *cells)
    return table


def _verdict(curve: Curve) -> str:
    return (
        f"{curve.run}: cumulative NLL ~ position^{curve.slope:.4f} (R² {curve.r_squared:.3f}); the "
        f"octaves' means fall up to position {curve.falls_to:,} of {curve.tokens - 1:,}"
    )


def write(curves: Sequence[Curve], output: Path) -> list[Path]:
    """OUTPUT.json and OUTPUT.png; returns both paths."""
    output.parent.mkdir(parents=True, exist_ok=True)
    data = output.with_name(output.name + ".json")
    data.write_text(json.dumps([asdict(curve) for curve in curves], indent=1) + "\n")
    picture = output.with_name(output.name + ".png")
    _draw(curves, picture)
    return [data, picture]


def _draw(curves: Sequence[Curve], picture: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots()
    for number, curve in enumerate(curves):
        color = f"C{number}"
        points = np.array([point for point in curve.cumulative if point[0] >= 16])
        axes.plot(points[:, 0], points[:, 1], color=color, linewidth=2, label=curve.run)
        fit = np.exp(curve.intercept + curve.slope * np.log(points[:, 0]))
        axes.plot(points[:, 0], fit, color=color, linewidth=1, linestyle=":")
        octaves = np.array([octave for octave in curve.octaves if octave[0] >= 16])
        middles = np.sqrt(octaves[:, 0] * octaves[:, 1])
        axes.errorbar(
            middles, octaves[:, 2], octaves[:, 3], color=color, fmt="o", markersize=4, capsize=2
        )
        axes.axvline(curve.sequence_length, color=color, linewidth=1, linestyle="--", alpha=0.6)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("position in the document (tokens)")
    axes.set_ylabel("negative log-likelihood (nats a token)")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    note = "line: mean up to here; dots: mean of an octave; dotted: power law; dashed: trained rows"
    axes.set_title(note, loc="left", fontsize=8)
    temporary = picture.with_name(f".{picture.name}.{os.getpid()}.png")
    figure.savefig(temporary, dpi=150)
    os.replace(temporary, picture)
