"""`evaluate nll-by-position`: whether a model uses distant context.

Owns: choosing documents, the bins, the fit, table and files. Does not own: the forward pass
(`generate.engine`: chunked prefill, so only the attention layers' KV cache grows with length).

Every document is cut to the same length, so every position averages over the same documents. A
falling curve therefore comes from the model, not from a change of documents. As in figure 6 of the
Nemotron 3 white paper, the figure shows the cumulative mean of the negative log-likelihood (NLL)
over the token's index, both on log scales, with a fitted power law. It also shows the mean of each
octave, which does not include earlier tokens.
"""

import contextlib
import math
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
from nemotron_train.config.json_text import json_text
from nemotron_train.data.indexed import ShardReader
from nemotron_train.data.manifest import FILE_NAME, load_manifest
from nemotron_train.evaluate.acceptance import validation_folders
from nemotron_train.evaluate.knobs import PositionsConfig, check_reading
from nemotron_train.generate.checkpoint import LoadedCheckpoint, open_checkpoint, resolve_checkpoint
from nemotron_train.generate.engine import Engine
from nemotron_train.platform.files import check_output, replacing, write_output
from nemotron_train.platform.terminal import open_console
from nemotron_train.run_folder.checkpoint_metadata import tokenizer_of

# Points of the cumulative curve per octave, evenly spaced on the log scale, for fit and figure.
POINTS_AN_OCTAVE = 8


@dataclass(frozen=True)
class Curve:
    """A checkpoint's mean NLL in nats per token, by position.

    Position p is a token's index in its document; position 0 is not predicted. octaves: [first
    position, last position, mean, standard error over documents] of positions 2^k .. 2^(k+1) - 1.
    cumulative: [p, mean over positions 1 .. p]. The fit is log mean = intercept + slope log p for p
    >= `first_position` of the knobs; r_squared is its R^2.
    """

    run: str
    sequence_length: int  # of training
    documents: int
    tokens: int  # of each document
    octaves: list[list[float]]
    cumulative: list[list[float]]
    slope: float
    intercept: float
    r_squared: float

    @property
    def falls_to(self) -> int:
        """The last position of the longest run of octaves, from the first, with falling means."""
        last = self.octaves[0][1]
        for previous, octave in pairwise(self.octaves):
            if octave[2] >= previous[2]:
                break
            last = octave[1]
        return int(last)


def evaluate_positions(runs: Sequence[str], knobs: PositionsConfig) -> list[Curve]:
    """Measure the checkpoints `runs` on the same documents, print the table and write the files.

    Raises ConfigError if a knob is out of range, the data has too few long documents, or a run was
    trained with another tokenizer. COLLECTIVE over the ranks of this launch.
    """
    check_reading(knobs)
    for path in _paths(Path(knobs.output)):
        with contextlib.suppress(OSError):  # `check_output` says what is wrong
            path.parent.mkdir(parents=True, exist_ok=True)
        check_output(path, "output")
    for run in runs:  # find errors in every run before measuring the first, which may take hours
        resolve_checkpoint(run, knobs)
    console, curves = open_console(), []
    documents: list[list[int]] = []
    for run in runs:
        with open_checkpoint(run, knobs, console.print) as model:
            console.quiet = not model.is_first_rank
            folders = [Path(path) for path in knobs.data] or validation_folders(model.config)
            check_tokenizer(model, folders)
            documents = documents or long_documents(folders, knobs)
            engine = Engine(model.model, None, model.platform.device)
            nll_DT = np.array(
                [document_nll(engine, tokens, knobs, console) for tokens in documents]
            )
            curve = fit_curve(
                str(model.checkpoint),
                model.config.train.sequence_length,
                nll_DT,
                knobs.first_position,
            )
            is_first = model.is_first_rank
        curves.append(curve)
    console.print(_table(curves))
    for curve in curves:
        console.print(_verdict(curve), soft_wrap=True)
    if is_first:
        for path in write(curves, Path(knobs.output)):
            console.print(f"wrote {path}", soft_wrap=True)
    return curves


def document_nll(
    engine: Engine, tokens: list[int], knobs: PositionsConfig, console: Console
) -> list[float]:
    """NLL in nats of every token of a document except the first."""
    console.print(f"  document of {len(tokens):,} tokens")
    (values,) = engine.log_probabilities([tokens], knobs.prefill_chunk)
    return [-value for value in values]


