"""Filters against their definitions, and their counts in the manifest."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetron.common.errors import UserError
from moetron.data.encoding.filters import Filters
from moetron.data.prepare.options import Options
from moetron.data.prepare.preprocess import preprocess
from moetron.data.shards.ngram_runs import repetitive
from moetron.data.shards.shard import Shard
from moetron.tokenizers.byte_level import ByteTokenizer


def repeats(document: list[int], repetitions: int, max_period: int) -> bool:
    """Return whether some slice of n tokens occurs ``repetitions`` times in a row (definition)."""
    return any(
        document[i : i + n * repetitions] == document[i : i + n] * repetitions
        for n in range(1, max_period + 1)
        for i in range(len(document) - n * repetitions + 1)
    )


@given(
    documents=st.lists(st.lists(st.integers(0, 2), max_size=24), max_size=5),
    repetitions=st.integers(2, 5),
    max_period=st.integers(1, 4),
)
def test_repetitive_is_its_definition(documents, repetitions: int, max_period: int) -> None:
    tokens = np.array([token for document in documents for token in document], np.uint16)
    lengths = np.array(list(map(len, documents)), np.int64)
    expected = [repeats(document, repetitions, max_period) for document in documents]
    assert repetitive(tokens, lengths, repetitions, max_period).tolist() == expected


@settings(max_examples=60)
@given(
    planted=st.lists(
        st.tuples(
            st.lists(st.integers(0, 3), min_size=1, max_size=13),
            st.integers(1, 40),
            st.lists(st.integers(0, 3), max_size=40),
            st.lists(st.integers(0, 3), max_size=40),
        ),
        max_size=5,
    ),
    repetitions=st.integers(5, 34),
)
def test_sampled_positions_miss_no_repetition(planted, repetitions: int) -> None:
    documents = [before + ngram * times + after for ngram, times, before, after in planted]
    tokens = np.array([token for document in documents for token in document], np.int32)
    lengths = np.array(list(map(len, documents)), np.int64)
    expected = [repeats(document, repetitions, 13) for document in documents]
    assert repetitive(tokens, lengths, repetitions).tolist() == expected


def test_a_repetition_at_the_start_belongs_to_its_document() -> None:
    tokens = np.array([*range(8), *[9] * 33])  # the first sampled position is its first
    assert repetitive(tokens, np.array([8, 33]), 33).tolist() == [False, True]


def test_the_manifest_counts_dropped_documents(tmp_path: Path) -> None:
    texts = ["one two three four", "x", "word " * 9, "0123456789" * 9, "five six seven eight", ""]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    filters = Filters(max_repetitions=9, frequent_words=True, min_tokens=4, max_tokens=95)
    options = Options([str(tmp_path / "*.txt")], "bytes", str(tmp_path / "p"))
    options = replace(options, append_eod=True, filters=replace(filters, frequent_words=False))
    manifest = preprocess(options).manifests[options.output_prefix]
    shard = Shard(options.output_prefix)
    kept = [ByteTokenizer().decode(shard.document(i)) for i in range(len(shard))]
    assert kept == [texts[0], texts[4]]
    assert manifest.filters == {"rejected": 0, "empty": 1, "short": 1, "long": 0, "repetitive": 2}
    assert manifest.text_bytes == sum(map(len, kept))
    again = preprocess(replace(options, filters=filters))
    assert not again.current
    assert again.manifests[options.output_prefix].filters["frequent words"] == 3


def test_wrong_filters_are_named() -> None:
    wrong = Options(["x"], "bytes", "p", filters=Filters(max_repetitions=1, max_tokens=0))
    with pytest.raises(UserError, match=r"--max-repetitions 1(.|\n)*--max-tokens 0"):
        preprocess(wrong)
