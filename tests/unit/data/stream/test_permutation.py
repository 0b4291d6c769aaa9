import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetron.data.addressing.permutation import MAX_SIZE, Permutation


@given(size=st.integers(1, 3000), key=st.text(max_size=8))
def test_is_a_bijection_with_its_inverse(size: int, key: str) -> None:
    order = Permutation(size, key)
    positions = np.arange(size)
    images = order(positions)
    assert np.array_equal(np.sort(images), positions)
    assert np.array_equal(order.inverse(images), positions)


@given(size=st.integers(1, MAX_SIZE), data=st.data())
def test_inverts_at_any_size(size: int, data: st.DataObject) -> None:
    positions = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20)))
    order = Permutation(size, "large")
    images = order(positions)
    assert images.min() >= 0 and images.max() < size
    assert np.array_equal(order.inverse(images), positions)


def test_is_the_same_on_every_machine() -> None:
    assert Permutation(10, "a")(np.arange(10)).tolist() == [2, 1, 0, 5, 8, 7, 3, 9, 4, 6]
    assert Permutation(10**12, "b")(np.arange(3)).tolist() == [
        989948628858,
        868475941655,
        322246223151,
    ]


def test_keys_give_unrelated_orders() -> None:
    size = 4096
    orders = [Permutation(size, f"epoch {epoch}")(np.arange(size)) for epoch in range(8)]
    for number, order in enumerate(orders):
        for other in orders[:number]:
            assert np.count_nonzero(order == other) < 12  # one is expected by chance
            assert abs(np.corrcoef(order, other)[0, 1]) < 0.08


def test_images_of_a_position_are_uniform() -> None:
    """Chi-square of the images of position 3 of 11 over 5,500 keys, 10 degrees of freedom."""
    keys, size = 5500, 11
    images = [int(Permutation(size, f"key {k}")(np.array([3]))[0]) for k in range(keys)]
    counts = np.bincount(images, minlength=size)
    assert ((counts - keys / size) ** 2 / (keys / size)).sum() < 35  # p = 1e-4


def test_neighbours_are_separated() -> None:
    size = 100_000
    images = Permutation(size, "n")(np.arange(size))
    distance = np.abs(np.diff(images)).mean()
    assert distance == pytest.approx(size / 3, rel=0.02)  # mean distance of two random numbers


@pytest.mark.parametrize("size", [0, -1, MAX_SIZE + 1])
def test_refuses_impossible_sizes(size: int) -> None:
    with pytest.raises(ValueError, match="size"):
        Permutation(size, "k")
