import math
from collections import Counter

import numpy as np
import pytest

from moetron.data.stream.mock_stream import MockStream


def test_a_sample_is_a_function_of_seed_number_and_vocabulary() -> None:
    first, again = MockStream(1, 1000, 64), MockStream(1, 1000, 64)
    again[5]  # earlier requests do not matter
    assert np.array_equal(first[9]["tokens"], again[9]["tokens"])
    assert not np.array_equal(first[9]["tokens"], first[10]["tokens"])
    assert not np.array_equal(first[9]["tokens"], MockStream(2, 1000, 64)[9]["tokens"])
    assert np.array_equal(first[9]["tokens"], MockStream(1, 1000, 128)[9]["tokens"][:64])


def test_is_the_same_on_every_machine() -> None:
    assert MockStream(1234, 384, 8)[7]["tokens"].tolist() == [73, 217, 239, 5, 135, 9, 153, 91]


@pytest.mark.parametrize("vocab_size", [2, 100, 50_280])
def test_shapes_of_a_sample(vocab_size: int) -> None:
    stream = MockStream(3, vocab_size, 32)
    sample = stream[len(stream) - 1]
    assert sample["tokens"].dtype == sample["labels"].dtype == np.int64
    assert sample["loss_mask"].dtype == np.float32 and sample["loss_mask"].tolist() == [1.0] * 32
    assert np.array_equal(sample["tokens"][1:], sample["labels"][:-1])
    assert sample["tokens"].min() >= 0 and sample["tokens"].max() < vocab_size
    with pytest.raises(IndexError):
        stream[-1]


def test_its_bigrams_can_be_learned() -> None:
    """A count table of 400 samples comes near the stated entropy on 20 others."""
    stream = MockStream(5, 50_280, 256)
    pairs: Counter[tuple[int, int]] = Counter()
    firsts: Counter[int] = Counter()
    for n in range(400):
        sample = stream[n]
        pairs.update(zip(sample["tokens"].tolist(), sample["labels"].tolist(), strict=True))
        firsts.update(sample["tokens"].tolist())
    losses = []
    for n in range(1000, 1020):
        sample = stream[n]
        for pair in zip(sample["tokens"].tolist(), sample["labels"].tolist(), strict=True):
            losses.append(-math.log((pairs[pair] + 0.04) / (firsts[pair[0]] + 0.04 * 256)))
    assert stream.entropy == pytest.approx(2.0, abs=0.2)
    assert stream.entropy - 0.05 < np.mean(losses) < stream.entropy + 0.2 < math.log(256)
