"""Layers of an encoder-decoder in one chain of layers, as megatron-core's pipelines run it.

Between pipeline chunks travels one tensor, [encoder's tokens; decoder's tokens] of a sample: an
encoder layer changes the first part and keeps the embedded decoder tokens for later, a decoder
layer changes the second part and keeps the encoder's output, its context. So every schedule and any
split into stages works, and a stage may hold the end of the encoder and the start of the decoder.
Inside a chunk the two parts are the layers' ``hidden_states`` and ``context``. Under sequence
parallelism a tensor rank holds its share of each part.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_layer import TransformerLayer

from moetron.moe.config.bridge import ModelConfig
from moetron.moe.encoder_decoder.relative_bias import RelativeBiases
from moetron.moe.encoder_decoder.segments import Pairs, Segments
from moetron.moe.layers.ffn import SequentialFfnLayer


@dataclass
class StackInputs:
    """Inputs of all layers for one micro-batch."""

    biases: RelativeBiases
    lengths: dict[str, int]
    """Tokens of a sample in "encoder" and "decoder", over all tensor ranks."""
    tensor_ranks: int
    """Ranks that split the tokens: of the tensor group under sequence parallelism, else 1."""
    tensor_rank: int
    segments: Segments | None
    recomputes: bool
    """Make the biases anew in each layer, so that a recomputed layer's gradient reaches them."""
    made: dict[str, torch.Tensor]
    """Biases by stack."""

    def bias(self, stack: str) -> torch.Tensor:
        """Return the biases of a stack's self-attention."""
        length = self.lengths[stack] if self.segments is None else self.segments.longest[stack]
        if self.recomputes:
            return self.biases(stack, length)
        if stack not in self.made:
            self.made[stack] = self.biases(stack, length)
        return self.made[stack]

    def pairs(self, attention: str) -> list[Pairs] | None:
        """Return who sees whom in "encoder", "decoder" or "cross" attention."""
        return None if self.segments is None else self.segments.pairs[attention]

    def padding(self, stack: str) -> torch.Tensor | None:
        """Return this rank's padding, bool [b, s], for routers."""
        padding = None if self.segments is None else self.segments.padding[stack]
        if padding is None:
            return None
        return padding.chunk(self.tensor_ranks, dim=1)[self.tensor_rank]

    def split(self, joined: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the encoder's and the decoder's part of [s, b, H]."""
        encoder, decoder = joined.split([n // self.tensor_ranks for n in self.lengths.values()])
        return encoder, decoder


class StackLayer(TransformerLayer):
    """A layer of one stack.

    Args:
        config: megatron-core's.
        submodules: of ``TransformerLayer``; an encoder's have no cross-attention.
        args: of the base class, as are ``kwargs``.
        stack: "encoder" or "decoder".
        ends: whether it is the last layer of its stack.
        joins: whether it is the last layer of its chunk, and another chunk follows.
    """

    def __init__(
        self,
        config: ModelConfig,
        submodules: Any,
        *args: Any,
        stack: str,
        ends: bool,
        joins: bool,
        **kwargs: Any,
    ) -> None:
        super().__init__(_config_of(config, stack), submodules, *args, **kwargs)
        self.stack, self.ends, self.joins = stack, ends, joins
        if stack == "encoder" and ends:
            self.final_layernorm = build_module(
                submodules.input_layernorm,
                config=config,
                hidden_size=config.hidden_size,
                eps=config.layernorm_epsilon,
            )

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: None = None,
        context: torch.Tensor | None = None,
        context_mask: None = None,
        rotary_pos_emb: None = None,
        attention_bias: StackInputs | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the layer on its part of ``hidden_states``; return both parts as the next needs them.

        Args:
            hidden_states: this stack's tokens [s, b, H], or both parts at the start of a chunk.
            attention_mask: None.
            context: the other part; None at the start of a chunk.
            context_mask: None.
            rotary_pos_emb: None.
            attention_bias: the inputs of all layers; the only argument that megatron-core's block
                passes on untouched.
            kwargs: of ``TransformerLayer``.
        """
        inputs = attention_bias
        assert inputs is not None
        if context is None:
            parts = inputs.split(hidden_states)
            encoder, decoder = parts
        elif self.stack == "encoder":
            encoder, decoder = hidden_states, context
        else:
            encoder, decoder = context, hidden_states
        if self.stack == "decoder":
            decoder = self._run(decoder, encoder, inputs, kwargs)
            if self.joins:
                return torch.cat([encoder, decoder]), None
            return decoder, encoder
        encoder = self._run(encoder, None, inputs, kwargs)
        if self.ends:
            encoder = self.final_layernorm(encoder)
        if self.joins:
            return torch.cat([encoder, decoder]), None
        return (decoder, encoder) if self.ends else (encoder, decoder)

    def _run(
        self,
        hidden_states: torch.Tensor,
        context: torch.Tensor | None,
        inputs: StackInputs,
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        kwargs = {**kwargs, "padding_mask": inputs.padding(self.stack)}
        output: torch.Tensor = super().forward(
            hidden_states,
            attention_mask=inputs.pairs(self.stack),
            context=context,
            context_mask=inputs.pairs("cross"),
            attention_bias=inputs.bias(self.stack),
            **kwargs,
        )[0]
        return output


class SequentialFfnStackLayer(StackLayer, SequentialFfnLayer):
    """The same with a dense FFN after the experts."""


def _config_of(config: ModelConfig, stack: str) -> ModelConfig:
    """Return the configuration of a stack's layers: the encoder may have its own capacity."""
    if stack == "decoder" or config.moe_expert_capacity_factor is None:
        return config
    own = copy.copy(config)
    if config.moe_encoder_capacity_factor is not None:
        own.moe_expert_capacity_factor = config.moe_encoder_capacity_factor
        own.moe_eval_capacity_factor = None
    if config.moe_encoder_eval_capacity_factor is not None:
        own.moe_eval_capacity_factor = config.moe_encoder_eval_capacity_factor
    return own
