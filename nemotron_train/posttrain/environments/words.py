"""The small closed vocabulary of the generated tasks: a small model meets every word often."""

import random

NOUNS = (
    "cat",
    "dog",
    "sun",
    "moon",
    "tree",
    "bird",
    "fish",
    "boat",
    "lamp",
    "door",
    "book",
    "rock",
)
ADJECTIVES = ("red", "big", "old", "new", "cold", "tall", "soft", "dark")
VERBS = ("sees", "finds", "likes", "keeps", "moves", "takes")
SMALL_WORDS = ("the", "a", "and", "near", "with")
WORDS = NOUNS + ADJECTIVES + ("blue", "wind", "star", "leaf")

_CONSONANTS, _VOWELS = "bdfgklmnprst", "aeiou"


def made_up_word(source: random.Random, length: int) -> str:
    """A word of `length` letters, consonants and vowels in turn: more of them than can be learned
    by heart."""
    letters = [_CONSONANTS, _VOWELS]
    return "".join(source.choice(letters[place % 2]) for place in range(length))