def check_tokenizer(model: LoadedCheckpoint, folders: Sequence[Path]) -> None:
    """Raises ConfigError if a folder was prepared with another tokenizer than the training data.

    A checkpoint that records no tokenizer passes.
    """
    trained_sha256 = tokenizer_of(model.checkpoint)
    for folder in folders:
        prepared_sha256 = load_manifest(folder).tokenizer.sha256
        if trained_sha256 and prepared_sha256 != trained_sha256:
            raise ConfigError(
                f"data={folder}: was prepared with another tokenizer ({prepared_sha256[:12]}) than "
                f"{model.checkpoint} was trained with ({trained_sha256[:12]}); prepare it with "
                "that one"
            )


def long_documents(folders: Sequence[Path], knobs: PositionsConfig) -> list[list[int]]:
    """The first `knobs.documents` documents with at least `knobs.max_tokens` tokens, cut to that
    length, in the order of folders and files.

    Raises ConfigError if there are fewer; the message lists the longest lengths.
    """
    documents: list[list[int]] = []
    lengths: list[int] = []
    for folder in folders:
        split = load_manifest(folder).splits.get(knobs.split)
        if split is None:
            raise ConfigError(f"{folder / FILE_NAME}: has no {knobs.split} split")
        for shard in split.shards:
            reader = ShardReader(folder, shard.name, shard)
            lengths_D = reader.lengths()
            lengths += lengths_D.tolist()
            for number in (lengths_D >= knobs.max_tokens).nonzero()[0]:
                if len(documents) < knobs.documents:
                    documents.append(reader.document(int(number), knobs.max_tokens).tolist())
    if len(documents) < knobs.documents:
        longest = sorted(lengths, reverse=True)[: knobs.documents]
        raise ConfigError(
            f"max_tokens={knobs.max_tokens} documents={knobs.documents}: the {knobs.split} split "
            f"has {len(documents)} documents that long; the longest have "
            f"{', '.join(map(str, longest))} tokens"
        )
    return documents


def fit_curve(run: str, length: int, nll_DT: np.ndarray, first_position: int) -> Curve:
    """Average over documents and fit the power law.

    length: training sequence length. nll_DT: float [documents, tokens - 1], NLL at positions 1,
    2, ... first_position: start of the fit.
    """
    num_documents, num_predicted = nll_DT.shape
    octaves = []
    for power in range(int(math.log2(num_predicted)) + 1):
        first, last = 2**power, min(2 ** (power + 1) - 1, num_predicted)
        means_D = nll_DT[:, first - 1 : last].mean(axis=1)
        standard_error = (
            statistics.stdev(means_D) / math.sqrt(num_documents) if num_documents > 1 else 0.0
        )
        octaves.append([first, last, float(means_D.mean()), float(standard_error)])
    means_T = nll_DT.mean(axis=0).cumsum() / np.arange(1, num_predicted + 1)
    count = int(POINTS_AN_OCTAVE * math.log2(num_predicted)) + 1
    positions = np.unique(np.geomspace(1, num_predicted, count).round().astype(int))
    cumulative = [[int(p), float(means_T[p - 1])] for p in positions]
    fitted = np.log([point for point in cumulative if point[0] >= first_position])
    slope, intercept = np.polyfit(fitted[:, 0], fitted[:, 1], 1)
    residuals = fitted[:, 1] - (intercept + slope * fitted[:, 0])
    total_variance = ((fitted[:, 1] - fitted[:, 1].mean()) ** 2).sum()
    return Curve(
        run,
        length,
        num_documents,
        num_predicted + 1,
        octaves,
        cumulative,
        float(slope),
        float(intercept),
        float(1 - (residuals**2).sum() / total_variance) if total_variance > 0 else 1.0,
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


def _paths(output: Path) -> tuple[Path, Path]:
    """OUTPUT.json and OUTPUT.png."""
    return output.with_name(output.name + ".json"), output.with_name(output.name + ".png")


def write(curves: Sequence[Curve], output: Path) -> list[Path]:
    """Write OUTPUT.json and OUTPUT.png; returns both paths."""
    data, picture = _paths(output)
    text = json_text([asdict(curve) for curve in curves], indent=1) + "\n"
    write_output(data, text, "output")
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
    with replacing(picture) as temporary:
        figure.savefig(temporary, dpi=150)
