"""Saves and loads a run's checkpoint repeatedly; prints memory and descriptors as JSON lines.

`cycle.py CYCLES KNOB=VALUE...` trains one step of the run, then cycles. `test_leaks` starts it.
"""

import ctypes
import gc
import json
import os
import sys
from pathlib import Path

import psutil
from rich.console import Console

from nemotron_train.compose.compose import compose_config
from nemotron_train.data.open import open_data
from nemotron_train.plan.derive import derive
from nemotron_train.platform import device
from nemotron_train.run_folder.folder import open_run_folder, run_path


class _Mallinfo2(ctypes.Structure):
    """glibc's struct mallinfo2: ten size_t fields, two of which are read."""

    _fields_ = [
        *((f"before_{number}", ctypes.c_size_t) for number in range(4)),
        ("hblkhd", ctypes.c_size_t),  # in mapped blocks
        *((f"between_{number}", ctypes.c_size_t) for number in range(2)),
        ("uordblks", ctypes.c_size_t),  # in use
        *((f"after_{number}", ctypes.c_size_t) for number in range(2)),
    ]


def heap_in_use() -> int:
    """Bytes allocated and not freed, in all arenas and mapped blocks. Excludes what the allocator
    keeps for later, which grows with the pattern of use."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Mallinfo2
    info = mallinfo2()
    return info.uordblks + info.hblkhd


def main(cycles: int, overrides: list[str]) -> None:
    config = compose_config(overrides)
    derived = derive(config, 1)
    platform = device.prepare(1)
    from nemotron_train.platform import groups as process_groups
    from nemotron_train.train.trainer import Trainer

    train_data, validation_data = open_data(config, print)
    groups = process_groups.start(config.parallel, platform.backend)
    folder = open_run_folder(config, derived, "")
    console = Console(quiet=True)
    data = (train_data, validation_data)
    trainer = Trainer(
        config,
        derived,
        platform,
        groups,
        *data,
        run_path(config),
        console,
        check_held=folder.check_held,
    )
    progress = trainer.train_step(trainer.resume()).progress
    process = psutil.Process()
    for cycle in range(1, cycles + 1):
        path = trainer.checkpoints.save(progress)
        again = trainer.checkpoints.load(Path(path))
        assert again.step == progress.step
        if cycle % 25 == 0:
            gc.collect()
            numbers = {"cycle": cycle, "rss": process.memory_info().rss}
            numbers |= {"heap": heap_in_use()}
            numbers |= {"descriptors": process.num_fds(), "threads": process.num_threads()}
            numbers |= {"children": len(process.children()), "folder": len(os.listdir(path.parent))}
            print(json.dumps(numbers), flush=True)
    process_groups.stop()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
