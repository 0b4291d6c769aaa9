import hashlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from moetron.common.errors import UserError
from moetron.data.shards import shard_writer as writer_module
from moetron.data.shards.indexed_format import token_dtype
from moetron.data.shards.shard import Shard

DOCUMENTS = [[1, 2, 3, 9], [4, 9], [5, 6, 7, 8, 9]]


@pytest.mark.parametrize("vocab_size", [1000, 65_499, 65_500, 256_384])
def test_megatron_reads_written_shards(make_shard, vocab_size: int) -> None:
    documents = [*DOCUMENTS, [vocab_size - 1]]
    dataset = IndexedDataset(make_shard("a", documents, vocab_size))
    assert dataset.index.dtype == DType.optimal_dtype(vocab_size) == token_dtype(vocab_size)
    assert [dataset[i].tolist() for i in range(len(dataset))] == documents
    assert dataset.document_indices.tolist() == [0, 1, 2, 3, 4]


def test_the_files_are_those_of_megatrons_builder(make_shard, tmp_path: Path) -> None:
    mine = Path(make_shard("mine", DOCUMENTS))
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for document in DOCUMENTS:
        builder.add_document(document, [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        theirs = (tmp_path / f"theirs{suffix}").read_bytes()
        assert mine.with_suffix(suffix).read_bytes() == theirs


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(documents=st.lists(st.lists(st.integers(0, 999), min_size=1, max_size=30), min_size=1))
def test_reads_back_what_was_written(make_shard, documents: list[list[int]]) -> None:
    shard = Shard(make_shard("any", documents))
    assert [shard.document(i).tolist() for i in range(len(shard))] == documents
    assert shard.tokens.tolist() == [token for document in documents for token in document]
    assert shard.verify() == []


def test_the_index_is_written_in_blocks(make_shard, monkeypatch) -> None:
    expected = Path(make_shard("one", DOCUMENTS)).with_suffix(".idx").read_bytes()
    monkeypatch.setattr(writer_module, "BLOCK", 2)
    assert Path(make_shard("blocks", DOCUMENTS)).with_suffix(".idx").read_bytes() == expected


def test_a_shard_is_continued_at_its_last_mark(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), writer_module.ShardWriter(tmp_path / "s", 1000) as writer:
        writer.add(np.array([1, 2, 3], np.uint16), np.array([2, 1]))
        writer.mark()
        writer.add(np.array([9], np.uint16), np.array([1]))
        raise RuntimeError("killed")
    with writer_module.ShardWriter(tmp_path / "s", 1000, documents=2, tokens=3) as writer:
        writer.add(np.array([4], np.uint16), np.array([1]))
        bin_record, _ = writer.finish()
    assert [document.tolist() for document in map(Shard(tmp_path / "s").document, range(3))] == [
        [1, 2],
        [3],
        [4],
    ]
    assert bin_record.sha256 == hashlib.sha256(np.array([1, 2, 3, 4], np.uint16)).hexdigest()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.bin", "s.idx"]


def test_reads_shards_without_a_manifest(make_shard) -> None:
    prefix = make_shard("a", DOCUMENTS)
    Path(prefix + ".json").unlink()
    shard = Shard(prefix)
    assert shard.manifest is None and len(shard) == 3
    assert "no manifest" in shard.verify()[0]


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("removed", [1, 2, 8])
@pytest.mark.parametrize("with_manifest", [True, False])
def test_refuses_a_truncated_file_by_name(make_shard, suffix, removed, with_manifest) -> None:
    prefix = make_shard("a", DOCUMENTS)
    path = Path(prefix + suffix)
    path.write_bytes(path.read_bytes()[:-removed])
    if not with_manifest:
        Path(prefix + ".json").unlink()
    with pytest.raises(UserError, match=rf"a\{suffix}: "):
        Shard(prefix)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_refuses_missing_empty_and_foreign_files_by_name(make_shard, suffix: str) -> None:
    path = Path(make_shard("a", DOCUMENTS) + suffix)
    for content in (b"", b"not a shard, but long enough to hold a header of 34 bytes"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"a\{suffix}: "):
            Shard(path.with_suffix(""))
    path.unlink()
    with pytest.raises(UserError, match=rf"a\{suffix}: no such file"):
        Shard(path.with_suffix(""))


def test_refuses_files_that_the_manifest_does_not_describe(make_shard) -> None:
    first, other = make_shard("a", DOCUMENTS), make_shard("b", DOCUMENTS[:2])
    for suffix in (".bin", ".idx"):
        Path(other + suffix).replace(first + suffix)
    with pytest.raises(UserError, match=r"a\.bin: 12 bytes, but its manifest says 22"):
        Shard(first)


def test_verify_finds_any_changed_byte(make_shard) -> None:
    prefix = make_shard("a", DOCUMENTS)
    for suffix in (".bin", ".idx"):
        path = Path(prefix + suffix)
        sound = path.read_bytes()
        for position in range(len(sound)):
            path.write_bytes(
                sound[:position] + bytes([sound[position] ^ 1]) + sound[position + 1 :]
            )
            with suppress(UserError):  # found when it was opened
                assert Shard(prefix).verify(), f"byte {position} of {suffix}"
        path.write_bytes(sound)
    assert Shard(prefix).verify() == []


@pytest.mark.parametrize(
    ("recorded", "changed"),
    [('"documents": 3', '"documents": 4'), ('"tokens": 11', '"tokens": 12'), ("uint16", "int32")],
)
def test_verify_compares_counts(make_shard, recorded: str, changed: str) -> None:
    path = Path(make_shard("a", DOCUMENTS) + ".json")
    assert recorded in path.read_text()
    path.write_text(path.read_text().replace(recorded, changed))
    assert Shard(path.with_suffix("")).verify() == [
        f"{path}: dtype, documents or tokens are not the shard's"
    ]


def test_refuses_a_broken_manifest(make_shard) -> None:
    prefix = make_shard("a", DOCUMENTS)
    Path(prefix + ".json").write_text("{}")
    with pytest.raises(UserError, match=r"a\.json: not a shard's manifest"):
        Shard(prefix)
