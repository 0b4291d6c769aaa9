"""Answers that grow in the decoder, over inputs that the encoder reads once.

Shape suffixes: B rows, S positions of the encoder, T of the decoder, H hidden, V vocabulary.
"""

from collections.abc import Sequence

import torch

from moetron.moe.encoder_decoder.encoder_decoder_model import EncoderDecoderModel
from moetron.moe.encoder_decoder.segments import segments_of
from moetron.moe.encoder_decoder.stack_layers import StackInputs


class EncodedBatch:
    """Rows of inputs and of their answers so far; the decoder runs over whole answers each time.

    Args:
        model: in evaluation mode on one rank; experts without capacity, or rows change each other.
        start: first id of every answer, which training put before the targets.
    """

    def __init__(self, model: EncoderDecoderModel, start: int) -> None:
        self._model, self._start = model, start
        self._device = next(model.parameters()).device
        self._encoded_SBH: torch.Tensor | None = None
        self._real_BS = torch.empty(0)  # int64: 1, and 0 for padding
        self._answers: list[list[int]] = []

    def extend(self, new: Sequence[Sequence[int]]) -> torch.Tensor:
        """Append tokens to each row; return the next token's logits [B, padded vocabulary].

        Args:
            new: the inputs of each row, with their end, at first; later one token or more for each
                answer.
        """
        with torch.no_grad():
            if self._encoded_SBH is None:
                self._encode(new)
                new = [[self._start] for _ in new]
            self._answers = [[*a, *b] for a, b in zip(self._answers, new, strict=True)]
            return self._decode()

    def keep(self, places: Sequence[int]) -> None:
        """Drop all rows but those at ``places``."""
        assert self._encoded_SBH is not None
        rows = torch.tensor(places, device=self._device)
        self._encoded_SBH = self._encoded_SBH.index_select(1, rows)
        self._real_BS = self._real_BS[rows]
        self._answers = [self._answers[place] for place in places]

    def _encode(self, rows: Sequence[Sequence[int]]) -> None:
        """Run the encoder's layers over the inputs of all rows, padded at their ends."""
        longest = max(len(row) for row in rows)
        ids_BS = torch.zeros(len(rows), longest, dtype=torch.long)
        self._real_BS = torch.zeros_like(ids_BS, device=self._device)
        for number, row in enumerate(rows):
            ids_BS[number, : len(row)] = torch.tensor(row)
            self._real_BS[number, : len(row)] = 1
        self._answers = [[] for _ in rows]
        self._encoded_SBH = self._run("encoder", ids_BS, ids_BS.new_full((len(rows), 1), 0))

    def _decode(self) -> torch.Tensor:
        """Run the decoder's layers over all answers; return the last position's logits [B, V]."""
        model = self._model
        hidden_TBH = self._run("decoder", torch.tensor(self._answers), None)
        weight = None
        if model.share_embeddings_and_output_weights:
            weight = model.shared_embedding_or_output_weight()
        logits_1BV, _ = model.output_layer(model.decoder.final_layernorm(hidden_TBH[-1:]), weight)
        found: torch.Tensor = logits_1BV[0]
        return found

    def _run(self, stack: str, ids: torch.Tensor, others: torch.Tensor | None) -> torch.Tensor:
        """Run one stack's layers; return its output [positions, B, H].

        Args:
            stack: "encoder" or "decoder".
            ids: its tokens [B, positions].
            others: tokens of the decoder, which an encoder layer only passes on.
        """
        model = self._model
        hidden = model.embedding(ids.to(self._device), None)
        if others is not None:
            context = model.embedding(others.to(self._device), None)
        else:
            assert self._encoded_SBH is not None
            context = self._encoded_SBH
        width = ids.shape[1] if stack == "decoder" else 1
        lengths = {"encoder": self._real_BS.shape[1], "decoder": width}
        segments = torch.nn.functional.pad(self._real_BS, (0, width), value=1)
        inputs = StackInputs(
            biases=model.relative_biases,
            lengths=lengths,
            tensor_ranks=1,
            tensor_rank=0,
            segments=segments_of(segments, lengths),
            recomputes=False,
            made={},
        )
        for layer in model.decoder.layers:
            if layer.stack == stack:
                hidden, context = layer(hidden, context=context, attention_bias=inputs)
        # The last encoder layer returns the parts in the order of the decoder's layers.
        return context if stack == "encoder" else hidden
