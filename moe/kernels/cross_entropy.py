"""Cross-entropy of logits in one read each way, without an fp32 copy of them.

Shape suffixes: T tokens, V rows of the vocabulary on this rank.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup, ReduceOp, all_reduce

FORWARD_BLOCK, BACKWARD_BLOCK = 4096, 4096
"""Columns that a program holds in registers."""


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, group: ProcessGroup | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from moetron.moe.kernels import cross_entropy_triton as kernels

        logits_TV, labels_T = logits.flatten(0, -2), labels.flatten().contiguous()
        assert logits_TV.stride(-1) == 1
        rows = logits_TV.shape[-1]
        ctx.first = 0 if group is None else group.rank() * rows
        log_z_T = torch.empty(len(logits_TV), dtype=torch.float32, device=logits.device)
        label_T = torch.empty_like(log_z_T)
        kernels.forward_kernel[(len(logits_TV),)](
            logits_TV,
            labels_T,
            log_z_T,
            label_T,
            logits_TV.stride(0),
            ctx.first,
            COLUMNS=rows,
            BLOCK=FORWARD_BLOCK,
            num_warps=8,
        )
        if group is not None and group.size() > 1:
            log_z_T, label_T = _combine(log_z_T, label_T, group)
        ctx.save_for_backward(logits, labels_T, log_z_T)
        return (log_z_T - label_T).view(labels.shape), log_z_T.view(labels.shape)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_loss: torch.Tensor, grad_log_z: torch.Tensor
    ) -> tuple[torch.Tensor, None, None]:
        from moetron.moe.kernels import cross_entropy_triton as kernels

        logits, labels_T, log_z_T = ctx.saved_tensors
        # A model's logits serve nothing else: their gradient takes their memory. A leaf's values
        # remain. The version counter makes autograd refuse a second use instead of a wrong result.
        root = logits if logits._base is None else logits._base
        source_TV = logits.detach().flatten(0, -2)
        result_TV = torch.empty_like(source_TV) if root.is_leaf else source_TV
        rows = source_TV.shape[-1]
        kernels.backward_kernel[(len(source_TV), -(-rows // BACKWARD_BLOCK))](
            source_TV,
            result_TV,
            labels_T,
            log_z_T,
            grad_loss.flatten().contiguous(),
            grad_log_z.flatten().contiguous(),
            source_TV.stride(0),
            ctx.first,
            COLUMNS=rows,
            BLOCK=BACKWARD_BLOCK,
            num_warps=8,
        )
        if not root.is_leaf:
            torch.autograd.graph.increment_version(logits)
        return result_TV.view(logits.shape), None, None


def _combine(
    log_z_T: torch.Tensor, label_T: torch.Tensor, group: ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log Z of the full vocabulary and the label's logit, from every rank's part of it."""
    largest_T = log_z_T.clone()
    # All-reduces over the tensor group, whose ranks hold different rows of the vocabulary: the
    # maximum keeps exp finite; of the label's logits all but one are 0.
    all_reduce(largest_T, op=ReduceOp.MAX, group=group)
    sums = torch.stack([(log_z_T - largest_T).exp_(), label_T])
    all_reduce(sums, group=group)
    return sums[0].log_().add_(largest_T), sums[1]


def cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, group: ProcessGroup | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the losses log Z - (logit of the label), and log Z; both differentiable.

    The forward pass leaves the logits as they are. The backward pass writes their gradient over
    them, unless they are a leaf: nothing else may need their values in its backward pass, and
    autograd raises an error if something does.

    Args:
        logits: [..., V], bf16 or fp32: this rank's rows of the vocabulary.
        labels: int64 [...], of the full vocabulary.
        group: ranks that hold the rows of the vocabulary in order; None: one rank.

    Returns:
        Two fp32 tensors [...]. Z is the sum of exp over the logits of all ranks.
    """
    losses, log_z = _CrossEntropy.apply(logits, labels, group)
    return losses, log_z
