"""Continue sequences of tokens with a trained model, on one rank."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt import GPTModel

from moetron.moe.checkpoint.save_load import load_weights
from moetron.moe.config.bridge import transformer_config
from moetron.moe.config.schema.settings import Settings
from moetron.moe.inference.sampling import Sampling
from moetron.moe.layers.build_model import build_model
from moetron.moe.layers.specs import uses_transformer_engine
from moetron.moe.training.runtime import Runtime

logger = logging.getLogger(__name__)


def load_model(path: Path, settings: Settings, vocab_size: int, runtime: Runtime) -> GPTModel:
    """The model of the checkpoint at ``path``, ready to be asked.

    Modules of multi-token prediction are left out: they serve training, and the next token's
    logits do not depend on them.
    """
    shape = settings.model.model_copy(update={"mtp_num_layers": None})
    settings = settings.model_copy(update={"model": shape})
    config = transformer_config(settings, uses_transformer_engine(settings))
    model = build_model(settings, config, vocab_size).to(runtime.device, config.params_dtype)
    load_weights(path, [model], vocab_size)
    if settings.data.bidirectional_prefix:
        logger.warning("trained with --bidirectional-prefix; here prompts are read causally")
    return model.eval()


class GrowingSequence:
    """The logits that follow a sequence, as it grows.

    With ``cached`` the keys and values of earlier tokens are kept (megatron-core's
    ``StaticInferenceContext``), and only new tokens are computed. Where the sequence outgrows the
    length that the model was trained on, all but the last half of that length is forgotten, with
    and without a cache.

    Args:
        model: on one rank.
        cached: whether to keep keys and values.
    """

    def __init__(self, model: GPTModel, cached: bool = True) -> None:
        self._model = model
        self._cached = cached
        self._limit: int = model.max_sequence_length
        self._window: list[int] = []
        self._context: StaticInferenceContext | None = None

    def extend(self, tokens: Sequence[int]) -> torch.Tensor:
        """Append at least one token; logits [padded vocabulary] of what follows the last."""
        assert tokens
        self._window += tokens
        if len(self._window) > self._limit:
            del self._window[: -max(self._limit // 2, 1)]
            self._context = None
        if not self._cached:
            return self._logits(self._window, None)
        if self._context is None or len(tokens) > 1:  # a cache is extended one by one
            self._context = StaticInferenceContext(1, self._limit)
            return self._logits(self._window, self._context)
        return self._logits(tokens, self._context)

    def _logits(
        self, tokens: Sequence[int], context: StaticInferenceContext | None
    ) -> torch.Tensor:
        device = next(self._model.parameters()).device
        first = 0 if context is None else context.sequence_len_offset
        positions = torch.arange(first, first + len(tokens), device=device)[None]
        with torch.no_grad():
            logits_BSV = self._model(
                torch.tensor([tokens], device=device),
                positions,
                None,
                inference_context=context,
                runtime_gather_output=True,
            )
        if context is not None:
            context.sequence_len_offset += len(tokens)
        return logits_BSV[0, -1]


def continuation(
    model: GPTModel,
    prompt: Sequence[int],
    vocab_size: int,
    sampling: Sampling,
    cached: bool = True,
) -> Iterator[int]:
    """Tokens that follow ``prompt``, without end.

    Args:
        model: on one rank.
        prompt: at least one token id.
        vocab_size: ids below this are real; the rows of the padding are never chosen.
        sampling: how tokens are drawn.
        cached: see `GrowingSequence`.
    """
    generator = torch.Generator().manual_seed(sampling.seed)
    sequence, new = GrowingSequence(model, cached), list(prompt)
    while True:
        logits_V = sequence.extend(new)[:vocab_size]
        new = [draw(logits_V.float().cpu(), sampling, generator)]
        yield new[0]


def draw(logits_V: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token id from float32 logits [vocabulary]."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    scaled_V = logits_V / sampling.temperature
    probabilities, ids = scaled_V.softmax(0).sort(descending=True, stable=True)
    if sampling.top_k:
        probabilities[sampling.top_k :] = 0
    before = probabilities.cumsum(0) - probabilities
    probabilities[before >= sampling.top_p] = 0
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])
