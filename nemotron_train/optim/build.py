"""AdamW through Megatron-Core's optimizers: FP32 master weights and state, sharded over the
data-parallel ranks if `parallel.distributed_optimizer` is set.

Weight decay applies to matrices only, not to norms, biases, A_log, D and dt_bias.
"""

from collections.abc import Sequence

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    ParamKey,
    get_megatron_optimizer,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from megatron.core.process_groups_config import ProcessGroupCollection

from nemotron_train.config.schema import Config
from nemotron_train.optim.sharded_state import stream_state
from nemotron_train.platform.device import TORCH_DTYPES, Platform

# Suffixes of the names of parameters without weight decay.
UNDECAYED = (".bias", "conv_bias", "A_log", ".D", "dt_bias")


def decays(name: str, num_dims: int) -> bool:
    """Whether weight decay applies to the parameter `name` with `num_dims` dimensions."""
    return num_dims > 1 and not name.endswith(UNDECAYED)


def build_optimizer(
    config: Config,
    model: Sequence[DistributedDataParallel],
    groups: ProcessGroupCollection,
    platform: Platform,
) -> MegatronOptimizer:
    """Build AdamW for all parameters of `model` on this rank."""
    dtype = TORCH_DTYPES[config.precision.parameter_dtype]
    optim = config.optim
    undecayed = ParamKey(
        with_name_predicate=ParamWithNamePredicate(
            name="undecayed", fn=lambda parameter, name: not decays(name, parameter.dim())
        )
    )
    # UPSTREAM(megatron-core 0.19.2): the distributed optimizer mixes up the order of FP32 and BF16
    # parameters in the same group. The override below repeats optimizer="adam", which changes
    # nothing but puts them into separate groups.
    kept_wide = ParamKey(
        with_name_predicate=ParamWithNamePredicate(
            name="kept_wide", fn=lambda parameter, name: parameter.dtype != dtype
        )
    )
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=optim.peak_learning_rate,
            min_lr=optim.min_learning_rate,
            weight_decay=optim.weight_decay,
            adam_beta1=optim.beta1,
            adam_beta2=optim.beta2,
            adam_eps=optim.epsilon,
            clip_grad=optim.clip_grad_norm,
            bf16=config.precision.parameter_dtype == "bfloat16",
            params_dtype=dtype,
            use_distributed_optimizer=config.parallel.distributed_optimizer,
            overlap_param_gather=config.parallel.overlap_parameter_gather,
            log_num_zeros_in_grad=True,
        ),
        list(model),
        config_overrides={
            undecayed: ParamGroupOverride(wd_mult=0.0),
            kept_wide: ParamGroupOverride(optimizer="adam"),
        },
        use_gloo_process_groups=False,
        pg_collection=groups,
    )
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part.optimizer, torch.optim.AdamW):
            # Without fused=True torch's AdamW loops over tensors on a CPU, and on a GPU it runs a
            # dozen kernels over lists of tensors.
            if platform.device == "cpu" or platform.switches.fused_adamw:
                for group in part.optimizer.param_groups:
                    group["fused"] = True
                    group["foreach"] = False
            _make_loadable(part, part.optimizer)
    stream_state(optimizer)
    return optimizer


def _make_loadable(part: MegatronOptimizer, inner: torch.optim.AdamW) -> None:
    """Make the distributed optimizer able to load a checkpoint into torch's AdamW.

    UPSTREAM(megatron-core 0.19.2): it cannot list the tensors to load before torch's optimizer has
    a `step` for every parameter. Then it expects a `step` among the loaded tensors, but the
    checkpoint has none there: `step` is restored with the parameter groups.
    """
    if len(inner.state) == 0:
        for group in inner.param_groups:
            for parameter in group["params"]:
                # The fused kernel counts steps on the parameter's device.
                device = parameter.device if inner.param_groups[0].get("fused") else None
                inner.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
    if isinstance(part, DistributedOptimizer):
        set_states = part._set_main_param_and_optimizer_states

        def set_states_without_step(model_param: object, tensors: dict) -> None:
            set_states(model_param, {"step": None, **tensors})

        part._set_main_param_and_optimizer_states = set_states_without_step


def _with_current_groups(parts: Sequence[DistributedOptimizer], state: dict) -> dict:
    """The loaded `state` with the parameter groups of these optimizers and the saved step count.

    UPSTREAM(megatron-core 0.19.2): saved groups are matched by their hyperparameters. The match
    fails for a checkpoint with another peak learning rate, with FP32 parameters (no "kept_wide"
    group) or with another layout (experts sharded over other ranks than the dense parameters have
    an optimizer of their own). The tensors are stored by name and fit anyway.
    """
    saved = state if "optimizer" in state else state[0]
    (step,) = {group["step"] for group in saved["optimizer"]["param_groups"]}
    states = {}
    for number, part in enumerate(parts):
        groups = part.optimizer.state_dict()["param_groups"]
        states[number] = {
            "optimizer": {"param_groups": [{**g, "params": [], "step": step} for g in groups]},
            "param_state": (state if len(parts) == 1 else state[number])["param_state"],
            "param_state_sharding_type": saved["param_state_sharding_type"],
        }
    return states[0] if len(parts) == 1 else states


def load_optimizer_state(optimizer: MegatronOptimizer, state: dict) -> None:
    """Load the state that `sharded_state_dict` described: master weights, moments and step count.
    Hyperparameters are those of this run, not those of the checkpoint.

    UPSTREAM(megatron-core 0.19.2): torch's AdamW gets one `step` tensor shared by all
    parameters, and its fused kernel then counts every parameter as a step.
    """
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    if all(isinstance(part, DistributedOptimizer) for part in parts):
        state = _with_current_groups(parts, state)
    optimizer.load_state_dict(state)
    for part in parts:
        if isinstance(part.optimizer, torch.optim.AdamW):
            is_fused = bool(part.optimizer.param_groups[0].get("fused"))
            for parameter, parameter_state in part.optimizer.state.items():
                device = parameter.device if is_fused else "cpu"
                parameter_state["step"] = parameter_state["step"].to(device, copy=True)


def set_learning_rate(optimizer: MegatronOptimizer, rate: float, weight_decay: float) -> None:
    """Set learning rate and weight decay for the next step. A group without weight decay has
    `wd_mult` 0."""
    for group in optimizer.param_groups:
        group["lr"] = rate
        group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)
