"""Greedy text generation from one checkpoint: our engine, plain and with speculative decoding,
against transformers' `generate` on the converted checkpoint.

    python -m benchmarks.generation_peer runs/tiny@256 [--threads 2] [--prompt-tokens 64 1024]

Times the whole call, prefill included: one held-out prompt and `--new-tokens` new tokens. The sides
take turns for `--rounds` rounds; the best time counts. transformers runs in its own process with
torch's kernels, its default cache and the checkpoint's dtype; its fused Mamba kernels need a GPU.
Also counts how many first tokens are the same, since all sides use the same model.
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

from rich.console import Console


def serve(folder: str, threads: int) -> None:
    """The peer's process. Each input line is JSON [prompt, number of tokens]; each answer line is
    "answer" and JSON [seconds, new tokens]."""
    import torch
    from transformers import AutoModelForCausalLM  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(threads)
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    for line in sys.stdin:
        prompt, num_tokens = json.loads(line)
        inputs = torch.tensor([prompt])
        start = time.perf_counter()
        with torch.inference_mode():
            tokens = model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                do_sample=False,
                max_new_tokens=num_tokens,
                eos_token_id=None,
                pad_token_id=0,
            )
        seconds = time.perf_counter() - start
        print("answer", json.dumps([seconds, tokens[0, len(prompt) :].tolist()]), flush=True)


Timed = Callable[[list[int], int], tuple[float, list[int]]]


@contextmanager
def peer(folder: Path, threads: int) -> Iterator[Timed]:
    """transformers' `generate` in another process, as a function: (prompt, number of tokens) ->
    (seconds, new tokens). Raises RuntimeError if that process ends."""
    command = [sys.executable, "-m", "benchmarks.generation_peer", str(folder)]
    process = subprocess.Popen(
        [*command, "--serve", "--threads", str(threads)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    requests, answers = process.stdin, process.stdout

    def generate(prompt: list[int], num_tokens: int) -> tuple[float, list[int]]:
        requests.write(json.dumps([prompt, num_tokens]) + "\n")
        requests.flush()
        for line in answers:
            if line.startswith("answer "):
                seconds, tokens = json.loads(line.removeprefix("answer "))
                return seconds, tokens
        raise RuntimeError("transformers ended without an answer")

    try:
        yield generate
    finally:
        requests.close()
        process.wait()


def measure(run: str, arguments: argparse.Namespace) -> None:
    """Prints the tokens per second of each side for each prompt length."""
    from nemotron_train.convert.hugging_face.to_hf import to_hf
    from nemotron_train.evaluate.acceptance import held_out_prompts, validation_folders
    from nemotron_train.generate.checkpoint import open_checkpoint
    from nemotron_train.generate.engine import Engine
    from nemotron_train.generate.knobs import DecodingKnobs, ModelKnobs, Sampling

    console = Console(width=120, highlight=False)
    with tempfile.TemporaryDirectory() as scratch:
        converted = Path(scratch, "converted")
        to_hf(run, converted, console=console)
        with (
            open_checkpoint(run, ModelKnobs(threads=arguments.threads), console.print) as model,
            peer(converted, arguments.threads) as theirs,
        ):

            def ours(speculative: bool) -> Timed:
                def generate(prompt: list[int], num_tokens: int) -> tuple[float, list[int]]:
                    engine = Engine(model.model, None, model.platform.device)
                    knobs = DecodingKnobs(num_tokens, speculative=speculative)
                    start = time.perf_counter()
                    (sequence,) = engine.generate([prompt], Sampling(temperature=0), knobs)
                    return time.perf_counter() - start, sequence.new

                return generate

            sides = {"ours": ours(False), "with drafts": ours(True), "transformers": theirs}
            folder = validation_folders(model.config)[0]
            for length in arguments.prompt_tokens:
                ((prompt,), _) = held_out_prompts(folder, 1, length)
                _compare(sides, prompt, arguments, console)


def _compare(
    sides: dict[str, Timed], prompt: list[int], arguments: argparse.Namespace, console: Console
) -> None:
    best, tokens = dict.fromkeys(sides, float("inf")), {}
    for _ in range(1 + arguments.rounds):  # the first round is a warm-up
        for name, generate in sides.items():
            seconds, tokens[name] = generate(prompt, arguments.new_tokens)
            best[name] = min(best[name], seconds)
    same = min(_num_same(new, tokens["transformers"]) for new in tokens.values())
    rates = {name: arguments.new_tokens / seconds for name, seconds in best.items()}
    parts = [
        f"{name} {rate:.0f} tokens/s ({rate / rates['transformers']:.2f}x)"
        for name, rate in rates.items()
    ]
    console.print(
        f"prompt {len(prompt):,} tokens, {arguments.new_tokens} new: {'; '.join(parts)}; "
        f"the first {same} tokens are the same"
    )


def _num_same(tokens: list[int], reference: list[int]) -> int:
    """Length of the common prefix."""
    pairs = enumerate(zip(tokens, reference, strict=True))
    return next((index for index, (a, b) in pairs if a != b), len(tokens))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("run", help="RUN_FOLDER@STEP, with multi-token prediction")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[64, 1024])
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.run, arguments.threads)
    else:
        measure(arguments.run, arguments)


if __name__ == "__main__":
    main()
