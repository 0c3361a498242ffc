"""`python -m tests.platform.pretend.run VERB ... [--- VERB ...]`: verbs of nemotron-train, one
after the other, on a pretended device. Ends with the exit code of the last.

Environment: PRETEND_DEVICE=NAME and PRETEND_CAPABILITY=9.0 choose the device (default: an H200);
PRETEND_CONVOLUTION=1 puts the stand-in of causal_conv1d on the path, PRETEND_TRANSFORMER_ENGINE=1
the real Transformer Engine with a stand-in for its C++ half, PRETEND_MAMBA=1 (with
TRITON_INTERPRET=1) the real mamba_ssm; TRITON_INTERPRET=1 lets our Triton kernels compute, under
Triton's interpreter; PRETEND_PORTS has a port for each verb's ranks to meet at; PRETEND_REPORT=FILE
gets a JSON list of {verb, exit, waits, copies, mismatches, by_line, operators, launches} for the
first rank. Process groups are gloo underneath and say nccl.
"""

import contextlib
import copy
import json
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import _disable_current_modes

from tests.platform.pretend import device, python_view


def main(words: list[str]) -> int:
    """Run the verbs; returns the last exit code."""
    name = os.environ.get("PRETEND_DEVICE", "NVIDIA H200")
    major, minor = os.environ.get("PRETEND_CAPABILITY", "9.0").split(".")
    python_view.install(name, (int(major), int(minor)))
    call_gloo_nccl()
    torch.set_num_threads(1)
    if os.environ.get("TRITON_INTERPRET"):
        _launch_kernels_on_host()
    if os.environ.get("PRETEND_CONVOLUTION"):
        from tests.platform.pretend import causal_conv1d

        sys.modules["causal_conv1d"] = causal_conv1d
    if os.environ.get("PRETEND_MAMBA"):
        from nemotron_train.kernels.triton import available
        from tests.platform.pretend import interpreter, packages

        interpreter.install()
        packages.put_on_path("mamba_ssm")
        available.can_use = lambda *tensors: False  # ours would be interpreted, too, and take long
    if os.environ.get("PRETEND_TRANSFORMER_ENGINE"):
        from tests.platform.transformer_engine import stand_in

        stand_in.install()
    from nemotron_train.cli.main import main as run_verb

    records, code = [], 0
    ports = os.environ.get("PRETEND_PORTS", "").split()
    for verb in _split(words):
        if ports:  # the store of the verb before may still hold its port
            os.environ["MASTER_PORT"] = ports.pop()
        device.STATE.clear()
        given = set(os.environ)
        code = run_verb(verb)
        for variable in set(os.environ) - given:
            if variable.startswith("NVTE_"):  # the next verb would take it for the user's
                del os.environ[variable]
        records.append({"verb": verb, "exit": code} | copy.deepcopy(vars(device.STATE)))
    report = os.environ.get("PRETEND_REPORT")
    if report and os.environ.get("RANK", "0") == "0":
        Path(report).write_text(json.dumps(records))
    return code


def _launch_kernels_on_host() -> None:
    """The interpreter's own copies between host and device are neither waits nor mismatches."""
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def counted(executor: Any, *arguments: Any, **options: Any) -> None:
        device.STATE.launches[executor.fn.__name__] += 1
        tensors = [t for t in arguments if isinstance(t, torch.Tensor)]
        wrong = [t for t in tensors if not device.on_cuda(t)]
        if wrong:  # a GPU would read an address of the host
            device.refuse(f"kernel {executor.fn.__name__}: CPU tensors {[t.shape for t in wrong]}")
        with _disable_current_modes():
            launch(executor, *arguments, **options)

    GridExecutor.__call__ = counted  # type: ignore[method-assign]


def _split(words: list[str]) -> list[list[str]]:
    verbs: list[list[str]] = [[]]
    for word in words:
        if word == "---":
            verbs.append([])
        else:
            verbs[-1].append(word)
    return verbs


def call_gloo_nccl() -> None:
    """Groups asked for as nccl run on gloo. Groups asked for as gloo are remembered, because only
    they may be given CPU tensors."""
    init_process_group, new_group = dist.init_process_group, dist.new_group
    groups = dist.distributed_c10d

    def init(backend: str | None = None, *args: Any, **kwargs: Any) -> Any:
        assert backend == "nccl", backend
        kwargs.pop("device_id", None)  # gloo refuses one
        return init_process_group("gloo", *args, **kwargs)

    def make(*args: Any, backend: str | None = None, **kwargs: Any) -> Any:
        group: Any = new_group(*args, **kwargs)
        if backend == "gloo" and hasattr(group, "group_name"):
            device.GLOO_GROUPS.add(group.group_name)
        return group

    def is_gloo(group: Any) -> bool:
        return group is not None and getattr(group, "group_name", "") in device.GLOO_GROUPS

    def device_of(group: Any = None) -> torch.device:
        return device.CPU if is_gloo(group) else device.CUDA

    @contextlib.contextmanager
    def one_by_one(*args: Any, **kwargs: Any) -> Iterator[Any]:
        yield types.SimpleNamespace(wait=lambda: None)

    dist.init_process_group = init
    dist._coalescing_manager = one_by_one  # gloo has no grouped collectives
    dist.new_group = make
    dist.get_backend = lambda group=None: "gloo" if is_gloo(group) else "nccl"
    groups._get_object_coll_device = lambda group=None: str(device_of(group))
    groups._get_pg_default_device = device_of


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
