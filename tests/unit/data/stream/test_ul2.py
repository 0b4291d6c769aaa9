from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetron.common.errors import UserError
from moetron.data.addressing.windowing import Windowing
from moetron.data.objectives.spans import corrupted_lengths, draws, random_segments, span_counts
from moetron.data.objectives.ul2 import OPENMOE, UL2, Denoiser
from moetron.data.stream.token_stream import training_stream, validation_stream
from moetron.tokenizers.byte_level import ByteTokenizer

FIRST_SENTINEL, SENTINELS, END, START = 2000, 300, 1, 0
RAW = range(300, 1900)  # raw tokens, apart from bytes of the prefixes, sentinels, end and start


def ul2(seq_length: int, **options) -> UL2:
    sentinels = range(FIRST_SENTINEL, FIRST_SENTINEL - SENTINELS, -1)
    encode = ByteTokenizer().encode
    return UL2(
        seq_length, encode, list(sentinels)[: options.pop("count", 300)], END, START, **options
    )


def restored(row: np.ndarray, mask: np.ndarray) -> tuple[str, list[list[int]]]:
    """Return (mode, raw tokens) of a sample with one example from its inputs and labels."""
    labels = row[1:].tolist()
    middle = int(np.argmax(mask))
    inputs, targets = labels[:middle], labels[middle : middle + int(mask.sum())]
    assert mask.tolist() == [0.0] * middle + [1.0] * len(targets) + [0.0] * (
        mask.size - middle - len(targets)
    )
    assert inputs.pop() == END and targets.pop() == END
    assert set(labels[middle + len(targets) + 1 :]) <= {START} and row[0] == START
    mode, inputs = bytes(inputs[:6]).decode(), inputs[6:]
    hidden: dict[int, list[int]] = {}
    for token in targets:
        if token > FIRST_SENTINEL - SENTINELS:
            hidden[token] = []
        elif hidden:
            hidden[next(reversed(hidden))].append(token)
    if not hidden:
        return mode, inputs + targets
    assert list(hidden) == [FIRST_SENTINEL - i for i in range(len(hidden))]
    assert all(hidden.values())
    text: list[int] = []
    for token in inputs:
        text += hidden.pop(token, [token])
    assert not hidden
    return mode, text


@pytest.mark.parametrize(
    ("mean_span", "density", "raw", "targets", "spans"),
    [
        (3, 0.15, 1137, 229, 57),
        (8, 0.15, 1178, 200, 22),
        (3, 0.5, 1534, 1024, 256),
        (8, 0.5, 1818, 1024, 114),
        (64, 0.5, 2014, 1024, 16),
    ],
)
def test_arithmetic_is_t5s(mean_span, density, raw, targets, spans) -> None:
    """Raw tokens of 1,024 inputs, as measured on OpenMoE's own code."""
    assert corrupted_lengths(raw, density, mean_span) == (1024, targets)
    assert max(corrupted_lengths(raw + 1, density, mean_span)) > 1024
    assert span_counts(raw, density, mean_span)[1] == spans


@settings(max_examples=80)
@given(slot=st.integers(0, 9), key=st.text(max_size=5), seq_length=st.sampled_from([32, 100, 512]))
def test_the_original_can_be_recovered(slot: int, key: str, seq_length: int) -> None:
    objective = ul2(seq_length)
    raw = np.random.default_rng(slot).integers(RAW.start, 1700, objective.windowing.advances[slot])
    row, mask = np.empty(seq_length + 1, np.int64), np.ones(seq_length, np.float32)
    objective.fill(raw.astype(np.uint16), slot, key, row, mask)
    mode, text = restored(row, mask)
    assert text == raw.tolist()
    assert mode in {"[S2S] ", "[NLU] ", "[NLG] "}
    assert np.count_nonzero(row[1:] == START) <= 2  # hardly any padding


def test_modes_hide_tokens_at_their_rates() -> None:
    objective = ul2(2048)
    fractions: dict[str, list[float]] = {"[S2S] ": [], "[NLU] ": [], "[NLG] ": []}
    for key in range(20):
        for slot, length in enumerate(objective.windowing.advances):
            raw = np.full(length, 500)
            row, mask = np.empty(2049, np.int64), np.ones(2048, np.float32)
            objective.fill(raw, slot, f"{key} {slot}", row, mask)
            hidden = np.count_nonzero((row[1:] == 500) & (mask == 1)) / length
            fractions[restored(row, mask)[0]].append(hidden)
    assert [len(of_mode) for of_mode in fractions.values()] == [100, 40, 60]  # 50, 20 and 30 %
    assert np.mean(fractions["[S2S] "]) == pytest.approx(0.5, abs=0.1)
    assert np.std(fractions["[S2S] "]) == pytest.approx(12**-0.5, abs=0.05)  # a uniform split
    assert fractions["[NLU] "] == pytest.approx([0.15] * 40, abs=1e-3)
    assert fractions["[NLG] "] == pytest.approx([0.5] * 60, abs=1e-3)


