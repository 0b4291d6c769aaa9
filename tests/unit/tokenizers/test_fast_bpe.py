"""The fast engine gives the ids of HuggingFace's library, on a BPE trained here."""

import importlib.util
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetron.tokenizers import fast_bpe
from moetron.tokenizers.byte_level import ByteTokenizer
from moetron.tokenizers.fast_bpe import FastBPE, first_difference, open_fast
from moetron.tokenizers.huggingface import HuggingFaceTokenizer

needs_gigatoken = pytest.mark.skipif(
    importlib.util.find_spec("gigatoken") is None, reason="the extra `fast` is not installed"
)


@needs_gigatoken
@settings(deadline=None)
@given(texts=st.lists(st.text() | st.text(" e\u0301\n<|ofx>'1"), max_size=5))
def test_any_text_has_the_same_ids(reference: HuggingFaceTokenizer, texts: list[str]) -> None:
    fast = open_fast(reference)
    assert fast is not None
    expected = reference.encode_batch(texts)
    assert fast.encode_batch(texts) == expected
    ids, lengths = fast.encode_flat(texts)
    assert ids.tolist() == [i for document in expected for i in document]
    assert lengths.tolist() == list(map(len, expected))
    assert [fast.decode(document) for document in expected] == list(map(reference.decode, expected))


@needs_gigatoken
@pytest.mark.parametrize("threads", [1, 3])
def test_threads_that_encode_at_the_same_time_get_their_own_ids(reference, threads: int) -> None:
    fast = FastBPE(reference, threads)
    batches = [[f"batch {number} of words, {'ever longer ' * number}"] for number in range(60)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(fast.encode_batch, batches))
    assert found == [reference.encode_batch(batch) for batch in batches]


@needs_gigatoken
@pytest.mark.parametrize(("process_bytes", "made"), [(1 << 50, 2), (0, 3)])
def test_an_engine_that_has_grown_too_large_is_replaced(
    reference, monkeypatch, process_bytes: int, made: int
) -> None:
    monkeypatch.setattr(fast_bpe, "PROCESS_BYTES", process_bytes)
    monkeypatch.setattr(fast_bpe, "REPLACED_CHARACTERS", 20)
    engines: list[str] = []
    make = fast_bpe._Engine.__init__
    monkeypatch.setattr(
        fast_bpe._Engine,
        "__init__",
        lambda self, definition: engines.append(definition) or make(self, definition),
    )
    fast = FastBPE(reference, threads=2)
    text = "nine char"
    for _ in range(7):  # each engine lasts for three calls
        ids, _ = fast.encode_flat([text])
        assert ids.tolist() == reference.encode(text)
    assert len(engines) == made


@needs_gigatoken
def test_only_a_known_tokenizer_that_agrees_is_fast(reference, monkeypatch) -> None:
    assert isinstance(open_fast(reference), FastBPE)
    assert open_fast(ByteTokenizer()) is None
    monkeypatch.setattr(reference, "definition", "{}")
    assert open_fast(reference) is None
    monkeypatch.undo()
    monkeypatch.setattr(
        HuggingFaceTokenizer, "encode_batch", lambda self, texts: [[0]] * len(texts)
    )
    assert open_fast(reference) is None


def test_without_gigatoken_nothing_is_fast(reference, monkeypatch) -> None:
    monkeypatch.setattr(fast_bpe, "installed_version", lambda _: None)
    assert open_fast(reference) is None


@needs_gigatoken
def test_names_the_first_text_that_differs(reference, monkeypatch) -> None:
    fast = FastBPE(reference)
    assert first_difference(fast, ["a", "b", "c"]) is None
    monkeypatch.setattr(
        HuggingFaceTokenizer,
        "encode_batch",
        lambda self, texts: [[-1] if text == "b" else fast.encode(text) for text in texts],
    )
    assert first_difference(fast, ["a", "b", "c"]) == "b"


@pytest.mark.parametrize("texts", [[], [""], ["", "one", "", "two \u2581 three"]])
def test_flat_ids_are_those_of_the_batch(reference, tokenizer, texts: list[str]) -> None:
    for each in (reference, tokenizer, ByteTokenizer()):
        ids, lengths = each.encode_flat(texts)
        expected = each.encode_batch(texts)
        assert ids.tolist() == [i for document in expected for i in document]
        assert lengths.dtype == np.int64 and lengths.tolist() == list(map(len, expected))
