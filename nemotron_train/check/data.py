"""Synthetic prepared data for the checks, a few kilobytes a source, identical on every machine.

Documents are shorter than a sequence and vary in length, so rows are packed and document boundaries
fall at many positions. The user's own data is not used: it may be on a cluster, and its vocabulary
would dominate a shrunk model. No torch.
"""

import random
from pathlib import Path

from nemotron_train.config.json_text import json_text
from nemotron_train.data.prepare import PrepareConfig, prepare
from nemotron_train.plan.shrink import VOCAB, source_folder

_DOCUMENTS, _WORDS = 400, 300
_LETTERS = "etaoinshrdlucmfwypvbgkjqxz"


def write_sources(folder: Path, count: int) -> None:
    """Prepare `count` sources under `folder`, all with the tokenizer of the first one.

    Existing sources are kept.
    """
    for number in range(count):
        output = source_folder(folder, number)
        text = folder / f"source_{number}.jsonl"
        if not text.exists():
            folder.mkdir(parents=True, exist_ok=True)
            lines = [json_text({"text": document}) for document in _documents(number)]
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
    """Documents of made-up words with word frequency 1 / rank, as in natural text."""
    word_random = random.Random(0)
    vocabulary = [
        "".join(word_random.choices(_LETTERS, range(26, 0, -1), k=word_random.randint(1, 7)))
        for _ in range(_WORDS)
    ]
    document_random = random.Random(f"documents {seed}")
    weights = [1 / rank for rank in range(1, _WORDS + 1)]
    return [
        " ".join(document_random.choices(vocabulary, weights, k=document_random.randint(3, 40)))
        for _ in range(_DOCUMENTS)
    ]
