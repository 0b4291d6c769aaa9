"""Samples for tokenizer training."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetron.tokenizers.byte_level import ByteTokenizer
from moetron.tokenizers.fertility import measure
from moetron.tokenizers.training_sample import Reservoir, blocks, sample_sources, unimax


@given(text=st.text(st.sampled_from("ab\n")), size=st.integers(1, 9))
def test_blocks_join_to_the_text(text: str, size: int) -> None:
    found = list(blocks(text, size))
    assert "".join(found) == text
    assert all(0 < len(block) <= size for block in found)


def test_blocks_end_with_lines_where_they_can() -> None:
    assert list(blocks("ab\ncd\nefghij", 6)) == ["ab\ncd\n", "efghij"]
    assert list(blocks("abcdef\nxyz", 4)) == ["abcd", "ef\n", "xyz"]


def test_a_reservoir_keeps_to_its_budget_and_is_uniform() -> None:
    hits = dict.fromkeys(range(20), 0)
    for seed in range(400):
        reservoir = Reservoir(50, str(seed))
        for number in range(20):
            reservoir.add(f"{number:010}")
        drawn = [int(block) for block in reservoir.drawn()]
        assert len(drawn) == 5
        assert drawn == sorted(drawn)
        for number in drawn:
            hits[number] += 1
    assert all(60 < count < 140 for count in hits.values())  # 100 expected, sd 8.7


def test_unimax_worked_example() -> None:
    """Budget 60 over 10, 20, 100: 10 once, 20 once (below its even part, 25), the rest from 100."""
    assert unimax({"c": 100, "a": 10, "b": 20}, 60, 1) == {"a": 10, "b": 20, "c": 30}
    assert unimax({"c": 100, "a": 10, "b": 20}, 60, 5) == {"a": 20, "b": 20, "c": 20}


@given(
    sizes=st.dictionaries(st.text(max_size=3), st.integers(0, 1000), min_size=1),
    budget=st.integers(0, 5000),
    epochs=st.sampled_from([1.0, 2.0, 5.0]),
)
def test_unimax_spends_what_it_can(sizes: dict[str, int], budget: int, epochs: float) -> None:
    taken = unimax(sizes, budget, epochs)
    assert all(taken[name] <= sizes[name] * epochs + 1e-9 for name in sizes)
    assert sum(taken.values()) == pytest.approx(min(budget, sum(sizes.values()) * epochs))


def test_sources_in_proportion_or_balanced() -> None:
    corpus = [("big", "x" * 40_000), ("small", "y" * 10_000)] * 10
    drawn = sample_sources(lambda: corpus, 100_000, None, seed=1)
    sizes = {source: sum(map(len, found)) for source, found in drawn.items()}
    assert 70_000 < sizes["big"] <= 80_000
    assert 10_000 < sizes["small"] <= 20_000
    even = sample_sources(lambda: corpus, 100_000, 1, seed=1)
    assert all(45_000 < sum(map(len, found)) <= 50_000 for found in even.values())
    assert even == sample_sources(lambda: corpus, 100_000, 1, seed=1)


def test_a_small_source_repeats_up_to_the_cap() -> None:
    corpus = [("big", "x" * 100_000), ("small", "y" * 1000)]
    drawn = sample_sources(lambda: corpus, 10_000, 3, seed=1)
    assert sum(map(len, drawn["small"])) == 3000


def test_fertility_counts_bytes_and_words() -> None:
    found = measure(ByteTokenizer(), ["zwei Wörter"])
    assert (found.bytes_per_token, found.tokens_per_word) == (1.0, 6.0)
