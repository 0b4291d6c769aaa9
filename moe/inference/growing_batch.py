"""Sequences of several lengths that grow together, with cached keys and values.

Rows are padded on the left, so that their next tokens stand at one position.

Shape suffixes: B rows, S positions, V vocabulary.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.transformer.attention import Attention

from moetron.moe.layers.attention import SdpaAttention, prefix_mask
from moetron.moe.layers.language_model import LanguageModel

_SMALLEST_CACHE = 64
"""Positions."""


def takes_padding(model: LanguageModel) -> bool:
    """Return whether rows of several lengths can share a pass: attention obeys a mask of padding.

    Transformer Engine's reads no mask after the prompt.
    """
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    return all(isinstance(layer.core_attention, SdpaAttention) for layer in layers)


def padded_mask(padding_B: torch.Tensor, prefix_B: torch.Tensor, length: int) -> torch.Tensor:
    """Return the mask bool [b, 1, s, s] of rows padded on the left; True marks forbidden pairs.

    Padding sees itself alone, since a softmax over nothing is not a number, and nobody sees it.

    Args:
        padding_B: positions of padding before each row, int64 [b].
        prefix_B: length of each row's bidirectional prefix, int64 [b].
        length: positions with padding (s).
    """
    place_S = torch.arange(length, device=padding_B.device)
    hidden_BS = place_S < padding_B[:, None]
    mask = prefix_mask(padding_B + prefix_B, length) | hidden_BS[:, None, None]
    mask[..., place_S, place_S] = False
    return mask


class GrowingBatch:
    """Growing sequences and the logits of their next tokens, which other rows do not change.

    With ``cached`` the keys and values of earlier tokens are cached (megatron-core's
    ``StaticInferenceContext``), and only new tokens are computed. When a sequence exceeds the
    length that the model was trained on, only the last half of that length is kept of it, with and
    without a cache. Rotary positions act as distances, so that padding before a row shifts nothing;
    routers leave padding out.

    Args:
        model: on one rank; experts without capacity (`dropless`), or results differ with a cache.
        rows: number of sequences; with another length each only where `takes_padding`.
        cached: whether to cache keys and values.
        prefixes: length of each row's bidirectional prefix, which the first `extend` must contain;
            above 0 it needs a model trained with prefixes. Unset: 0.
    """

    def __init__(
        self,
        model: LanguageModel,
        rows: int = 1,
        cached: bool = True,
        prefixes: Sequence[int] | None = None,
    ) -> None:
        self._model = model
        self._cached = cached
        self._prefixes = [0] * rows if prefixes is None else list(prefixes)
        assert len(self._prefixes) == rows
        assert not any(self._prefixes) or model.bidirectional_prefix
        self._limit: int = model.max_sequence_length
        self._windows: list[list[int]] = [[] for _ in range(rows)]
        self._padding: list[int] = []  # before each row of the cache
        self._context: StaticInferenceContext | None = None

    def extend(self, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """Append at least one token to each row; return the next logits [B, padded vocabulary]."""
        assert len(tokens) == len(self._windows) and all(tokens)
        for row, new in enumerate(tokens):
            self._windows[row] += new
            if len(self._windows[row]) > self._limit:
                self._forget(row)
        if self._context is None or max(map(len, tokens)) > 1:  # a cache grows by single tokens
            return self._from_start()
        if self._context.sequence_len_offset == self._context.max_sequence_length:
            if self._context.max_sequence_length == self._limit:
                return self._from_start()  # rows that are gone were longer
            self._enlarge(self._context)
        return self._logits([list(new) for new in tokens], self._padding, self._context)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone, in this order."""
        self._windows = [self._windows[row] for row in rows]
        self._prefixes = [self._prefixes[row] for row in rows]
        if self._context is None:
            return
        self._padding = [self._padding[row] for row in rows]
        memory = self._context.key_value_memory_dict
        chosen = torch.tensor(rows, device=next(self._model.parameters()).device)
        for layer, pair in memory.items():
            memory[layer] = tuple(x.index_select(1, chosen) for x in pair)
        self._context.max_batch_size = len(rows)

    def _forget(self, row: int) -> None:
        """Drop the beginning of a row that is too long; nothing stays cached."""
        dropped = len(self._windows[row]) - max(self._limit // 2, 1)
        del self._windows[row][:dropped]
        self._prefixes[row] = max(self._prefixes[row] - dropped, 0)
        self._context = None

    def _from_start(self) -> torch.Tensor:
        """Compute all rows from their beginnings."""
        width = max(map(len, self._windows))
        self._padding = [width - len(window) for window in self._windows]
        assert not any(self._padding) or takes_padding(self._model)
        if self._cached:
            length = min(self._limit, max(2 * width, _SMALLEST_CACHE))
            self._context = StaticInferenceContext(len(self._windows), length)
        return self._logits(self._windows, self._padding, self._context)

    def _enlarge(self, context: StaticInferenceContext) -> None:
        """Double the positions of the cache."""
        length = min(self._limit, 2 * context.max_sequence_length)
        more = length - context.max_sequence_length
        memory = context.key_value_memory_dict
        for layer, pair in memory.items():  # [positions, rows, heads, width]
            memory[layer] = tuple(F.pad(x, (0, 0, 0, 0, 0, 0, 0, more)) for x in pair)
        context.max_sequence_length = length

    def _mask(self, padding_B: torch.Tensor, first: int, length: int) -> torch.Tensor | None:
        """Return the mask of ``length`` new positions from ``first`` on; None: causal."""
        is_padded = any(self._padding)
        if first:  # a single token sees all of the cache but padding
            place_S = torch.arange(first + length, device=padding_B.device)
            return (place_S < padding_B[:, None])[:, None, None] if is_padded else None
        # A model trained with prefixes needs a mask, even without a prefix.
        if not is_padded and not self._model.bidirectional_prefix:
            return None
        prefix_B = torch.tensor(self._prefixes, device=padding_B.device)
        return padded_mask(padding_B, prefix_B, length)

    def _logits(
        self,
        tokens: Sequence[list[int]],
        padding: Sequence[int],
        context: StaticInferenceContext | None,
    ) -> torch.Tensor:
        device = next(self._model.parameters()).device
        padding_B = torch.tensor(padding, device=device)
        first = 0 if context is None else context.sequence_len_offset
        length = max(map(len, tokens))
        ids = [[0] * (length - len(row)) + row for row in tokens]
        place_S = torch.arange(first, first + length, device=device)
        from_row_BS = place_S - padding_B[:, None]
        self._model.set_padding(from_row_BS < 0 if any(padding) else None)
        with torch.no_grad():
            logits_BSV = self._model(
                torch.tensor(ids, device=device),
                from_row_BS.clamp(min=0),
                self._mask(padding_B, first, length),
                inference_context=context,
                # All-gather of the vocabulary over the tensor group, which is this rank alone.
                runtime_gather_output=True,
            )
        self._model.set_padding(None)
        if context is not None:
            context.sequence_len_offset += length
        return logits_BSV[:, -1]
