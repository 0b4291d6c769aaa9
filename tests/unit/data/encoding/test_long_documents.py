"""Documents too long to hold in memory give the same bytes as held ones."""

import gzip
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moetron.data.corpora.labels import labelled_texts
from moetron.data.encoding import long_text
from moetron.data.encoding.filters import Filters
from moetron.data.prepare.options import Options
from moetron.data.prepare.preprocess import preprocess
from moetron.data.readers import long_rows
from moetron.data.readers import rows as inputs
from moetron.data.readers.chunks import Cursor, LongChunk
from moetron.data.readers.input_files import find_files
from moetron.data.readers.long_rows import LongText
from moetron.data.readers.rows import read_chunks
from moetron.data.shards import shard_writer as writer_module

WORDS = 'words "quoted" \\ back\\\\slash \n über 漢字 \U0001f600 \0 '
LONG = [f"{number} {WORDS * 30}" for number in range(6)]
ROWS = [
    {"text": "short"},
    {"text": LONG[0], "max_stars_count": 5},
    {"text": LONG[2] * 2, "max_stars_count": 5},
    {"before": LONG[1], "nested": {"text": LONG[2]}, "text": LONG[3], "after": [1, {}]},
    {"text": "short", "long": LONG[4]},
    {"text": "", "long": LONG[4]},
    {"text": LONG[0], "metadata": {"max_stars_count": 9}},
    {"text": "again " * 200},
    {"no text": LONG[5]},
    {"text": [LONG[5]]},
    {"text": "ab" * 300 + " one two three four"},
    {"text": LONG[5]},
]
BROKEN = (
    b'{"text": "%b \\x no escape %b"}' % (b"a" * 300, b"b" * 300),
    b'{"text": "%b \xff no UTF-8"}' % (b"a" * 600),
    b'{"text": "%b", }' % (b"a" * 600),
    b'{"text": "never closed %b' % (b"a" * 600),
    b"no quotation mark " * 40,
)


def hold_nothing(patch: pytest.MonkeyPatch) -> None:
    """Make a few hundred bytes a long document, read in tiny blocks."""
    patch.setattr(inputs, "LONG_BYTES", 400)
    patch.setattr(long_rows, "LONG_BYTES", 1200)
    patch.setattr(long_rows, "HELD_BYTES", 100)
    patch.setattr(long_rows, "BLOCK_BYTES", 13)


@pytest.fixture
def options(tmp_path: Path, monkeypatch) -> Options:
    monkeypatch.setattr(inputs, "CHUNK_BYTES", 64)
    monkeypatch.setattr(long_text, "PIECE_CHARACTERS", 90)
    folder = tmp_path / "in"
    folder.mkdir()
    rows = [json.dumps(row).encode() for row in ROWS]
    rows += [json.dumps(row, ensure_ascii=False).encode() for row in ROWS[:4]] + [*BROKEN]
    (folder / "a.jsonl").write_bytes(b"\n".join(rows))
    (folder / "b.txt").write_text(LONG[1], encoding="utf-8-sig")
    (folder / "c.txt").write_bytes(LONG[2].encode() + b"\xe2\x82")
    (folder / "d.txt").write_text("short")
    (folder / "e.jsonl.gz").write_bytes(gzip.compress(b"\n".join([*rows[:4], b"", *rows[4:7]])))
    return Options([str(folder)], "bytes", str(tmp_path / "p"), max_bad_fraction=1.0)


def content(path: Path) -> bytes:
    """Return a file's bytes; for rejects, without the parser's message in brackets."""
    lines = path.read_bytes().splitlines()
    rejects = path.name.endswith(".rejects.jsonl")
    return (
        b"\n".join(line.partition(b"not JSON (")[0] for line in lines)
        if rejects
        else path.read_bytes()
    )


VARIANTS = {
    "plain": {},
    "filters": {
        "append_eod": True,
        "filters": Filters(max_repetitions=32, frequent_words=True, deduplicate=True),
    },
    "stars": {"filters": Filters(min_stars=2, min_tokens=20, max_tokens=2000)},
    "sides": {"holdout_fraction": 0.4, "shard_size_tokens": 500, "append_eod": True},
    "full shards": {"shard_size_tokens": 1, "filters": Filters(deduplicate=True)},
    "shares": {"merge_shares": 2},
}


