"""Shard sets, and duplicates within and across files."""

from dataclasses import replace
from pathlib import Path

import pytest

from moetron.common.errors import UserError
from moetron.data.encoding.filters import Filters
from moetron.data.prepare.options import Options
from moetron.data.prepare.preprocess import preprocess
from moetron.data.readers import rows as inputs_module
from moetron.data.shards.shard import Shard
from moetron.data.shards.shard_set import is_written_with, member, members, shard_prefixes
from moetron.data.stream.blend import open_blend
from moetron.tokenizers.byte_level import ByteTokenizer

TEXTS = [f"document {i}: {'äöü 漢字 ' * (i % 7)}" for i in range(60)]
TEXTS[20] = TEXTS[55] = TEXTS[3]


@pytest.fixture
def options(tmp_path: Path, monkeypatch) -> Options:
    monkeypatch.setattr(inputs_module, "CHUNK_BYTES", 300)
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number:02}.txt").write_text(text)
    inputs, prefix = [str(tmp_path / "*.txt")], str(tmp_path / "out" / "p")
    return Options(inputs, "bytes", prefix, append_eod=True, shard_size_tokens=700)


def decoded(prefix: str) -> list[str]:
    shard = Shard(prefix)
    return [ByteTokenizer().decode(shard.document(i)) for i in range(len(shard))]


def test_shards_end_with_the_document_that_fills_them(options: Options) -> None:
    manifests = preprocess(options).manifests
    assert list(manifests) == members(options.output_prefix) and len(manifests) > 3
    assert [text for prefix in manifests for text in decoded(prefix)] == TEXTS
    for prefix, manifest in list(manifests.items())[:-1]:
        lengths = Shard(prefix).document_lengths
        assert manifest.tokens == lengths.sum() >= 700 > lengths[:-1].sum()
    assert all(Shard(prefix).verify() == [] for prefix in manifests)
    total = sum(manifest.text_bytes for manifest in manifests.values())
    assert total == sum(len(text.encode()) for text in TEXTS)
    assert preprocess(options).current
    assert len(preprocess(replace(options, shard_size_tokens=2000)).manifests) < len(manifests)
    assert len(members(options.output_prefix)) < len(manifests)


def test_a_shard_set_is_one_source_of_a_blend(options: Options) -> None:
    prefixes = list(preprocess(options).manifests)
    single = replace(options, output_prefix=options.output_prefix + "1", shard_size_tokens=None)
    preprocess(single)
    blend = open_blend(["3", options.output_prefix, "1", single.output_prefix], 16)
    assert [source.name for source in blend.sources] == ["p", "p1"] and blend.weights == (3, 1)
    source, single = blend.sources
    assert [shard.prefix for shard in source.shards] == prefixes
    tokens = [shard.tokens for shard in source.shards]
    windows = [shard[i : i + 17] for shard in tokens for i in range(0, len(shard) - 16, 16)]
    assert len(windows) == source.windows
    for window, expected in enumerate(windows):
        assert source.read(window)[1].tolist() == expected.tolist()
    assert source.tokens == single.tokens == sum(map(len, tokens))
    Path(prefixes[1] + ".idx").unlink()
    with pytest.raises(UserError, match=r"p: 5 shards.*p_00001"):
        open_blend([options.output_prefix], 16)


@pytest.mark.parametrize("workers", [1, 3])
def test_the_first_of_equal_documents_is_kept(options: Options, workers: int) -> None:
    once = replace(options, filters=Filters(deduplicate=True), workers=workers)
    manifests = preprocess(once).manifests
    kept = [text for prefix in manifests for text in decoded(prefix)]
    assert kept == list(dict.fromkeys(TEXTS))
    assert all(manifest.filters["duplicate"] == 2 for manifest in manifests.values())
    total = sum(manifest.text_bytes for manifest in manifests.values())
    assert total == sum(len(text.encode()) for text in kept)
    assert not list(Path(options.output_prefix).parent.glob("*.tmp*"))


def test_a_set_may_have_more_than_a_hundred_thousand_shards(tmp_path: Path) -> None:
    prefix = str(tmp_path / "p")
    expected = [member(prefix, number) for number in (9, 10_000, 99_999, 100_000, 100_001)]
    for name in expected:
        Path(f"{name}.idx").touch()
    Path(f"{prefix}_123.idx").touch()
    assert shard_prefixes(prefix) == expected
    assert is_written_with(Path(f"{expected[-1]}.bin.tmp"), prefix)
