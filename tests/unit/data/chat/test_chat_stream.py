"""Shards and samples of chats."""

from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest

from moetron.common.errors import UserError
from moetron.data.chat.chat_shard import ChatShard
from moetron.data.chat.chat_stream import ChatStream, evenly, open_chats
from moetron.data.prepare.options import Options
from moetron.data.prepare.preprocess import preprocess
from tests.unit.data.chat.chat_cases import TOKENIZER, chat, prepare

ROWS = [chat("a" * n, "b" * (1 + n % 4), *["c"] * (n % 2)) for n in range(9)]
S = 160


def stream(folder: Path, seed: int | None = 1, **options: object) -> ChatStream:
    prefix = str(folder / "chats")
    return open_chats([prefix], S, TOKENIZER.fingerprint, TOKENIZER.pad, seed, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chats")
    assert prepare(folder, ROWS, length=120).counts["used"] == 9
    return folder


def test_an_epoch_has_each_conversation_once(folder: Path) -> None:
    samples = stream(folder)
    count = samples.rows_per_epoch
    assert 1 < count < 9
    for epoch in range(3):
        seen = [n for i in range(count) for n in samples.conversations(epoch * count + i)]
        assert sorted(seen) == list(range(9))
    orders = [[samples.conversations(e * count + i) for i in range(count)] for e in range(2)]
    assert orders[0] != orders[1]


def test_samples(folder: Path) -> None:
    samples, shard = stream(folder), ChatShard(str(folder / "chats"), TOKENIZER.fingerprint)
    for n in range(samples.rows_per_epoch):
        sample, place = samples[n], 0
        assert sum(sample["documents"]) == S == len(sample["tokens"]) == len(sample["labels"])
        for number in samples.conversations(n):
            ids = shard.tokens.document(number)
            trained = shard.mask.document(number)
            end = place + len(ids)
            assert sample["tokens"][place:end].tolist() == ids.tolist()
            mask = sample["loss_mask"][place:end].astype(bool)
            # Shifted once: the label has loss that the mask names.
            assert sample["labels"][place:end][mask].tolist() == ids[trained > 0].tolist()
            assert not mask[-1]  # the next conversation's first token is nobody's label
            place = end
        assert sample["padding"] == S - place and not sample["loss_mask"][place:].any()


def test_weights_by_conversation(folder: Path) -> None:
    sample = stream(folder, normalisation="sample")[0]
    ends = np.cumsum(sample["documents"])[:-1]
    weights = [part.sum() for part in np.split(sample["loss_weight"], ends)]
    counts = [part.sum() for part in np.split(sample["loss_count"], ends)]
    used = len(stream(folder).conversations(0))
    assert np.allclose(weights[:used], 1) and counts[:used] == [1] * used
    assert ((sample["loss_weight"] > 0) == (sample["loss_mask"] > 0)).all()
    assert "loss_weight" not in stream(folder)[0]


def test_unpacked_and_validation(folder: Path) -> None:
    samples = stream(folder, seed=None, packed=False)
    assert len(samples) == 9
    # An evaluation of three samples has one of each third.
    assert [samples.conversations(n) for n in range(9)] == [
        [n] for n in (0, 5, 2, 7, 4, 1, 6, 3, 8)
    ]
    with pytest.raises(IndexError):
        samples[9]


@pytest.mark.parametrize("count", [1, 2, 50, 4321])
def test_the_beginning_of_a_validation_lies_evenly(count: int) -> None:
    places = evenly(count)
    assert sorted(places) == list(range(count))
    for first in {1, 2, 7, 40, 1000} & set(range(count)):
        gaps = np.diff(np.sort(places[:first]), append=count)
        assert gaps.max() <= 3 * count / first


def test_the_same_on_every_rank(folder: Path) -> None:
    """Random access in any order, and in a loader's process."""
    one, other = stream(folder), ForkingPickler.loads(ForkingPickler.dumps(stream(folder)))
    for n in (5, 0, 12, 5):
        for name, value in one[n].items():
            assert np.array_equal(value, other[n][name])


def test_refused(folder: Path) -> None:
    prefix = str(folder / "chats")
    with pytest.raises(UserError, match="--seq-length 32"):
        open_chats([prefix], 32, TOKENIZER.fingerprint, TOKENIZER.pad, 1)
    with pytest.raises(UserError, match="another tokenizer"):
        ChatShard(prefix, "0" * 64)


def test_a_shard_of_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    inputs, prefix = (str(tmp_path / "a.txt"),), str(tmp_path / "t")
    preprocess(Options(inputs=inputs, tokenizer="bytes", output_prefix=prefix))
    for end in (".bin", ".idx", ".json"):
        Path(f"{prefix}.mask{end}").write_bytes(Path(prefix + end).read_bytes())
    with pytest.raises(UserError, match="not a shard of chats"):
        ChatShard(prefix, TOKENIZER.fingerprint)


def test_rows_that_cannot_be_used_are_counted(tmp_path: Path) -> None:
    rows = [
        *ROWS[:2],
        "{not json",
        {"messages": []},
        {"prompt": "p", "completion": "c"},
        {"messages": [{"role": "user", "content": "only a question"}]},
        {"messages": [{"role": "tool", "content": "x"}]},
        chat("q", "an <|endoftext|> inside"),
        chat("q" * 100, "cut before the answer"),
        chat("q", "long " * 30),
    ]
    counts = prepare(tmp_path, rows).counts
    assert counts == {
        "rows": 10,
        "used": 4,
        "truncated": 2,
        "not a JSON object": 1,
        "no messages": 1,
        "no token of an answer": 2,
        "role tool": 1,
        "a message spells a special token": 1,
    }


def test_nothing_to_train_on(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no row can be used: .*no messages"):
        prepare(tmp_path, [{"messages": []}])


def test_pairs_stay_together(tmp_path: Path) -> None:
    pairs = [{"prompt": "q" * n, "chosen": "yes", "rejected": "no"} for n in range(4)]
    bad = {"prompt": "q", "chosen": "yes", "rejected": "<|endoftext|>"}
    assert prepare(tmp_path, [*pairs, bad], kind="pairs").counts["used"] == 4
    shard = ChatShard(str(tmp_path / "chats"), TOKENIZER.fingerprint)
    assert [max(shard.mask.document(n)) for n in range(8)] == [1, 2] * 4
    samples = ChatStream([shard], S, TOKENIZER.pad, seed=3, kind="pairs")
    for n in range(samples.rows_per_epoch):
        numbers = samples.conversations(n)
        assert numbers[1::2] == [number + 1 for number in numbers[::2]]
