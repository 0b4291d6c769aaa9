"""The loss of a micro-batch."""

import torch

from moetron.moe.training.loss_tally import Tally
from moetron.moe.training.step import token_loss
from tests.unit.training.training_cases import CountingStream


def test_masked_tokens_count_neither_in_the_sum_nor_in_the_number() -> None:
    losses = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]], requires_grad=True)
    mask = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    numbers = {name: torch.zeros(2, dtype=torch.int64) for name in ("source", "objective")}
    batch = {"loss_mask": mask, "filtered": torch.zeros(2, dtype=torch.int64), **numbers}
    total, tokens, report = token_loss(Tally(CountingStream()), batch, losses)
    total.backward()
    assert float(total) == 37.0
    assert tokens.dtype == torch.int32
    assert int(tokens) == 3
    assert report[:, 0].tolist() == [37.0, 3.0, 0.0]
    assert report.dtype == torch.float64
    assert not report.requires_grad
    assert losses.grad is not None
    assert losses.grad.tolist() == mask.tolist()
