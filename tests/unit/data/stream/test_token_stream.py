import json
import pickle
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moetron.common.errors import UserError
from moetron.data.stream.token_stream import TokenStream, training_stream, validation_stream

S = 4


def numbered(first: int, count: int, length: int = 7) -> list[list[int]]:
    """Return documents whose tokens are first, first + 1, ...: a window shows its position."""
    return [list(range(i, i + length)) for i in range(first, first + count * length, length)]


def window_of(sample: dict, first: int) -> int:
    """Return the window of a sample of ``numbered`` documents; its tokens must be consecutive."""
    tokens = [*sample["tokens"].tolist(), int(sample["labels"][-1])]
    assert tokens == list(range(tokens[0], tokens[0] + S + 1))
    assert sample["labels"].tolist() == tokens[1:]
    assert (tokens[0] - first) % S == 0
    return (tokens[0] - first) // S


@pytest.fixture
def three(make_shard) -> list[str]:
    """Shards a, b, c of 70, 140 and 21 tokens: 17, 34 and 5 windows of 4."""
    sizes = {"a": (10_000, 10), "b": (20_000, 20), "c": (30_000, 3)}
    return [make_shard(name, numbered(*size), 40_000) for name, size in sizes.items()]


def test_each_epoch_visits_every_window_once(three) -> None:
    stream = training_stream(three, S, seed=1)
    for epoch in range(3):
        seen = [Counter[int]() for _ in three]
        for n in range(epoch * 56, (epoch + 1) * 56):
            sample = stream[n]
            seen[sample["source"]][window_of(sample, 10_000 * (sample["source"] + 1))] += 1
        assert [sorted(counter.elements()) for counter in seen] == [
            list(range(17)),
            list(range(34)),
            list(range(5)),
        ]


def test_epochs_and_sources_have_different_orders(three) -> None:
    stream = training_stream(three[1:2], S, seed=1)
    orders = [[window_of(stream[e * 34 + i], 20_000) for i in range(34)] for e in range(3)]
    assert orders[0] != sorted(orders[0])
    assert orders[0] != orders[1] != orders[2] != orders[0]
    other = training_stream(three[1:2], S, seed=2)
    assert [window_of(other[i], 20_000) for i in range(34)] != orders[0]


def test_sources_of_one_size_have_different_orders(make_shard) -> None:
    twins = [make_shard(name, numbered(first, 20), 40_000) for name, first in (("x", 0), ("y", 9))]
    stream = training_stream(twins, S, seed=1)
    orders: list[list[int]] = [[], []]
    for n in range(68):
        orders[stream[n]["source"]].append(window_of(stream[n], 9 * stream[n]["source"]))
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]


def test_weights_are_respected(three) -> None:
    stream = training_stream(["0.7", three[0], "0.2", three[1], "0.1", three[2]], S, seed=1)
    counts = Counter(stream[n]["source"] for n in range(1000))
    assert [counts[s] for s in range(3)] == [700, 200, 100]
    assert stream.source_names == ["a", "b", "c"]


def test_samples_do_not_depend_on_the_order_of_access(three) -> None:
    stream = training_stream(three, S, seed=3)
    numbers = [0, 5, 255, 256, 257, 4000, 10**12, len(stream) - 1]
    expected = {n: stream[n]["tokens"].tolist() for n in numbers}
    random.Random(0).shuffle(numbers)
    fresh = pickle.loads(pickle.dumps(training_stream(three, S, seed=3)))  # noqa: S301 - our own
    for n in numbers:
        assert fresh[n]["tokens"].tolist() == expected[n]
    batch = fresh.batch(numbers)
    assert batch["tokens"].tolist() == [expected[n] for n in numbers]
    assert batch["source"].tolist() == [stream[n]["source"] for n in numbers]


def test_shapes_of_a_sample(three) -> None:
    stream = training_stream(three, S, seed=1)
    for sample in (stream[0], stream.batch([0, 1])):
        assert sample["tokens"].dtype == sample["labels"].dtype == np.int64
        assert sample["loss_mask"].dtype == np.float32 and sample["loss_mask"].all()
        assert sample["tokens"].shape == sample["labels"].shape == sample["loss_mask"].shape
    for n in (-1, len(stream)):
        with pytest.raises(IndexError):
            stream[n]


