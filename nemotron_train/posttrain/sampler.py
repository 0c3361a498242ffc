"""Rollouts from a policy: prompts in the chat format, turns with environments, scores.

Owns: groups of samples, the turns of an episode, which ids were sampled. Does not own: decoding
(`generate.engine`), the format (`data.chat`), how environments run (`posttrain.environments`).

Sampled ids are never decoded and encoded again: an episode goes on from them, and training takes
them as they are.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from nemotron_train.config.budget import NO_LIMIT, TurnBudgetKnobs
from nemotron_train.config.errors import ConfigError
from nemotron_train.data.chat.messages import with_effort
from nemotron_train.data.chat.parse import parse_turn
from nemotron_train.data.chat.render import END, THINK_END, ChatFormat
from nemotron_train.generate.budget import ThinkingBudget, line_break_test
from nemotron_train.generate.continuation import Answer, Continuation
from nemotron_train.generate.engine import Engine
from nemotron_train.generate.knobs import DecodingKnobs, Sampling
from nemotron_train.posttrain.environments.protocol import EndedBy, Episode, Message, Row, Score
from nemotron_train.posttrain.rollout import ENVIRONMENT, FORCED, SAMPLED, Rollout
from nemotron_train.posttrain.shared_scoring import Environments

_DONE = "turn"  # the text that ends a sequence whose episode is over


class Sampler:
    """Makes rollouts with one engine. Its weights may change between calls.

    The engine must draw only ids that the tokenizer knows. max_context: most tokens of a prompt and
    what follows. budget: knobs of the reasoning budget, for rows that have none of their own; None:
    no limit for those.
    """

    def __init__(
        self,
        engine: Engine,
        chat: ChatFormat,
        scoring: Environments,
        decoding: DecodingKnobs,
        max_context: int,
        budget: TurnBudgetKnobs | None = None,
    ) -> None:
        self.engine = engine
        self.chat = chat
        self.scoring = scoring
        self.decoding = decoding
        self.max_context = max_context
        self._budget = budget or TurnBudgetKnobs()
        self._is_break = line_break_test(chat.tokenizer.decode)
        self.scoring_seconds = 0.0  # that generation had to wait for, over all calls
        self._turns: dict[str, int] = {}

    def rollouts(
        self,
        rows: Sequence[Row],
        samples: int,
        sampling: Sampling,
        first_sequence: int = 0,
        groups: Sequence[int] | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[Rollout]:
        """`samples` rollouts of each row, in order. COLLECTIVE.

        groups: numbers of the rows; default: 0, 1, … Sample s of row g has the sequence number
        first_sequence + g samples + s, which with the seed determines its draws. progress: called
        with the finished and all rollouts. Raises ConfigError if an environment cannot be loaded,
        or a prompt leaves no room for an answer.
        """
        rows = [self._with_budget(row) for row in rows]
        new_names = {row.environment for row in rows} - set(self._turns)
        self._turns |= self.scoring.load(sorted(new_names))
        players = self._players(rows, samples, range(len(rows)) if groups is None else groups)
        for player in players:
            player.number = first_sequence + player.group * samples + player.sample
        playing = {player.number: player for player in players if player.score is None}
        prompts = [player.prompt_ids for player in playing.values()]
        finished = len(players) - len(playing)

        def on_token(sequence: Continuation, token: int) -> Answer | Future[Answer]:
            nonlocal finished
            answer = playing[sequence.number].after(sequence, token)
            if isinstance(answer, str) and answer:
                finished += 1
                progress(finished, len(players))
            return answer

        numbers = list(playing)
        sequences = self.engine.generate(prompts, sampling, self.decoding, on_token, numbers)
        waited = time.perf_counter()
        for player, sequence in zip(playing.values(), sequences, strict=True):
            player.finish(sequence)
        self.scoring_seconds += time.perf_counter() - waited
        progress(len(players), len(players))
        return [player.rollout() for player in players]

    def _players(self, rows: Sequence[Row], samples: int, groups: Sequence[int]) -> list["_Player"]:
        players = []
        starts = self.scoring.start(rows)
        for group, row, start in zip(groups, rows, starts, strict=True):
            messages, score = (None, start) if isinstance(start, Score) else (start, None)
            ids = [] if messages is None else self._prompt(row, messages)
            for sample in range(samples):
                episode = Episode(row, tuple(messages or ()), ())
                budget = self._new_budget(row)
                players.append(_Player(self, episode, group, sample, ids, score, budget))
        return players

    def _with_budget(self, row: Row) -> Row:
        """The row with its own budget, or that of the knobs."""
        if row.budget is not None or self._budget.budget == NO_LIMIT:
            return row
        return replace(row, budget=self._budget.budget)

    def _new_budget(self, row: Row) -> ThinkingBudget:
        """The budget of one episode."""
        ends = self.engine.end_tokens if self.decoding.end_of_document else frozenset()
        return ThinkingBudget(
            NO_LIMIT if row.budget is None else row.budget,
            self._budget.budget_grace,
            self.chat.special_ids[THINK_END],
            {self.chat.special_ids[END], *ends},
            self._is_break,
            self._budget.budget_scope,
        )

    def _prompt(self, row: Row, messages: Sequence[Message]) -> list[int]:
        # With budget 0, the ids that fine-tuning teaches for an answer without reasoning.
        asked = with_effort(messages, row.effort)
        ids = self.chat.prompt(asked, row.tools, row.thinking and row.budget != 0)
        if len(ids) >= self.max_context:
            raise ConfigError(
                f"row {row.id} of environment {row.environment}: its prompt has {len(ids)} tokens, "
                f"and prompt and answer together may have {self.max_context}"
            )
        return ids

    def max_turns(self, environment: str) -> int:
        """Most completions of an episode."""
        return self._turns[environment]


@dataclass(eq=False)
class _Player:
    """An episode while it is being sampled."""

    owner: Sampler
    episode: Episode
    group: int
    sample: int
    prompt_ids: list[int]
    score: Score | None  # known before the end: the environment failed
    budget: ThinkingBudget
    number: int = 0  # of the sequence
    kinds: list[str] = field(default_factory=list)
    turn_begin: int = 0  # index of the first id of the current turn
    sequence: Continuation | None = None
    scored: Future[Score] | None = None
    thinking_tokens: int = 0
    answer_tokens: int = 0
    malformed_calls: int = 0
    malformed_thinking: bool = False
    is_thinking: bool = False  # whether the current turn begins with reasoning
    forced_closes: int = 0

    def __post_init__(self) -> None:
        self.forced_closes = len(self._begin_thinking())  # its id stands in the prompt

    def _begin_thinking(self) -> list[int]:
        """Begin a turn. Returns the id that closes its reasoning at once, if the budget has nothing
        left."""
        thinking = self.episode.row.thinking
        self.is_thinking = thinking and self.budget.begin()
        is_closed = thinking and not self.is_thinking
        return [self.owner.chat.special_ids[THINK_END]] * is_closed

    def after(self, sequence: Continuation, token: int) -> Answer | Future[Answer]:
        """The listener of the engine: after each sampled token."""
        self.kinds.append(SAMPLED)
        if token == self.owner.chat.special_ids[END]:
            return self._end_of_turn(sequence)
        if len(self.prompt_ids) + len(sequence.new) >= self.owner.max_context:
            return "length"
        forced = self.budget.after(token)
        if not forced:
            return ""
        if len(forced) >= self._room(sequence):  # no answer could follow
            return "length"
        self.kinds += [FORCED] * len(forced)
        self.forced_closes += 1
        return forced

    def _room(self, sequence: Continuation) -> int:
        """The most ids that may still follow."""
        room = self.owner.max_context - len(self.prompt_ids) - len(sequence.new)
        return min(room, self.owner.decoding.max_new_tokens - len(sequence.new))

    def _end_of_turn(self, sequence: Continuation) -> Answer | Future[Answer]:
        self._add_turn(sequence.new)
        if self.episode.last.fault:
            return self._over(EndedBy.stop)
        if self.turns == self.owner.max_turns(self.episode.row.environment) == 1:
            return self._over(EndedBy.stop)
        return self.owner.scoring.begin_step(
            self.episode, lambda reply: self._after_reply(sequence, reply)
        )

    def _after_reply(self, sequence: Continuation, reply: list[Message] | Score | None) -> Answer:
        """What follows the environment's reply. Runs in a thread of the scoring pool."""
        if isinstance(reply, Score):
            self.score = reply
            return _DONE
        if reply is None:
            return self._over(EndedBy.stop)
        self.episode = replace(self.episode, turns=(*self.episode.turns, *reply))
        if self.turns >= self.owner.max_turns(self.episode.row.environment):
            return self._over(EndedBy.turns)
        ids = self.owner.chat.following(reply, self.episode.row.thinking)
        closes = self._begin_thinking()
        if len(ids) + len(closes) >= self._room(sequence):
            return self._over(EndedBy.length)
        self.kinds += [ENVIRONMENT] * len(ids) + [FORCED] * len(closes)
        self.forced_closes += len(closes)
        self.turn_begin = len(self.kinds)
        return ids + closes

    @property
    def turns(self) -> int:
        return sum(message.role == "assistant" for message in self.episode.turns)

    def _add_turn(self, ids: Sequence[int]) -> None:
        """Add the completion that begins at `turn_begin` to the episode."""
        turn = ids[self.turn_begin :]
        parsed = parse_turn(self.owner.chat, turn, self.is_thinking, text_calls=True)
        self.malformed_thinking |= not parsed.thinking_closed
        close = self.owner.chat.special_ids[THINK_END]
        if self.is_thinking:
            thinking_tokens = list(turn).index(close) if close in turn else len(turn)
            self.thinking_tokens += thinking_tokens
            self.answer_tokens += max(0, len(turn) - thinking_tokens - 1)
        else:
            self.answer_tokens += len(turn)
        self.malformed_calls += len(parsed.malformed_calls)
        turns = (*self.episode.turns, parsed.message)
        self.episode = replace(self.episode, turns=turns)

    def _over(self, ended_by: EndedBy) -> str:
        """The episode is over: its score is asked for while others go on."""
        self.episode = replace(self.episode, ended_by=ended_by)
        self.scored = self.owner.scoring.begin_score(self.episode)
        return _DONE

    def finish(self, sequence: Continuation) -> None:
        """Wait for the score. A sequence that ended by itself or by its length has an open turn."""
        self.sequence = sequence
        if sequence.ended_by != _DONE:
            self._add_turn(sequence.new)
            self._over(EndedBy.stop if sequence.ended_by == "end" else EndedBy.length)
        if self.score is None:
            assert self.scored is not None
            self.score = self.scored.result()

    def rollout(self) -> Rollout:
        """The finished rollout."""
        assert self.score is not None
        ids = self.sequence.new if self.sequence else []
        kinds = "".join(self.kinds)
        assert len(kinds) == len(ids), (len(kinds), len(ids))
        return Rollout(
            group=self.group,
            sample=self.sample,
            sequence=self.number,
            prompt_ids=self.prompt_ids,
            ids=ids,
            kinds=kinds,
            log_probabilities=self.sequence.drawn_log_probabilities if self.sequence else [],
            episode=self.episode,
            score=self.score,
            cut=self.episode.ended_by == EndedBy.length,
            text=self.owner.chat.tokenizer.decode(ids),
            thinking_tokens=self.thinking_tokens,
            answer_tokens=self.answer_tokens,
            forced_closes=self.forced_closes,
            malformed_calls=self.malformed_calls,
            malformed_thinking=self.malformed_thinking,
        )
