"""Preferences (DPO, KTO): layouts against one process, and the reference's cache."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moetron.common.errors import UserError
from moetron.data.chat.chat_rows import Kind
from moetron.data.chat.chat_stream import ChatStream, open_chats
from moetron.moe.checkpoint.position import Progress
from moetron.moe.checkpoint.save_load import save_checkpoint
from moetron.moe.health.spikes import StepValues
from moetron.moe.training.build_trainer import (
    REFERENCE,
    build_loop,
    build_trainer,
    set_references,
)
from moetron.moe.training.evaluate import evaluate, reference_log_probs
from moetron.moe.training.loop import Loop
from moetron.moe.training.runtime import divide
from moetron.moe.training.sample_stream import Streams
from moetron.moe.training.trainer import Trainer
from tests.parallel.support.harness import run_ranks
from tests.parallel.support.parity_cases import settings
from tests.parallel.support.parity_suite import Suite
from tests.parallel.test_sft import SFT
from tests.unit.data.chat.chat_cases import TOKENIZER, prepare

S = 160
PAIRS = [
    {"prompt": "ab" * (n % 5), "chosen": "yes" * (1 + n % 4), "rejected": "no" * (1 + n % 3)}
    for n in range(16)
]
DPO: dict[str, Any] = {
    **SFT,
    "seq_length": S,
    "preference_loss": "dpo",
    "preference_beta": 0.3,
    "global_batch_size": 4,
}


LABELLED = [
    {"prompt": "ab" * (n % 7), "completion": ("yes", "no")[n % 2] * (1 + n % 4), "label": n % 2 < 1}
    for n in range(32)
]
KTO: dict[str, Any] = {
    **DPO,
    "preference_loss": "kto",
    "preference_beta": 0.05,
    "preference_desirable_weight": 1.5,
    "preference_undesirable_weight": 0.7,
}


def _open(
    prefix: str, known: float, seed: int, _: int, length: int, kind: Kind = "pairs"
) -> ChatStream:
    stream = open_chats([prefix], length, TOKENIZER.fingerprint, TOKENIZER.pad, seed, kind=kind)
    if known:  # any values: they only shift the margins
        stream.reference = known * np.cos(np.arange(stream.conversation_count), dtype=np.float32)
    if kind == "labelled":  # near the answers' own, so that no sigmoid is flat; mismatched: below
        stream.reference -= np.repeat(np.float32([45, 60]), len(LABELLED))
    return stream


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("pairs")
    assert prepare(folder, PAIRS, kind="pairs", length=80).counts["used"] == len(PAIRS)
    return str(folder / "chats")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("labelled")
    assert prepare(folder, LABELLED, kind="labelled", length=80).counts["used"] == len(LABELLED)
    return str(folder / "chats")


@pytest.mark.parametrize("kind", ["dpo", "dpo_norm"])
def test_layouts_equal_one_process(tmp_path: Path, prefix: str, kind: str) -> None:
    changes = {**DPO, "preference_loss": kind, "preference_label_smoothing": 0.1}
    suite = Suite(tmp_path, 2, changes=changes, samples=partial(_open, prefix, 5.0))
    layouts = ("ep2", "tp2", "pp2", "cp2") if kind == "dpo" else ("cp2", "dp2")
    assert not suite.differences("dropless", layouts)


def test_layouts_of_kto_equal_one_process(tmp_path: Path, labelled: str) -> None:
    samples = partial(_open, labelled, 5.0, kind="labelled")
    suite = Suite(tmp_path, 2, changes=KTO, samples=samples)
    assert not suite.differences("dropless", ("ep2", "tp2", "pp2", "cp2"))
    for _, rows in suite._known.values():
        assert all(row["kl"] > 1 and 0.1 < row["preference_loss"] < 0.9 for row in rows)


def _without_load(trainer: Trainer) -> Trainer:
    options = trainer.settings.checkpoint.model_copy(update={"load": None})
    return replace(trainer, settings=trainer.settings.model_copy(update={"checkpoint": options}))


def _run(prefix: str, folder: str, layout: str, changes: dict[str, Any]) -> dict[str, Any]:
    chosen = settings(layout, 2, **changes, load=folder, save=folder)
    trainer = build_trainer(chosen, divide(chosen, torch.device("cpu")), TOKENIZER.vocab_size)
    kind: Kind = "labelled" if chosen.adaptation.preference_loss == "kto" else "pairs"
    stream = open_chats([prefix], S, TOKENIZER.fingerprint, TOKENIZER.pad, 1, kind=kind)
    trainer = _without_load(trainer)
    streams = Streams(stream, stream)
    again = [reference_log_probs(trainer, stream) for _ in range(2)]
    set_references(trainer, streams, resumes=False)
    first = stream.reference
    loop = Loop(trainer, streams, Progress(), [rows := _Rows()], peak=None)
    batches, judge, judged = loop.batches(), loop.health.judge, list[StepValues]()
    loop.health.judge = lambda *seen: judged.append(seen[0]) or judge(*seen)  # type: ignore[func-returns-value, method-assign]
    loop.step(batches, lambda: False)
    start = rows.rows[0]
    held_out = evaluate(trainer, stream).preferences
    for _ in range(12):
        loop.step(batches, lambda: False)
    stream.reference = None
    set_references(trainer, streams, resumes=True)
    return {
        "equal": all(np.array_equal(first, each) for each in again),
        "kept": np.array_equal(first, stream.reference),
        "loss": start["preference_loss"],
        "margin": start["margin"],
        "kl": start.get("kl"),
        "complete": bool((first < 0).all()),
        "judged": [judged[0].loss, *filter(None, judged[0].rank_losses)],
        "last": rows.rows[-1]["preference_loss"],
        "accuracy": evaluate(trainer, stream).preferences["accuracy"],
        "held_out": held_out["preference_loss"],
    }


class _Rows:
    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def step(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def expert_load(self, step: int, loads: Any) -> None: ...


@pytest.mark.parametrize("layout", ["dp1", "cp2"])
def test_the_first_loss_is_ln_2(tmp_path: Path, prefix: str, layout: str) -> None:
    """The cached log-probabilities equal those of training to the last bit."""
    ranks = 1 if layout == "dp1" else 2
    for found in run_ranks(_run, ranks, prefix, str(tmp_path), layout, DPO):
        assert found["equal"] and found["kept"] and found["complete"]
        assert found["margin"] == 0.0
        assert found["loss"] == float(np.float32(math.log(2)))
        assert len(found["judged"]) == 2 and set(found["judged"]) == {found["loss"]}
        assert found["last"] < found["held_out"] < math.log(2)
        assert found["accuracy"] > 0.8
    assert (tmp_path / REFERENCE).is_file()


def test_the_first_loss_of_kto_is_a_half(tmp_path: Path, labelled: str) -> None:
    """The model is its reference, so that the baseline and all rewards are 0, to the last bit."""
    changes = {**KTO, "preference_desirable_weight": 1.0, "preference_undesirable_weight": 1.0}
    changes |= {"preference_beta": 0.3, "use_distributed_optimizer": True}
    changes |= {"overlap_grad_reduce": True, "overlap_param_gather": True}
    for found in run_ranks(_run, 2, labelled, str(tmp_path), "dp2", changes):
        assert found["equal"] and found["kept"] and found["complete"]
        assert found["judged"] == [0.5] * 3
        assert found["loss"] == 0.5 and found["kl"] == 0.0 == found["margin"]
        assert found["last"] < found["held_out"] < 0.5
        assert found["accuracy"] > 0.8


def _with_reference(prefix: str, folder: str) -> dict[str, Any]:
    """Start DPO from one checkpoint with the reference of another, and resume it."""
    known: dict[str, np.ndarray] = {}
    chosen = settings("dp1", 2, **DPO, load=folder)
    runtime = divide(chosen, torch.device("cpu"))
    trainer = build_trainer(chosen, runtime, TOKENIZER.vocab_size)
    stream, parameters = _open(prefix, 0.0, 1, 0, S), list(trainer.chunks[0].parameters())
    for name in ("base", "start"):
        known[name] = reference_log_probs(trainer, stream)
        state = trainer.chunks, trainer.optimizer, chosen, stream.state()
        save_checkpoint(Path(folder) / name, Progress(), *state)
        weights = [parameter.clone() for parameter in parameters]
        for parameter in parameters:
            parameter.data.mul_(1.1)
    places = {name: f"{folder}/{name}" for name in ("base", "start", "run")}
    Path(places["run"]).mkdir()
    options = {"save": places["run"], "preference_reference_load": places["base"]}

    def built(**changes: Any) -> tuple[Loop, Any]:
        chosen = settings("dp1", 2, **{**DPO, **options, "finetune": False, **changes})
        trainer = build_trainer(chosen, runtime, TOKENIZER.vocab_size)
        stream = _open(prefix, 0.0, 1, 0, S)
        return build_loop(trainer, Streams(stream, None)), stream

    loop, stream = built(load=places["start"], finetune=True)
    mine = loop.trainer.chunks[0].parameters()
    result = {
        "reference": np.array_equal(stream.reference, known["base"]),
        "other": np.array_equal(stream.reference, known["start"]),
        "weights": all(map(torch.equal, mine, weights)),
    }
    loop.sinks = [rows := _Rows()]  # type: ignore[list-item]
    loop.step(loop.batches(), lambda: False)
    loop._save(loop._saver.save)
    _, again = built(load=places["run"])
    with pytest.raises(UserError, match="not of --preference-reference-load"):
        built(load=places["run"], preference_reference_load=places["start"])
    result["resumed"] = np.array_equal(again.reference, known["base"])
    return result | {"loss": rows.rows[0]["preference_loss"]}


def test_a_reference_of_its_own(tmp_path: Path, prefix: str) -> None:
    (found,) = run_ranks(_with_reference, 1, prefix, str(tmp_path))
    assert found.pop("loss") != float(np.float32(math.log(2)))
    assert found == {"reference": True, "other": False, "weights": True, "resumed": True}
