"""What the patch of megatron-core 0.19's losses of multi-token prediction must give."""

from types import SimpleNamespace

import torch
from megatron.core.models.gpt import gpt_model


def prediction_losses() -> None:
    """Two tokens predict a third and count as much as in a mean over all three."""
    config = SimpleNamespace(
        mtp_num_layers=1, mtp_loss_scaling_factor=1.0, calculate_per_token_loss=True
    )
    hidden = torch.zeros(6, 1, 1, requires_grad=True)
    output = gpt_model.process_mtp_loss(
        hidden_states=hidden,
        labels=torch.arange(3).view(1, 3),
        loss_mask=torch.ones(1, 3),
        output_layer=lambda hidden, **_: (hidden, None),
        output_weight=None,
        runtime_gather_output=None,
        is_training=False,
        compute_language_model_loss=lambda labels, logits: logits[..., 0].transpose(0, 1) * labels,
        config=config,
        cp_group=None,
    )
    output.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.flatten().tolist() == [1, 1, 1, 1, 2, 0]
