"""The model class that the LM evaluation harness calls.

Owns: windows of a long text, truncation, generation settings of a task. Every answer equals that of
lm-eval's own Hugging Face model (`--model hf`, version 0.4.13) on the converted checkpoint. Does
not own: encoding (`harness_tokens`), tasks and metrics (the harness), decoding (`generate.engine`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.json_text import json_text
from nemotron_train.evaluate.harness_tokens import HarnessTokens
from nemotron_train.evaluate.knobs import HarnessConfig
from nemotron_train.generate.continuation import Continuation
from nemotron_train.generate.engine import Engine
from nemotron_train.generate.knobs import DecodingKnobs, Sampling, check_sampling

MAX_NEW_TOKENS = 256  # if the task sets no limit
SEED = 1234  # of sampled texts
_TOP_K = 50  # what transformers takes if neither the task nor the model says
# Settings that change nothing at these values. Others than these and ours are refused.
_WITHOUT_EFFECT = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1}
_WITHOUT_EFFECT |= {"use_cache": True, "length_penalty": 1, "early_stopping": False}

# (texts of the request or None, ids of the context, ids of the answer)
Pair = tuple[tuple[str, str] | None, list[int], list[int]]


class HarnessModel(TemplateLM):
    """Implements the harness's model interface with the engine: log-likelihood of answers, rolling
    log-likelihood of texts, and generation.

    window: the most tokens the model is given at once. Every method raises ConfigError, naming the
    value, for a request that does not fit or cannot be carried out exactly.
    """

    def __init__(
        self, engine: Engine, tokens: HarnessTokens, knobs: HarnessConfig, window: int
    ) -> None:
        super().__init__()
        self._engine = engine
        self._tokens = tokens
        self._knobs = knobs
        self._window = window

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self._tokens.end_id

    @property
    def prefix_token_id(self) -> int:
        """The id before a text without context."""
        return self._tokens.prefix_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """The ids of a text, as `HarnessTokens.encode`."""
        return self._tokens.encode(string, add_special_tokens)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood in nats of the answer, whether it is what greedy decoding gives) of each
        (context, answer). A context that is too long loses its beginning."""
        for context, answer in (request.args for request in requests):
            if not context and not self._tokens.encode(answer, add_special_tokens=False):
                raise _nothing_to_score(context, answer)
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        for texts, context, answer in requests:
            if not context or not answer:
                raise _nothing_to_score(*(texts or ("", "")))
            if len(answer) > self._window:
                window = _shown(self._window, self._knobs.max_length)
                raise ConfigError(
                    f"{window}: an answer of a task has {len(answer)} tokens, more than the window "
                    f"predicts; it begins {(texts or ('', ''))[1][:40]!r}"
                )
        # The last token is predicted and not given, so one more than the window is read.
        sequences = [(context + answer)[-(self._window + 1) :] for _, context, answer in requests]
        results = []
        for (_, _, answer), scores in zip(requests, self._scores(sequences), strict=True):
            of_answer = scores[len(scores) - len(answer) :]
            total = sum(value for value, _ in of_answer)
            results.append((total, all(is_best for _, is_best in of_answer)))
        return results

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood in nats of each whole text. A text longer than the window is read in
        several; each of its tokens is predicted once."""
        windows: list[Pair] = []
        counts = []
        for (text,) in (request.args for request in requests):
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._window,
                context_len=1,
            )
            found: list[Pair] = [(None, *make_disjoint_window(pair)) for pair in pairs]
            windows += found
            counts.append(len(found))
        scored = iter(self._loglikelihood_tokens(windows))
        return [sum(next(scored)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """The text after each context, until a stop string, an end token or the limit.

        It contains neither the stop string nor special tokens. A context that leaves no room for
        `max_gen_toks` in the window loses its beginning.
        """
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            key = json_text(request.args[1], sort_keys=True, default=str)
            groups.setdefault(key, []).append(number)
        texts = [""] * len(requests)
        for place, numbers in enumerate(groups.values()):
            contexts = [requests[number].args[0] for number in numbers]
            generated = self._generate(contexts, requests[numbers[0]].args[1], SEED + place)
            for number, text in zip(numbers, generated, strict=True):
                texts[number] = text
        return texts

    def _generate(self, contexts: list[str], options: dict[str, Any], seed: int) -> list[str]:
        """The texts after contexts whose tasks have the same settings."""
        wanted = read_generation(options, self._window, self._knobs.max_length)
        stops = handle_stop_sequences(wanted.stops, eos=self._tokens.end_text)
        room = self._window - wanted.max_new_tokens
        prompts = [self._tokens.encode_prompt(context)[-room:] for context in contexts]
        # A stop string spans at most one token for each of its bytes; two more may lie around it.
        reach = max(len(stop.encode()) for stop in stops) + 2

        def on_token(sequence: Continuation, token: int) -> str:
            end = self._tokens.decode(sequence.new[-reach:], skip_special_tokens=False)
            return "stop" if any(stop in end for stop in stops if stop) else ""

        decoding = DecodingKnobs(
            max_new_tokens=wanted.max_new_tokens,
            prefill_chunk=self._knobs.prefill_chunk,
            batch=self._knobs.batch,
        )
        sampling = replace(wanted.sampling, seed=seed)
        sequences = self._engine.generate(prompts, sampling, decoding, on_token)
        texts = [self._tokens.decode(sequence.new) for sequence in sequences]
        return [postprocess_generated_text(text, stops, None) for text in texts]

    def _scores(self, sequences: Sequence[list[int]]) -> list[list[tuple[float, bool]]]:
        """(log-probability, whether it is the most probable token) of every token but the first."""
        # Batch sequences of similar length: the longest one determines the number of calls.
        order = sorted(range(len(sequences)), key=lambda number: len(sequences[number]))
        results: list[list[tuple[float, bool]]] = [[] for _ in sequences]
        for start in range(0, len(order), self._knobs.batch):
            batch = order[start : start + self._knobs.batch]
            scores = self._engine.scores([sequences[i] for i in batch], self._knobs.prefill_chunk)
            for number, values in zip(batch, scores, strict=True):
                results[number] = values
        return results


@dataclass(frozen=True)
class Generation:
    """What a task's `generation_kwargs` ask for."""

    stops: list[str]
    max_new_tokens: int
    sampling: Sampling


