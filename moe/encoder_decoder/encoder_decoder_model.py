"""The encoder-decoder as a LanguageModel whose samples hold inputs and targets.

A sample's S tokens are the encoder's, then the decoder's; labels, losses and masks have S positions
too, of which the encoder's have no loss. Shape suffixes: b samples, S positions.
"""

from typing import Any

import torch
import torch.nn.functional as F

from moetron.moe.config.schema import derived
from moetron.moe.config.schema.settings import Settings
from moetron.moe.encoder_decoder.relative_bias import RelativeBiases
from moetron.moe.encoder_decoder.segments import segments_of
from moetron.moe.encoder_decoder.stack_layers import StackInputs
from moetron.moe.layers.language_model import LanguageModel


class EncoderDecoderModel(LanguageModel):
    """T5: one embedding for both stacks, relative biases, logits of the decoder's tokens only.

    With tied embeddings the decoder's output is multiplied by H^-0.5 before the output layer (Mesh
    TensorFlow, T5 1.0).

    Args:
        settings: the full tree.
        chunk: number of this chunk on its rank.
        args: of `LanguageModel`, as are ``kwargs``.
    """

    def __init__(self, *args: Any, settings: Settings, chunk: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lengths = derived.stack_lengths(settings)
        self._recomputes = settings.parallel.recompute_granularity == "full"
        groups = self.pg_collection
        self.relative_biases = RelativeBiases(
            self.config, settings.model, settings.training.seed, groups, chunk
        )
        self._ranks, self._rank = 1, 0
        if self.config.sequence_parallel:
            self._ranks, self._rank = groups.tp.size(), groups.tp.rank()
        if self.post_process and self.share_embeddings_and_output_weights:
            self.output_layer.register_forward_pre_hook(_scale)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        position_ids: Any = None,
        attention_mask: None = None,
        *,
        labels: torch.Tensor | None = None,
        loss_mask: torch.Tensor | None = None,
        segments: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return losses [b, S] (0 in the encoder's positions), or the decoder's logits.

        Args:
            input_ids: [b, S].
            position_ids: ignored.
            attention_mask: None.
            labels: [b, S]; None for logits.
            loss_mask: [b, S].
            segments: examples of a sample's tokens, [b, S]; None: one example, no padding.
        """
        lengths = self._lengths
        inputs = StackInputs(
            biases=self.relative_biases,
            lengths=lengths,
            tensor_ranks=self._ranks,
            tensor_rank=self._rank,
            segments=None if segments is None else segments_of(segments, lengths),
            recomputes=self._recomputes,
            made={},
        )
        first = lengths["encoder"]
        output = super().forward(
            None if input_ids is None else self._interleave(input_ids),
            None,
            None,
            labels=None if labels is None else labels[:, first:],
            loss_mask=None if loss_mask is None else loss_mask[:, first:],
            extra_block_kwargs={"attention_bias": inputs},
        )
        if self.post_process and labels is not None:
            return F.pad(output, (first, 0))
        return output

    def _interleave(self, tokens_bS: torch.Tensor) -> torch.Tensor:
        """Order tokens so that equal parts of them are tensor ranks' shares of both stacks."""
        if self._ranks == 1:
            return tokens_bS
        shares = [
            part.chunk(self._ranks, dim=1)
            for part in tokens_bS.split(list(self._lengths.values()), dim=1)
        ]
        return torch.cat([share for rank in zip(*shares, strict=True) for share in rank], dim=1)


def _scale(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    hidden_states, *others = args
    return (hidden_states * hidden_states.shape[-1] ** -0.5, *others)
