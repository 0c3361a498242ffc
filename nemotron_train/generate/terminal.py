"""The verb `generate`: reads prompts, streams text to the terminal, prints costs.

Owns: reading prompts, printing, the JSON lines of `output=`. Does not own: decoding (`engine`),
which characters are ready to print (`text`).
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from nemotron_train.config.budget import NO_LIMIT
from nemotron_train.config.errors import ConfigError
from nemotron_train.config.json_text import json_text
from nemotron_train.config.visible import visible
from nemotron_train.data.chat.messages import Message
from nemotron_train.data.chat.render import END, THINK_END, ChatFormat
from nemotron_train.data.json_lines import Fields, json_lines
from nemotron_train.data.tokenize import LoadedTokenizer
from nemotron_train.generate.budget import ThinkingBudget, line_break_test
from nemotron_train.generate.checkpoint import LoadedCheckpoint, open_checkpoint, open_tokenizer
from nemotron_train.generate.continuation import Continuation, Costs
from nemotron_train.generate.engine import Engine
from nemotron_train.generate.knobs import GenerateConfig, check_chat, check_decoding, check_sampling
from nemotron_train.generate.speculative import Acceptance
from nemotron_train.generate.text import GrowingText
from nemotron_train.platform.files import check_output, text_lines, write_output
from nemotron_train.platform.terminal import open_console


def generate(run: str, knobs: GenerateConfig) -> None:
    """Continue the prompts of `knobs` with the checkpoint `run` and print the result. COLLECTIVE.

    Raises ConfigError if the knobs, the prompts, the checkpoint or the tokenizer cannot be used, or
    `output` cannot be written.
    """
    prompts = check_and_read(knobs)
    if knobs.output:
        check_output(Path(knobs.output), "output")
    console = open_console(stderr=True)
    with open_checkpoint(run, knobs, console.print) as model:
        if not model.is_first_rank:
            console.quiet = True
        check_speculative(knobs.speculative, model)
        tokenizer, end_tokens = open_tokenizer(model, knobs)
        chat = ChatFormat(tokenizer, "chat=true: the run's tokenizer") if knobs.chat else None
        ids = [
            _prompt_ids(text, tokenizer, chat, knobs)
            for text in prompts
            for _ in range(knobs.samples)
        ]
        texts = [GrowingText(tokenizer, knobs.stop, prompt) for prompt in ids]
        budgets = _budgets(chat, knobs, end_tokens, len(ids))
        console.print(f"{model.checkpoint} · {model.platform.describe()}")
        printer = _Printer(prompts, knobs.samples, len(ids) == 1 and model.is_first_rank)

        def on_token(sequence: Continuation, token: int) -> str | list[int]:
            text = texts[sequence.number]
            is_end = knobs.end_of_document and token in end_tokens
            printer.stream("" if is_end else text.add(token))
            forced = budgets[sequence.number].after(token) if budgets else []
            forced = forced[: knobs.max_new_tokens - len(sequence.new)]
            for token_id in forced:
                if not text.is_stopped:
                    printer.stream(text.add(token_id))
            return "stop" if text.is_stopped else forced or ""

        engine = Engine(model.model, end_tokens, model.platform.device, tokenizer.known_ids)
        sequences = engine.generate(ids, knobs, knobs, on_token)
        for text in texts:
            printer.stream(text.finish())
        if not model.is_first_rank:
            return
        for sequence in sequences:
            printer.print_sequence(sequence, texts[sequence.number].text)
        if knobs.output:
            _write(Path(knobs.output), prompts, knobs.samples, sequences, texts)
        lines = summary(engine.costs, engine.acceptance if knobs.speculative else None)
        if budgets:
            closed = sum(any(sequence.given) for sequence in sequences)
            lines.append(f"reasoning closed by the budget: {closed} of {len(sequences)} sequences")
        for line in lines:
            console.print(line, soft_wrap=True)


def check_and_read(knobs: GenerateConfig) -> list[str]:
    """Check the knobs and return the prompts. Raises ConfigError if a knob is out of range, the
    prompt file cannot be read, or there is no prompt or an empty one."""
    check_sampling(knobs)
    check_decoding(knobs)
    check_chat(knobs)
    if knobs.samples < 1:
        raise ConfigError(f"samples={knobs.samples}: give 1 or more")
    if knobs.samples > 1 and knobs.temperature == 0:
        raise ConfigError(f"samples={knobs.samples}: greedy continuations are all the same")
    if "" in knobs.stop:
        raise ConfigError("stop=: an empty text ends every sequence before it begins")
    prompts = [*knobs.prompt, *(_read_prompts(Path(knobs.prompts)) if knobs.prompts else [])]
    if not prompts:
        raise ConfigError("no prompt: give prompt=TEXT or prompts=FILE")
    if "" in prompts:
        raise ConfigError("prompt=: an empty prompt gives the model nothing to go on from")
    return prompts


def check_speculative(speculative: bool, model: LoadedCheckpoint) -> None:
    """Raises ConfigError if `speculative` is set and the model has no MTP block."""
    if speculative and not model.config.model.mtp.depths:
        raise ConfigError(
            "speculative=true: the model has no multi-token-prediction block (model.mtp.depths=0)"
        )


def _read_prompts(path: Path) -> list[str]:
    if path.suffix == ".jsonl":
        return [_prompt(row) for _, row in json_lines(path)]
    try:
        lines = text_lines(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompts={path}: cannot be read ({error})") from error
    return [line for line in lines if line.strip()]


def _prompt(row: Fields) -> str:
    if not isinstance(row.get("prompt"), str):
        raise row.wrong("prompt", "a text")
    return row.get("prompt")


def _prompt_ids(
    text: str, tokenizer: LoadedTokenizer, chat: ChatFormat | None, knobs: GenerateConfig
) -> list[int]:
    if chat is None:
        return _encode(text, tokenizer)
    return chat.prompt([Message("user", text)], thinking=knobs.thinking and knobs.budget != 0)


def _budgets(
    chat: ChatFormat | None, knobs: GenerateConfig, end_tokens: Sequence[int], count: int
) -> list[ThinkingBudget]:
    """The budget of each sequence; none if there is nothing to force."""
    if chat is None or knobs.budget in (NO_LIMIT, 0):
        return []
    ends = {chat.special_ids[END], *(end_tokens if knobs.end_of_document else ())}
    is_break = line_break_test(chat.tokenizer.decode)
    close = chat.special_ids[THINK_END]
    budgets = [
        ThinkingBudget(knobs.budget, knobs.budget_grace, close, ends, is_break)
        for _ in range(count)
    ]
    for budget in budgets:
        budget.begin()
    return budgets


def _encode(text: str, tokenizer: LoadedTokenizer) -> list[int]:
    ids = tokenizer.encode(text).tolist()
    if not ids:
        raise ConfigError(f"prompt={text!r}: the tokenizer makes no token of it")
    return ids


class _Printer:
    """Prints to standard output: streams a single sequence, prints several one after the other.

    A terminal gets `visible` text, since a model can write an escape sequence; a pipe or a file
    gets every character.
    """

    def __init__(self, prompts: Sequence[str], samples: int, is_streaming: bool) -> None:
        self._prompts = prompts
        self._samples = samples
        self._is_streaming = is_streaming
        self._shown = visible if sys.stdout.isatty() else str
        if is_streaming:
            self.stream(prompts[0])

    def stream(self, text: str) -> None:
        if self._is_streaming and text:
            sys.stdout.write(self._shown(text))
            sys.stdout.flush()

    def print_sequence(self, sequence: Continuation, text: str) -> None:
        if self._is_streaming:
            sys.stdout.write("\n")
        else:
            prompt = self._prompts[sequence.number // self._samples]
            title = f"--- {sequence.number} ({sequence.ended_by})"
            sys.stdout.write(f"{title}\n{self._shown(prompt + text)}\n")
        sys.stdout.flush()


def _write(
    path: Path,
    prompts: Sequence[str],
    samples: int,
    sequences: Sequence[Continuation],
    texts: Sequence[GrowingText],
) -> None:
    lines = []
    for sequence in sequences:
        record = {
            "prompt": prompts[sequence.number // samples],
            "text": texts[sequence.number].text,
            "ended_by": sequence.ended_by,
            "prompt_tokens": sequence.prompt,
            "tokens": sequence.new,
            "log_probabilities": sequence.log_probabilities,
            "forced": [place for place, given in enumerate(sequence.given) if given],
        }
        lines.append(json_text(record, ensure_ascii=False) + "\n")
    write_output(path, "".join(lines), "output")


def summary(costs: Costs, acceptance: Acceptance | None) -> list[str]:
    """The summary lines: throughput, memory per sequence and, if given, draft acceptance."""
    prefill = costs.prefill_tokens / max(costs.prefill_seconds, 1e-9)
    decode = costs.new_tokens / max(costs.decode_seconds, 1e-9)
    lines = [
        f"prefill {costs.prefill_tokens:,} tokens, {prefill:,.0f} tokens/s; "
        f"decoding {costs.new_tokens:,} tokens, {decode:,.0f} tokens/s",
        f"memory a sequence on a rank: {costs.constant_bytes:,} bytes of Mamba-2 state, constant; "
        f"{costs.bytes_per_token:,} bytes a token of context, of the attention layers alone",
    ]
    if acceptance is not None:
        rates = ", ".join(
            f"{rate:.1%} at depth {depth}" for depth, rate in enumerate(acceptance.rates, 1)
        )
        lines.append(
            f"drafts accepted: {rates}; {acceptance.mean_length:.2f} tokens a round; "
            f"{costs.draft_bytes_per_token:,} bytes more a token of context, of the drafting block"
        )
    return lines
