"""Best-fit decreasing packing."""

from hypothesis import given
from hypothesis import strategies as st

from moetron.data.chat.packing import pack


def test_worked_example() -> None:
    """7 and 3 fill a row; 5, 4 and 1 the next; the last 4 needs its own."""
    rows = pack([3, 7, 5, 4, 4, 1], room=10)
    assert sorted(map(sorted, rows)) == [[0, 1], [2, 3, 5], [4]]


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=60),
    seed=st.randoms(use_true_random=False),
)
def test_rows(lengths: list[int], seed: object) -> None:
    order = list(range(len(lengths)))
    seed.shuffle(order)  # type: ignore[attr-defined]
    rows, plain = pack(lengths, 12, order), pack(lengths, 12)
    assert sorted(n for row in rows for n in row) == list(range(len(lengths)))
    sizes = [sum(lengths[n] for n in row) for row in rows]
    assert max(sizes) <= 12
    assert len(rows) == len(plain)  # a property of the lengths alone
    assert len(rows) <= -(-11 * -(-sum(lengths) // 12) // 9) + 1 or min(lengths) > 3
    smallest = min(lengths)
    assert sum(12 - size >= smallest for size in sizes) <= len(sizes)
