"""Output of a run's metrics: always metrics.jsonl, optionally W&B and TensorBoard.

Owns: the lines of metrics.jsonl, their consistency after crashes and resumes, the two optional
sinks. Does not own: which metrics exist (the caller; docs/metrics.md lists them), their reduction
over ranks. Values are plain Python, and only one rank has a writer.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

from nemotron_train.config.json_text import json_text
from nemotron_train.config.schema import LoggingConfig
from nemotron_train.platform.files import heal_last_line, write_atomically
from nemotron_train.run_folder.metric_groups import grouped


class Sink(Protocol):
    """An additional output for metrics. Their names are GROUP/NAME (`metric_groups`)."""

    name: str

    def write(self, step: int, numbers: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class MetricsWriter:
    """Appends to metrics.jsonl, one flushed line per call, and passes the numbers to the sinks.

    resume_step: the step of the checkpoint that training continues from (0: a new run). Lines of
    later steps are removed first, because these steps run again; so are incomplete lines from a
    crash. If a sink fails, `say` reports it once and the sink is removed; training continues.
    """

    def __init__(
        self,
        path: Path,
        *,
        resume_step: int = 0,
        sinks: Sequence[Sink] = (),
        say: Callable[[str], None] = print,
    ):
        self._sinks = list(sinks)
        self._say = say
        self._path = path
        _keep_until(path, resume_step)
        heal_last_line(path)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Write one line. `metrics` holds `step` and plain values.

        Non-finite numbers are written as null, because JSON cannot represent them. Raises TypeError
        for a value that is not plain.
        """
        step = metrics["step"]
        line = json_text(_plain(metrics), ensure_ascii=False)
        self._file.write(line + "\n")
        self._file.flush()
        numbers = {
            grouped(name): value
            for name, value in metrics.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and name != "step"
        }
        for sink in list(self._sinks):
            self._guard(sink, lambda sink=sink: sink.write(step, numbers))

    def rewind(self, step: int) -> None:
        """Remove the lines of steps after `step`, to which training goes back.

        W&B and TensorBoard keep their points until a step is logged again.
        """
        self._file.close()
        _keep_until(self._path, step)
        heal_last_line(self._path)
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()

    def close(self) -> None:
        """Close metrics.jsonl and all sinks."""
        self._file.close()
        for sink in list(self._sinks):
            self._guard(sink, sink.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _guard(self, sink: Sink, action: Callable[[], None]) -> None:
        """Run `action`; if it fails, report and remove the sink."""
        try:
            action()
        except Exception as error:  # an error of a logging service must not stop training
            self._sinks.remove(sink)
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            self._say(f"{sink.name} failed and is left out from now on: {reason}")


def open_sinks(
    logging: LoggingConfig,
    folder: Path,
    *,
    run_name: str,
    run_id: str,
    config: Mapping[str, Any],
    resume_step: int = 0,
    say: Callable[[str], None] = print,
) -> list[Sink]:
    """The sinks that `logging` enables. They write to the run folder `folder`.

    config: the whole configuration as plain values, shown in W&B. run_id: lets a resumed run
    continue the same W&B run. If a sink cannot start, `say` prints one warning.
    """
    builders: list[tuple[str, Callable[[], Sink]]] = []
    if logging.wandb:
        builders.append(("W&B", lambda: WandbSink(logging, folder, run_name, run_id, config, say)))
    if logging.tensorboard:
        builders.append(
            ("TensorBoard", lambda: TensorBoardSink(folder / "tensorboard", resume_step))
        )
    sinks = []
    for name, build in builders:
        try:
            sinks.append(build())
        except Exception as error:  # a missing package, no network, a full disk: train without it
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            say(f"{name} cannot start and is left out: {reason}")
    return sinks


class WandbSink:
    """Weights & Biases.

    W&B reads the API key from its environment variable or netrc; we never write it. Without a key,
    the run is stored offline in the run folder, and `wandb sync` can upload it later.
    """

    name = "W&B"

    def __init__(
        self,
        logging: LoggingConfig,
        folder: Path,
        run_name: str,
        run_id: str,
        config: Mapping[str, Any],
        say: Callable[[str], None],
    ):
        import wandb

        settings = wandb.Settings(console="off", silent=True, disable_code=True)
        online = wandb.setup().settings.mode == "online"  # the default; WANDB_MODE changes it
        if online and not wandb.login(prompt=False):
            # wandb.init would prompt for a key and block.
            settings.mode = "offline"
            online = False
            say("W&B: no key found, so the run is kept offline; `wandb sync` uploads it later")
        self._run = wandb.init(
            project=logging.wandb_project,
            group=logging.wandb_group or None,
            name=run_name,
            id=run_id,
            resume="allow",
            dir=str(folder),
            config=dict(config),
            settings=settings,
        )
        self._run.define_metric("*", step_metric=grouped("tokens"))
        if online:
            say(f"W&B: {self._run.url}")

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Log the numbers of a step."""
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        """Finish the W&B run."""
        self._run.finish()


class TensorBoardSink:
    """TensorBoard event files. On a resume, points of steps that run again are hidden."""

    name = "TensorBoard"

    def __init__(self, folder: Path, resume_step: int):
        from torch.utils.tensorboard import SummaryWriter

        purge_step = resume_step + 1 if resume_step else None
        self._writer = SummaryWriter(str(folder), purge_step=purge_step)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Add one point per number."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


def _keep_until(path: Path, step: int) -> None:
    """Atomically rewrite the file with only the complete lines of steps up to `step`."""
    if not path.exists():
        return
    kept_lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            metrics = json.loads(line)
        except ValueError:
            continue  # incomplete: the process crashed while writing it
        line_step = metrics.get("step") if isinstance(metrics, dict) else None
        if isinstance(line_step, int) and line_step <= step:
            kept_lines.append(line + "\n")
    write_atomically(path, "".join(kept_lines))


def _plain(value: Any) -> Any:
    """`value` as JSON values, with None for non-finite numbers. Raises TypeError."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    raise TypeError(f"metrics take plain values, not {type(value).__name__}: {value!r}")
