"""Mamba-2 mixer (arXiv 2405.21060) in HybridModel's `mamba_layer` slot, tensor-parallel by
heads and groups over Megatron's parallel linears.

Owns: the parameters and their sharding. Does not own: the arithmetic (`convolution`, `core`,
`gated_norm`). Unlike Megatron's own mixer, it does not need mamba_ssm.

Shapes: S tokens, B rows, H heads of P channels (H*P = inner width), G groups of state size N,
all of this tensor-parallel rank. Under context parallelism (`model.context`) a rank projects,
gates and normalizes its own piece of the sequence. Between these steps, it computes convolution
and state over the whole sequence for some of the heads.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)
from torch import nn

from nemotron_train.config.schema import MambaConfig
from nemotron_train.model.context import HeadExchange
from nemotron_train.model.decode_state import DecodeBatch, MambaState
from nemotron_train.model.documents import PackedDocuments
from nemotron_train.model.mamba.convolution import causal_conv
from nemotron_train.model.mamba.core import ssd
from nemotron_train.model.mamba.decoding import MOST_TOKENS, ssd_steps
from nemotron_train.model.mamba.gated_norm import gated_rms_norm
from nemotron_train.model.mamba.split import split_to_batch_first
from nemotron_train.model.sharding import mark_sharded, split_components
from nemotron_train.platform.bfloat16_products import product_dtype
from nemotron_train.platform.device import parameter_device


@dataclass
class Mamba2MixerSubmodules:
    """The two projections. Their classes decide the precision of each."""

    in_proj: ModuleSpec | type
    out_proj: ModuleSpec | type


class GatedNormWeight(nn.Module):
    """Holds the weight of the gated RMSNorm, so that its parameter name is `norm.weight`."""

    def __init__(self, width: int, dtype: torch.dtype, device: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dtype=dtype, device=device))
        mark_sharded(self.weight, dim=0)


class Mamba2Mixer(MegatronModule):
    """in_proj -> short causal convolution -> SSD -> gated grouped RMSNorm -> out_proj.

    `in_proj` packs [z, x, B, C, dt] in that order, as the published checkpoints do. A_log, D
    and dt_bias are FP32 for every parameter dtype, because they enter exponentials.
    """

    A_log: nn.Parameter
    D: nn.Parameter
    dt_bias: nn.Parameter

    def __init__(
        self,
        config: TransformerConfig,
        submodules: Mamba2MixerSubmodules,
        d_model: int,
        mamba: MambaConfig,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        pp_layer_offset: int = 0,
        name: str | None = None,
    ) -> None:
        super().__init__(config)
        self.mamba = mamba
        self.layer_number = layer_number
        self.tp_group = pg_collection.tp
        num_shards = self.tp_group.size()
        self.num_heads = mamba.heads // num_shards
        self.num_groups = mamba.groups // num_shards
        self.inner_width = self.num_heads * mamba.head_dim
        state_width = self.num_groups * mamba.state_size
        self.conv_components = [self.inner_width, state_width, state_width]
        components = [self.inner_width, *self.conv_components, self.num_heads]
        # x, B, C and dt of a head are exchanged together. z stays: it is used after y is exchanged
        # back.
        states = (self.num_groups, mamba.state_size)
        exchanged = [(self.num_heads, mamba.head_dim), states, states, (self.num_heads, 1)]
        self.exchange = HeadExchange(pg_collection.cp, exchanged)
        full_inner = mamba.heads * mamba.head_dim

        self.in_proj = build_module(
            submodules.in_proj,
            d_model,
            sum(components) * num_shards,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name="fc1",
            tp_group=self.tp_group,
            name=f"{name}.in_proj" if name else None,
        )
        mark_sharded(self.in_proj.weight, dim=0, components=components)

        device = parameter_device(config.use_cpu_initialization)
        conv_width = sum(self.conv_components)
        dtype = config.params_dtype
        self.conv_weight = nn.Parameter(
            torch.empty(conv_width, mamba.conv_kernel_size, dtype=dtype, device=device)
        )
        self.conv_bias = nn.Parameter(torch.empty(conv_width, dtype=dtype, device=device))
        mark_sharded(self.conv_weight, dim=0, components=self.conv_components)
        mark_sharded(self.conv_bias, dim=0, components=self.conv_components)
        for parameter_name in ("A_log", "D", "dt_bias"):
            parameter = nn.Parameter(
                torch.empty(self.num_heads, dtype=torch.float32, device=device)
            )
            mark_sharded(parameter, dim=0)
            self.register_parameter(parameter_name, parameter)
        self.norm = GatedNormWeight(self.inner_width, dtype, device)

        self.out_proj = build_module(
            submodules.out_proj,
            full_inner,
            d_model,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            is_expert=False,
            tp_comm_buffer_name="fc2",
            tp_group=self.tp_group,
            name=f"{name}.out_proj" if name else None,
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        inference_context: object | None = None,
        packed_seq_params: PackedDocuments | DecodeBatch | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_states [S,B,hidden] (this rank's shard of S under sequence parallelism) -> the
        same shape, and no bias. `packed_seq_params`: the documents, or a decode batch."""
        zxbcdt_SBF, _ = self.in_proj(hidden_states)
        if isinstance(packed_seq_params, DecodeBatch):
            return self.out_proj(self._mix_new(zxbcdt_SBF, packed_seq_params))
        documents_BS = packed_seq_params.ids_or_none if packed_seq_params is not None else None
        return self.out_proj(self.mix(zxbcdt_SBF, documents_BS))

    def mix(self, zxbcdt_SBF: torch.Tensor, documents_BS: torch.Tensor | None) -> torch.Tensor:
        """Everything between the projections: [S,B,F] -> [S,B,inner width]. Selective recomputation
        runs this method again: it costs few FLOPs for the memory it saves."""
        widths = [self.inner_width, sum(self.conv_components), self.num_heads]
        if self.exchange.num_ranks == 1:
            z_BSI, xbc_BSC, dt_BSH = split_to_batch_first(zxbcdt_SBF, widths)
            y_BSI = self._mix_tokens(xbc_BSC, dt_BSH, documents_BS)
        else:
            z_BSI, y_BSI = self._mix_over_ranks(zxbcdt_SBF, documents_BS)
        return self._gated(y_BSI, z_BSI).transpose(0, 1)

    def _gated(self, y_BSI: torch.Tensor, z_BSI: torch.Tensor) -> torch.Tensor:
        """The gated norm over each group's channels."""
        return gated_rms_norm(
            y_BSI,
            z_BSI,
            self.norm.weight,
            group_size=self.inner_width // self.num_groups,
            epsilon=self.config.layernorm_epsilon,
        )

    def _mix_over_ranks(
        self, zxbcdt_SBF: torch.Tensor, documents_BS: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """z and y of this rank's piece of the sequence, [B,s,I]. y is computed on the rank that has
        the whole sequence of a head, and exchanged back before the norm, since a group of the norm
        may be spread over several ranks until then. COLLECTIVE."""
        z, *parts = zxbcdt_SBF.split(
            [self.inner_width, *self.conv_components, self.num_heads], dim=-1
        )
        widths = self.exchange.widths
        xbc_BSC, dt_BSH = split_to_batch_first(
            self.exchange.to_heads(*parts), [sum(widths[:-1]), widths[-1]]
        )
        y_BSI = self._mix_tokens(xbc_BSC, dt_BSH, documents_BS)
        return z.transpose(0, 1), self.exchange.to_tokens(y_BSI.transpose(0, 1)).transpose(0, 1)

    def _mix_tokens(
        self, xbc_BSC: torch.Tensor, dt_BSH: torch.Tensor, documents_BS: torch.Tensor | None
    ) -> torch.Tensor:
        """Convolution and state over whole sequences, for this context-parallel rank's heads."""
        local = self.exchange.own
        xbc_BSC = causal_conv(
            xbc_BSC,
            local(self.conv_weight, [0, 1, 2]),
            local(self.conv_bias, [0, 1, 2]),
            document_ids_BS=documents_BS,
        )
        y_BSHP = ssd(
            *self._operands(xbc_BSC, dt_BSH),
            chunk_size=self.mamba.chunk_size,
            document_ids_BS=documents_BS,
        )
        return y_BSHP.flatten(2).to(xbc_BSC.dtype)

    def _operands(self, xbc_BSC: torch.Tensor, dt_BSH: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """x, dt, A, B, C and D, the arguments of `ssd`, from the convolution's output."""
        mamba, local = self.mamba, self.exchange.own
        *components, num_heads = self.exchange.widths
        xbc_BSC = xbc_BSC.to(product_dtype(xbc_BSC))
        x_BSI, B_BSK, C_BSK = torch.split(xbc_BSC, components, dim=-1)
        dt_BSH = F.softplus(dt_BSH.float() + local(self.dt_bias, [3]))
        if mamba.dt_limit_min > 0.0 or mamba.dt_limit_max < float("inf"):
            dt_BSH = dt_BSH.clamp(mamba.dt_limit_min, mamba.dt_limit_max)
        num_groups = components[1] // mamba.state_size
        return (
            x_BSI.unflatten(-1, (num_heads, mamba.head_dim)),
            dt_BSH,
            -torch.exp(local(self.A_log, [3])),
            B_BSK.unflatten(-1, (num_groups, mamba.state_size)),
            C_BSK.unflatten(-1, (num_groups, mamba.state_size)),
            local(self.D, [3]),
        )

    def _mix_new(self, zxbcdt_T1F: torch.Tensor, batch: DecodeBatch) -> torch.Tensor:
        """`mix` for a decode batch, starting from the states of the earlier tokens and updating
        them: [T,1,F] -> [T,1,inner width]."""
        assert self.exchange.num_ranks == 1, "generation cuts no sequence"
        widths = [self.inner_width, sum(self.conv_components), self.num_heads]
        z_T1I, xbc_T1C, dt_T1H = zxbcdt_T1F.split(widths, dim=-1)
        xbc_BnC, dt_BnH = batch.to_padded(xbc_T1C), batch.to_padded(dt_T1H)
        state = self.state_of(batch, xbc_BnC)
        y_BnC = causal_conv(xbc_BnC, self.conv_weight, self.conv_bias, initial_BKC=state.window_BKC)
        state.update_window(torch.cat([state.window_BKC, xbc_BnC], dim=1), batch)
        x, dt, A, B, C, D = self._operands(y_BnC, dt_BnH)
        is_token_Bn1 = batch.is_token_Bn1()
        if is_token_Bn1 is not None:
            dt = dt * is_token_Bn1  # dt = 0: padding does not change the state
        if batch.max_new <= MOST_TOKENS or batch.speculative:
            y_BnHP, steps = ssd_steps(x, dt, A, B, C, D, state.ssm_BHPN)
            state.record_states(steps, batch)
        else:
            y_BnHP, state.ssm_BHPN = ssd(
                x,
                dt,
                A,
                B,
                C,
                D,
                chunk_size=self.mamba.chunk_size,
                initial_state_BHPN=state.ssm_BHPN,
                return_final_state=True,
            )
        y_1TI = batch.to_packed(y_BnHP.flatten(2).to(zxbcdt_T1F.dtype)).transpose(0, 1)
        return self._gated(y_1TI, z_T1I.transpose(0, 1)).transpose(0, 1)

    def state_of(self, batch: DecodeBatch, like: torch.Tensor) -> MambaState:
        """This layer's state; zeros before the first token. `like` gives the device, and the dtype
        of the convolution window (the SSM state is FP32)."""
        state = batch.states.mamba.get(self.layer_number)
        if state is None:
            mamba, num_rows = self.mamba, len(batch.counts)
            shape = (num_rows, self.num_heads, mamba.head_dim, mamba.state_size)
            window = (num_rows, mamba.conv_kernel_size - 1, sum(self.conv_components))
            ssm = torch.zeros(shape, dtype=torch.float32, device=like.device)
            state = MambaState(ssm, like.new_zeros(window))
            batch.states.mamba[self.layer_number] = state
        return state

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Megatron's sharded state dict. The components of packed tensors are stored separately, so
        that a checkpoint loads under another tensor-parallel size."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        direct: dict[str, torch.Tensor] = {}  # this module's parameters, without its children's
        self._save_to_state_dict(direct, "", keep_vars=True)
        sharded = make_sharded_tensors_for_checkpoint(
            direct,
            prefix,
            tensor_parallel_layers_axis_map=dict.fromkeys(direct, 0),
            sharded_offsets=sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        for name, module in self.named_children():
            if name == "norm":
                child = make_sharded_tensors_for_checkpoint(
                    module.state_dict(prefix="", keep_vars=True),
                    f"{prefix}norm.",
                    {"weight": 0},
                    sharded_offsets,
                    tp_group=self.tp_group,
                    dp_cp_group=metadata["dp_cp_group"],
                )
            else:
                child = sharded_state_dict_default(
                    module, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=self.tp_group
                )
            sharded.update(child)
        packed = {
            "in_proj.weight": (self.in_proj.weight, "zxBCt"),
            "conv_weight": (self.conv_weight, "xBC"),
            "conv_bias": (self.conv_bias, "xBC"),
        }
        for name, (parameter, component_names) in packed.items():
            sharded[f"{prefix}{name}"] = split_components(
                sharded[f"{prefix}{name}"], parameter, component_names
            )
        return sharded
