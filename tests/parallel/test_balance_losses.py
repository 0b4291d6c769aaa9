"""Every balance and z-loss, value and gradient, against the papers' formulas in every layout."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from tests.parallel.balance_runs import Case, reference, run_router
from tests.parallel.harness import run_ranks

PREVIOUS = (("moe_global_aux_loss_counts", "previous_step"),)
KINDS = {
    "aux_loss": Case(),
    "first choices": Case(moe=(("moe_aux_loss_first_choice_only", True),)),
    "sigmoid": Case(moe=(("moe_router_score_function", "sigmoid"),)),
    "seq_aux_loss": Case(kind="seq_aux_loss"),
    "global_aux_loss": Case(kind="global_aux_loss"),
    "previous step": Case(kind="global_aux_loss", moe=PREVIOUS),
    "noisy_load": Case(kind="noisy_load", moe=(("moe_router_type", "noisy_topk"),)),
}
OTHERS = ("straight_through", "gumbel", "relaxed_topk", "random_second", "reinforce")
MASKS = ("nothing", "losses", "padding")
TP, EP, ETP = (
    f"{kind}_parallel_size" for kind in ("tensor_model", "expert_model", "expert_tensor")
)
CP = "context_parallel_size"
LAYOUTS = {
    "one": (1, 1, {}),
    "TP2": (2, 1, {TP: 2, ETP: 1}),
    "CP2": (2, 1, {CP: 2}),
    "EP2": (2, 2, {EP: 2}),
    "TP2 CP2 DP2": (8, 2, {TP: 2, CP: 2, ETP: 1}),
}  # ranks, data-parallel ranks, sizes


def _cases(layout: str) -> list[Case]:
    parallel = tuple(LAYOUTS[layout][2].items())
    cases = [
        replace(case, micro_batch_size=size, per_token=per_token, masked=masked, parallel=parallel)
        for case, size, per_token, masked in product(
            KINDS.values(), (1, 2, 4, 8), (True, False), MASKS
        )
        # Without a per-token loss context ranks average unlike numbers of tokens: refused.
        if per_token or CP not in LAYOUTS[layout][2]
    ]
    others = (
        Case(moe=(("moe_router_type", name),), micro_batch_size=4, parallel=parallel)
        for name in OTHERS
    )
    return [*cases, *others] if layout == "one" else cases


@pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=[pytest.mark.slow] * (LAYOUTS[name][0] > 2)) for name in LAYOUTS],
)
def test_losses_are_those_of_the_formulas(layout: str) -> None:
    ranks, data_ranks, _ = LAYOUTS[layout]
    cases = _cases(layout)
    found = run_ranks(run_router, ranks, cases)[0]
    for case, result in zip(cases, found, strict=True):
        expected = reference(case, data_ranks)
        gradient = expected["gradient"].float()
        assert float(gradient.abs().max()) > 1e-3, case
        torch.testing.assert_close(
            result["gradient"], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, c=case: f"{c}: {m}"
        )
        for name in ("aux_loss", "z_loss"):
            assert result[name] == pytest.approx(expected[name], rel=1e-5), (case, name)
