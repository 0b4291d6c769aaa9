"""Runs with more shards than a process may keep open."""

import os
import pickle
import sys
from pathlib import Path

import pytest

from moetron.common.errors import UserError
from moetron.data.shards import shard as shard_module
from moetron.data.shards.shard import MAPS, Shard
from moetron.data.stream.token_stream import training_stream

COUNT = 300
DOCUMENT = [*range(7), 9]


@pytest.fixture
def many(make_shard, tmp_path: Path) -> list[str]:
    """Return the prefixes of ``COUNT`` shards; their files are links to one shard's."""
    one = Path(make_shard("one", [DOCUMENT]))
    prefixes = [str(tmp_path / f"shard_{number}") for number in range(COUNT)]
    for prefix in prefixes:
        for suffix in (".bin", ".idx", ".json"):
            os.link(f"{one}{suffix}", f"{prefix}{suffix}")
    return prefixes


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.skipif(sys.platform != "linux", reason="counts files in /proc")
def test_opened_shards_keep_no_file_and_read_ones_a_bounded_number(many: list[str]) -> None:
    shard_module._kept.cache_clear()
    before = open_files()
    stream = training_stream(many, seq_length=7, seed=1)
    assert open_files() == before
    read = {tuple(stream[n]["tokens"].tolist()) for n in range(COUNT)}
    assert read == {tuple(range(7))}
    assert before < open_files() <= before + MAPS
    assert {Shard(prefix).document(0).tolist()[-1] for prefix in many} == {9}
    assert open_files() <= before + MAPS


def test_a_loader_worker_gets_shards_without_opening_them(many: list[str], monkeypatch) -> None:
    sent = pickle.dumps([Shard(prefix) for prefix in many])
    monkeypatch.setattr(Shard, "__init__", None)  # a call of it fails
    shards = pickle.loads(sent)  # noqa: S301 - written above
    assert [len(shard) for shard in shards] == [1] * COUNT
    assert shards[-1].document(0).tolist() == DOCUMENT


def test_other_ranks_read_manifests_only(many: list[str], monkeypatch, tmp_path: Path) -> None:
    """At 100,000 shards and 1,024 ranks each file more is a hundred million requests."""
    expected = training_stream(many, seq_length=7, seed=1)
    for path in (*tmp_path.glob("shard_1.bin"), *tmp_path.glob("shard_2.idx")):
        path.unlink()
    monkeypatch.setenv("RANK", "1")
    stream = training_stream(many, seq_length=7, seed=1)
    assert stream.state() == expected.state()
    assert stream[0]["tokens"].tolist() == [*range(7)]
    Path(f"{many[3]}.json").unlink()
    Path(f"{many[3]}.bin").unlink()
    with pytest.raises(UserError, match=r"shard_3\.bin: no such file"):
        training_stream(many, seq_length=7, seed=1)


def test_a_shard_that_was_replaced_since_it_was_opened_is_refused(make_shard) -> None:
    shard = Shard(make_shard("one", [DOCUMENT]))
    make_shard("one", [DOCUMENT, DOCUMENT])
    with pytest.raises(UserError, match=r"one\.bin: 32 bytes now, 16 when the run started"):
        shard.tokens  # noqa: B018


def test_a_shard_made_again_under_the_same_name_is_read_anew(make_shard) -> None:
    assert Shard(make_shard("one", [DOCUMENT])).tokens[0] == 0
    assert Shard(make_shard("one", [DOCUMENT[::-1]])).tokens[0] == 9
