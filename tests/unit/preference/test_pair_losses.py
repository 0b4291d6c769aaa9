"""DPO's losses on worked examples."""

import math

import pytest
import torch

from moetron.moe.preference.pair_losses import Preference, pair_losses

LOG_PROBS = torch.tensor([[-4.0, -9.0, -6.0, -3.0, 0.0, 0.0]])
REFERENCE = torch.tensor([[-5.0, -8.0, -6.0, -6.0, 0.0, 0.0]])
TOKENS = torch.tensor([[2.0, 1.0, 3.0, 3.0, 0.0, 0.0]])
PAIRS = torch.tensor([2])


def _losses(preference: Preference) -> torch.Tensor:
    return pair_losses(LOG_PROBS, REFERENCE, TOKENS, PAIRS, preference)


def test_dpo() -> None:
    """Margins 0.1 (1 - -1) = 0.2 and 0.1 (0 - 3) = -0.3; the third place has no pair."""
    loss, accuracy, chosen, rejected, _, *counts = _losses(Preference("dpo", 0.1))[:, 0]
    expected = [math.log1p(math.exp(-0.2)), math.log1p(math.exp(0.3)), 0]
    assert loss.tolist() == pytest.approx(expected)
    assert accuracy.tolist() == [1, 0, 0]
    assert [each.tolist() for each in counts] == [[1, 1, 0]] * 2
    assert chosen.tolist() == pytest.approx([0.1, 0, 0])
    assert rejected.tolist() == pytest.approx([-0.1, 0.3, 0])


def test_normalised_by_length() -> None:
    """Means over tokens: 1 / 2 and -1 / 1; 0 / 3 and 3 / 3."""
    chosen, rejected = _losses(Preference("dpo_norm", 5.0))[2:4, 0]
    assert (chosen - rejected).tolist() == pytest.approx([7.5, -5.0, 0])


def test_label_smoothing() -> None:
    loss = _losses(Preference("dpo", 0.1, label_smoothing=0.1))[0, 0]
    right, wrong = math.log1p(math.exp(-0.2)), math.log1p(math.exp(0.2))
    assert loss[0].item() == pytest.approx(0.9 * right + 0.1 * wrong)


def test_places_without_a_pair_have_no_gradient() -> None:
    log_probs = LOG_PROBS.clone().requires_grad_()
    pair_losses(log_probs, REFERENCE, TOKENS, PAIRS, Preference("dpo", 0.1))[0].sum().backward()
    assert log_probs.grad is not None
    assert (log_probs.grad[0, :4] != 0).all() and not log_probs.grad[0, 4:].any()
