"""Published coefficients against the losses that their implementations compute."""

import pytest
import torch

from moetron.moe.plan.published_coefficients import (
    CONVENTIONS,
    Convention,
    balance_coefficient,
    z_coefficient,
)


@pytest.mark.parametrize(
    ("name", "theirs", "layers", "topk", "balance", "z"),
    [
        ("megablocks", (0.01, 0.001), 16, 8, 6.25e-4, 7.8125e-6),  # OLMoE's code
        ("flaxformer", (0.01, 1e-4), 4, 2, 5e-3, 2.5e-5),  # OpenMoE 8B
        ("flaxformer", (0.01, 1e-3), 8, 2, 2.5e-3, 1.25e-4),  # OpenMoE 34B
        ("mesh_tensorflow", (0.01, 0.001), 6, 2, 0.01, 0.001),  # ST-MoE's paper
        ("switch", (0.01, 0.0), 6, 1, 0.01, 0.0),
    ],
)
def test_recipes(
    name: str, theirs: tuple[float, float], layers: int, topk: int, balance: float, z: float
) -> None:
    convention = CONVENTIONS[name]
    assert balance_coefficient(theirs[0], convention, layers, topk, 64) == pytest.approx(balance)
    assert z_coefficient(theirs[1], convention, layers, topk) == pytest.approx(z)


def _published(name: str, counts_LE: torch.Tensor, mean_LE: torch.Tensor, tokens: int) -> float:
    """What each implementation adds up from its counts (of all or of first choices)."""
    experts, dots_L = counts_LE.shape[1], (counts_LE * mean_LE).sum(1)
    topk = float(counts_LE[0].sum()) / tokens
    per_layer = {
        "flaxformer": experts * dots_L / tokens,
        "megablocks": experts * dots_L / (tokens * topk),
        "mesh_tensorflow": experts * dots_L / tokens,
        "gshard": dots_L / (tokens * experts),
    }[name]
    return float(per_layer.mean() if CONVENTIONS[name].layers == "mean" else per_layer.sum())


@pytest.mark.parametrize("name", ["flaxformer", "megablocks", "mesh_tensorflow", "gshard"])
def test_ours_is_the_published_loss(name: str) -> None:
    layers, tokens, experts, topk = 3, 40, 8, 2
    probs = torch.randn(layers, tokens, experts, dtype=torch.float64).softmax(2)
    convention: Convention = CONVENTIONS[name]
    counted = 1 if convention.first_choice_only else topk
    counts = torch.zeros(layers, experts, dtype=torch.float64)
    best = probs.topk(counted, dim=2).indices.flatten(1)
    counts.scatter_add_(1, best, torch.ones_like(best, dtype=torch.float64))
    ours = experts * (counts / (tokens * counted) * probs.mean(1)).sum()
    coefficient = balance_coefficient(0.02, convention, layers, topk, experts)
    expected = 0.02 * _published(name, counts, probs.mean(1), tokens)
    assert float(ours) * coefficient == pytest.approx(expected)