@pytest.mark.parametrize(("variant", "workers"), [*((name, 1) for name in VARIANTS), ("sides", 2)])
def test_long_documents_give_the_same_bytes(
    options: Options, tmp_path: Path, monkeypatch, variant: str, workers: int
) -> None:
    options = replace(options, workers=workers, **VARIANTS[variant])
    if options.holdout_fraction:
        options = replace(options, holdout_prefix=str(tmp_path / "q"))
    made = []
    for hold in (True, False):
        if not hold:
            hold_nothing(monkeypatch)
        for number in range(options.merge_shares or 0):
            preprocess(
                replace(options, share=f"{number}/{options.merge_shares}", merge_shares=None)
            )
        preprocess(options)
        files = [path for path in sorted(tmp_path.iterdir()) if path.is_file()]
        made.append({path.name: content(path) for path in files})
        for path in files:
            path.unlink()
    assert made[0] == made[1] and len(made[0]) >= 4
    assert (
        sum(isinstance(chunk, LongChunk) for chunk in read_chunks(find_files(options.inputs))) > 20
    )
    if variant == "filters":
        left_out = json.loads(made[0]["p.json"])["filters"]
        assert all(
            left_out[name] for name in ("duplicate", "repetitive", "frequent words", "empty")
        )


def test_a_document_that_fails_leaves_no_trace(options: Options, tmp_path: Path) -> None:
    with writer_module.ShardWriter(tmp_path / "s", 1000) as writer:
        with pytest.raises(RuntimeError), writer.document() as append:
            append(writer_module.np.array([1], writer.dtype))
            raise RuntimeError
        with writer.document() as append:
            append(writer_module.np.array([2, 3], writer.dtype))
        writer.finish()
    assert (tmp_path / "s.bin").read_bytes() == b"\2\0\3\0"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=9),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=200)
@given(
    text=st.text(alphabet='ab"\\\n\0ü漢\U0001f600', min_size=20, max_size=60),
    others=st.dictionaries(st.text('ab"\\', min_size=1, max_size=3), JSON, max_size=3),
    ascii_only=st.booleans(),
    block_bytes=st.integers(12, 40),
)
def test_any_row_is_read_as_a_parser_reads_it(
    tmp_path_factory, text: str, others: dict, ascii_only: bool, block_bytes: int
) -> None:
    row = json.dumps({**others, "text": text}, ensure_ascii=ascii_only).encode()
    file = tmp_path_factory.getbasetemp() / "row.jsonl"
    file.write_bytes(row)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_rows, "HELD_BYTES", 8)
        patch.setattr(long_rows, "BLOCK_BYTES", block_bytes)
        found = LongText(LongChunk(str(file), 1, 0, len(row), 0, Cursor()), "text")
        assert "".join(found.blocks()) == orjson.loads(row)["text"]


@given(content=st.binary(min_size=1, max_size=40), block_bytes=st.integers(1, 9))
@example(content=b"\xef", block_bytes=1)  # start of a byte order mark
def test_any_file_is_decoded_or_refused(tmp_path_factory, content: bytes, block_bytes: int) -> None:
    parts = [content[a:b] for a, b in pairwise([*range(0, len(content), block_bytes), None])]
    try:
        expected = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        with pytest.raises(long_rows.Unreadable, match=rf"not UTF-8 \(byte {error.start}\)"):
            list(long_rows._decoded(parts))
    else:
        assert "".join(long_rows._decoded(parts)) == expected


def test_a_tokenizer_is_trained_on_parts_of_long_documents(options: Options, monkeypatch) -> None:
    files = find_files(options.inputs)
    text = "".join(text for _, text in labelled_texts(files, "text"))
    hold_nothing(monkeypatch)
    parts = "".join(text for _, text in labelled_texts(files, "text"))
    assert LONG[3] in parts and abs(len(parts) - len(text)) < 0.3 * len(text)


def test_a_row_that_is_long_without_long_strings_is_refused(tmp_path: Path, monkeypatch) -> None:
    hold_nothing(monkeypatch)
    file = tmp_path / "numbers.jsonl"
    file.write_bytes(b'{"text": "a", "numbers": [%b0]}' % (b"1, " * 500))
    with pytest.raises(long_rows.Unreadable, match="more than 1200 bytes without its long strings"):
        LongText(LongChunk(str(file), 1, 0, file.stat().st_size, 0, Cursor()), "text")
