"""Muon against torch's on unsharded matrices, AdamW for the rest."""

import math

import pytest
import torch

from moetron.moe.optim.muon import Muon, MuonRule, orthogonalized


def _gradients(shape: tuple[int, ...], steps: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator) for _ in range(steps)]


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (3, 6, 6)])
def test_singular_values_become_about_one(shape: tuple[int, ...]) -> None:
    matrices = _gradients(shape, 1)[0] * 100
    turned = orthogonalized(matrices, 5)
    values = torch.linalg.svdvals(turned)
    assert float(values.min()) > 0.6 and float(values.max()) < 1.3
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    assert float((turned - left @ right).norm() / turned.norm()) < 0.3
    assert not orthogonalized(torch.zeros(3, 2), 5).any()


def test_worked_step() -> None:
    """One row has one singular value: u = (0.8, 0.6) x f(1), f the quintic, five times."""
    value = 1.0
    for _ in range(5):
        value = 3.4445 * value - 4.7750 * value**3 + 2.0315 * value**5
    found = orthogonalized(torch.tensor([[4.0, 3.0]]), 5)
    torch.testing.assert_close(found, torch.tensor([[0.8, 0.6]]) * value, rtol=1e-4, atol=0)


@pytest.mark.parametrize("shape", [(12, 8), (8, 20)])
def test_equals_torch(shape: tuple[int, int]) -> None:
    """Torch computes in bf16: an update may differ by a few hundredths of its size."""
    ours = torch.linspace(-1, 2, math.prod(shape)).view(shape).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    group = {"params": [ours], "lr": 0.02, "weight_decay": 0.1}
    mine = Muon([group], {ours: None}, MuonRule(), fused=True)
    torchs = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    start = ours.detach().clone()
    for grad in _gradients(shape):
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        mine.step()
        torchs.step()
    gap, way = float((ours - theirs).norm()), float((theirs - start).norm())
    assert gap < 0.03 * way
    torch.testing.assert_close(
        mine.state[ours]["momentum_buffer"], torchs.state[theirs]["momentum_buffer"]
    )


def test_experts_are_separate_matrices_and_adamw_updates_the_rest() -> None:
    stacked, bias = torch.randn(3, 6, 4), torch.randn(7)
    one = stacked[1].clone().requires_grad_()
    vector = bias.clone().requires_grad_()
    stacked.requires_grad_()
    bias.requires_grad_()
    many = Muon([{"params": [stacked, bias], "lr": 0.1}], {stacked: None}, MuonRule())
    single = Muon([{"params": [one], "lr": 0.1}], {one: None}, MuonRule())
    adamw = torch.optim.AdamW([vector], lr=0.1)
    for matrix, row in zip(_gradients((3, 6, 4)), _gradients((7,)), strict=True):
        stacked.grad, one.grad = matrix.clone(), matrix[1].clone()
        bias.grad, vector.grad = row.clone(), row.clone()
        for optimizer in (many, single, adamw):
            optimizer.step()
    torch.testing.assert_close(stacked[1], one)
    assert torch.equal(bias, vector)
    assert set(many.state[stacked]) == {"momentum_buffer"} == set(many.moments(stacked))
    assert {"exp_avg", "exp_avg_sq"} == set(many.moments(bias)) < set(many.state[bias])
    assert many.state_numel(bias) == 2 * 7 and many.state_numel(stacked) == 3 * 6 * 4
