"""The sample of a run's rollouts, and their texts in pieces.

Second truths: the writer of such files in `posttrain`, of which `report` imports nothing; each
token decoded on its own. Not covered: tokenizers whose decoding of a part is no beginning of the
whole, which only leaves pieces too long.
"""

import gzip
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_train.data.tokenize import LoadedTokenizer, load_tokenizer
from nemotron_train.posttrain.rollout import from_json, write_rollouts
from nemotron_train.report.runs import rollouts as module
from nemotron_train.report.runs.rollouts import (
    ENVIRONMENT,
    FORCED,
    SAMPLED,
    UNKNOWN,
    Piece,
    pieces_of,
    sample_rollouts,
)
from tests.report.made_up_policy import byte_tokenizer, rollout, write_step


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@cache
def loaded(folder: Path) -> LoadedTokenizer:
    return load_tokenizer(folder)


def test_the_report_reads_what_the_trainer_writes(folder: Path, tmp_path: Path) -> None:
    """Every field that is shown, of a file that `posttrain` wrote."""
    encode = loaded(folder).encode_with_special_tokens
    parts = [encode(text) for text in ("ask</think>", "\n<tool_response>7", " so 8<|im_end|>")]
    value = rollout("tools", True, "ask</think>\n<tool_response>7 so 8<|im_end|>")
    value["ids"], value["prompt_ids"] = [*chain(*parts)], encode("<|im_start|>user")
    value["kinds"] = [[kind, len(part)] for kind, part in zip("sef", parts, strict=True)]
    value["log_probabilities"] = [-0.5] * len(value["ids"])
    value["trainer_log_probabilities"] = [-0.5] * len(parts[0])
    path = tmp_path / "rollouts" / "step_00000004.jsonl.gz"
    path.parent.mkdir()
    write_rollouts(path, [from_json(value)])
    [found] = sample_rollouts(tmp_path, 9, folder)
    assert (found.step, found.environment, found.row, found.sample) == (4, "tools", "tools/1", 1)
    assert (found.verdict, found.reward, found.advantage, found.passed) == ("passed", 1, 0.25, True)
    assert list(found.counts.values()) == [len(parts[0]), len(parts[2]), len(parts[1])]
    assert list(found.counts) == [SAMPLED, FORCED, ENVIRONMENT]
    assert found.prompt == (
        Piece("<|im_start|>", ENVIRONMENT, True),
        Piece("user", ENVIRONMENT),
    )
    assert found.text == (
        Piece("ask", SAMPLED),
        Piece("</think>", SAMPLED, True),
        Piece("\n", ENVIRONMENT),
        Piece("<tool_response>", ENVIRONMENT, True),
        Piece("7", ENVIRONMENT),
        Piece(" so 8", FORCED),
        Piece("<|im_end|>", FORCED, True),
    )


def test_which_rollouts_are_taken(tmp_path: Path) -> None:
    """First, middle and last step of those trained; of each environment the first that passed and
    the first that did not, whatever the other verdict is."""
    timeout = rollout("b", False, "t0")
    timeout["score"]["verdict"] = "timeout"
    for step in (1, 3, 5, 8, 9):
        members = [rollout("b", True, f"p{n}") for n in range(2)]
        write_step(
            tmp_path, step, [timeout, rollout("b", False, "f1"), *members, rollout("a", True)]
        )
    (tmp_path / "rollouts" / "step_00000002.jsonl.gz.partial").write_text("no")
    (tmp_path / "rollouts" / "step_00000004.jsonl.gz").mkdir()
    found = sample_rollouts(tmp_path, 8, None)
    texts = [(r.step, r.environment, r.verdict, r.text[0].text) for r in found]
    of_step = [("a", "passed", "yes"), ("b", "passed", "p0"), ("b", "timeout", "t0")]
    assert texts == [(step, *each) for step in (1, 5, 8) for each in of_step]
    assert sample_rollouts(tmp_path / "nowhere", 8, None) == []


