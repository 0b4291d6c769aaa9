"""Preprocessing with a fast engine, and with texts too long for one call."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetron.data.encoding import encode as encode_module
from moetron.data.encoding import long_text
from moetron.data.prepare import engine
from moetron.data.prepare.options import Options
from moetron.data.prepare.preprocess import preprocess
from moetron.data.shards.shard import Shard
from moetron.tokenizers.byte_level import ByteTokenizer
from moetron.tokenizers.fast_bpe import FastBPE


class WrongAfter(FastBPE):
    """Engine that is right about every text but one."""

    def __init__(self, reference: ByteTokenizer, wrong: str) -> None:
        self.reference, self.wrong = reference, wrong
        self.name, self.vocab_size, self.eod = "fast", reference.vocab_size, reference.eod

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [[0] if text == self.wrong else self.reference.encode(text) for text in texts]

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return ByteTokenizer.encode_flat(self, texts)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("wrong", ["c.txt", None])
def test_a_fast_engine_that_differs_is_replaced(
    tmp_path: Path, monkeypatch, caplog, wrong, workers: int
) -> None:
    monkeypatch.setattr("moetron.data.readers.rows.CHUNK_BYTES", 1)
    monkeypatch.setattr(engine, "open_fast", lambda tokenizer, _: WrongAfter(tokenizer, wrong))
    names = [f"{letter}.txt" for letter in "abcd"]
    for name in names:
        (tmp_path / name).write_text(name)
    preprocess(Options([str(tmp_path / "*.txt")], "bytes", str(tmp_path / "p"), workers=workers))
    shard = Shard(tmp_path / "p")
    assert [ByteTokenizer().decode(shard.document(i)) for i in range(4)] == names
    assert ("restarting with the reference" in caplog.text) == (wrong is not None)


@pytest.mark.parametrize(("texts", "at"), [(1, 450), (2, 900), (3, 0)])
def test_start_middle_or_end_of_a_long_text_is_compared(texts: int, at: int) -> None:
    text = "".join(chr(0x4E00 + i) for i in range(1000))
    batch, characters = [text] * texts, encode_module.COMPARED_CHARACTERS
    piece = text[at : at + characters]
    assert len(piece) == characters
    with pytest.raises(encode_module.EnginesDiffer):
        encode_module.compare_engines(WrongAfter(ByteTokenizer(), piece), batch, 1)
    encode_module.compare_engines(WrongAfter(ByteTokenizer(), "another"), batch, 1)


def test_threads_of_a_concurrent_tokenizer_give_the_same_bytes(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("moetron.data.readers.rows.CHUNK_BYTES", 1)
    monkeypatch.setattr(ByteTokenizer, "concurrent", True)
    monkeypatch.setattr(
        "moetron.data.prepare.worker_pool._processes", None
    )  # would fail if it were called
    for number in range(40):
        (tmp_path / f"{number:02}.txt").write_text("text " * (number % 7 + 1))
    for workers in (1, 3):
        inputs, prefix = [str(tmp_path / "*.txt")], str(tmp_path / f"p{workers}")
        preprocess(Options(inputs, "bytes", prefix, append_eod=True, workers=workers))
    assert (tmp_path / "p1.bin").read_bytes() == (tmp_path / "p3.bin").read_bytes()
    assert (tmp_path / "p1.idx").read_bytes() == (tmp_path / "p3.idx").read_bytes()


def test_a_long_text_is_split_where_ids_do_not_change(monkeypatch) -> None:
    monkeypatch.setattr(long_text, "PIECE_CHARACTERS", 50)
    text = "some words\nand 漢字 more, " * 40
    found = list(long_text.pieces([text], ByteTokenizer()))
    assert "".join(found) == text
    assert len(found) > 10 and all(50 <= len(piece) < 70 for piece in found[:-1])
    assert all(piece[0].isspace() and not piece[-1].isspace() for piece in found[1:-1])


@given(sizes=st.lists(st.integers(0, 700), max_size=20), letters=st.sampled_from(["x", "ab c\n"]))
def test_pieces_do_not_depend_on_the_blocks(sizes: list[int], letters: str) -> None:
    text = letters * 400
    ends = [0, *sorted(min(size, len(text)) for size in sizes), len(text)]
    parts = [text[start:end] for start, end in pairwise(ends)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_text, "PIECE_CHARACTERS", 50)
        patch.setattr(long_text, "CONTEXT_CHARACTERS", 30)
        expected = list(long_text.pieces([text], ByteTokenizer()))
        assert list(long_text.pieces(parts, ByteTokenizer())) == expected
        assert "".join(expected) == text


class Prefixed(ByteTokenizer):
    """Tokenizer that marks the start of a text, so that no split is safe."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [[0, *ids] for ids in super().encode_batch(texts)]


def test_a_text_without_a_safe_position_is_split_at_the_bound(monkeypatch) -> None:
    monkeypatch.setattr(long_text, "PIECE_CHARACTERS", 50)
    found = list(long_text.pieces(["some words " * 40], Prefixed()))
    assert [len(piece) for piece in found] == [200, 200, 40]
    assert list(map(len, long_text.pieces(["x" * 150], ByteTokenizer()))) == [150]


def test_long_documents_are_encoded_like_short_ones(tmp_path: Path, monkeypatch) -> None:
    texts = ["short", "long words " * 30, "short again", "", "other long words " * 30]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    options = Options([str(tmp_path / "*.txt")], "bytes", str(tmp_path / "p"), append_eod=True)
    preprocess(options)
    expected = (tmp_path / "p.bin").read_bytes()
    (tmp_path / "p.bin").unlink()
    for module in (long_text, encode_module):
        monkeypatch.setattr(module, "PIECE_CHARACTERS", 50)
    preprocess(options)
    assert (tmp_path / "p.bin").read_bytes() == expected
