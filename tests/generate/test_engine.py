"""The engine on an untrained small model: ragged batches, seeds, ends of sequences, and speculative
decoding, which changes only the time.

Second truths: each sequence alone; plain decoding; the multi-token-prediction block as training
runs it over the whole sequence. Not covered here: several ranks (tests/distributed), speed.
"""

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from nemotron_train.config.errors import ConfigError
from nemotron_train.generate.engine import Engine
from nemotron_train.generate.knobs import DecodingKnobs, Sampling
from nemotron_train.generate.sampling import distribution
from nemotron_train.generate.speculative import Drafted, Drafter

GREEDY = Sampling(temperature=0)
NEW = 8
PLAIN = DecodingKnobs(max_new_tokens=NEW, prefill_chunk=16)
BOUND = 1e-5


@pytest.fixture(scope="module")
def model(groups: Any, build: Any) -> Any:
    return build(groups)


def test_ragged_batch_equals_each_alone(model: Any, prompts: Any) -> None:
    together = Engine(model).generate(prompts, GREEDY, PLAIN)
    for one, prompt in zip(together, prompts, strict=True):
        (alone,) = Engine(model).generate([prompt], GREEDY, PLAIN)
        assert one.new == alone.new and one.ended_by == "length"
        assert one.log_probabilities == pytest.approx(alone.log_probabilities, abs=BOUND)
        scored = Engine(model).log_probabilities([one.tokens], chunk=5)[0]
        assert one.log_probabilities == pytest.approx(scored[-NEW:], abs=BOUND)


def test_greedy_takes_the_largest_of_the_full_forward(model: Any, prompts: Any) -> None:
    (one,) = Engine(model).generate([prompts[2]], GREEDY, PLAIN)
    with torch.inference_mode():
        logits = model(torch.tensor([one.tokens]))[0]
    assert one.new == logits[len(prompts[2]) - 1 : -1].argmax(-1).tolist()


def test_draws_belong_to_the_sequence(model: Any, prompts: Any) -> None:
    """Draws do not depend on the batch. Another seed gives other draws, and so does a second copy
    of the same prompt."""
    sampling, twice = Sampling(seed=5), [*prompts, *prompts]
    found = [
        [s.new for s in Engine(model).generate(twice, sampling, replace(PLAIN, batch=batch))]
        for batch in (1, 3, 10)
    ]
    assert found[0] == found[1] == found[2]
    assert found[0][:5] != found[0][5:]
    other = Engine(model).generate(twice, Sampling(seed=6), PLAIN)
    assert [s.new for s in other] != found[0]


def test_ends(model: Any, prompts: Any) -> None:
    """A sequence ends at the end-of-document token, when the listener says so, or at the length.
    The other sequences of the batch are not affected."""
    whole = Engine(model).generate(prompts, GREEDY, PLAIN)
    end = whole[1].new[4]
    first = [s.new.index(end) + 1 if end in s.new else NEW for s in whole]
    ended = Engine(model, end_token=end).generate(prompts, GREEDY, PLAIN)
    assert [s.new for s in ended] == [
        s.new[:length] for s, length in zip(whole, first, strict=True)
    ]
    assert ended[1].ended_by == "end"
    unstopped = replace(PLAIN, end_of_document=False)
    assert Engine(model, end).generate(prompts, GREEDY, unstopped)[1].new == whole[1].new

    def on_token(sequence: Any, token: int) -> str:
        return "enough" if sequence.number == 2 and len(sequence.new) == 3 else ""

    stopped = Engine(model).generate(prompts, GREEDY, PLAIN, on_token)
    assert [len(s.new) for s in stopped] == [NEW, NEW, 3, NEW, NEW]
    assert stopped[2].ended_by == "enough"