@pytest.mark.parametrize("tokenizer", ["none", "gone", "another"])
def test_without_its_tokenizer_a_text_has_no_kinds(
    tokenizer: str, folder: Path, tmp_path: Path
) -> None:
    """The text stays whole. The prompt is then the messages."""
    given = {"none": None, "gone": tmp_path / "gone", "another": folder}[tokenizer]
    write_step(tmp_path, 1, [rollout("a", True, "what it said", prompt_ids=[10**6])])
    [found] = sample_rollouts(tmp_path, 1, given)
    assert found.text == (Piece("what it said", UNKNOWN),)
    assert found.prompt == (Piece("user: a task of a", ENVIRONMENT),)


tokens = st.lists(st.tuples(st.integers(0, 264), st.sampled_from([SAMPLED, FORCED, ENVIRONMENT])))


@settings(max_examples=60, deadline=None)
@given(tokens)
def test_pieces_are_the_text_in_order(folder: Path, members: list[tuple[int, str]]) -> None:
    """Any bytes and special tokens of any kinds: nothing is lost or doubled, neighbours differ, a
    special token is a piece's own. If all bytes are ASCII, each character has its token's kind."""
    tokenizer = loaded(folder)
    ids, kinds = [token for token, _ in members], [kind for _, kind in members]
    pieces = pieces_of(None, ids, kinds, tokenizer)
    assert "".join(piece.text for piece in pieces) == tokenizer.decode(ids)
    singles = [tokenizer.decode([token]) for token in ids]
    if all(text.isascii() for text in singles):
        wanted = [
            (character, kind, token in tokenizer.control_tokens)
            for text, (token, kind) in zip(singles, members, strict=True)
            for character in text
        ]
        assert [(c, p.kind, p.special) for p in pieces for c in p.text] == wanted


def test_a_cut_within_a_character(folder: Path) -> None:
    """A character of three bytes, the last of which the environment said, is in one piece."""
    ids = loaded(folder).encode("a€b").tolist()
    found = pieces_of("a€b", ids, [SAMPLED] * 3 + [ENVIRONMENT] * 2, loaded(folder))
    assert found == (Piece("a", SAMPLED), Piece("€b", ENVIRONMENT))
    assert pieces_of("a€c", ids, [SAMPLED] * 5, loaded(folder)) == ()
    kinds = [SAMPLED, FORCED, SAMPLED, FORCED, FORCED] * 200
    assert pieces_of(None, ids * 200, kinds, loaded(folder)) == (), "too many to be worth the time"


@pytest.mark.parametrize(
    "bad",
    [
        {"kinds": [["x", 3]]},
        {"kinds": [["s", "many"]]},
        {"kinds": 7},
        {"score": None},
        {"score": {"verdict": "passed", "reward": float("inf"), "message": ""}},
        {"advantage": float("nan")},
        {"advantage": "much"},
        {"episode": {"prompt": [7]}},
        {"prompt_ids": None},
        {"sample": 1e999},
        {"ids": [[1]], "kinds": [["s", 1]]},
    ],
    ids=str,
)
def test_a_line_that_is_no_rollout_is_left_out(bad: dict, folder: Path, tmp_path: Path) -> None:
    write_step(tmp_path, 1, [rollout("a", True, "wrong") | bad, rollout("a", True, "right")])
    [found] = sample_rollouts(tmp_path, 1, folder)
    assert found.text[0].text == "right"


def test_what_a_crash_leaves_and_what_is_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A torn file, one that is no gzip, lines that are no JSON: what is before is still shown. Of a
    file that unpacks to gigabytes only the beginning is read."""
    whole = write_step(tmp_path, 1, [rollout("a", True), *[rollout("b", True)] * 500]).read_bytes()
    path = tmp_path / "rollouts" / "step_00000001.jsonl.gz"
    for content, wanted in (
        (whole[: len(whole) - 30], ["a", "b"]),
        (b"no gzip", []),
        (b"", []),
        (gzip.compress(b'\xff\n{"environment": 1}\n[]\n' + b"[" * 100_000 + b"\n7\n"), []),
    ):
        path.write_bytes(content)
        assert [r.environment for r in sample_rollouts(tmp_path, 1, None)] == wanted
    read: list[Any] = []
    parse = module.json.loads
    monkeypatch.setattr(module.json, "loads", lambda line: read.append(len(line)) or parse(line))
    path.write_bytes(gzip.compress(b" " * (module.READ_BYTES + 5_000_000) + b"\n"))
    assert sample_rollouts(tmp_path, 1, None) == []
    assert sum(read) <= module.READ_BYTES
