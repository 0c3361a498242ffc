"""Where the numbers of a run go: metrics.jsonl always, W&B and TensorBoard when asked.

Owns: one JSON object a logged step, its safety over crashes and resumes, and the two optional
sinks. Does not own: which numbers there are (the caller; docs/metrics.md lists them) nor their
reduction over ranks: values come in as plain Python, and only one rank has a writer.
"""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

from nemotron_train.config.schema import LoggingConfig
from nemotron_train.run_folder.metric_groups import grouped


class Sink(Protocol):
    """A second reader of the numbers, which go there as GROUP/NAME (`metric_groups`)."""

    name: str

    def write(self, step: int, numbers: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class MetricsWriter:
    """Appends to metrics.jsonl, one flushed line a call, and hands the numbers to the sinks.

    `resume_step`: the step of the checkpoint that training goes on from (0: from the start). Lines
    of later steps are dropped first: those steps are run again. So is a line torn by a crash.
    A sink that fails is told of once through `say` and then left out; training goes on.
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
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Writes one object. `metrics` holds `step` and plain values; a number that is not finite
        is written as null, since JSON has no word for it. Raises TypeError for anything else."""
        step = metrics["step"]
        line = json.dumps(_plain(metrics), ensure_ascii=False, allow_nan=False)
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
        """Drops the lines of later steps than `step`: training goes back to it. W&B and TensorBoard
        keep what they have until a step is logged again."""
        self._file.close()
        _keep_until(self._path, step)
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()

    def close(self) -> None:
        self._file.close()
        for sink in list(self._sinks):
            self._guard(sink, sink.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _guard(self, sink: Sink, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # whatever a logging service does, training goes on
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
    """The sinks that `logging` asks for, writing into the run folder `folder`.

    `config`: the whole configuration as plain values, shown by W&B. `run_id` makes a resumed run
    the same run there. A sink that cannot start costs one warning.
    """
    wanted: list[tuple[str, Callable[[], Sink]]] = []
    if logging.wandb:
        wanted.append(("W&B", lambda: WandbSink(logging, folder, run_name, run_id, config, say)))
    if logging.tensorboard:
        wanted.append(("TensorBoard", lambda: TensorBoardSink(folder / "tensorboard", resume_step)))
    sinks = []
    for name, build in wanted:
        try:
            sinks.append(build())
        except Exception as error:  # a missing package, no network, a full disk: only logging
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            say(f"{name} cannot start and is left out: {reason}")
    return sinks


class WandbSink:
    """Weights & Biases. The key comes from its environment variable or netrc and is never written
    by us; without one the run is kept offline in the run folder, for `wandb sync` later."""

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
            # wandb.init would ask for a key and wait for an answer.
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
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


class TensorBoardSink:
    """TensorBoard event files; on a resume it hides the points of steps that are run again."""

    name = "TensorBoard"

    def __init__(self, folder: Path, resume_step: int):
        from torch.utils.tensorboard import SummaryWriter

        purge_step = resume_step + 1 if resume_step else None
        self._writer = SummaryWriter(str(folder), purge_step=purge_step)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


def _keep_until(path: Path, step: int) -> None:
    """Rewrites the file with the whole lines of steps <= `step`; atomic, as a crash may strike."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            metrics = json.loads(line)
        except ValueError:
            continue  # torn by a crash
        known = metrics.get("step") if isinstance(metrics, dict) else None
        if isinstance(known, int) and known <= step:
            kept.append(line + "\n")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


def _plain(value: Any) -> Any:
    """`value` with numbers that are not finite as None; TypeError names what JSON cannot hold."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    raise TypeError(f"metrics take plain values, not {type(value).__name__}: {value!r}")
