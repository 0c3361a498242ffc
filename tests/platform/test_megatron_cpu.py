"""One canary per patch. It fails once Megatron-Core no longer needs the patch, or no longer has the
patched code. Not covered: a GPU, where no patch is installed.
"""

import importlib
import inspect
import re
import subprocess
import sys
import types
from pathlib import Path

import megatron.core
import pytest
import torch

from nemotron_train.platform import megatron_cpu

SOURCES = Path(megatron.core.__file__).parent
ALL_SOURCE = "\n".join(path.read_text() for path in SOURCES.rglob("*.py"))


def run_without_patches(code: str) -> str:
    """Runs `code` in a process that only imports Megatron-Core. Returns its last error line."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""


@pytest.mark.parametrize("name", sorted(megatron_cpu._cuda_stand_ins()))
def test_stand_in_is_used_by_megatron(name: str) -> None:
    """Megatron-Core still refers to this attribute of torch.cuda."""
    assert re.search(
        rf"torch\.cuda(\.random)?\.{name}\b|from torch\.cuda import.*\b{name}\b", ALL_SOURCE
    )


@pytest.mark.parametrize("module_name", megatron_cpu.MODULES_WITH_CONSTANTS)
def test_constants_are_still_named(module_name: str) -> None:
    """The module's source still refers to CUDA in a function, and no loaded function does."""
    module = importlib.import_module(module_name)
    source = inspect.getsource(module)
    assert any(
        f"'{constant}'" in source or f'"{constant}"' in source for constant in megatron_cpu.RENAMED
    )
    assert megatron_cpu.rename_constants(module) == 0, "everything was renamed at installation"


def test_current_device_fails_without_the_stand_ins() -> None:
    assert run_without_patches("import torch; torch.cuda.current_device()") != ""


def test_host_move_leaves_cpu_tensors_upstream() -> None:
    """Upstream's function ignores `as_numpy` for a tensor that is on the CPU already."""
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    assert token_dispatcher.maybe_move_tensor_to_cpu is megatron_cpu._move_to_host
    source = (SOURCES / "transformer/moe/moe_utils.py").read_text()
    body = source.split("def maybe_move_tensor_to_cpu")[1].split("\ndef ")[0]
    assert "tensor.is_cuda" in body
    assert moe_utils.maybe_move_tensor_to_cpu(torch.ones(2), as_numpy=True).sum() == 2.0


def test_jit_is_off() -> None:
    from megatron.core import jit

    assert jit.jit_fuser is jit.noop_decorator
    assert "torch.compile" in inspect.getsource(jit)
    assert torch.compile.__module__.startswith("torch"), "torch.compile itself is put back"


def test_stack_still_asks_for_transformer_engines_norm() -> None:
    """NemotronStack can go once HybridStack takes its final norm from the spec."""
    from megatron.core.models.hybrid.hybrid_block import HybridStack

    assert "TENorm(" in inspect.getsource(HybridStack.__init__)


def test_moe_layer_still_builds_latent_projections_itself() -> None:
    """LatentMoELayer can shrink once MoELayer takes the projections from its spec."""
    from megatron.core.transformer.moe.moe_layer import MoELayer

    assert "TransformerEngine is required for MoE latent projections" in inspect.getsource(
        MoELayer.__init__
    )


def test_router_still_indexes_mtp_by_its_depths() -> None:
    """SigmoidRouter's own bookkeeping can go once the tracker knows the block's layers."""
    from megatron.core.transformer.moe.router import TopKRouter

    source = inspect.getsource(TopKRouter.attach_and_log_load_balancing_loss)
    assert "num_layers += self.config.mtp_num_layers" in source


def test_optimizer_still_loads_without_steps() -> None:
    """The workarounds in optim.build can go once loading handles torch's AdamW."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    source = inspect.getsource(DistributedOptimizer.load_state_dict)
    assert 's["step"] = step' in source
    assert "tensors[key]" in inspect.getsource(
        DistributedOptimizer._set_main_param_and_optimizer_states
    )


@pytest.mark.parametrize("name", megatron_cpu.WHOLE_BUFFER_COLLECTIVES)
def test_whole_buffer_collectives_are_still_called_in_place(name: str) -> None:
    """Copies go to gloo unless the group has one rank and source and result share memory. Not
    covered: the copy by gloo, which is only slower."""
    from megatron.core.distributed import param_and_grad_buffer

    assert f"{name}(" in inspect.getsource(param_and_grad_buffer)
    calls = []
    collect = megatron_cpu._unless_alone(lambda *args, **options: calls.append(options))
    buffer = torch.zeros(4)
    for size, source in ((1, buffer), (1, buffer.clone()), (2, buffer)):
        group = types.SimpleNamespace(size=lambda size=size: size)
        collect(buffer, source, group=group, async_op=False)
    assert len(calls) == 2 and calls[0]["async_op"] is False


def test_uneven_parts_still_go_to_collectives_that_gloo_lacks() -> None:
    """tests/distributed/test_uneven.py checks that gloo itself refuses uneven parts."""
    source = (SOURCES / "tensor_parallel/mappings.py").read_text()
    assert "torch.distributed.all_gather(output_tensor_list, input_, group=group)" in source
    assert "torch.distributed.reduce_scatter(output, input_tensor_list, group=group)" in source


def test_refused_where_a_gpu_is_present(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(megatron_cpu, "_installed", False)
    with pytest.raises(RuntimeError, match="GPU is present"):
        megatron_cpu.install()
