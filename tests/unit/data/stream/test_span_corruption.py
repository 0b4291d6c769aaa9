"""T5's span_corruption: exact lengths, every token recovered; prefix_lm of two stacks."""

import numpy as np
import pytest

from moetron.common.errors import UserError
from moetron.data.objectives.span_corruption import SpanCorruption
from moetron.data.objectives.split_text import SplitText
from moetron.data.stream.mock_spans import MockSpans

SENTINELS = range(32099, 31999, -1)
END, START = 1, 0


@pytest.mark.parametrize(
    ("inputs", "raw", "targets", "spans"), [(512, 568, 114, 28), (1024, 1137, 229, 57)]
)
def test_t5s_lengths(inputs: int, raw: int, targets: int, spans: int) -> None:
    """Lengths of t5/data/preprocessors.py, random_spans_helper."""
    made = SpanCorruption(inputs + targets, inputs, SENTINELS, END, START)
    assert (made.raw_tokens, made.inputs, made.targets) == (raw, inputs, targets)
    row, mask = np.empty(inputs + targets + 1, np.int64), np.ones(inputs + targets, np.float32)
    filled = made.fill(np.arange(100, 100 + raw), 0, "a key", row, mask)
    assert filled.segments is None, "one text that fills the sample"
    assert mask.sum() == targets
    assert not mask[:inputs].any()
    used = row[:inputs][row[:inputs] >= 32000]
    assert used.tolist() == list(SENTINELS[:spans])  # descending
    assert row[inputs - 1] == row[-1] == END


@pytest.mark.parametrize("examples", [1, 3])
def test_every_token_is_recovered(examples: int) -> None:
    encoder, decoder = 60 * examples, 20 * examples
    made = SpanCorruption(encoder + decoder, encoder, SENTINELS, END, START, examples=examples)
    (raw,) = made.windowing.advances
    text = np.arange(100, 100 + raw)
    row = np.empty(encoder + decoder + 1, np.int64)
    mask = np.ones(encoder + decoder, np.float32)
    segments = made.fill(text, 0, "key", row, mask).segments
    assert segments is not None
    tokens, labels = row[:-1], row[1:]
    found: list[int] = []
    for example in range(1, examples + 1):
        places = np.flatnonzero(segments == example)
        inputs, targets = places[places < encoder], places[places >= encoder]
        assert tokens[targets[0]] == START
        assert (tokens[targets[1:]] == labels[targets[:-1]]).all()
        assert (mask[targets] == 1).all()
        spans: dict[int, list[int]] = {}
        for token in labels[targets][:-1].tolist():
            if token in SENTINELS:
                current = spans.setdefault(token, [])
            else:
                current.append(token)
        assert tokens[inputs[-1]] == labels[targets[-1]] == END
        for token in tokens[inputs[:-1]].tolist():
            found += spans.get(token, [token])
    assert found == text.tolist()
    assert mask.sum() == sum(segments[encoder:] > 0)


def test_split_texts_fit_and_are_whole() -> None:
    encoder, decoder = 16, 6
    made, splits = SplitText(encoder + decoder, encoder, END, START), set()
    for sample in range(60):
        text = np.arange(100, 116)
        row, mask = np.empty(encoder + decoder + 1, np.int64), np.ones(encoder + decoder)
        segments = made.fill(text, 0, f"sample {sample}", row, mask).segments
        assert segments is not None
        inputs, targets = row[:-1][:encoder][segments[:encoder] == 1], row[1:][mask == 1]
        assert inputs[-1] == targets[-1] == END
        assert [*inputs[:-1], *targets[:-1]] == text.tolist()
        assert row[encoder] == START
        assert (segments[encoder:] == mask[encoder:]).all()
        splits.add(len(inputs) - 1)
    assert splits == {11, 12, 13, 14, 15}


def test_refusals() -> None:
    with pytest.raises(UserError, match="use --seq-length 626"):
        SpanCorruption(600, 512, SENTINELS, END, START)
    with pytest.raises(UserError, match="28 hidden spans"):
        SpanCorruption(626, 512, SENTINELS[:27], END, START)
    with pytest.raises(UserError, match="longer inputs"):
        SpanCorruption(6, 2, SENTINELS, END, START)


def test_mock_samples_are_functions_of_their_number() -> None:
    one, other = (MockSpans(7, 512, 160, 128) for _ in range(2))
    for n in (0, 5):
        assert np.array_equal(one[n]["tokens"], other[n]["tokens"])
    assert not np.array_equal(one[0]["tokens"], one[1]["tokens"])
    assert max(one[3]["tokens"]) == 511
