"""`evaluate harness`: runs LM evaluation harness tasks (lm-eval, EleutherAI) on a checkpoint.

Owns: the verb, loading tasks, the window, the results file. Does not own: the model class that the
harness calls (`harness_model`), tasks, few-shot prompts, metrics (the harness).

Task files come from the harness or the user. They may run Python functions, so set include_path
only to trusted folders.
"""

from pathlib import Path
from typing import Any

from rich.table import Table

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.json_text import json_text
from nemotron_train.evaluate.knobs import HarnessConfig, check_harness
from nemotron_train.generate.checkpoint import (
    ResolvedCheckpoint,
    open_checkpoint,
    open_tokenizer,
    resolve_checkpoint,
)
from nemotron_train.generate.engine import Engine
from nemotron_train.platform.files import check_output, write_output
from nemotron_train.platform.terminal import open_console
from nemotron_train.run_folder.lineage import longest_context

try:
    from lm_eval.tasks import TaskManager

    from nemotron_train.evaluate.harness_model import HarnessModel, read_generation
    from nemotron_train.evaluate.harness_tokens import HarnessTokens
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "lm_eval":
        raise
    raise ConfigError(
        "evaluate harness: lm-eval is not installed; install the extra nemotron-train[evaluate]"
    ) from None


def evaluate_harness(run: str, knobs: HarnessConfig) -> dict[str, Any]:
    """Run the tasks on the checkpoint `run`; print and return the harness's results by task.

    Raises ConfigError if a task does not exist or cannot be loaded, a knob is out of range, or a
    request cannot be carried out exactly. COLLECTIVE over the ranks of this launch.
    """
    from lm_eval.evaluator import simple_evaluate

    check_harness(knobs)
    if knobs.output:
        check_output(Path(knobs.output), "output")
    window = window_of(resolve_checkpoint(run, knobs), knobs.max_length)
    manager = TaskManager(include_path=knobs.include_path or None)
    tasks = load_tasks(manager, knobs.tasks)
    for name, task in manager.load(tasks)["tasks"].items():  # before the work, not in its midst
        check_task(name, task, knobs, window)
    console = open_console()
    with open_checkpoint(run, knobs, console.print) as model:
        console.quiet = not model.is_first_rank
        tokenizer, end_tokens = open_tokenizer(model, knobs)
        folder = Path(knobs.tokenizer or model.config.data.tokenizer)
        engine = Engine(model.model, end_tokens, model.platform.device, tokenizer.known_ids)
        results: Any = simple_evaluate(
            HarnessModel(engine, HarnessTokens(tokenizer, folder, engine.end_token), knobs, window),
            tasks=tasks,
            task_manager=manager,
            num_fewshot=knobs.num_fewshot if knobs.num_fewshot >= 0 else None,
            limit=knobs.limit or None,
            log_samples=False,
        )
        console.print(f"{model.checkpoint}, window of {window:,} tokens")
        console.print(_table(results["results"]))
        if knobs.output and model.is_first_rank:
            about = {"checkpoint": str(model.checkpoint), "max_length": window}
            text = json_text(about | dict(results), default=str)
            write_output(Path(knobs.output), text + "\n", "output")
            console.print(f"wrote {knobs.output}")
    return results["results"]


def window_of(resolved: ResolvedCheckpoint, max_length: int) -> int:
    """The most tokens that the model is given at once: `max_length`, or for 0 its longest context.

    A larger one is the user's to try: nothing in the model counts positions.
    """
    return max_length or longest_context(resolved.folder, resolved.config.train.sequence_length)


def load_tasks(manager: TaskManager, names: list[str]) -> list[Any]:
    """The tasks and groups of these names, which may be patterns such as `mmlu_*`.

    Raises ConfigError if a name fits none, or if a task's file or data cannot be read.
    """
    missing = [name for name in names if not manager.match_tasks([name])]
    if missing or not names:
        raise ConfigError(
            f"tasks={','.join(missing or names)}: the harness has no such task; "
            "`lm-eval ls tasks` lists its own, include_path=FOLDER adds yours"
        )
    found: list[Any] = []
    for name in manager.match_tasks(names):
        try:
            loaded: Any = manager.load([name])
            found += (
                [loaded["groups"][name]] if name in loaded["groups"] else loaded["tasks"].values()
            )
            manager.load(found)  # refuses a task that two of the names bring
        except Exception as error:  # the harness, its data libraries and a task's own code
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ConfigError(f"tasks={name}: cannot be loaded ({reason[:300]})") from error
    return found


def check_task(name: str, task: Any, knobs: HarnessConfig, window: int) -> None:
    """Raises ConfigError if a task's settings do not fit the window, or if it has fewer solved
    examples than are asked for."""
    if task.OUTPUT_TYPE == "generate_until":
        read_generation(task.config.generation_kwargs or {}, window, knobs.max_length)
    if knobs.num_fewshot > 0 and task.get_config("num_fewshot") != 0:
        num_examples = len(list(task.fewshot_docs()))
        if num_examples < knobs.num_fewshot:
            raise ConfigError(
                f"num_fewshot={knobs.num_fewshot}: the task {name} has {num_examples} solved "
                "examples"
            )


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
