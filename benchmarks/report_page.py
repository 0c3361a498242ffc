"""Time of `nemotron-train report` for many long runs, and the size of its page.

    python benchmarks/report_page.py                      # 20 runs of 100,000 steps
    python benchmarks/report_page.py --runs 4 --steps 10000 --keep /tmp/report_page

Writes synthetic run folders (the same metrics as a run of the embedded default, expert loads
included), then runs the command in a new process, as a user does. The files are then in the page
cache, as after a run; reading them from a cold disk takes longer. Linux only.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

LAYERS = [f"decoder.layers.{number}" for number in range(7)]
MOE = [*LAYERS[1::3], "mtp.layers.0.mtp_model_layer.layers.1"]
PARTS = ("data", "forward_backward", "gradient_reduce", "optimizer")


def write_run(folder: Path, number: int, num_steps: int) -> None:
    """Writes a synthetic run folder. `number`: seed of its random numbers."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(number)
    losses = 3 + 5 / np.sqrt(1 + np.arange(num_steps) / 50)
    losses += 0.1 * generator.standard_normal(num_steps)
    noise = np.exp(generator.standard_normal((num_steps, 8)))
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, num_steps + 1):
            loss, some = float(losses[step - 1]), noise[step - 1].tolist()
            row = {"step": step, "tokens": 2048 * step, "time": 1.8e9 + step, "loss": loss}
            row |= {
                "lr": 1e-3,
                "grad_norm": some[0],
                "mtp_loss_1": loss + 1,
                "mtp_loss_2": loss + 2,
            }
            row |= {f"max_vio/{layer}": 1 + some[i] / 10 for i, layer in enumerate(MOE)}
            row |= {"max_vio": 1.5, "load_balance_loss": some[4], "zero_weight_gradients": 1.2e5}
            row |= {
                "skipped_updates": 0,
                "tokens_per_second": 1e5 / some[5],
                "step_seconds": some[5],
            }
            row |= {f"step_time/{part}": some[5] / 4 for part in PARTS}
            if step % 100 == 0:
                row |= {f"residual_rms/{layer}": some[6] for layer in LAYERS}
                row |= {f"gradient_norm/{layer}": some[7] for layer in LAYERS}
                row |= {f"expert_load/{layer}": [0.0625] * 16 for layer in MOE}
            if step % 1000 == 0:
                row["validation_loss"] = loss
            file.write(json.dumps(row) + "\n")
    summary = {"finished": True, "validation_loss": loss, "step": num_steps}
    (folder / "summary.json").write_text(json.dumps(summary))


def timed_report(folder: Path) -> tuple[float, float, float]:
    """(wall-clock seconds, CPU seconds, peak memory in GiB) of the report command."""
    command = [sys.executable, "-m", "nemotron_train", "report", str(folder)]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, processor, after.ru_maxrss / 2**20


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--keep", type=Path, help="make the folders here, or use those made before")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        for number in range(arguments.runs):
            run = folder / f"run{number}"
            if not (run / "metrics.jsonl").exists():
                write_run(run, number, arguments.steps)
        size = sum(path.stat().st_size for path in folder.glob("*/metrics.jsonl"))
        cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
        print(
            f"{arguments.runs} runs x {arguments.steps:,} steps, {size / 2**20:,.0f} MiB of lines"
        )
        seconds, processor, memory = timed_report(folder)
        page = (folder / "report.html").stat().st_size / 2**20
        print(f"{seconds:.1f} s, {processor:.1f} s of the processor; {memory:.2f} GiB of memory")
        print(f"page: {page:.1f} MiB")
        print(f"{cores} cores, load {load:.1f} at the beginning")


if __name__ == "__main__":
    main()
