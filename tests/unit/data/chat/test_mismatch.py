"""Mismatched examples: other prompts' answers, the same in every epoch."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetron.common.errors import UserError
from moetron.data.chat.chat_shard import ChatShard
from moetron.data.chat.chat_stream import ChatStream, open_chats
from moetron.data.chat.mismatch import Mismatched, shifted_answers
from tests.unit.data.chat.chat_cases import TOKENIZER, prepare

S = 120
ROWS = [
    {"prompt": "ask " * (1 + n // 2), "completion": f"{n:02} " * (1 + n % 5), "label": n % 3 > 0}
    for n in range(12)
]


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("labelled")
    assert prepare(folder, ROWS, kind="labelled", length=100).counts["used"] == len(ROWS)
    return str(folder / "chats")


def _open(prefix: str, packed: bool, length: int = S) -> ChatStream:
    return open_chats(
        [prefix], length, TOKENIZER.fingerprint, TOKENIZER.pad, 1, packed, kind="labelled"
    )


@given(st.lists(st.integers(0, 6), min_size=2))
def test_answers_go_to_other_prompts(names: list[int]) -> None:
    prompts = [bytes([name]) for name in names]
    if 2 * max(map(names.count, names)) > len(names):
        with pytest.raises(UserError, match="have the same prompt"):
            shifted_answers(prompts)
        return
    found = shifted_answers(prompts).tolist()
    assert sorted(found) == list(range(len(names)))
    assert all(prompts[n] != prompts[other] for n, other in enumerate(found))


def test_prompts_keep_their_place_and_answers_their_loss(prefix: str) -> None:
    shard = ChatShard(prefix, TOKENIZER.fingerprint)
    examples = Mismatched([shard], [(0, n) for n in range(len(shard.lengths))], 90)
    used = []
    for n in range(len(shard.lengths)):
        ids, mask = examples[n]
        start = int(np.argmax(mask > 0))
        own, own_mask = shard.tokens.document(n), shard.mask.document(n)
        assert start == int(np.argmax(own_mask > 0)) and (ids[:start] == own[:start]).all()
        assert len(ids) == len(mask) == examples.lengths[n] <= 90 and (mask[start:] > 0).all()
        used.append(int(TOKENIZER.decode(ids[start : start + 2].tolist())))
        assert used[-1] // 2 != n // 2  # two examples have the same prompt
    assert sorted(used) == list(range(12))


@pytest.mark.parametrize("packed", [True, False])
def test_samples(prefix: str, packed: bool) -> None:
    stream = _open(prefix, packed)
    stream.reference = np.arange(24, dtype=np.float32)
    seen = []
    for n in range(stream.rows_per_epoch):
        sample = stream[n]
        numbers = stream.conversations(n)
        count, other = len(numbers), sample["mismatched"]
        assert sample["examples"] == other["examples"] == count
        assert sample["numbers"][:count].tolist() == numbers
        assert other["numbers"][:count].tolist() == [12 + number for number in numbers]
        assert (sample["numbers"][count:] == -1).all()
        assert other["reference"][:count].tolist() == [12.0 + number for number in numbers]
        labels = [int(ROWS[number]["label"]) for number in numbers]  # type: ignore[call-overload]
        assert sample["wanted"][:count].tolist() == labels
        assert sum(other["documents"]) == S == len(other["tokens"])
        seen += numbers
    assert sorted(seen) == list(range(12)) and stream.conversation_count == 24


def test_pairs_are_two_examples(tmp_path: Path) -> None:
    pairs = [{"prompt": "q" * n, "chosen": "yes", "rejected": "no"} for n in range(1, 3)]
    prepare(tmp_path, pairs, kind="labelled")
    stream = _open(str(tmp_path / "chats"), False)
    found = {stream.conversations(n)[0]: int(stream[n]["wanted"][0]) for n in range(4)}
    assert found == {0: 1, 1: 0, 2: 1, 3: 0}


def test_other_rows_are_refused(tmp_path: Path) -> None:
    prepare(tmp_path, [{"prompt": "q", "completion": "a"}])
    with pytest.raises(UserError, match="prepare it with --kind labelled"):
        _open(str(tmp_path / "chats"), True)