def read_generation(options: dict[str, Any], window: int, max_length: int) -> Generation:
    """Read a task's `generation_kwargs`; greedy unless it samples.

    max_length: the knob, for the message. Raises ConfigError for a value out of range, for a
    setting that we do not carry out, and if the window has no room for the new tokens and a prompt.
    """
    try:
        return _read_generation(options, window, max_length)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"generation_kwargs of a task: {options}: {error}") from None


def _read_generation(options: dict[str, Any], window: int, max_length: int) -> Generation:
    settings: dict[str, Any] = {**normalize_gen_kwargs(options, MAX_NEW_TOKENS)}
    stops, length = settings.pop("until"), settings.pop("max_gen_toks")
    if not all(isinstance(stop, str) for stop in stops):
        raise ValueError(f"until={stops} must be texts")
    if not 1 <= length < window:
        raise ConfigError(
            f"{_shown(window, max_length)}: a task generates up to max_gen_toks={length} tokens; "
            "that must be 1 or more and less than the window, so that a prompt fits too"
        )
    does_sample = bool(settings.pop("do_sample", False))
    temperature = float(settings.pop("temperature", 0.0))
    top_k, top_p = int(settings.pop("top_k", _TOP_K)), float(settings.pop("top_p", 1.0))
    for name, value in settings.items():
        if name not in _WITHOUT_EFFECT or value != _WITHOUT_EFFECT[name]:
            raise ConfigError(f"generation_kwargs of a task: {name}={value!r} is not supported")
    if does_sample and not temperature:
        raise ConfigError("generation_kwargs of a task: do_sample=true needs a temperature above 0")
    sampling = Sampling(temperature, top_k, top_p) if does_sample else Sampling(temperature=0.0)
    check_sampling(sampling)
    return Generation(stops, length, sampling)


def _shown(window: int, max_length: int) -> str:
    """The window as the user set it or left it."""
    own = "" if max_length else f" (this model's longest context, {window} tokens)"
    return f"max_length={max_length}{own}"


def _nothing_to_score(context: str, answer: str) -> ConfigError:
    return ConfigError(
        f"evaluate harness: a task asks for the answer {answer[:40]!r} after {context[-40:]!r}; "
        "one of them has no tokens, so there is nothing to score"
    )
