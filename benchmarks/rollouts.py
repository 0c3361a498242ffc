"""Rollouts a second: our engine against transformers' `generate` on the converted checkpoint.

    python -m benchmarks.rollouts runs/warm@1200 [--prompts 16] [--samples 8] [--threads 2]

The same prompts of all families in the chat format, the same number of samples of each,
temperature 1, the same stop token and the same length limit, in FP32. Only the first turn is
sampled and nothing is scored. Our features are switched off one by one: one prefill for the
samples of a prompt, the
place of a finished sequence for the next one, drafts of the multi-token-prediction block (which are
off at first). The sides take turns for `--rounds` rounds; the best time counts.

The floor is printed first: the multiplications and additions of all tokens at the rate of a matrix
product of the engine's batch, measured here, with neither attention, scan nor Python.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console

Answers = list[list[int]]  # new tokens of each rollout
Timed = Callable[[], tuple[float, Answers]]


def serve(folder: str, threads: int) -> None:
    """The peer's process. Each input line is JSON with prompts, samples, stop and limit; each
    answer line is "answer" and JSON [seconds, new tokens]."""
    from transformers import AutoModelForCausalLM  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(threads)
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    for line in sys.stdin:
        task = json.loads(line)
        prompts, stop = task["prompts"], task["stop"]
        longest = max(map(len, prompts))
        ids = torch.tensor([[stop] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        start = time.perf_counter()
        with torch.inference_mode():
            tokens = model.generate(
                ids,
                attention_mask=mask,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                num_return_sequences=task["samples"],
                max_new_tokens=task["limit"],
                eos_token_id=stop,
                pad_token_id=stop,
            )
        seconds = time.perf_counter() - start
        new = []
        for row in tokens[:, longest:].tolist():
            end = row.index(stop) + 1 if stop in row else len(row)
            new.append(row[:end])
        print("answer", json.dumps([seconds, new]), flush=True)


@contextmanager
def peer(folder: Path, threads: int, task: dict[str, Any]) -> Iterator[Timed]:
    """transformers' `generate` in another process. Raises RuntimeError if that process ends."""
    command = [sys.executable, "-m", "benchmarks.rollouts", str(folder)]
    process = subprocess.Popen(
        [*command, "--serve", "--threads", str(threads)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    requests, answers = process.stdin, process.stdout

    def generate() -> tuple[float, Answers]:
        requests.write(json.dumps(task) + "\n")
        requests.flush()
        for line in answers:
            if line.startswith("answer "):
                seconds, new = json.loads(line.removeprefix("answer "))
                return seconds, new
        raise RuntimeError("transformers ended without an answer")

    try:
        yield generate
    finally:
        requests.close()
        process.wait()


class Ours:
    """Our engine on one checkpoint, with features switched."""

    def __init__(self, model: Any, known_ids: Any, task: dict[str, Any]) -> None:
        self._model = model
        self._known_ids = known_ids
        self._task = task
        self.accepted = ""

    def timed(self, batch: int, shared: bool = True, refill: bool = True, drafts: bool = False):
        """A function that samples all rollouts."""
        from nemotron_train.generate.batch import Batch
        from nemotron_train.generate.engine import Engine
        from nemotron_train.generate.knobs import DecodingKnobs, Sampling

        task = self._task
        prompts = [prompt for prompt in task["prompts"] for _ in range(task["samples"])]
        knobs = DecodingKnobs(task["limit"], batch=batch, speculative=drafts)
        key = Batch.prefill_key if shared else (lambda row: row.number)
        sizes = len(prompts) if refill else batch

        def generate() -> tuple[float, Answers]:
            engine = Engine(self._model, task["stop"], "cpu", self._known_ids)
            with patch.object(Batch, "prefill_key", staticmethod(key)):
                start = time.perf_counter()
                new = [
                    row.new
                    for begin in range(0, len(prompts), sizes)
                    for row in engine.generate(prompts[begin : begin + sizes], Sampling(), knobs)
                ]
                seconds = time.perf_counter() - start
            if drafts:
                self.accepted = ", ".join(f"{rate:.0%}" for rate in engine.acceptance.rates)
            return seconds, new

        return generate


def floor(tokens: int, active: int, width: int, batch: int) -> float:
    """Seconds for the products of so many tokens with so many active parameters."""
    size = min(active, 1 << 21)
    weight, activations = torch.randn(size // width, width), torch.randn(batch, width)
    for _ in range(3):
        torch.nn.functional.linear(activations, weight)
    start = time.perf_counter()
    for _ in range(20):
        torch.nn.functional.linear(activations, weight)
    seconds_a_flop = (time.perf_counter() - start) / (20 * 2 * batch * weight.numel())
    return seconds_a_flop * 2 * tokens * active


def measure(run: str, arguments: argparse.Namespace) -> None:
    """Print the rollouts a second of each side."""
    from nemotron_train.convert.hugging_face.to_hf import to_hf
    from nemotron_train.data.chat.render import END, ChatFormat
    from nemotron_train.generate.checkpoint import open_checkpoint, open_tokenizer
    from nemotron_train.generate.knobs import ModelKnobs
    from nemotron_train.plan.derive import derive
    from nemotron_train.posttrain.environments.families import FAMILY_NAMES
    from nemotron_train.posttrain.tasks import Split, rows_of_levels

    console, knobs = Console(width=120, highlight=False), ModelKnobs(threads=arguments.threads)
    with tempfile.TemporaryDirectory() as scratch:
        converted = Path(scratch, "converted")
        to_hf(run, converted, console=console)
        with open_checkpoint(run, knobs, console.print) as model:
            tokenizer, _ = open_tokenizer(model, knobs)
            chat = ChatFormat(tokenizer)
            rows = [
                row
                for name in FAMILY_NAMES
                for row in rows_of_levels(name, Split.evaluation, 1, arguments.prompts)
            ][:: len(FAMILY_NAMES)]
            task = {
                "prompts": [chat.prompt(row.messages) for row in rows],
                "samples": arguments.samples,
                "stop": chat.special_ids[END],
                "limit": arguments.limit,
            }
            ours = Ours(model.model, tokenizer.known_ids, task)
            batch = arguments.batch
            with peer(converted, arguments.threads, task) as theirs:
                sides = {
                    "ours": ours.timed(batch),
                    "ours, a prefill for each sample": ours.timed(batch, shared=False),
                    "ours, no refill": ours.timed(batch, refill=False),
                    "ours, with drafts": ours.timed(batch, drafts=True),
                    "transformers": theirs,
                }
                _compare(sides, arguments.rounds, console)
            derived = derive(model.config)
            tokens = sum(map(len, sides["ours"]()[1]))
            seconds = floor(
                tokens, derived.active_parameters, model.config.model.hidden_size, batch
            )
            count = len(rows) * arguments.samples
            console.print(
                f"floor of the products alone: {count / seconds:.0f} rollouts/s for "
                f"{tokens / count:.0f} new tokens a rollout; drafts accepted: {ours.accepted}"
            )


def _compare(sides: dict[str, Timed], rounds: int, console: Console) -> None:
    best, lengths = dict.fromkeys(sides, float("inf")), {}
    for _ in range(1 + rounds):  # the first round is a warm-up
        for name, generate in sides.items():
            seconds, new = generate()
            best[name] = min(best[name], seconds)
            lengths[name] = sum(map(len, new)) / len(new)
            count = len(new)
    rates = {name: count / seconds for name, seconds in best.items()}
    for name, rate in rates.items():
        console.print(
            f"{name}: {rate:.1f} rollouts/s, {rate * lengths[name]:.0f} tokens/s, "
            f"{lengths[name]:.1f} tokens a rollout; {rate / rates['transformers']:.2f}x"
        )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("run", help="RUN_FOLDER@STEP whose tokenizer has the chat tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--limit", type=int, default=96, help="new tokens of a rollout at most")
    parser.add_argument("--batch", type=int, default=64, help="sequences that we decode together")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.run, arguments.threads)
    else:
        measure(arguments.run, arguments)


if __name__ == "__main__":
    main()