def test_no_raw_token_is_wasted(make_shard) -> None:
    seq_length, epochs = 64, 2
    tokens = list(range(1300)) * 3
    prefix = make_shard("a", [[300 + token for token in tokens]], 4000)
    stream = training_stream([prefix], seq_length, seed=1, objective=ul2(seq_length))
    count = stream.sources[0].windows
    tail = len(tokens) - sum(stream.sources[0].windowing.advances[i % 10] for i in range(count))
    assert 0 <= tail < seq_length
    for epoch in range(epochs):
        seen: Counter[int] = Counter()
        for n in range(epoch * count, (epoch + 1) * count):
            row = np.append(stream[n]["tokens"], stream[n]["labels"][-1])
            seen.update(restored(row, stream[n]["loss_mask"])[1])
        assert sum(seen.values()) == len(tokens) - tail
        assert max(seen.values()) == 3


def test_samples_are_drawn_by_number(make_shard) -> None:
    prefix = make_shard("a", [list(range(300, 1500))], 4000)
    stream = training_stream([prefix], 64, seed=1, objective=ul2(64))
    again = training_stream([prefix], 64, seed=1, objective=ul2(64))
    assert again[7]["tokens"].tolist() == stream[7]["tokens"].tolist()
    other = training_stream([prefix], 64, seed=2, objective=ul2(64))
    assert other[7]["tokens"].tolist() != stream[7]["tokens"].tolist()
    assert stream.state()["objective"]["name"] == "ul2"
    assert len(validation_stream([prefix], 64, objective=ul2(64))) == stream.sources[0].windows


def test_several_examples_share_the_sentinels() -> None:
    with pytest.raises(UserError, match="sentinels; put more examples"):
        ul2(4096)
    objective = ul2(4096, examples=2)
    slot = objective._slots.index(3)  # r = 0.5, mu = 3
    raw = np.arange(objective.windowing.advances[slot]) % 1000 + 300
    row, mask = np.empty(4097, np.int64), np.ones(4096, np.float32)
    objective.fill(raw, slot, "key", row, mask)
    halves = [(row[i : i + 2049].copy(), mask[i : i + 2048]) for i in (0, 2048)]
    assert halves[1][0][0] == END or halves[1][0][0] == START
    halves[1][0][0] = START
    assert [token for half in halves for token in restored(*half)[1]] == raw.tolist()


def test_refuses_impossible_settings() -> None:
    with pytest.raises(UserError, match="no room"):
        ul2(8)
    with pytest.raises(UserError, match="3 examples do not divide"):
        ul2(64, examples=3)
    with pytest.raises(UserError, match="in at most 1000"):
        ul2(64, denoisers=[Denoiser(0.12345, "a"), Denoiser(0.5, "b")])
    assert len(OPENMOE) == 6


@given(advances=st.lists(st.integers(1, 9), min_size=1, max_size=6), overlap=st.integers(0, 3))
def test_windowing_uses_every_token_once(advances: list[int], overlap: int) -> None:
    windowing = Windowing(tuple(advances), overlap)
    for tokens in range(40):
        count, position = windowing.count(tokens), 0
        for i in range(count):
            slot, start, end = windowing.place(i)
            assert start == position and end - start == advances[slot] + overlap
            position += advances[i % len(advances)]
        assert count == 0 or end <= tokens
        assert windowing.place(count)[2] > tokens


@given(total=st.integers(1, 60), data=st.data())
def test_segments_sum_to_the_total(total: int, data: st.DataObject) -> None:
    segments = data.draw(st.integers(1, total))
    lengths = random_segments(segments, draws("k", total))
    assert lengths.size == segments and lengths.sum() == total and lengths.min() >= 1


def test_every_composition_is_as_likely() -> None:
    """4 tokens in 2 segments: 1+3, 2+2, 3+1; chi-square, 2 degrees of freedom."""
    firsts = Counter(int(random_segments(2, draws(f"{k}", 4))[0]) for k in range(3000))
    assert sum((firsts[i] - 1000) ** 2 / 1000 for i in (1, 2, 3)) < 18.4  # p = 1e-4
