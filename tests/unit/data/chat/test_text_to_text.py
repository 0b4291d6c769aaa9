"""Inputs and targets of an encoder-decoder: rows, shards, packing in two stacks, samples."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moetron.common.errors import UserError
from moetron.data.chat.chat_shard import ChatShard
from moetron.data.chat.chat_stream import open_chats
from moetron.data.chat.packing import OPEN_ROWS, pack_stacks
from moetron.data.chat.text_to_text_stream import TextToTextStream, open_text_to_text
from tests.unit.data.chat.chat_cases import TOKENIZER, chat, prepare

ENCODER, DECODER = 24, 16
ROWS = [{"inputs": "a" * (n % 9), "targets": "b" * (1 + n % 4)} for n in range(20)]
EOD, PAD, KNOWN = TOKENIZER.eod, TOKENIZER.pad, TOKENIZER.fingerprint


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tasks")
    assert prepare(folder, ROWS, "text_to_text").counts["used"] == len(ROWS)
    return str(folder / "chats")


def stream(prefix: str, seed: int | None = 1, **options: Any) -> TextToTextStream:
    return open_text_to_text([prefix], (ENCODER, DECODER), KNOWN, PAD, seed, **options)


def test_rows_of_every_form(tmp_path: Path) -> None:
    question, answer = "ask", "yes"
    rows = [
        {"inputs": question, "targets": answer},
        {"prompt": question, "completion": answer},
        chat(question, answer),
        {"inputs": question, "targets": ""},
        {"inputs": question},
        {"inputs": f"spells {TOKENIZER.end_text}", "targets": answer},
        chat(question, answer, answer),
        "no JSON",
    ]
    outcome = prepare(tmp_path, rows, "text_to_text")
    shard = ChatShard(str(tmp_path / "chats"), KNOWN)
    assert len(shard.lengths) == outcome.counts["used"] == 3
    expected = [*TOKENIZER.encode(question), EOD, *TOKENIZER.encode(answer), EOD]
    for number in range(3):
        assert shard.tokens.document(number).tolist() == expected
        assert shard.mask.document(number).tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    reasons = {
        "no token of a target",
        "no inputs and targets as text",
        "a message spells a special token",
        "messages other than a question and its answer",
        "not a JSON object",
    }
    assert all(outcome.counts[reason] == 1 for reason in reasons)


def test_both_parts_are_cut_before_their_ends(tmp_path: Path) -> None:
    rows = [{"inputs": "i" * n, "targets": "t" * n} for n in (1, 2, 3, 4, 9)]
    outcome = prepare(tmp_path, rows, "text_to_text", length=5, targets=4)
    shard = ChatShard(str(tmp_path / "chats"), KNOWN)
    assert outcome.counts["truncated"] == 2  # 4 + 1 inputs fit, 4 + 1 targets do not
    assert shard.lengths == [4, 6, 8, 9, 9]
    (i, t), last = (TOKENIZER.encode(text)[0] for text in "it"), shard.tokens.document(4)
    assert last.tolist() == [i, i, i, i, EOD, t, t, t, EOD]


@pytest.mark.parametrize("packed", [True, False])
def test_an_epoch_has_each_example_once(prefix: str, packed: bool) -> None:
    samples, shard = stream(prefix, packed=packed), ChatShard(prefix, KNOWN)
    count = samples.rows_per_epoch
    assert count == len(ROWS) if not packed else 5 <= count < 8
    seen = []
    for n in range(count, 2 * count):
        sample = samples[n]
        tokens, labels, segments = (sample[key] for key in ("tokens", "labels", "segments"))
        for example, number in enumerate(samples.conversations(n), 1):
            ids, mask = shard.tokens.document(number), shard.mask.document(number)
            own = segments == example
            first, start = np.flatnonzero(own[:ENCODER]), np.flatnonzero(own[ENCODER:]) + ENCODER
            assert (np.diff(first) == 1).all() and (np.diff(start) == 1).all()
            assert tokens[first].tolist() == ids[mask == 0].tolist()
            assert labels[start].tolist() == ids[mask == 1].tolist()
            assert tokens[start].tolist() == [PAD, *labels[start][:-1]]
            seen.append(number)
        decodes = np.arange(ENCODER + DECODER) >= ENCODER
        assert (sample["loss_mask"] == (segments > 0) * decodes).all()
        assert (tokens[segments == 0] == PAD).all()
    assert sorted(seen) == list(range(len(ROWS)))


def test_normalisation_by_example(prefix: str) -> None:
    sample = stream(prefix, normalisation="sample")[0]
    examples = sample["segments"].max()
    assert examples > 1
    assert sample["loss_count"].sum() == examples == pytest.approx(sample["loss_weight"].sum())


@pytest.mark.parametrize("examples", [40, 3 * OPEN_ROWS])
def test_packing_in_both_stacks(examples: int) -> None:
    """Nothing is cut or lost, and the rows of an epoch do not depend on its order."""
    random = np.random.default_rng(3)
    room, least = (24, 10), 24 // 2 + 1 if examples > 40 else 1  # two of these never fit
    lengths = np.stack([random.integers(least, 25, examples), random.integers(1, 11, examples)], 1)
    orders = [random.permutation(examples).tolist() for _ in range(2)]
    found = [pack_stacks(lengths, room, order) for order in orders]
    assert found[0] != found[1]
    assert [len(row) for row in found[0]] == [len(row) for row in found[1]]
    for rows in found:
        assert sorted(n for row in rows for n in row) == list(range(examples))
        assert all((lengths[row].sum(0) <= room).all() for row in rows)
    if least > 1:
        assert len(found[0]) == examples
    else:
        total = lengths.sum(0) / np.array(room)
        assert total.max() <= len(found[0]) < 1.5 * total.max()


def test_refusals(prefix: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        open_text_to_text([prefix], (8, 4), KNOWN, PAD, 1)
    inputs, targets = str(raised.value).splitlines()
    assert "9 tokens of an example do not fit into the 8 of the encoder" in inputs
    assert "5 tokens" in targets and "--max-target-length" in targets
    with pytest.raises(UserError, match="need --encoder-num-layers"):
        open_chats([prefix], 40, KNOWN, PAD, 1)
    prepare(tmp_path, [chat("question", "answer")])
    with pytest.raises(UserError, match="prepare it with --kind text_to_text"):
        stream(str(tmp_path / "chats"))
