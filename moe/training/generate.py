"""Continue a sequence of tokens with a trained model, on one rank, without a cache."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from megatron.core.models.gpt import GPTModel

from moetron.moe.config.bridge import transformer_config
from moetron.moe.config.settings import Settings
from moetron.moe.layers.build import build_model
from moetron.moe.layers.specs import uses_transformer_engine
from moetron.moe.training.checkpoint import load_weights
from moetron.moe.training.runtime import Runtime


def load_model(path: Path, settings: Settings, vocab_size: int, runtime: Runtime) -> GPTModel:
    """The model of the checkpoint at ``path``, ready to be asked."""
    config = transformer_config(settings, uses_transformer_engine(settings))
    model = build_model(settings, config, vocab_size).to(runtime.device, config.params_dtype)
    load_weights(path, [model])
    return model.eval()


def continuation(
    model: GPTModel,
    prompt: Sequence[int],
    vocab_size: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[int]:
    """Tokens that follow ``prompt``, without end.

    The whole sequence is computed anew for every token; where it outgrows the length that the model
    was trained on, its beginning is left out.

    Args:
        model: on one rank.
        prompt: at least one token id.
        vocab_size: ids below this are real; the rows of the padding are never chosen.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: choose among so many of the likeliest; 0: among all.
        top_p: choose among the likeliest that make up this share of the probability.
        seed: of the draws.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    while True:
        window = torch.tensor([tokens[-model.max_sequence_length :]], device=device)
        positions = torch.arange(window.size(1), device=device)[None]
        with torch.no_grad():
            logits_V = model(window, positions, None)[0, -1, :vocab_size]
        tokens.append(draw(logits_V.float().cpu(), temperature, top_k, top_p, generator))
        yield tokens[-1]


def draw(
    logits_V: torch.Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator
) -> int:
    """One token id from float32 logits [vocabulary]; see ``continuation``."""
    if temperature == 0:
        return int(logits_V.argmax())
    probabilities, ids = (logits_V / temperature).softmax(0).sort(descending=True, stable=True)
    if top_k:
        probabilities[top_k:] = 0
    before = probabilities.cumsum(0) - probabilities
    probabilities[before >= top_p] = 0
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])
