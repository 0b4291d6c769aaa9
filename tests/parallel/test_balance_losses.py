"""Every balance and z-loss, value and gradient, against the papers' formulas in every layout."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from tests.parallel.support.balance_runs import Case, reference, run_router
from tests.parallel.support.harness import run_ranks

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


SIZES = (1, 2, 4, 8)
SOME = ((1, True, "nothing"), (2, False, "losses"), (4, True, "padding"), (8, True, "losses"))
"""Micro-batch size, per-token loss, mask: each size, in place of all 24 combinations."""


def _cases(layout: str, ways: Any) -> list[Case]:
    parallel = tuple(LAYOUTS[layout][2].items())
    return [
        replace(case, micro_batch_size=size, per_token=per_token, masked=masked, parallel=parallel)
        for case in KINDS.values()
        for size, per_token, masked in ways
        # Without a per-token loss context ranks average different numbers of tokens: rejected.
        if per_token or CP not in LAYOUTS[layout][2]
    ]


def _compare(layout: str, cases: list[Case]) -> None:
    ranks, data_ranks, _ = LAYOUTS[layout]
    found = run_ranks(run_router, ranks, cases, timeout_s=300)[0]
    for case, result in zip(cases, found, strict=True):
        expected = reference(case, data_ranks)
        gradient = expected["gradient"].float()
        assert float(gradient.abs().max()) > 1e-3, case
        torch.testing.assert_close(
            result["gradient"], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, c=case: f"{c}: {m}"
        )
        for name in ("aux_loss", "z_loss"):
            assert result[name] == pytest.approx(expected[name], rel=1e-5), (case, name)


@pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=[pytest.mark.slow] * (LAYOUTS[name][0] > 2)) for name in LAYOUTS],
)
def test_losses_equal_the_formulas(layout: str) -> None:
    _compare(layout, _cases(layout, SOME))


@pytest.mark.parametrize("layout", [pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS])
def test_losses_for_all_micro_batches_and_masks(layout: str) -> None:
    _compare(layout, _cases(layout, tuple(product(SIZES, (True, False), MASKS))))


def test_losses_of_other_routers() -> None:
    routers = [(("moe_router_type", name),) for name in OTHERS]
    _compare("one", [Case(moe=moe, micro_batch_size=4) for moe in routers])
