"""`convert from-hf`: imports the weights of a Hugging Face folder as a run.

Owns: the resulting run folder, its single checkpoint at step 0, which finished shards are kept.
Does not own: config.json and the recipe (`config`), names and layout of weights (`mapping`), the
checkpoint format (`checkpoint_tensors`). Streams: only some rows of a tensor, or one attention
projection, are in memory.

The folder is untrusted: only JSON and safetensors are read, never pickles or code.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from nemotron_train import __version__
from nemotron_train.config.errors import ConfigError
from nemotron_train.config.json_text import json_text
from nemotron_train.config.knobs import to_plain
from nemotron_train.config.quantities import format_bytes
from nemotron_train.config.schema import Config, DataKind, ModelConfig
from nemotron_train.convert.checkpoint_tensors import CheckpointWriter, Place, shard_name
from nemotron_train.convert.hugging_face.fields import INDEX, SINGLE
from nemotron_train.convert.hugging_face.mapping import Piece, Weight, our_shapes, weights
from nemotron_train.convert.hugging_face.safetensors_file import DTYPES, SafetensorsReader
from nemotron_train.convert.unfinished import Unfinished, unfinished
from nemotron_train.data.tokenize import FILE_NAME as TOKENIZER
from nemotron_train.data.tokenize import (
    GENERATION,
    load_tokenizer,
    read_json_object,
    tokenizer_contents,
)
from nemotron_train.plan.precision.record import plan_record
from nemotron_train.plan.precision.resolve import resolve_plan
from nemotron_train.platform.files import check_output_folder, file_sha256, write_durably
from nemotron_train.run_folder import checkpoint_metadata
from nemotron_train.run_folder.integrity import commit, damage, partial_folder, step_folder
from nemotron_train.run_folder.lineage import LINEAGE
from nemotron_train.run_folder.progress import Progress

MAX_INDEX_BYTES = 2**28
ROWS_BYTES = 2**24  # read and written at a time
# Prefixes of the decoder's tensors: published checkpoints, newer transformers.
DECODER_PREFIXES = ("backbone.", "model.")


def from_hf(
    folder: Path,
    config: Config,
    output: Path,
    console: Console,
    *,
    shard_bytes: int = 5 * 2**30,
) -> Path:
    """Creates the run folder `output` with the configuration `config` and the weights in `folder`
    as the checkpoint of step 0; returns that checkpoint. `config.model` must be the model that
    `folder`/config.json describes. After an interruption, a second call continues after the last
    complete shard.

    Raises ConfigError, naming file and tensor, if weights are missing, have another shape, are not
    plain floats or do not belong to the model; also if `output` exists.
    """
    check_output_folder(output, "--out", [folder])
    theirs = _Theirs(folder)
    table = weights(config.model)
    theirs.check(table)
    shards = _cut(table, theirs, shard_bytes)
    source = {
        "files": theirs.identity,
        "model": asdict(config.model),
        "shards": shards,
        "version": __version__,
    }
    config = _with_own_data(config, output)
    files = _run_files(folder, config, theirs)

    def is_complete() -> bool:
        try:
            is_same = all((output / name).read_bytes() == data for name, data in files.items())
        except OSError:
            return False
        return is_same and damage(step_folder(output / "checkpoints", 0)) is None

    with unfinished(output, source, "--out", is_complete) as making:
        if making is None:
            console.print(f"{output}: is there already, complete", soft_wrap=True)
            return step_folder(output / "checkpoints", 0)
        final = step_folder(making.folder / "checkpoints", 0)
        sums = _write_tensors(final, shards, table, theirs, making, console)
        for name, text in _texts(config).items():
            write_durably(partial_folder(final) / name, text)
        commit(final, sums, lambda: None)
        for name, content in files.items():
            (making.folder / name).parent.mkdir(exist_ok=True)
            write_durably(making.folder / name, content)
    console.print(f"wrote {output}; train from it with branch={output}@0", soft_wrap=True)
    return step_folder(output / "checkpoints", 0)


def wider_than_bfloat16(folder: Path, model: ModelConfig) -> list[str]:
    """Tensors of the folder whose stored dtype holds more than BF16, as `NAME (F16)`; without those
    that our model keeps in FP32 whatever the run's dtype. Reads headers only. Raises ConfigError,
    naming file and tensor, as `from_hf` does."""
    theirs = _Theirs(folder)
    table = weights(model)
    theirs.check(table)
    return [
        f"{weight.name} ({theirs.stored_dtype(weight)})"
        for weight in table
        if not weight.keeps_float32 and theirs.dtype(weight) != torch.bfloat16
    ]


class _Theirs:
    """The tensors of a Hugging Face folder. Raises ConfigError for an unreadable file or index."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._places: dict[str, SafetensorsReader] = {}
        for path in self._paths():
            file = SafetensorsReader(path)
            for name in file.shapes:
                if name in self._places:
                    raise ConfigError(f"{path}: {name} is in {self._places[name].path} too")
                self._places[name] = file

    @property
    def identity(self) -> dict[str, Any]:
        """File name -> [size in bytes, modification time in ns]: identifies the files without
        reading them."""
        return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in self._paths()}

    def _paths(self) -> list[Path]:
        """The files that the index names, or the single file."""
        index = self.folder / INDEX
        if not index.is_file():
            return [self.folder / SINGLE]
        try:
            if index.stat().st_size > MAX_INDEX_BYTES:
                raise ValueError("it is too long")
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            RecursionError,
        ) as error:
            raise ConfigError(f"{index} cannot be read ({error})") from error
        for name in names:
            if type(name) is not str or Path(name).name != name or not name:
                raise ConfigError(f"{index}: {name!r} is no plain file name")
        return [self.folder / name for name in sorted(names)]

    def check(self, table: Sequence[Weight]) -> None:
        """Raises ConfigError unless names, shapes and dtypes match the table."""
        expected = {self._name(weight.name): weight for weight in table}
        for name in sorted(expected.keys() - self._places.keys()):
            raise ConfigError(f"{self.folder}: {name} is missing")
        for name in sorted(self._places.keys() - expected.keys()):
            raise ConfigError(
                f"{self._places[name].path}: {name} is not in the model that config.json describes"
            )
        for name, weight in expected.items():
            file = self._places[name]
            shape, dtype = file.shapes[name], file.dtypes[name]
            if shape != weight.shape:
                raise ConfigError(
                    f"{file.path}: {name} is {shape}; config.json says {weight.shape}"
                )
            if dtype not in DTYPES:
                raise ConfigError(
                    f"{file.path}: {name} is {dtype}; only {', '.join(DTYPES)} are read"
                )

    def dtype(self, weight: Weight) -> torch.dtype:
        """The dtype in which we store the tensor: theirs, or FP32 if our model keeps it in FP32."""
        if weight.keeps_float32:
            return torch.float32
        name = self._name(weight.name)
        return DTYPES[self._places[name].dtypes[name]]

    def stored_dtype(self, weight: Weight) -> str:
        """The dtype that the file names, such as F16."""
        name = self._name(weight.name)
        return self._places[name].dtypes[name]

    def rows(self, weight: Weight, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of their tensor."""
        name = self._name(weight.name)
        return self._places[name].rows(name, start, stop).to(self.dtype(weight))

    def _name(self, name: str) -> str:
        """The tensor's name in these files, which may use the other decoder prefix."""
        ours, other = DECODER_PREFIXES
        if name not in self._places and name.startswith(ours):
            renamed = other + name.removeprefix(ours)
            return renamed if renamed in self._places else name
        return name


# Writing ------------------------------------------------------------------------------------


def _sources(table: Sequence[Weight]) -> dict[str, list[tuple[Weight, Piece, int]]]:
    """Our tensor -> its (their tensor, piece, first row of the piece in their tensor)."""
    sources: dict[str, list[tuple[Weight, Piece, int]]] = {}
    for weight in table:
        row = 0
        for piece in weight.pieces:
            sources.setdefault(piece.name, []).append((weight, piece, row))
            row += piece.rows
    return sources


def _cut(table: Sequence[Weight], theirs: _Theirs, shard_bytes: int) -> list[list[str]]:
    """Names of our tensors, shard by shard."""
    sources, shards, size = _sources(table), [[]], 0
    for name, shape in our_shapes(list(table)).items():
        dtypes = {theirs.dtype(weight) for weight, _, _ in sources[name]}
        if len(dtypes) > 1:
            names = ", ".join(weight.name for weight, _, _ in sources[name][:2])
            raise ConfigError(f"{theirs.folder}: {names}, …: are not all of one dtype")
        length = prod(shape) * dtypes.pop().itemsize
        if shards[-1] and size + length > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += length
    return shards


def _write_tensors(
    final: Path,
    shards: Sequence[Sequence[str]],
    table: Sequence[Weight],
    theirs: _Theirs,
    making: Unfinished,
    console: Console,
) -> dict[str, str]:
    """Writes all tensors into the partial checkpoint of `final`; returns shard -> SHA-256."""
    partial = partial_folder(final)
    partial.mkdir(parents=True, exist_ok=True)
    relative = partial.relative_to(making.folder)
    sources, shapes, sums = _sources(table), our_shapes(list(table)), {}
    writer = CheckpointWriter(partial)
    for number, names in enumerate(shards):
        file = shard_name(number)
        places_json = making.kept(str(relative / file))
        if places_json is not None:
            writer.places += [Place(**place) for place in places_json]
            sums[file] = making.digest(str(relative / file))
            console.print(f"{file}: is there already")
            continue
        before = len(writer.places)
        writer.open_shard(number)
        for name in names:
            for first_row, rows in _blocks(sources[name], theirs):
                writer.write_rows(name, shapes[name], first_row, rows)
        writer.close_shard()
        sums[file] = file_sha256(partial / file, flush=True)
        places = [asdict(place) for place in writer.places[before:]]
        making.done(str(relative / file), sums[file], places)
        size = (partial / file).stat().st_size
        console.print(f"{file}: {len(names)} tensors, {format_bytes(size)}")
    writer.open_shard(len(shards))
    writer.finish()
    return sums


def _blocks(
    sources: Sequence[tuple[Weight, Piece, int]], theirs: _Theirs
) -> Iterator[tuple[int, torch.Tensor]]:
    """One of our tensors as (first row, rows): piece by piece, or whole if its rows alternate
    between several of theirs."""
    _, first, _ = sources[0]
    if first.groups == 1:
        for weight, piece, row in sources:
            shape = (piece.stop - piece.start, *piece.shape[1:])
            if len(weight.shape) < len(shape):  # one expert of a stacked tensor
                rows = theirs.rows(weight, 0, weight.shape[0])
                yield piece.start, rows.reshape(shape)
                continue
            step = max(1, ROWS_BYTES // max(prod(shape[1:]) * 4, 1))
            for start in range(0, shape[0], step):
                stop = min(start + step, shape[0])
                rows = theirs.rows(weight, row + start, row + stop)
                yield piece.start + start, rows.reshape(stop - start, *shape[1:])
        return
    whole = torch.empty(first.shape, dtype=theirs.dtype(sources[0][0]))
    grouped = whole.unflatten(0, (first.groups, -1))
    for weight, piece, row in sources:
        rows = theirs.rows(weight, row, row + piece.rows)
        grouped[:, piece.start : piece.stop] = rows.unflatten(0, (piece.groups, -1))
    yield 0, whole


def _texts(config: Config) -> dict[str, str]:
    """The JSON files of the checkpoint. There is no data.json, because no data was consumed."""
    progress = Progress(0, 0, checkpoint_metadata.NO_DATA)
    texts = checkpoint_metadata.texts_of(progress, config, plan_record(resolve_plan(config)), {}, 0)
    del texts[checkpoint_metadata.DATA]
    about = json.loads(texts[checkpoint_metadata.ABOUT])
    about |= {"optimizer": False, "imported": True}
    texts[checkpoint_metadata.ABOUT] = json_text(about, indent=1)
    # Megatron-Core's identifier of the tensor format.
    tensors_format = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    texts["metadata.json"] = json_text(tensors_format)
    return texts


def _with_own_data(config: Config, output: Path) -> Config:
    """The configuration with prepared data and the imported tokenizer. The embedded data uses
    another tokenizer, so the user names data folders when training starts."""
    if config.data.kind == DataKind.prepared:
        return config
    changes = {"kind": DataKind.prepared, "tokenizer": str(output / "tokenizer")}
    return replace(config, data=replace(config.data, **changes, phases=[], validation=[]))


def _run_files(folder: Path, config: Config, theirs: _Theirs) -> dict[str, bytes]:
    """File name -> content of the configuration, the tokenizer and the lineage, so that runs can
    branch from the folder."""
    start_knobs = {"resume": "", "branch": "", "fresh_data": False, "weights_only": False}
    start_knobs["switch_precision"] = False
    plain = to_plain(replace(config, **start_knobs))
    text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100)
    files = {"config.yaml": text.encode()}
    if (folder / TOKENIZER).is_file():
        load_tokenizer(folder)  # raises ConfigError, now and not when the run is used
        read_json_object(folder / "tokenizer_config.json")
        contents = tokenizer_contents(folder)
        generation = _generation(folder)
        if generation:
            contents[GENERATION] = (json_text(generation, indent=2) + "\n").encode()
        files |= {f"tokenizer/{name}": content for name, content in contents.items()}
    content = (folder / "config.json").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    imported = {"folder": str(folder), "config": digest, **theirs.identity}
    longest = json.loads(content).get("max_position_embeddings")
    if isinstance(longest, int):
        imported["max_position_embeddings"] = longest
    lineage = {"imported_from": imported}
    return files | {LINEAGE: (json_text(lineage, indent=2) + "\n").encode()}


def _generation(folder: Path) -> dict[str, Any]:
    """generation_config.json of the folder, with the token ids that only config.json names. Raises
    ConfigError if it is no JSON object."""
    generation = read_json_object(folder / GENERATION)
    config = read_json_object(folder / "config.json")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if generation.get(name) is None and config.get(name) is not None:
            generation[name] = config[name]
    return generation
