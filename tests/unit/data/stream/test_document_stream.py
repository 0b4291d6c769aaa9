"""Documents of samples: an end token ends a document and belongs to it."""

import numpy as np

from moetron.data.stream.documents import DocumentStream, document_lengths
from moetron.data.stream.mock_stream import MockStream


def test_worked_examples() -> None:
    for tokens, lengths in (
        ([5, 0, 6, 7, 0, 0, 8], [2, 3, 1, 1]),
        ([5, 6, 0], [3]),
        ([0, 5], [1, 1]),
        ([5], [1]),
    ):
        assert document_lengths(np.array(tokens), eod=0).tolist() == lengths


def test_samples_are_those_of_the_stream() -> None:
    inner = MockStream(1, 8, 64)
    stream = DocumentStream(inner, eod=0)
    sample = stream[3]
    assert np.array_equal(sample["tokens"], inner[3]["tokens"])
    assert stream.state() == inner.state() and len(stream) == len(inner)
    ends = np.cumsum(sample["documents"])
    assert ends[-1] == 64 and len(ends) > 3
    assert (sample["tokens"][ends[:-1] - 1] == 0).all()
