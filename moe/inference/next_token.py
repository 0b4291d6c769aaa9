"""Choice of the next token from its logits.

Shape suffix: V vocabulary.
"""

import torch

from moetron.moe.inference.sampling import Sampling


def penalize(logits_V: torch.Tensor, seen_V: torch.Tensor, penalty: float) -> torch.Tensor:
    """Return logits with those of seen tokens made less likely (CTRL, arXiv 1909.05858).

    As HuggingFace does: positive ones are divided by ``penalty``, negative ones multiplied.

    Args:
        logits_V: float32 [vocabulary].
        seen_V: bool [vocabulary], tokens of the prompt and of the answer so far.
        penalty: 1 changes nothing.
    """
    less_V = torch.where(logits_V < 0, logits_V * penalty, logits_V / penalty)
    return torch.where(seen_V, less_V, logits_V)


def draw(logits_V: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Sample a token id from float32 logits [vocabulary]."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    scaled_V = logits_V / sampling.temperature
    probabilities, ids = scaled_V.softmax(0).sort(descending=True, stable=True)
    if sampling.top_k:
        probabilities[sampling.top_k :] = 0
    before = probabilities.cumsum(0) - probabilities
    probabilities[before >= sampling.top_p] = 0
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])
