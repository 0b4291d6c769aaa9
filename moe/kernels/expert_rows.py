"""Rows of a rank's experts: copies of tokens, sorted by expert, then by token.

T tokens, E experts, at most K experts per token, R rows, H values each. With the kernels nothing
waits for the device: R is T x K, and how many of the rows there are only ``ends_E`` tells. Without
them (on a CPU) R is the number of rows. No atomic additions: every run gives the same bits.
"""

from dataclasses import dataclass

import torch

from moetron.moe.kernels.availability import triton_is_installed, uses_triton

if triton_is_installed():
    from moetron.moe.kernels import expert_rows_triton as kernels


@dataclass(frozen=True)
class RowPlan:
    """Rows of the tokens of a rank that holds every expert."""

    ends_E: torch.Tensor
    """int32: one past each expert's last row. Later rows belong to nobody."""
    source_R: torch.Tensor
    """int64: token of each row; -1: none."""
    choice_R: torch.Tensor
    """int64: position of each row's choice in the flat map [T x E]; -1: none."""
    slot_TK: torch.Tensor | None
    """int64: rows of each token in the order of experts; -1: none. None without the kernels."""
    map_shape: torch.Size
    """[T, E]."""

    @property
    def counts_E(self) -> torch.Tensor:
        """Return the number of each expert's rows, int64, on the device."""
        return self.ends_E.diff(prepend=self.ends_E.new_zeros(1)).long()

    def trimmed(self) -> "RowPlan":
        """Return the plan without rows after the last expert's; waits for the device."""
        rows = int(self.ends_E[-1])
        if rows == len(self.source_R):
            return self
        parts = (self.source_R[:rows], self.choice_R[:rows])
        return RowPlan(self.ends_E, *parts, self.slot_TK, self.map_shape)

    def gather(self, x_TH: torch.Tensor) -> torch.Tensor:
        """Return each row's token [R, H]; rows without a token are 0."""
        if self.slot_TK is not None:
            return kernels.gather(x_TH, self.source_R, self.slot_TK)
        return x_TH.index_select(0, self.source_R)

    def combine(self, y_RH: torch.Tensor) -> torch.Tensor:
        """Return the sums of each token's rows [T, H], in float32 and the order of experts."""
        if self.slot_TK is not None:
            return kernels.combine(y_RH, self.slot_TK)
        index_RH = self.source_R.unsqueeze(1).expand_as(y_RH)
        # Sums of bf16 are float32 here too.
        return y_RH.new_zeros(self.map_shape[0], y_RH.shape[1]).scatter_add_(0, index_RH, y_RH)

    def weights(self, probs_TE: torch.Tensor) -> torch.Tensor:
        """Return each row's weight [R]; rows without a token get 0."""
        if self.slot_TK is not None:
            return kernels.take(probs_TE, self.choice_R)
        return probs_TE.flatten().index_select(0, self.choice_R)

    def weight_gradient(self, grad_R: torch.Tensor) -> torch.Tensor:
        """Return the gradient of ``probs_TE``, 0 where nothing was chosen."""
        if self.slot_TK is not None:
            return kernels.put(grad_R, self.choice_R, self.map_shape)
        flat = grad_R.new_zeros(self.map_shape.numel()).scatter_(0, self.choice_R, grad_R)
        return flat.view(self.map_shape)


@dataclass(frozen=True)
class SortedRows:
    """Rows that arrive sorted by expert, as a dispatcher that exchanges tokens delivers them."""

    ends_E: torch.Tensor
    """int32: one past each expert's last row; the last is the number of rows."""

    @property
    def counts_E(self) -> torch.Tensor:
        """Return the number of each expert's rows, int64, on the device."""
        return self.ends_E.diff(prepend=self.ends_E.new_zeros(1)).long()

    def trimmed(self) -> "SortedRows":
        """Return the rows: all of them belong to experts."""
        return self

    def gather(self, x_RH: torch.Tensor) -> torch.Tensor:
        """Return the rows."""
        return x_RH

    def combine(self, y_RH: torch.Tensor) -> torch.Tensor:
        """Return the rows."""
        return y_RH

    def weights(self, probs_R: torch.Tensor) -> torch.Tensor:
        """Return the weights."""
        return probs_R

    def weight_gradient(self, grad_R: torch.Tensor) -> torch.Tensor:
        """Return the gradient."""
        return grad_R


ExpertRows = RowPlan | SortedRows


def plan_rows(map_TE: torch.Tensor, topk: int) -> RowPlan:
    """Return the rows of a routing map, bool, with at most ``topk`` (K) true in each row."""
    if uses_triton(map_TE):
        return RowPlan(*kernels.plan(map_TE, topk), map_TE.shape)
    expert_R, source_R = map_TE.t().nonzero(as_tuple=True)  # sorted by expert, then by token
    ends_E = map_TE.sum(0).cumsum(0).int()
    return RowPlan(ends_E, source_R, source_R * map_TE.shape[1] + expert_R, None, map_TE.shape)
