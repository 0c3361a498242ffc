"""`nemotron-train` with a number broken on one rank. Run as a program, one process per rank.

    broken_run.py WHAT RANK SAMPLES[,SAMPLES...] VERB ...

The fault occurs on RANK, at the steps that start after SAMPLES samples of the data. WHAT is `loss`
(the loss is NaN), `gradient` (the loss is right, the gradient of one module is infinite), `spike`
(loss times 100), `weight` (a weight becomes NaN and stays NaN), or `data` (a shard cannot be read).
With the suffix `,slow`, RANK sleeps in all steps, four times as long as each of its forward passes
takes.
"""

import sys
import time
from typing import Any

from nemotron_train.platform import device

device.prepare(1)

import torch.distributed as dist  # noqa: E402

from nemotron_train.cli.main import main  # noqa: E402
from nemotron_train.config.errors import ConfigError  # noqa: E402
from nemotron_train.run_folder.progress import Progress, StepResult  # noqa: E402
from nemotron_train.train import train_step  # noqa: E402

what, rank, broken_samples = "", 0, [0]
forward_step = train_step.forward_step
take_step = train_step.TrainStep.__call__
is_broken = is_slow = False


def broken_forward_step(iterator: Any, model: Any, **weights: Any) -> Any:
    started = time.perf_counter()
    output, loss = forward_step(iterator, model, **weights)
    if is_slow and dist.get_rank() == rank:
        time.sleep(4 * (time.perf_counter() - started))
    factor = {"loss": float("nan"), "spike": 100.0}.get(what)
    if not is_broken or factor is None:
        return output, loss
    return output, lambda sums: loss(sums * factor)


def unreadable(*place: Any) -> Any:
    raise ConfigError("data/train_00000.bin: was removed")


def broken_step(step: train_step.TrainStep, progress: Progress) -> StepResult:
    global is_broken
    is_broken = progress.data.samples in broken_samples and dist.get_rank() == rank
    parameters = dict(step.chunks[0].module.named_parameters())
    handle = None
    if is_broken and what == "gradient":
        weight = parameters["decoder.layers.2.mixer.in_proj.weight"]
        handle = weight.register_hook(lambda gradient: gradient * float("inf"))
    if is_broken and what == "weight":
        parameters["decoder.layers.2.mixer.in_proj.weight"].data[0, 0] = float("nan")
    if is_broken and what == "data":
        step.supply._batches.take = unreadable  # type: ignore[method-assign]
    try:
        return take_step(step, progress)
    finally:
        if handle is not None:
            handle.remove()


if __name__ == "__main__":  # a checkpoint's writer processes import this file again
    what, comma, _ = sys.argv[1].partition(",")
    is_slow, rank = comma == ",", int(sys.argv[2])
    broken_samples = [int(number) for number in sys.argv[3].split(",")]
    train_step.forward_step = broken_forward_step
    train_step.TrainStep.__call__ = broken_step  # type: ignore[method-assign]
    sys.exit(main(sys.argv[4:]))