@pytest.mark.parametrize("drafts, seed", [(1, 0), (2, 1), (4, 2)])
def test_speculative_greedy_is_plain_greedy(
    model: Any, prompts: Any, drafts: int, seed: int
) -> None:
    """The model is untrained, so hardly a draft is accepted."""
    shuffled = random.Random(seed).sample(prompts, len(prompts))
    plain = Engine(model).generate(shuffled, GREEDY, PLAIN)
    knobs = replace(PLAIN, speculative=True, draft_tokens=drafts)
    speculative = Engine(model).generate(shuffled, GREEDY, knobs)
    assert [s.new for s in speculative] == [s.new for s in plain]
    for ours, theirs in zip(speculative, plain, strict=True):
        assert ours.log_probabilities == pytest.approx(theirs.log_probabilities, abs=BOUND)


@pytest.mark.parametrize("pattern", ["*E", "M*E"])
def test_every_length_is_rolled_back(
    groups: Any, build: Any, prompts: Any, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The drafts follow the plain continuation and err at random, so every number of accepted
    drafts occurs. The text is still the plain one. Also for a block with a Mamba-2 layer."""
    model = build(groups, f"model.mtp.pattern={pattern}")
    plain = Engine(model).generate(prompts, GREEDY, replace(PLAIN, max_new_tokens=24))
    texts = {tuple(s.prompt): s.tokens for s in plain}
    draw, counts = random.Random(0), set()
    really = Drafter.draft

    def knowing(self: Drafter, known: Any, draws: Any) -> Drafted:
        really(self, known, draws)
        rows = []
        for tokens in known:
            whole = next(t for p, t in texts.items() if tuple(tokens[: len(p)]) == p)
            right = [*whole, 0, 0, 0][len(tokens) : len(tokens) + 3]
            rows.append([t if draw.random() < 0.7 else (t + 1) % 512 for t in right])
        tokens_Bk = torch.tensor(rows)
        one_hot = torch.nn.functional.one_hot(tokens_Bk, 512).double()
        return Drafted(tokens_Bk, one_hot)

    judge = Drafter.judge

    def counting(self: Drafter, *arguments: Any) -> Any:
        verdict = judge(self, *arguments)
        counts.update(verdict.accepted)
        return verdict

    monkeypatch.setattr(Drafter, "draft", knowing)
    monkeypatch.setattr(Drafter, "judge", counting)
    knobs = replace(PLAIN, max_new_tokens=24, speculative=True, draft_tokens=3)
    engine = Engine(model)
    speculative = engine.generate(prompts, GREEDY, knobs)
    assert [s.new for s in speculative] == [s.new for s in plain]
    assert counts == {0, 1, 2, 3}
    assert engine.acceptance.mean_length > 2


@pytest.mark.parametrize("pattern", ["*E", "M*E"])
def test_drafts_come_from_the_block_as_training_runs_it(
    groups: Any, build: Any, prompts: Any, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After prefill in chunks and rounds of all lengths, every draft's distribution equals the one
    that training's forward pass gives at that depth over the known and drafted tokens."""
    model = build(groups, f"model.mtp.pattern={pattern}")
    drafts, records = 3, []
    really = Drafter.draft

    def recording(self: Drafter, known: Any, draws: Any) -> Drafted:
        drafted = really(self, known, draws)
        records.append(([list(tokens) for tokens in known], drafted))
        return drafted

    monkeypatch.setattr(Drafter, "draft", recording)
    # The flatter distribution makes most drafts accepted, but not all.
    with torch.no_grad():
        model.output_layer.weight.mul_(0.3)
    knobs = replace(PLAIN, speculative=True, draft_tokens=drafts)
    engine = Engine(model)
    engine.generate(prompts, Sampling(top_k=0), knobs)
    lengths = engine.acceptance
    assert lengths.accepted[-1] > 0 and lengths.accepted[0] < lengths.rounds
    compared = 0
    for known, drafted in records[::2]:
        for row, tokens in enumerate(known):
            wanted = _training_depths(model, tokens + drafted.tokens_Bk[row].tolist(), drafts)
            for depth in range(drafts):
                theirs = distribution(wanted[depth][len(tokens) - 2], Sampling(top_k=0))
                ours = distribution(drafted.logits_BkV[row, depth], Sampling(top_k=0))
                torch.testing.assert_close(ours.log(), theirs.log(), atol=BOUND, rtol=0)
                compared += 1
    assert compared > 9


@torch.inference_mode()
def _training_depths(model: Any, tokens: list[int], depths: int) -> list[torch.Tensor]:
    """Logits [S,V] of each depth, computed as in `NemotronModel._mtp_loss_sums`."""
    tokens_BS = torch.tensor([tokens])
    hidden = model.decoder(model.embedding(tokens_BS, None), attention_mask=None)
    found = []
    for _ in range(depths):
        hidden, tokens_BS, _, _ = model.mtp.layers[0](
            input_ids=tokens_BS,
            position_ids=None,
            hidden_states=hidden,
            attention_mask=None,
            embedding=model.embedding,
        )
        found.append(model.logits(hidden))
    return found


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_draws_known_ids_only(
    model: Any, prompts: Any, speculative: bool, temperature: float
) -> None:
    """A vocabulary is often padded, and a tokenizer's ids may have holes. The model's own
    distribution, whose log-probabilities are returned, stays whole."""
    known = set(range(0, 512, 7))
    engine = Engine(model, known_ids=known)
    knobs = replace(PLAIN, speculative=speculative)
    sampling = Sampling(temperature=temperature, seed=2)
    drawn = engine.generate(prompts, sampling, knobs)
    assert {token for s in drawn for token in s.new} <= known
    for one in drawn:
        scored = Engine(model).log_probabilities([one.tokens])[0][len(one.prompt) - 1 :]
        assert one.log_probabilities == pytest.approx(scored, abs=BOUND)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("speculative", [False, True])
def test_logits_that_are_not_finite_end_it(
    model: Any, prompts: Any, value: float, speculative: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One logit of one row, after the first token of the continuation."""
    logits, calls = model.logits, []

    def broken(hidden: Any) -> Any:
        result = logits(hidden)
        calls.append(1)
        if len(calls) > 1:
            result[0, 17] = value
        return result

    monkeypatch.setattr(model, "logits", broken)
    with pytest.raises(ConfigError, match="logits are not finite"):
        Engine(model).generate(prompts, GREEDY, replace(PLAIN, speculative=speculative))
    with pytest.raises(ConfigError, match="logits are not finite"):
        Engine(model).log_probabilities(prompts[2:4])


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("places", [1, 2, 4, 16])
def test_places_are_given_to_waiting_sequences(
    model: Any, prompts: Any, places: int, speculative: bool
) -> None:
    """Sequences of different lengths through few places equal each alone. A place is taken again
    while the others are in the middle of theirs."""
    many = [prompts[number % 5] for number in range(11)]
    lengths = [1 + (5 * number) % 12 for number in range(11)]

    def on_token(sequence: Any, token: int) -> str:
        return "enough" if len(sequence.new) == lengths[sequence.number] else ""

    knobs = replace(PLAIN, max_new_tokens=12, batch=places)
    if speculative:
        knobs = replace(knobs, speculative=True, draft_tokens=2)
    engine = Engine(model)
    found = engine.generate(many, GREEDY, knobs, on_token)
    assert [s.number for s in found] == list(range(11))
    for one in found:
        (alone,) = Engine(model).generate([one.prompt], GREEDY, replace(PLAIN, max_new_tokens=12))
        length = lengths[one.number]
        assert one.new == alone.new[:length] and one.ended_by in ("enough", "length")
        assert one.log_probabilities == pytest.approx(alone.log_probabilities[:length], abs=BOUND)
    if places == 4 and not speculative:
        # 61 tokens in four places that are never empty for long: far fewer rounds than the 36 of
        # three batches of four, each as long as its longest sequence.
        assert engine.costs.passes < 36


@pytest.mark.parametrize("speculative", [False, True])
def test_equal_prompts_are_prefilled_once(model: Any, prompts: Any, speculative: bool) -> None:
    """Four samples of two prompts, with the draws that each has alone."""
    many = [prompts[3]] * 4 + [prompts[2]] * 4
    knobs = replace(PLAIN, batch=8, prefill_chunk=64)
    engine = Engine(model)
    drafting = replace(knobs, speculative=True, draft_tokens=2) if speculative else knobs
    found = engine.generate(many, GREEDY if speculative else Sampling(seed=9), drafting)
    assert engine.costs.prefill_tokens == len(prompts[3]) + len(prompts[2])
    apart = Engine(model)
    sampling = GREEDY if speculative else Sampling(seed=9)
    alone = apart.generate(many, sampling, replace(knobs, batch=1))
    assert apart.costs.prefill_tokens == 4 * (len(prompts[3]) + len(prompts[2]))
    assert [s.new for s in found] == [s.new for s in alone]
    if not speculative:
        assert len({tuple(s.new) for s in found[:4]}) == 4


@pytest.mark.parametrize("pattern", ["*E", "M*E"])
def test_a_layer_that_one_batch_has_not_run(
    groups: Any, build: Any, prompts: Any, pattern: str
) -> None:
    """A prompt of one token gives the depths nothing to run. It joins sequences whose depths have
    states, and they join it."""
    model = build(groups, f"model.mtp.pattern={pattern}")
    for order in ([0, 3, 3, 0], [3, 0, 0, 3]):
        many = [prompts[number] for number in order]
        knobs = replace(PLAIN, batch=1, speculative=True, draft_tokens=2)
        apart = Engine(model).generate(many, GREEDY, knobs)

        def on_token(sequence: Any, token: int) -> str:
            return "short" if sequence.number == 0 and len(sequence.new) == 3 else ""

        together = Engine(model).generate(many, GREEDY, replace(knobs, batch=2), on_token)
        assert [s.new for s in together[1:]] == [s.new for s in apart[1:]]
        assert together[0].new == apart[0].new[:3]


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("coupled", [False, True])
def test_given_tokens_stand_in_the_text(
    model: Any, prompts: Any, speculative: bool, coupled: bool
) -> None:
    """Four tokens are given after the third and the twelfth token of each sequence, once after a
    token that would end it. Against a prompt that already holds everything up to there; and the
    same with drafts and without."""
    sampling = Sampling(seed=2, coupled=True) if coupled else GREEDY
    knobs = replace(PLAIN, max_new_tokens=20, batch=3)
    (first, *_) = Engine(model).generate(prompts, sampling, knobs)
    end = first.new[2]
    texts = [[500 + number, 7, 8, 9 + number] for number in range(5)]

    def on_token(sequence: Any, token: int) -> str | list[int]:
        is_due = len(sequence.new) in (3, 12)
        return texts[sequence.number] if is_due else ""

    def run(drafts: bool) -> list[Any]:
        chosen = replace(knobs, speculative=True, draft_tokens=3) if drafts else knobs
        return Engine(model, end).generate(prompts, sampling, chosen, on_token)

    found = run(speculative)
    assert [s.new for s in found] == [s.new for s in run(False)]
    assert found[0].new[2] == end and found[0].new[3:7] == texts[0]
    for one in found:
        places = [place for place, given in enumerate(one.given) if given]
        assert places == [p for p in (3, 4, 5, 6, 12, 13, 14, 15) if p < len(one.new)]
        assert all(math.isnan(one.log_probabilities[place]) for place in places)
        scored = Engine(model).log_probabilities([one.tokens])[0][-len(one.new) :]
        drawn = [place for place in range(len(one.new)) if place not in places]
        for place in drawn:
            assert one.log_probabilities[place] == pytest.approx(scored[place], abs=BOUND)
        if not coupled and len(one.new) > 7:
            (after,) = Engine(model).generate([one.prompt + one.new[:7]], GREEDY, PLAIN)
            assert one.new[7:12] == after.new[: len(one.new[7:12])]


def test_given_tokens_end_at_the_length(model: Any, prompts: Any) -> None:
    knobs = replace(PLAIN, max_new_tokens=6)
    found = Engine(model).generate(prompts, GREEDY, knobs, lambda s, t: [1, 2, 3])
    assert all(len(s.new) == 6 and s.ended_by == "length" for s in found)
    assert all(s.given == [False, True, True, True, False, True] for s in found)
