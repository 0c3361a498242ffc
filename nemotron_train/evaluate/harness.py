"""`evaluate harness`: runs LM evaluation harness tasks (lm-eval, EleutherAI) on a checkpoint.

Owns: the model class that the harness calls, the verb. Does not own: tasks, few-shot prompts,
metrics (the harness), decoding (`generate.engine`).

Task files come from the harness or the user. They may run Python functions, so set include_path
only to trusted folders.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from nemotron_train.config.errors import ConfigError
from nemotron_train.data.tokenize import LoadedTokenizer
from nemotron_train.evaluate.knobs import HarnessConfig
from nemotron_train.generate.checkpoint import open_checkpoint, open_tokenizer
from nemotron_train.generate.engine import Continuation, Engine
from nemotron_train.generate.knobs import DecodingKnobs, Sampling
from nemotron_train.generate.text import GrowingText
from nemotron_train.platform.files import check_output, write_output

try:
    from lm_eval.api.model import TemplateLM
except ImportError:
    raise ConfigError(
        "evaluate harness: lm-eval is not installed; install the extra nemotron-train[evaluate]"
    ) from None

MAX_NEW_TOKENS = 256  # if the task sets no limit


class HarnessModel(TemplateLM):
    """Implements the harness's model interface with the engine: log-likelihood of continuations,
    rolling log-likelihood of texts, and generation.

    An empty context is replaced by an end-of-document token. Raises ConfigError if the tokenizer
    has none.
    """

    def __init__(self, engine: Engine, tokenizer: LoadedTokenizer, knobs: HarnessConfig) -> None:
        super().__init__()
        if engine.end_token is None:
            raise ConfigError(
                "evaluate harness: the tokenizer has no end-of-document token to begin a text with"
            )
        self._engine = engine
        self._loaded = tokenizer
        self._knobs = knobs
        self._end_token = engine.end_token

    @property
    def eot_token_id(self) -> int:
        """The end-of-document id; the harness also uses it as the prefix token."""
        return self._end_token

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Encode without special tokens, whatever `add_special_tokens` says."""
        return self._loaded.encode(string).tolist()

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        sequences = [context + continuation for _, context, continuation in requests]
        all_scores = self._scores(sequences)
        results = []
        for (_, _, continuation), scores in zip(requests, all_scores, strict=True):
            continuation_scores = scores[len(scores) - len(continuation) :]
            results.append(
                (
                    sum(value for value, _ in continuation_scores),
                    all(is_best for _, is_best in continuation_scores),
                )
            )
        return results

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood in nats of each whole text; of its last `max_length` tokens if longer."""
        sequences = [
            [self.prefix_token_id, *self.tok_encode(text)]
            for (text,) in (request.args for request in requests)
        ]
        return [sum(value for value, _ in scores) for scores in self._scores(sequences)]

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Generate after each context until a stop string, the end-of-document token or the limit.

        The returned text contains neither the stop string nor the end-of-document token.
        """
        texts = []
        for context, options in (request.args for request in requests):
            stop_option = options.get("until") or []
            stops = [stop_option] if isinstance(stop_option, str) else list(stop_option)
            length = int(options.get("max_gen_toks", MAX_NEW_TOKENS))
            temperature = (
                float(options.get("temperature", 0.0)) if options.get("do_sample") else 0.0
            )
            grown = GrowingText(self._loaded, stops)

            def on_token(sequence: Continuation, token: int, grown: GrowingText = grown) -> str:
                grown.add(token)
                return "stop" if grown.is_stopped else ""

            prompt = self.tok_encode(context) or [self.prefix_token_id]
            max_prompt = self._knobs.max_length - length
            if self._knobs.max_length:
                prompt = prompt[-max(max_prompt, 1) :]
            decoding = DecodingKnobs(
                max_new_tokens=length, prefill_chunk=self._knobs.prefill_chunk, batch=1
            )
            sampling = Sampling(temperature=temperature, top_p=float(options.get("top_p", 1.0)))
            (sequence,) = self._engine.generate([prompt], sampling, decoding, on_token)
            if sequence.ended_by != "stop":
                grown.finish()
            text = grown.text
            if sequence.ended_by == "end":  # the text of whichever token ended it
                text = text.removesuffix(self._loaded.decode(sequence.new[-1:]))
            texts.append(text)
        return texts

    def _scores(self, sequences: Sequence[list[int]]) -> list[list[tuple[float, bool]]]:
        """(log-probability, whether it is the most probable token) of every token but the first.

        Sequences longer than `max_length` are truncated to their last `max_length` tokens.
        """
        max_length = self._knobs.max_length
        truncated = [tokens[-max_length:] if max_length else tokens for tokens in sequences]
        # Batch sequences of similar length: the longest one determines the number of calls.
        order = sorted(range(len(truncated)), key=lambda number: len(truncated[number]))
        results: list[list[tuple[float, bool]]] = [[] for _ in truncated]
        for start in range(0, len(order), self._knobs.batch):
            batch = order[start : start + self._knobs.batch]
            scores = self._engine.scores([truncated[i] for i in batch], self._knobs.prefill_chunk)
            for number, values in zip(batch, scores, strict=True):
                results[number] = values
        return results


