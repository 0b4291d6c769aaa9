"""Check of a checkpoint's vocabulary against the model's."""

from pathlib import Path
from typing import Any

import pytest

from moetron.common.errors import UserError
from moetron.moe.checkpoint.position import Progress
from moetron.moe.checkpoint.run_folder import Record
from moetron.moe.checkpoint.vocabulary import saved_vocabulary, vocabulary_of, vocabulary_problem
from tests.unit.training.training_cases import settings


def record(vocab_size: int | None, stream: dict[str, Any] | None = None, ranks: int = 1) -> Record:
    """Return the record of a run padded to a multiple of 8 on each of ``ranks`` tensor ranks."""
    saved = settings(
        model={"vocab_size": vocab_size, "make_vocab_size_divisible_by": 8},
        parallel={"tensor_model_parallel_size": ranks},
        data={"tokenizer_model": "pieces.model"},
    )
    return Record(Progress(), saved.model_dump(mode="json"), {}, stream or {}, {}, {})


def test_ids_are_compared_without_padding() -> None:
    for ranks, rows in ((1, 96), (2, 96), (4, 96), (8, 128)):
        assert vocabulary_problem(record(90, ranks=ranks), 90, rows) is None
        problem = vocabulary_problem(record(90, ranks=ranks), 91, rows)
        assert problem is not None, "91 ids, too, are padded to as many rows"
        assert f"--vocab-size 91, given or the tokenizer's ({rows} rows" in problem
        assert f"the checkpoint has 90 ({rows} rows)" in problem


def test_the_remedy_names_the_flags_of_the_run() -> None:
    problem = vocabulary_problem(record(90), 200)
    assert problem is not None
    assert problem.endswith("what its run had: --tokenizer-model pieces.model and --vocab-size 90")


def test_mock_data_give_the_size_if_settings_do_not() -> None:
    old = record(None, {"mock": {"seed": 1, "vocab_size": 90}})
    assert saved_vocabulary(old) == 90
    assert vocabulary_problem(old, 90) is None
    assert "the checkpoint has 90 (96 rows)" in str(vocabulary_problem(old, 91))


def test_rows_are_compared_if_the_size_is_unknown() -> None:
    old = record(None, ranks=2)
    assert saved_vocabulary(old) is None
    assert vocabulary_problem(old, 90) is None, "nobody has looked at the tensors yet"
    assert vocabulary_problem(old, 90, rows=96) is None
    for ids in (80, 97):
        problem = str(vocabulary_problem(old, ids, rows=96))
        assert "the checkpoint has 96 rows; give what its run had: --tokenizer-model" in problem


def test_a_record_of_a_version_with_fewer_settings() -> None:
    bare = Record(Progress(), {}, {}, {}, {}, {})
    assert vocabulary_problem(bare, 90) is None
    assert vocabulary_problem(bare, 90, rows=90) is None


def test_a_tokenizer_may_have_fewer_ids_than_the_model() -> None:
    known, unknown = (settings(model={"vocab_size": size}) for size in (100, None))
    assert [vocabulary_of(Path("run"), known, ids) for ids in (100, 90, None)] == [100] * 3
    assert vocabulary_of(Path("run"), unknown, 90) == 90
    with pytest.raises(UserError, match="run: its vocabulary has 100 ids and the tokenizer 101"):
        vocabulary_of(Path("run"), known, 101)
    with pytest.raises(UserError, match="give --tokenizer-model"):
        vocabulary_of(Path("run"), unknown, None)
