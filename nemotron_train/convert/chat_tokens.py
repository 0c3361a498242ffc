"""`convert add-chat-tokens`: the special tokens of the chat format for a tokenizer and its model.

Tokenizers trained here have them (`CHAT_TOKENS`). Others get them as special tokens after their
last id. If the model has no row left for them, its embedding and output layer grow. The rows of the
new tokens are the mean of the rows of all known tokens: a new token then begins as an average one,
and no other token's probability changes by more than the new ones take (J. Hewitt, "Initializing
new word embeddings for pretrained language models", 2021).

The result is a run folder to branch from, without optimizer state. Only one tensor is in memory.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.json_text import json_text
from nemotron_train.config.knobs import to_plain
from nemotron_train.config.schema import Config, DataKind
from nemotron_train.convert.checkpoint_tensors import CheckpointReader, CheckpointWriter
from nemotron_train.convert.unfinished import unfinished
from nemotron_train.data.chat.render import missing_tokens
from nemotron_train.data.tokenize import (
    FILE_NAME,
    LoadedTokenizer,
    load_tokenizer,
    tokenizer_contents,
)
from nemotron_train.plan.derive import derive
from nemotron_train.plan.precision.record import plan_record
from nemotron_train.plan.precision.resolve import resolve_plan
from nemotron_train.platform.files import check_output_folder, file_sha256, write_durably
from nemotron_train.run_folder import checkpoint_metadata
from nemotron_train.run_folder.checkpoint import check_tensors, find_checkpoint
from nemotron_train.run_folder.integrity import (
    MANIFEST,
    commit,
    damage,
    partial_folder,
    step_folder,
)
from nemotron_train.run_folder.lineage import LINEAGE, read_lineage
from nemotron_train.run_folder.progress import Progress

ROW_TENSORS = ("embedding.word_embeddings.weight", "output_layer.weight")
_ROWS_MULTIPLE = 64  # the vocabulary grows to a multiple of it, for products and parallel layouts


def add_chat_tokens(checkpoint: str, output: Path, console: Console) -> Path:
    """Make the run folder `output` from a checkpoint (RUN@STEP); return its checkpoint, at step 0.

    Raises ConfigError if the checkpoint or its tokenizer is missing or damaged, if the tokenizer
    has all the tokens already, or if `output` exists.
    """
    found = find_checkpoint(checkpoint, contents=False)
    check_output_folder(output, "--out", [found.run])
    folder = Path(found.config.data.tokenizer)
    loaded = _tokenizer(folder, checkpoint_metadata.tokenizer_of(found.path))
    new = missing_tokens(loaded)
    if not new:
        raise ConfigError(
            f"{folder / FILE_NAME}: has all tokens of the chat format already; nothing to add"
        )
    tokenizer_text, new_ids = _extended(loaded, new, folder)
    config = _config(found.config, output, max(new_ids) + 1)
    contents = tokenizer_contents(folder) | {FILE_NAME: tokenizer_text.encode()}
    digest = file_sha256(found.path / MANIFEST)
    source = {"checkpoint": digest, "tokens": new, "vocab_size": config.model.vocab_size}
    files = {f"tokenizer/{name}": content for name, content in contents.items()}
    plain = yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True, width=100)
    lineage = {**read_lineage(found.run), "chat_tokens_added_to": {"of": checkpoint, **source}}
    files |= {"config.yaml": plain.encode()}
    files |= {LINEAGE: (json_text(lineage, indent=2) + "\n").encode()}
    final = step_folder(output / "checkpoints", 0)

    def is_complete() -> bool:
        try:
            same = all((output / name).read_bytes() == content for name, content in files.items())
        except OSError:
            return False
        return same and damage(final) is None

    with unfinished(output, source, "--out", is_complete) as making:
        if making is None:
            console.print(f"{output}: is there already, complete", soft_wrap=True)
            return final
        reader = CheckpointReader(found.path)
        check_tensors(found.path, found.config.model)
        known = sorted(loaded.known_ids)
        step = making.folder / "checkpoints" / final.name
        _write(reader, step, config, known, new_ids)
        for name, content in files.items():
            (making.folder / name).parent.mkdir(exist_ok=True)
            write_durably(making.folder / name, content)
    grown = config.model.vocab_size - found.config.model.vocab_size
    rows = f"the vocabulary grew by {grown}" if grown else "unused rows of the vocabulary took them"
    console.print(f"added {' '.join(new)}; {rows}", markup=False, soft_wrap=True)
    console.print(f"wrote {output}; train from it with branch={output}@0", soft_wrap=True)
    return final


def _tokenizer(folder: Path, expected: str) -> LoadedTokenizer:
    """The tokenizer of the run. Raises ConfigError if it is another one than at training."""
    loaded = load_tokenizer(folder)
    if expected and loaded.sha256 != expected:
        raise ConfigError(
            f"{folder / FILE_NAME}: is not the tokenizer that the checkpoint was trained with "
            f"(SHA-256 {loaded.sha256[:16]}, not {expected[:16]})"
        )
    return loaded


def _extended(loaded: LoadedTokenizer, new: list[str], folder: Path) -> tuple[str, list[int]]:
    """tokenizer.json with the new special tokens, and their ids. Raises ConfigError if one of them
    is an ordinary token there, whose text would then no longer be encoded as before."""
    content = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
    vocabulary = loaded.tokenizer.get_vocab(with_added_tokens=True)
    taken = [token for token in new if token in vocabulary]
    if taken:
        raise ConfigError(
            f"{folder / FILE_NAME}: {taken[0]} is an ordinary token there, with the id "
            f"{vocabulary[taken[0]]}; a special token cannot take its name"
        )
    ids = list(range(loaded.vocab_size, loaded.vocab_size + len(new)))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    content["added_tokens"] = content.get("added_tokens") or []
    for token_id, token in zip(ids, new, strict=True):
        entry = {"id": token_id, "content": token, **flags, "special": True}
        content["added_tokens"].append(entry)
    return json_text(content, ensure_ascii=False, indent=2) + "\n", ids


def _config(parent: Config, output: Path, needed: int) -> Config:
    """The run's configuration with the new tokenizer and vocabulary, and without data, which had
    the ids of the old tokenizer."""
    model = parent.model
    if needed > model.vocab_size:
        model = replace(model, vocab_size=-(-needed // _ROWS_MULTIPLE) * _ROWS_MULTIPLE)
    data = replace(
        parent.data,
        kind=DataKind.prepared,
        tokenizer=str(output / "tokenizer"),
        phases=[],
        validation=[],
    )
    started = {"resume": "", "branch": "", "fresh_data": False, "weights_only": False}
    config = replace(parent, model=model, data=data, name=output.name, folder=str(output.parent))
    config = replace(config, **started)
    # The layout of the vocabulary is checked without the data, which is still to be named.
    derive(replace(config, data=replace(data, kind=DataKind.embedded)))
    return config


def _write(
    reader: CheckpointReader, final: Path, config: Config, known: list[int], new_ids: list[int]
) -> None:
    partial = partial_folder(final)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    writer = CheckpointWriter(partial)
    for name in reader.shapes:
        tensor = reader.read(name)
        if name in ROW_TENSORS:
            tensor = _with_rows(tensor, config.model.vocab_size, known, new_ids)
        writer.write(name, tensor)
    writer.finish()
    for name, text in _texts(config).items():
        write_durably(partial / name, text)
    commit(final, {}, lambda: None)


def _with_rows(
    rows_VD: torch.Tensor, vocab_size: int, known: list[int], new_ids: list[int]
) -> torch.Tensor:
    """The rows; those of the new ids, and any added after them, are the mean of the known ones."""
    mean_D = rows_VD[torch.tensor(known)].double().mean(0).to(rows_VD.dtype)
    padding = mean_D.expand(vocab_size - rows_VD.shape[0], -1)
    grown_VD = torch.cat([rows_VD, padding])
    grown_VD[torch.tensor(new_ids)] = mean_D
    return grown_VD


def _texts(config: Config) -> dict[str, str]:
    """The JSON files of the checkpoint, which has no data yet."""
    progress = Progress(0, 0, checkpoint_metadata.NO_DATA)
    plan = plan_record(resolve_plan(config))
    texts = checkpoint_metadata.texts_of(progress, config, plan, {}, 0)
    del texts[checkpoint_metadata.DATA]
    about: dict[str, Any] = json.loads(texts[checkpoint_metadata.ABOUT])
    texts[checkpoint_metadata.ABOUT] = json_text(about | {"optimizer": False}, indent=1)
    tensors_format = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    texts["metadata.json"] = json_text(tensors_format)
    return texts
