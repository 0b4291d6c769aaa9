"""Rows of experts against loops over the routing map; torch operations and Triton kernels."""

import pytest
import torch

from moetron.moe.kernels.expert_rows import RowPlan, SortedRows, plan_rows
from tests.unit.kernels.interpreter import rerun_interpreted

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MAP = [  # 4 tokens, 3 experts, at most 2 each
    [1, 0, 1],
    [0, 0, 0],
    [0, 0, 1],
    [1, 0, 1],
]
ROWS = [(0, 0), (0, 3), (2, 0), (2, 2), (2, 3)]  # (expert, token)


def _map(tokens: int, experts: int, topk: int, dropped: float) -> torch.Tensor:
    """Return a map of ``topk`` experts for each token; some choices dropped."""
    order = torch.rand(tokens, experts).argsort(1)
    kept = (order < topk) & (torch.rand(tokens, experts) >= dropped)
    return kept.to(DEVICE)


CASES = [  # tokens, experts, topk, dropped
    (7, 4, 2, 0.0),
    (33, 6, 3, 0.4),
    (20, 70, 8, 0.1),
    (13, 5, 5, 0.0),
    (9, 1, 1, 0.0),
    (5, 4, 2, 1.0),  # everything dropped
    (0, 4, 2, 0.0),  # no tokens
]


def _case(case: tuple[int, int, int, float]) -> tuple[torch.Tensor, RowPlan]:
    torch.manual_seed(hash(case))
    map_TE = _map(*case)
    if map_TE.shape[1] > 4:
        map_TE[:, 2] = False  # an expert without tokens
    return map_TE, plan_rows(map_TE, case[2])


def _expected(map_TE: torch.Tensor) -> tuple[list[int], list[int]]:
    """Return ends and sources of all rows up to the last end, by a loop."""
    ends, source = [], []
    for column in map_TE.T.tolist():
        source += [token for token, chosen in enumerate(column) if chosen]
        ends.append(len(source))
    return ends, source


def test_worked_example() -> None:
    plan = plan_rows(torch.tensor(MAP, dtype=torch.bool, device=DEVICE), 2)
    assert plan.ends_E.tolist() == [2, 2, 5] and plan.ends_E.dtype == torch.int32
    assert plan.counts_E.tolist() == [2, 0, 3]
    trimmed = plan.trimmed()
    assert trimmed.source_R.tolist() == [token for _, token in ROWS]
    assert trimmed.choice_R.tolist() == [token * 3 + expert for expert, token in ROWS]
    if plan.slot_TK is not None:
        assert plan.source_R.tolist() == [0, 3, 0, 2, 3, -1, -1, -1]
        assert plan.slot_TK.tolist() == [[0, 2], [-1, -1], [3, -1], [1, 4]]
    x = torch.tensor([[1.0], [2.0], [4.0], [8.0]], device=DEVICE)
    rows = plan.gather(x)
    assert rows.flatten().tolist()[:5] == [1.0, 8.0, 1.0, 4.0, 8.0] and not rows[5:].any()
    assert plan.combine(rows).flatten().tolist() == [2.0, 0.0, 4.0, 16.0]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_plan(case: tuple[int, int, int, float]) -> None:
    map_TE, plan = _case(case)
    ends, source = _expected(map_TE)
    assert plan.ends_E.tolist() == ends
    assert plan.source_R.tolist()[: len(source)] == source
    assert (plan.source_R[len(source) :] == -1).all()
    chosen = plan.choice_R[plan.choice_R >= 0]
    assert sorted(chosen.tolist()) == map_TE.flatten().nonzero().flatten().tolist()
    assert (plan.choice_R // case[1] == plan.source_R).all()
    for token, slots in enumerate([] if plan.slot_TK is None else plan.slot_TK.tolist()):
        assert [row for row in slots if row >= 0] == [
            row for row, other in enumerate(source) if other == token
        ]


@pytest.mark.parametrize(
    ("width", "dtype"), [(24, torch.float32), (1, torch.float32), (64, torch.bfloat16)], ids=str
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_movement(case: tuple[int, int, int, float], width: int, dtype: torch.dtype) -> None:
    plan = _case(case)[1]
    x = torch.randn(case[0], width, device=DEVICE).to(dtype)
    rows = plan.gather(x)
    for row, token in enumerate(plan.source_R.tolist()):
        assert torch.equal(rows[row], x[token] if token >= 0 else torch.zeros_like(rows[row]))
    y = torch.randn(rows.shape, device=DEVICE).to(dtype)
    y[plan.source_R < 0] = torch.nan  # never read
    sums = torch.zeros(case[0], width, dtype=torch.float64, device=DEVICE)
    for row, token in enumerate(plan.source_R.tolist()):
        if token >= 0:
            sums[token] += y[row].double()
    found = plan.combine(y)
    assert found.dtype == dtype
    torch.testing.assert_close(
        found, sums.to(dtype), rtol=1e-2 if dtype.itemsize == 2 else 1e-6, atol=1e-6
    )
    assert torch.equal(found, plan.combine(y))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_weights(case: tuple[int, int, int, float]) -> None:
    map_TE, plan = _case(case)
    probs = torch.rand(case[:2], device=DEVICE) * map_TE
    weights, grad = plan.weights(probs), torch.randn(len(plan.source_R), device=DEVICE)
    grad[plan.source_R < 0] = torch.nan
    expected = torch.zeros_like(probs)
    for row, choice in enumerate(plan.choice_R.tolist()):
        assert float(weights[row]) == (float(probs.flatten()[choice]) if choice >= 0 else 0)
        if choice >= 0:
            expected.view(-1)[choice] = grad[row]
    assert torch.equal(plan.weight_gradient(grad), expected)


def test_values_that_are_not_contiguous() -> None:
    map_TE, plan = _case(CASES[1])
    x = torch.randn(8, case_tokens := CASES[1][0], device=DEVICE)
    assert torch.equal(plan.gather(x.t()), plan.gather(x.t().contiguous()))
    y = torch.randn(8, len(plan.source_R), device=DEVICE)
    assert torch.equal(plan.combine(y.t()), plan.combine(y.t().contiguous()))
    probs = torch.rand(map_TE.shape[1], case_tokens, device=DEVICE)
    assert torch.equal(plan.weights(probs.t()), plan.weights(probs.t().contiguous()))
    other = plan_rows(map_TE.t().contiguous().t(), CASES[1][2])
    assert torch.equal(other.source_R, plan.source_R)


def test_sorted_rows_stay_where_they_are() -> None:
    rows = SortedRows(torch.tensor([2, 2, 5], dtype=torch.int32))
    x = torch.randn(5, 3)
    assert rows.counts_E.tolist() == [2, 0, 3] and rows.trimmed() is rows
    for same in (rows.gather, rows.combine, rows.weights, rows.weight_gradient):
        assert same(x) is x


def test_in_the_interpreter() -> None:
    rerun_interpreted(__file__)
