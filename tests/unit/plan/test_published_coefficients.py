"""Converted coefficients against the losses that the published implementations compute."""

import pytest
import torch

from moetron.moe.plan.published_coefficients import (
    CONVENTIONS,
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
def test_coefficients_of_recipes(
    name: str, theirs: tuple[float, float], layers: int, topk: int, balance: float, z: float
) -> None:
    convention = CONVENTIONS[name]
    assert balance_coefficient(theirs[0], convention, layers, topk, 64) == pytest.approx(balance)
    assert z_coefficient(theirs[1], convention, layers, topk) == pytest.approx(z)


def _published(name: str, counts_LE: torch.Tensor, mean_LE: torch.Tensor, tokens: int) -> float:
    """Return the loss that an implementation computes from its counts [layers, experts]."""
    experts, dots_L = counts_LE.shape[1], (counts_LE * mean_LE).sum(1)
    topk = float(counts_LE[0].sum()) / tokens
    return float(
        {
            "flaxformer": (experts * dots_L / tokens).mean(),
            "megablocks": (experts * dots_L / (tokens * topk)).mean(),
            "mesh_tensorflow": (experts * dots_L / tokens).sum(),
            "gshard": (dots_L / (tokens * experts)).sum(),
        }[name]
    )


@pytest.mark.parametrize(
    ("name", "counted"),
    [("flaxformer", 2), ("megablocks", 2), ("mesh_tensorflow", 1), ("gshard", 1)],
)
def test_converted_loss_equals_the_published_loss(name: str, counted: int) -> None:
    """``counted``: choices of a token that f counts."""
    layers, tokens, experts, topk = 3, 40, 8, 2
    probs = torch.randn(layers, tokens, experts, dtype=torch.float64).softmax(2)
    counts = torch.zeros(layers, experts, dtype=torch.float64)
    best = probs.topk(counted, dim=2).indices.flatten(1)
    counts.scatter_add_(1, best, torch.ones_like(best, dtype=torch.float64))
    ours = experts * (counts / (tokens * counted) * probs.mean(1)).sum()
    convention = CONVENTIONS[name]
    assert convention.first_choice_only == (counted == 1)
    coefficient = balance_coefficient(0.02, convention, layers, topk, experts)
    expected = 0.02 * _published(name, counts, probs.mean(1), tokens)
    assert float(ours) * coefficient == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "scale"),
    [("megatron", 1.0), ("flaxformer", 2.0), ("gshard", 0.0625), ("megablocks", 1.0)],
)
def test_balanced_routing_gives_the_published_balance_loss(name: str, scale: float) -> None:
    """One layer, k = 2, E = 4: our balanced loss is 1, so the coefficient is theirs."""
    assert balance_coefficient(1.0, CONVENTIONS[name], 1, 2, 4) == scale
