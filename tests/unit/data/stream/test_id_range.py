"""Token ids outside the vocabulary: refused when a shard is opened, at the latest when read."""

import os
from pathlib import Path

import numpy as np
import orjson
import pytest

from moetron.common.errors import UserError
from moetron.data.objectives.causal import Causal
from moetron.data.shards.manifest import manifest_path, read_manifest, write_manifest
from moetron.data.shards.shard import Shard
from moetron.data.shards.shard_writer import ShardWriter
from moetron.data.stream import id_range as id_range_module
from moetron.data.stream.id_range import id_range
from moetron.data.stream.stages import Stage, StagedStream
from moetron.data.stream.token_stream import training_stream
from tests.unit.data.conftest import MakeShard

DOCUMENTS = [[3, 99, 5, 0]] * 20


def test_the_writer_keeps_the_largest_id_also_after_a_crash(tmp_path: Path) -> None:
    prefix = str(tmp_path / "shard")
    writer = ShardWriter(prefix, 1000)
    writer.add(np.array([3, 998, 5], writer.dtype), np.array([3]))
    writer.mark()
    writer.close()
    with ShardWriter(prefix, 1000, 1, 3) as resumed:
        resumed.add(np.array([4, 7], resumed.dtype), np.array([2]))
        with pytest.raises(ZeroDivisionError), resumed.document() as append:
            append(np.array([999], resumed.dtype))
            raise ZeroDivisionError
        resumed.finish()
        assert resumed.max_id == 998


def test_the_manifest_answers_without_reading(make_shard: MakeShard) -> None:
    prefix = make_shard("a", DOCUMENTS)
    manifest = read_manifest(prefix)
    assert manifest is not None
    write_manifest(prefix, manifest.model_copy(update={"max_id": 500}))
    with pytest.raises(UserError, match=r"outside the vocabulary of 400: .*a \(ids 0 to 500\)"):
        training_stream([prefix], 8, seed=1).limit_ids(400)
    training_stream([prefix], 8, seed=1).limit_ids(501)
    [problem] = Shard(prefix).verify()
    assert "the largest id is 99, not max_id" in problem


@pytest.mark.parametrize("with_manifest", [True, False])
def test_older_shards_and_those_of_other_tools_are_read_once(
    make_shard: MakeShard, with_manifest: bool
) -> None:
    prefix = make_shard("a", DOCUMENTS)
    if not with_manifest:
        manifest_path(prefix).unlink()
    stream = StagedStream([Stage([prefix], Causal(8), 1)], 8)
    with pytest.raises(UserError, match=r"outside the vocabulary of 99: .*a \(ids 0 to 99\)"):
        stream.limit_ids(99)
    kept = Path(f"{prefix}.ids.json")
    known = orjson.loads(kept.read_bytes())
    assert (known["smallest"], known["largest"]) == (0, 99)
    kept.write_bytes(orjson.dumps({**known, "largest": 50}))
    assert id_range(Shard(prefix)) == (0, 50)
    os.utime(f"{prefix}.bin", ns=(1, 1))
    assert id_range(Shard(prefix)) == (0, 99)
    kept.write_bytes(b"[1, 2")
    assert id_range(Shard(prefix)) == (0, 99)


def test_other_ranks_leave_the_disk_alone(
    make_shard: MakeShard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    prefix = make_shard("a", DOCUMENTS)
    training_stream([prefix], 8, seed=1).limit_ids(10)
    assert not Path(f"{prefix}.ids.json").exists()


def test_a_shard_that_was_changed_is_refused_when_read(make_shard: MakeShard) -> None:
    prefix = make_shard("a", DOCUMENTS)
    manifest = read_manifest(prefix)
    assert manifest is not None
    write_manifest(prefix, manifest.model_copy(update={"max_id": 99}))
    ids = np.fromfile(f"{prefix}.bin", np.uint16)
    ids[40] = 60_000
    ids.tofile(f"{prefix}.bin")
    stream = training_stream([prefix], 8, seed=1)
    stream.limit_ids(100)
    with pytest.raises(UserError, match=r"sample \d+ holds ids 0 to 60000, outside .* of 100"):
        [stream[n] for n in range(10)]
    assert any("ids from 0 to 60000" in problem for problem in Shard(prefix).verify())


def test_many_shards_are_read_at_once_and_the_wait_is_told(
    make_shard: MakeShard, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    prefixes = [make_shard(f"s{number}", [[number, number + 1]] * 20) for number in range(20)]
    manifest = read_manifest(prefixes[3])
    assert manifest is not None
    write_manifest(prefixes[3], manifest.model_copy(update={"max_id": 4}))
    monkeypatch.setattr(id_range_module, "TOLD_BYTES", 19 * 80)
    with pytest.raises(UserError) as raised:
        training_stream(prefixes, 8, seed=1).limit_ids(18)
    names = [f"{prefixes[n]} (ids 0 to {n + 1})" for n in (17, 18, 19)]
    assert ", ".join(names) in str(raised.value)
    assert "reading 1.52e-06 GB of shards" in caplog.text
    caplog.clear()
    training_stream(prefixes, 8, seed=1).limit_ids(21)
    assert not caplog.text
