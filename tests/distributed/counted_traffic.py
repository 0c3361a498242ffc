"""A rank of one training step that counts the data it passes to torch.distributed. Run by
test_communication.py: `counted_traffic.py OUT OVERRIDE ...`, writes OUT/rank-R.json.

Every collective of torch.distributed is wrapped before Megatron-Core is imported, so that names
imported by value are wrapped too. A call is charged to its group and to the kind of collective,
with the convention of plan.cost.communication: the input counts, for gathers the output.
"""

import functools
import inspect
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

# Function: kind, and the argument whose bytes count.
COUNTED = {
    "all_reduce": ("all-reduce", "tensor"),
    "all_gather_into_tensor": ("all-gather", "output_tensor"),
    "_all_gather_base": ("all-gather", "output_tensor"),
    "all_gather": ("all-gather", "tensor_list"),
    "reduce_scatter_tensor": ("reduce-scatter", "input"),
    "_reduce_scatter_base": ("reduce-scatter", "input"),
    "reduce_scatter": ("reduce-scatter", "input_list"),
    "all_to_all_single": ("all-to-all", "input"),
    "all_to_all": ("all-to-all", "input_tensor_list"),
    "isend": ("send", "tensor"),
    "send": ("send", "tensor"),
    "broadcast": ("broadcast", "tensor"),
}


class Counter:
    """The calls since the last `clear`, without those inside another counted call. Each has its
    kind, the ranks of its group, its bytes and the dtype of its elements."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self._inside = False

    def wrap(self, name: str) -> None:
        kind, argument = COUNTED[name]
        original: Callable = getattr(distributed_c10d, name)
        signature = inspect.signature(original)

        @functools.wraps(original)
        def counted(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return original(*args, **kwargs)
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            self._note(kind, bound.arguments[argument], bound.arguments["group"])
            self._inside = True
            try:
                return original(*args, **kwargs)
            finally:
                self._inside = False

        setattr(distributed_c10d, name, counted)
        setattr(dist, name, counted)

    def _note(self, kind: str, payload: Any, group: dist.ProcessGroup | None) -> None:
        group = group or dist.group.WORLD
        tensors = payload if isinstance(payload, list) else [payload]
        frame = next(
            f for f in inspect.stack()[2:] if f.filename != __file__ and "torch/" not in f.filename
        )
        self.calls.append(
            {
                "kind": kind,
                "group": id(group),
                "size": dist.get_world_size(group),
                "bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
                "dtype": str(tensors[0].dtype).removeprefix("torch."),
                "caller": f"{frame.filename.split('site-packages/')[-1]}:{frame.function}",
            }
        )


def main(out: Path, overrides: list[str]) -> None:
    counter = Counter()
    for name in COUNTED:
        counter.wrap(name)

    from benchmarks.memory import MODEL, Run
    from nemotron_train.compose.compose import compose_config

    torch.set_num_threads(1)
    run = Run(compose_config([*MODEL, *overrides]))

    def mark(name: str) -> None:
        if name == "step_1":
            counter.calls.clear()

    run.steps(2, mark)
    names = ("tp", "pp", "cp", "ep", "expt_tp", "dp_cp", "expt_dp", "embd")
    named: dict[int, list[str]] = {id(dist.group.WORLD): ["world"]}
    for name in names:
        group = getattr(run.groups, name, None)
        if group is not None:
            named.setdefault(id(group), []).append(name)
    for call in counter.calls:
        call["group"] = named.get(call["group"], ["other"])
    rank = os.environ["RANK"]
    (out / f"rank-{rank}.json").write_text(json.dumps(counter.calls), encoding="utf-8")
    from nemotron_train.platform import groups

    groups.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
