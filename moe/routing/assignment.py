"""Joint balanced assignment of all tokens of a group. Shape suffixes: T tokens, E experts."""

import torch

SINKHORN_ROUNDS = 30
SINKHORN_TOLERANCE = 1e-4


def sinkhorn(logits_TE: torch.Tensor) -> torch.Tensor:
    """Return exp(logits) scaled by row and column until rows and columns sum to 1 / T and 1 / E.

    Equal to ``sinkhorn`` of megatron-core (transformer/moe/moe_utils.py) where that needs at most
    `SINKHORN_ROUNDS` rounds to change column factors by less than `SINKHORN_TOLERANCE` in the mean:
    logits of a standard deviation of 1 need about 5. Beyond, megatron-core's may run for 100,000.
    The host asks for no result: a converged iteration continues without effect.
    """
    cost_TE = logits_TE.exp()
    tokens, experts = cost_TE.shape
    rows_T, columns_E = cost_TE.new_ones(tokens), cost_TE.new_ones(experts)
    done = torch.zeros((), dtype=torch.bool, device=cost_TE.device)
    for _ in range(SINKHORN_ROUNDS):
        new_T = (1 / tokens) / ((columns_E * cost_TE).sum(1) + 1e-8)
        new_E = (1 / experts) / ((new_T[:, None] * cost_TE).sum(0) + 1e-8)
        change = (columns_E - new_E).abs().mean()
        rows_T = torch.where(done, rows_T, new_T)
        columns_E = torch.where(done, columns_E, new_E)
        done = done | (change <= SINKHORN_TOLERANCE)
    return columns_E * cost_TE * rows_T[:, None]


def linear_assignment(scores_TE: torch.Tensor) -> torch.Tensor:
    """Assign one expert per token and at most ceil(T / E) tokens per expert, maximising the score.

    BASE layers (Lewis et al., arXiv 2103.16716, section 3.1), solved exactly by scipy on the CPU in
    O(T^3): a reference for small T. A token's expert depends on later tokens.
    """
    from scipy.optimize import linear_sum_assignment

    tokens, experts = scores_TE.shape
    slots = -(-tokens // experts)
    seats = scores_TE.double().repeat_interleave(slots, dim=1)  # [T, E x slots]
    rows, columns = linear_sum_assignment(seats.cpu().numpy(), maximize=True)
    chosen_TE = torch.zeros(tokens, experts, dtype=torch.bool)
    chosen_TE[torch.as_tensor(rows), torch.as_tensor(columns) // slots] = True
    return chosen_TE.to(scores_TE.device)