def test_eod_mask_loss_follows_the_input(make_shard) -> None:
    prefix = make_shard("a", [[1, 9], [2, 3, 9], [4, 5, 6, 9]])
    assert validation_stream([prefix], 8)[0]["loss_mask"].tolist() == [1.0] * 8
    masked = validation_stream([prefix], 8, eod_mask_loss=True)[0]
    assert masked["tokens"].tolist() == [1, 9, 2, 3, 9, 4, 5, 6]
    assert masked["loss_mask"].tolist() == [1, 0, 1, 1, 0, 1, 1, 1]
    assert masked["labels"].tolist() == [9, 2, 3, 9, 4, 5, 6, 9]


def stream_of(stream: TokenStream) -> list[dict[str, Any]]:
    return [stream[n] for n in range(len(stream))]


def test_validation_is_every_window_in_file_order(three) -> None:
    stream = validation_stream(three, S)
    assert len(stream) == 17 + 34 + 5
    places = [(s["source"], window_of(s, 10_000 * (s["source"] + 1))) for s in stream_of(stream)]
    assert places == [(s, w) for s, size in enumerate([17, 34, 5]) for w in range(size)]
    with pytest.raises(IndexError):
        stream[56]


def test_some_validation_windows_are_spread_over_all_sources(three) -> None:
    """With the first ones, a small evaluation would read the first source alone."""
    stream = validation_stream(three, S, at_most=14)
    places = [(s["source"], window_of(s, 10_000 * (s["source"] + 1))) for s in stream_of(stream)]
    first = [(0, w) for w in (0, 4, 8, 12, 16)]
    assert places == [*first, *((1, w) for w in range(3, 34, 4)), (2, 1)]
    assert len(validation_stream(three, S, at_most=1000)) == 17 + 34 + 5
    assert stream.state() != validation_stream(three, S).state()


def test_state_identifies_the_stream(three) -> None:
    state = training_stream(three, S, seed=1).state()
    assert json.loads(json.dumps(state)) == state
    assert state == training_stream(three, S, seed=1).state()
    assert [source["tokens"] for source in state["sources"]] == [70, 140, 21]
    others = [
        training_stream(three, S, seed=2),
        training_stream(three[:2], S, seed=1),
        training_stream(three, 5, seed=1),
        training_stream(["1", three[0], "1", three[1], "1", three[2]], S, seed=1),
        training_stream(three, S, seed=1, eod_mask_loss=True),
    ]
    assert all(other.state() != state for other in others)


def test_refuses_another_tokenizers_shards_all_at_once(make_shard) -> None:
    good = make_shard("good", numbered(0, 4), fingerprint="a" * 64)
    bad = [make_shard(f"bad{i}", numbered(0, 4), fingerprint="b" * 64) for i in (1, 2)]
    assert training_stream([good], S, seed=1, expected_fingerprint="a" * 64)[0]
    with pytest.raises(UserError, match=r"another tokenizer.*bad1.*bad2") as caught:
        training_stream([good, *bad], S, seed=1, expected_fingerprint="a" * 64)
    assert "good" not in str(caught.value)


def test_refuses_sources_that_are_too_short(make_shard) -> None:
    assert len(validation_stream([make_shard("enough", [[1, 2, 3, 4, 5]])], S)) == 1
    with pytest.raises(UserError, match=r"short: 4 tokens in 1 documents .* \(needs 5\)"):
        training_stream([make_shard("short", [[1, 2, 3, 4]])], S, seed=1)


@pytest.mark.parametrize("form", [[], ["0.5"], ["0.5", "{a}", "{b}"], ["0.5", "{a}", "{b}", "1"]])
def test_refuses_other_forms_of_data_path(three, form: list[str]) -> None:
    words = [word.format(a=three[0], b=three[1]) for word in form]
    with pytest.raises(UserError, match="data-path"):
        training_stream(words, S, seed=1)


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf"])
def test_refuses_invalid_weights(three, weight: str) -> None:
    with pytest.raises(UserError, match=r"--data-path: weight .* above 0"):
        training_stream([weight, three[0]], S, seed=1)


def test_eod_mask_loss_needs_a_manifest(three) -> None:
    Path(three[0] + ".json").unlink()
    assert training_stream(three[:1], S, seed=1, expected_fingerprint="x" * 64)[0]
    with pytest.raises(UserError, match="manifest"):
        training_stream(three[:1], S, seed=1, eod_mask_loss=True)
