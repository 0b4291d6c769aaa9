"""OpenMoE's feed-forward blocks: the double-gated unit, and a dense FFN after the experts."""

import copy
from typing import Any

import torch
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch.distributed import ProcessGroup


class DoubleGatedMLP(MLP):
    """down((silu(gate x) * up x) * linear x): flaxformer's MLP with activations (swiglu, linear).

    Replaces megatron-core's ``MLP``; ``linear_fc1`` holds gate and up, and ``linear_fc1_linear``
    [F, H] the third matrix, split over tensor ranks in the same way. 4 H F parameters (OpenMoE's
    flaxformer, t5/dense.py; the paper's own count has three matrices).

    Args:
        config: megatron-core's, of a gated unit without biases.
        submodules: ``linear_fc1`` builds both inner layers.
        is_expert: must be False: experts of this kind are grouped (expert_variants.py).
        input_size: as in ``MLP``.
        ffn_hidden_size: F; unset: the configuration's.
        tp_group: tensor ranks; unset: megatron's.
        named: ``name``, which megatron-core 0.19 passes.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        is_expert: bool = False,
        input_size: int | None = None,
        ffn_hidden_size: int | None = None,
        tp_group: ProcessGroup | None = None,
        **named: Any,
    ) -> None:
        assert not is_expert and config.gated_linear_unit and not config.add_bias_linear
        width = ffn_hidden_size or config.ffn_hidden_size
        super().__init__(config, submodules, False, input_size, width, tp_group, **named)
        self.linear_fc1_linear = build_module(
            submodules.linear_fc1,
            self.input_size,
            width,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=True,
            is_expert=False,
            tp_comm_buffer_name="fc1",
            tp_group=tp_group,
        )

    def forward(
        self, hidden_states: torch.Tensor, per_token_scale: torch.Tensor | None = None, **_: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Map [s, b, H] to [s, b, H]; no bias."""
        assert per_token_scale is None
        gate, up = self.linear_fc1(hidden_states)[0].chunk(2, dim=-1)
        linear = self.linear_fc1_linear(hidden_states)[0]
        output: tuple[torch.Tensor, torch.Tensor | None] = self.linear_fc2(
            self.config.activation_func(gate) * up * linear
        )
        return output


class DoubleGatedSharedExpertMLP(SharedExpertMLP, DoubleGatedMLP):
    """Double-gated shared experts: OpenMoE's extra FFN beside the experts (paper, Eq 4)."""


class SequentialFfnLayer(TransformerLayer):
    """A layer whose experts are followed by a dense FFN: x += MoE(norm x), then x += FFN(norm' x).

    OpenMoE's code (flaxformer, ``extra_mlp`` and ``pre_extra_mlp_layernorm``), and ST-MoE's
    sparse-dense stack (arXiv 2202.08906, appendix C).

    Args:
        config: megatron-core's.
        submodules: of ``TransformerLayer``.
        extra_mlp: class of the FFN.
        extra_submodules: its linear layers.
        ffn_hidden_size: its width.
        args: of ``TransformerLayer``, as are ``kwargs``.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: Any,
        *args: Any,
        extra_mlp: type[MLP],
        extra_submodules: MLPSubmodules,
        ffn_hidden_size: int,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, submodules, *args, **kwargs)
        self.pre_extra_mlp_layernorm = build_module(
            submodules.pre_mlp_layernorm,
            config=config,
            hidden_size=config.hidden_size,
            eps=config.layernorm_epsilon,
        )
        dense = copy.copy(config)
        dense.ffn_hidden_size = ffn_hidden_size
        self.extra_mlp = extra_mlp(dense, extra_submodules, tp_group=self.pg_collection.tp)

    def _forward_mlp(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        after_experts = super()._forward_mlp(hidden_states, *args, **kwargs)
        output_with_bias = self.extra_mlp(self.pre_extra_mlp_layernorm(after_experts))
        result: torch.Tensor = self._forward_post_mlp(output_with_bias, after_experts)
        return result
