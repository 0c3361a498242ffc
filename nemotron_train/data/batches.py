"""The batch source: a pure function from a data state to (batch, next state).

Owns: batches of the blend as NumPy arrays. Does not own: the cursor. The caller keeps the state,
and the same state gives the same batch each time. Moving batches to a device belongs to the
training step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.schema import BlendSource, DataConfig, DataPhase
from nemotron_train.data.blend import (
    DataState,
    Phase,
    check_state,
    exact_weights,
    fingerprint,
    schedule,
)
from nemotron_train.data.fingerprint import describe
from nemotron_train.data.manifest import MASK_OF, load_manifest
from nemotron_train.data.packed import PackedSource
from nemotron_train.data.tokenize import FILE_NAME as TOKENIZER_FILE
from nemotron_train.data.windows import WindowedSource
from nemotron_train.platform.files import file_sha256

Source = WindowedSource | PackedSource


@dataclass(frozen=True)
class Batch:
    """Some rows of the global sample order. B sequences, S sequence length.

    The label of a position is the next token. If that is the first token of another document, the
    loss mask is 0, because the model cannot predict it. It is also 0 for a token of a conversation
    that the assistant did not say. `document_ids_BS` numbers the documents of a row 0, 1, 2, …, for
    attention masks and state resets. `sample_ids_B` numbers the samples of
    the whole run. `origins_B3` is (source, epoch, window) of each sample.
    """

    tokens_BS: np.ndarray  # int64
    labels_BS: np.ndarray  # int64
    loss_mask_BS: np.ndarray  # float32, 0 or 1
    document_ids_BS: np.ndarray  # int64
    sample_ids_B: np.ndarray  # int64
    origins_B3: np.ndarray  # int64

    def cut(self, length: int) -> "Batch":
        """The same tokens in shorter rows: `length` must divide S.

        Consecutive windows already share one token, so the result has the windows of a source with
        that sequence length. A shorter row keeps the sample id and origin of its original row.
        """
        num_rows, whole = self.tokens_BS.shape
        assert whole % length == 0, f"rows of {whole} cut into {length}"
        pieces = whole // length
        documents_BS = self.document_ids_BS.reshape(num_rows * pieces, length)
        return Batch(
            tokens_BS=self.tokens_BS.reshape(-1, length),
            labels_BS=self.labels_BS.reshape(-1, length),
            loss_mask_BS=self.loss_mask_BS.reshape(-1, length),
            document_ids_BS=documents_BS - documents_BS[:, :1],
            sample_ids_B=self.sample_ids_B.repeat(pieces),
            origins_B3=self.origins_B3.repeat(pieces, axis=0),
        )


class BatchSource:
    """Samples of the configured blend. Their order depends only on the configuration, the data and
    the seed. Validation is read in file order, without shuffling.

    Opens and checks all data at the start, so that bad input stops a run before training. Raises
    ConfigError for data that WindowedSource or blend.py rejects, an empty blend, phases out of
    order, and tokenizers that differ between sources or from `data.tokenizer`.

    `description`: the description of the data for a checkpoint (`data.fingerprint`).
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        sequence_length: int,
        seed: int,
        split: str,
        vocab_size: int,
    ) -> None:
        assert split in ("train", "validation")
        self._split = split
        self._seed = seed
        self._sequence_length = sequence_length
        if split == "train":
            self._knob, phases = "data.phases", list(config.phases)
        else:
            self._knob, phases = "data.validation", [DataPhase(0, config.validation)]
        _check_phases(phases, self._knob)
        self._sources: dict[str, Source] = {}
        by_path: dict[str, Source] = {}
        self._phases = []
        for number, phase in enumerate(phases):
            knob = f"data.phases[{number}].blend" if split == "train" else "data.validation"
            for entry in phase.blend:
                if entry.path not in by_path:
                    folder = Path(entry.path)
                    by_path[entry.path] = _kind(folder)(
                        folder,
                        split,
                        sequence_length=sequence_length,
                        seed=seed,
                        vocab_size=vocab_size,
                        shuffle=split == "train",
                    )
            self._phases.append(_phase(phase, by_path, knob))
        self.description = describe(config, phases, by_path, sequence_length, seed)
        for source in by_path.values():
            self._sources.setdefault(source.key, source)
        self._keys = list(self._sources)
        _check_tokenizers(config.tokenizer, list(by_path.values()))

    @property
    def folders(self) -> list[Path]:
        """The folders of the sources, indexed by the first column of `Batch.origins_B3`."""
        return [source.folder for source in self._sources.values()]

    @property
    def fingerprint(self) -> str:
        """SHA-256 that identifies all data and all phases of this source."""
        return fingerprint(self._phases, len(self._phases))

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the split in all sources, each source counted once."""
        return sum(source.num_tokens for source in self._sources.values())

    @property
    def num_samples(self) -> int:
        """Number of samples in one epoch of every source: one pass over all data."""
        return sum(source.num_windows for source in self._sources.values())

    @property
    def unigram_entropy(self) -> float:
        """Unigram entropy of this split in nats per token, averaged over sources by tokens."""
        weighted = sum(
            source.num_tokens * source.manifest.splits[self._split].unigram_entropy
            for source in self._sources.values()
        )
        return weighted / self.num_tokens

    def epochs(self, state: DataState) -> dict[str, float]:
        """Epochs read of each folder at `state`, fractional."""
        return {
            str(source.folder): state.drawn.get(key, 0) / source.num_windows
            for key, source in self._sources.items()
        }

    def state_at_start(self) -> DataState:
        """The state before the first sample."""
        return DataState(
            split=self._split,
            sequence_length=self._sequence_length,
            seed=self._seed,
            fingerprint=fingerprint(self._phases, 0),
        )

    def take(
        self, state: DataState, num_sequences: int, rank_slice: tuple[int, int] | None = None
    ) -> tuple[Batch, DataState]:
        """The next `num_sequences` samples, and the state after them.

        With `rank_slice` = (start, stop), only these rows are read and returned. The returned state
        is the one after all samples, equal on every rank. Raises ConfigError if `state` belongs to
        other data, another blend, sequence length or seed, and, naming the file, if a shard was
        removed, replaced or written to since it was opened.
        """
        check_state(
            self._phases,
            state,
            split=self._split,
            sequence_length=self._sequence_length,
            seed=self._seed,
            knob=self._knob,
        )
        start, stop = rank_slice or (0, num_sequences)
        assert 0 <= start <= stop <= num_sequences
        draws, after = schedule(self._phases, state, num_sequences)
        num_rows, length = stop - start, self._sequence_length
        tokens_BT = np.empty((num_rows, length + 1), dtype=np.int64)
        documents_BT = np.empty_like(tokens_BT)
        trained_BT = np.empty_like(tokens_BT, dtype=bool)
        origins_B3 = np.empty((num_rows, 3), dtype=np.int64)
        for row, draw in enumerate(draws[start:stop]):
            source = self._sources[draw.source]
            epoch, window = source.window_at(draw.drawn)
            tokens_BT[row], documents_BT[row], trained_BT[row] = source.read(epoch, window)
            origins_B3[row] = self._keys.index(draw.source), epoch, window
        for key in {draw.source for draw in draws[start:stop]}:
            self._sources[key].check_unchanged()  # after the rows: nothing else is trained on
        same_document_BS = documents_BT[:, :-1] == documents_BT[:, 1:]
        batch = Batch(
            tokens_BS=tokens_BT[:, :-1].copy(),
            labels_BS=tokens_BT[:, 1:].copy(),
            loss_mask_BS=(same_document_BS & trained_BT[:, 1:]).astype(np.float32),
            document_ids_BS=documents_BT[:, :-1].copy(),
            sample_ids_B=np.arange(state.samples + start, state.samples + stop),
            origins_B3=origins_B3,
        )
        return batch, after


def _kind(folder: Path) -> type[WindowedSource] | type[PackedSource]:
    """How the rows of this folder are made: conversations are kept whole."""
    splits = load_manifest(folder).splits
    return PackedSource if any(mask in splits for mask in MASK_OF.values()) else WindowedSource


def _check_phases(phases: Sequence[DataPhase], knob: str) -> None:
    """Raises ConfigError if a blend is empty or the phases are out of order."""
    if not phases or not phases[0].blend:
        raise ConfigError(f"{knob}: empty; name at least one folder with prepared data")
    if phases[0].from_tokens != 0:
        raise ConfigError(f"{knob}[0].from_tokens={phases[0].from_tokens}: the first must be 0")
    for number, (before, phase) in enumerate(pairwise(phases), 1):
        if phase.from_tokens <= before.from_tokens:
            raise ConfigError(
                f"{knob}[{number}].from_tokens={phase.from_tokens}: must be above the phase "
                f"before it ({before.from_tokens})"
            )
        if not phase.blend:
            raise ConfigError(f"{knob}[{number}].blend: empty; name at least one folder")


def _phase(phase: DataPhase, by_path: dict[str, Source], knob: str) -> Phase:
    """The phase with its folders replaced by the keys of their data. Raises ConfigError if two
    folders hold the same data or a weight is invalid."""
    entries: list[BlendSource] = list(phase.blend)
    keys = [by_path[entry.path].key for entry in entries]
    for index, key in enumerate(keys):
        if key in keys[:index]:
            raise ConfigError(
                f"{knob}[{index}].path={entries[index].path}: holds the same data as "
                f"{entries[keys.index(key)].path}; list it once, with the sum of the weights"
            )
    weights = exact_weights([entry.weight for entry in entries], knob)
    return Phase(phase.from_tokens, tuple(zip(keys, weights, strict=True)))


def _check_tokenizers(folder: str, sources: Sequence[Source]) -> None:
    """Raises ConfigError unless all sources were encoded with the tokenizer in `folder`, which the
    run uses for decoding."""
    path = Path(folder) / TOKENIZER_FILE
    if not path.is_file():
        raise ConfigError(f"data.tokenizer={folder}: holds no {TOKENIZER_FILE}")
    expected = file_sha256(path)
    for source in sources:
        if source.manifest.tokenizer.sha256 != expected:
            raise ConfigError(
                f"data.tokenizer={folder}: {source.folder} was prepared with another tokenizer; "
                f"its own lies in {source.folder / 'tokenizer'}"
            )
