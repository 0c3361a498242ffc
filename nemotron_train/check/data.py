"""Text for the checks: prepared data of a few kilobytes a source, the same on every machine.

Documents are shorter than a sequence and differ in length, so that rows are packed and document
boundaries fall everywhere. The user's own data stay out of it: they may lie on a cluster, and their
vocabulary would be most of a shrunk model. No torch.
"""

import json
import random
from pathlib import Path

from nemotron_train.data.prepare import PrepareConfig, prepare
from nemotron_train.plan.shrink import VOCAB, source_folder

_DOCUMENTS, _WORDS = 400, 300
_LETTERS = "etaoinshrdlucmfwypvbgkjqxz"


def write_sources(folder: Path, count: int) -> None:
    """Prepare `count` sources under `folder`, all with the tokenizer of the first; those that are
    there already are kept."""
    for number in range(count):
        output = source_folder(folder, number)
        text = folder / f"source_{number}.jsonl"
        if not text.exists():
            folder.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps({"text": document}) for document in _documents(number)]
            text.write_text("\n".join(lines) + "\n")
        first = source_folder(folder, 0)
        prepare(
            PrepareConfig(
                input=str(text),
                output=str(output),
                tokenizer=str(first / "tokenizer") if number else "",
                train_tokenizer_vocab_size=0 if number else VOCAB,
                validation_fraction=0.1,
                workers=1,
            )
        )


def _documents(seed: int) -> list[str]:
    """Words drawn by rank from a vocabulary of made-up ones, as in a text the first ones most."""
    words = random.Random(0)
    vocabulary = [
        "".join(words.choices(_LETTERS, range(26, 0, -1), k=words.randint(1, 7)))
        for _ in range(_WORDS)
    ]
    draws = random.Random(f"documents {seed}")
    weights = [1 / rank for rank in range(1, _WORDS + 1)]
    return [
        " ".join(draws.choices(vocabulary, weights, k=draws.randint(3, 40)))
        for _ in range(_DOCUMENTS)
    ]
