"""`python -m tests.platform.transformer_engine.tree OUTPUT PLAN...`: build the small native model
of tests/precision on a pretended B200 from Transformer Engine's real classes, once a plan, take one
forward and backward pass, and write what was built and the formats read back as JSON.
"""

import inspect
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from tests.platform.pretend import python_view, run
from tests.platform.transformer_engine import stand_in


def main(output: Path, plans: list[str]) -> None:
    """output: the JSON file."""
    python_view.install("NVIDIA B200", (10, 0))
    run.call_gloo_nccl()
    stand_in.install()
    from nemotron_train.platform import packages
    from nemotron_train.platform.device import prepare, with_packages

    torch.set_num_threads(1)
    platform = with_packages(prepare(1), packages.problems(["mamba_ssm", "causal_conv1d"]))
    assert platform.transformer_engine, packages.problems([])
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from nemotron_train.config.schema import ParallelConfig
    from nemotron_train.platform import groups as process_groups

    groups = process_groups.start(ParallelConfig(), "nccl")
    model_parallel_cuda_manual_seed(1234)
    found: dict[str, Any] = {plan: one_plan(plan, platform, groups) for plan in plans}
    output.write_text(json.dumps({"plans": found, "wrong_arity": wrong_arity()}))
    process_groups.stop()


def wrong_arity() -> list[str]:
    """Reference functions that take another number of arguments than the C++ function."""
    module = sys.modules[stand_in.NAME]
    return [
        name
        for name, form in stand_in.forms().items()
        if not _takes(form, len(getattr(module, name).signature.parameters))
    ]


def _takes(form: Any, number: int) -> bool:
    try:
        inspect.signature(form).bind(*range(number))
    except TypeError:
        return False
    return True


def one_plan(plan: str, platform: Any, groups: Any) -> dict[str, Any]:
    """The backend that is chosen and, if it is the native one, the model's classes and formats."""
    from nemotron_train.assemble.build import build_model
    from nemotron_train.plan.backend import choose_backend
    from nemotron_train.plan.guards import Surroundings
    from nemotron_train.plan.precision.resolve import resolve_plan
    from nemotron_train.platform import device
    from nemotron_train.precision.native import NativePrecision, executed_format
    from tests.precision.native_run import batch, small

    config = small(plan, "optim.decay_tokens=256")  # some plans follow the decay
    resolved = resolve_plan(config)
    choice = choose_backend(config, resolved, Surroundings(device.hardware(platform)))
    found: dict[str, Any] = {"native": choice.native, "text": choice.text}
    if not choice.native:
        return found
    os.environ.update(choice.environment)
    model = build_model(config, resolved, platform, groups, native=True)
    control = NativePrecision([model], resolved)  # raises if a module is not set to the plan
    formats = resolved.at(0).formats
    found["plan"] = {path: formats[path].fprop for path in control._linears}
    found["set"] = control.attached()
    stand_in.CALLS.clear()
    model(**{name: tensor.to("cuda") for name, tensor in batch().items()}).sum().backward()
    found["ran"] = {path: executed_format(module) for path, module in control._linears.items()}
    found["classes"] = Counter(
        f"{type(module).__module__.partition('.')[0]}.{type(module).__name__}"
        for module in model.modules()
    )
    found["devices"] = sorted({p.device.type for p in model.parameters()})
    found["calls"] = dict(stand_in.CALLS)
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