def evaluate_harness(run: str, knobs: HarnessConfig) -> dict[str, Any]:
    """Run the tasks on the checkpoint `run`; print and return the harness's results by task.

    Raises ConfigError if a task does not exist or a knob is out of range. COLLECTIVE over the ranks
    of this launch.
    """
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    for name in ("limit", "max_length"):
        if getattr(knobs, name) < 0:
            raise ConfigError(f"{name}={getattr(knobs, name)}: give 0 (all) or a number above")
    for name in ("batch", "prefill_chunk"):
        if getattr(knobs, name) < 1:
            raise ConfigError(f"{name}={getattr(knobs, name)}: give 1 or more")
    if knobs.output:
        check_output(Path(knobs.output), "output")
    if knobs.include_path and not Path(knobs.include_path).is_dir():
        raise ConfigError(f"include_path={knobs.include_path}: no such folder")
    manager = TaskManager(include_path=knobs.include_path or None)
    missing = [task for task in knobs.tasks if not manager.match_tasks([task])]
    if missing or not knobs.tasks:
        raise ConfigError(
            f"tasks={','.join(missing or knobs.tasks)}: the harness has no such task; "
            "`lm-eval ls tasks` lists its own, include_path=FOLDER adds yours"
        )
    console = Console(width=120)
    with open_checkpoint(run, knobs, console.print) as model:
        console.quiet = not model.is_first_rank
        tokenizer, end_tokens = open_tokenizer(model, knobs)
        engine = Engine(model.model, end_tokens, model.platform.device)
        results: Any = simple_evaluate(
            HarnessModel(engine, tokenizer, knobs),
            tasks=list(knobs.tasks),
            task_manager=manager,
            num_fewshot=knobs.num_fewshot if knobs.num_fewshot >= 0 else None,
            limit=knobs.limit or None,
            log_samples=False,
        )
        console.print(f"{model.checkpoint}", highlight=False)
        console.print(_table(results["results"]))
        if knobs.output and model.is_first_rank:
            text = json.dumps({"checkpoint": str(model.checkpoint)} | dict(results), default=str)
            write_output(Path(knobs.output), text + "\n", "output")
            console.print(f"wrote {knobs.output}", highlight=False)
    return results["results"]


def _table(results: dict[str, dict[str, Any]]) -> Table:
    table = Table("task", "metric", "value", "standard error")
    for task, metrics in results.items():
        for name, value in metrics.items():
            metric, _, filter_name = name.partition(",")
            error = metrics.get(f"{metric}_stderr,{filter_name}")
            if isinstance(value, float) and not metric.endswith("_stderr"):
                shown = f"{error:.4f}" if isinstance(error, float) else "-"
                table.add_row(task, metric, f"{value:.4f}", shown)
    return table
