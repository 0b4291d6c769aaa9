"""Multipliers of learning rate and weight decay, against AdamW with explicit groups."""

from typing import Any

import pytest
import torch

from tests.parallel.support.checkpoint_runs import parallel_of, settings, start

LR, DECAY = 0.01, 0.3
OPTIMIZER: dict[str, Any] = {
    "weight_decay": DECAY,
    "clip_grad": 0.0,
    "router_lr_mult": 0.5,
    "router_wd_mult": 0.0,
    "expert_lr_mult": 3.0,
    "expert_wd_mult": 2.0,
}


def _by_hand(name: str, parameter: torch.Tensor, decays_all: bool) -> dict[str, float]:
    lr, decay = 1.0, 1.0
    if ".router." in name:
        lr, decay = 0.5, 0.0
    elif ".experts." in name:
        lr, decay = 3.0, 2.0
    if not decays_all and parameter.dim() == 1:
        decay = 0.0
    return {"lr": LR * lr, "weight_decay": DECAY * decay}


@pytest.mark.parametrize("decays_all", [False, True])
def test_groups_equal_explicit_ones(decays_all: bool) -> None:
    chosen = settings(
        "dp",
        model={"hidden_dropout": 0.0},
        moe={"moe_shared_expert_intermediate_size": 8},
        optimizer={**OPTIMIZER, "decay_norms_and_biases": decays_all},
        learning_rate={"lr": LR, "lr_warmup_iters": 0, "lr_decay_style": "constant"},
        precision={"bf16": False},
    )
    with parallel_of(chosen):
        loop = start(chosen)
        ours = dict(loop.trainer.chunks[0].named_parameters())
        theirs = {name: p.detach().clone().requires_grad_() for name, p in ours.items()}
        reference = torch.optim.AdamW(
            [{"params": [p], **_by_hand(name, p, decays_all)} for name, p in theirs.items()],
            betas=(0.9, 0.95),
        )
        batches = loop.batches()
        for _ in range(3):
            loop.step(batches, lambda: False)
            for name, parameter in ours.items():
                theirs[name].grad = parameter.main_grad.clone()
            reference.step()
        assert sum(".router." in name for name in ours) == 2
        for name, parameter in ours.items():
            torch.testing.assert_close(parameter, theirs[name], rtol=1e-5, atol=1e-7, msg=name)
