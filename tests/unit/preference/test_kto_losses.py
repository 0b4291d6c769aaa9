"""KTO's losses and baseline on worked examples."""

import math

import pytest
import torch

from moetron.moe.preference.kto_losses import baseline_of, kto_losses
from moetron.moe.preference.pair_losses import SUMS, Preference

LOG_PROBS = torch.tensor([[-4.0, -9.0, -6.0, 7.0]])
REFERENCE = torch.tensor([[-6.0, -8.0, -9.0, 0.0]])
WANTED = torch.tensor([[1, 1, 0, 0]])
EXAMPLES = torch.tensor([3])
BASELINE = torch.tensor(1.0)
CHOSEN = Preference("kto", 0.1, desirable_weight=2.0, undesirable_weight=3.0)


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def test_worked_example() -> None:
    """Log ratios 2 and -1 of wanted answers and 3 of an unwanted one, less a baseline of 1."""
    values = kto_losses(LOG_PROBS, REFERENCE, WANTED, EXAMPLES, BASELINE, CHOSEN)
    found = {name: row[0].tolist() for name, row in zip(SUMS, values, strict=True)}
    losses = [2 * (1 - _sigmoid(0.1)), 2 * (1 - _sigmoid(-0.2)), 3 * (1 - _sigmoid(-0.2)), 0]
    assert found["loss"] == pytest.approx(losses)
    assert found["accuracy"] == [1, 0, 0, 0]
    assert found["chosen_reward"] == pytest.approx([0.2, -0.1, 0, 0])
    assert found["rejected_reward"] == pytest.approx([0, 0, 0.3, 0])
    assert found["kl"] == [1, 1, 1, 0]
    assert found["chosen"] == [1, 1, 0, 0] and found["rejected"] == [0, 0, 1, 0]


def test_gradient() -> None:
    """Against the derivative: weight x beta x s (1 - s), with the sign of the label."""
    log_probs = LOG_PROBS.clone().requires_grad_()
    loss = kto_losses(log_probs, REFERENCE, WANTED, EXAMPLES, BASELINE, CHOSEN)[0].sum()
    loss.backward()

    def slope(weight: float, gain: float) -> float:
        return weight * 0.1 * _sigmoid(gain) * (1 - _sigmoid(gain))

    assert log_probs.grad is not None
    expected = [-slope(2, 0.1), -slope(2, -0.2), slope(3, -0.2), 0]
    assert log_probs.grad[0].tolist() == pytest.approx(expected)


def test_the_baseline_is_not_negative_and_has_no_gradient() -> None:
    total = torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)
    below, above = baseline_of(total, torch.tensor(4)), baseline_of(-total, torch.tensor(4))
    assert below == 0 and above == 0.75 and not above.requires_grad
    assert above.dtype == torch.float32
    assert baseline_of(torch.tensor(0.0), torch.tensor(0)) == 0  # ranks without samples
