"""Joint balanced assignment of all tokens of a group. Shape suffixes: T tokens, E experts."""

import torch


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
