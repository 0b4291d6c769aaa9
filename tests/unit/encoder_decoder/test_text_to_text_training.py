"""Fine-tuning of an encoder-decoder on inputs and targets, in the loop."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moetron.assembly import train
from moetron.commands.analyze_routing import analyze_run, parser
from moetron.data.chat.text_to_text_stream import open_text_to_text
from moetron.moe.checkpoint.run_folder import find
from moetron.moe.config.schema.settings import Settings
from moetron.moe.convert.checkpoint_tensors import CheckpointTensors
from tests.unit.config.config_cases import found
from tests.unit.data.chat.chat_cases import TOKENIZER, prepare
from tests.unit.encoder_decoder.stack_cases import DECODER, ENCODER, MODEL, stack_settings

ROWS = [{"inputs": "ab"[n % 2] * (1 + n % 7), "targets": "ba"[n % 2] * 3} for n in range(24)]
HELD_OUT = [{"inputs": letter * 9, "targets": "ab".replace(letter, "") * 3} for letter in "ab"]
ROUTED: dict[str, Any] = {
    "num_experts": 4,
    "moe_layer_freq": [0, 1, 0, 1, 1],
    "moe_router_topk": 2,
    "moe_aux_loss_coeff": 0.0,
}
VOCABULARY = TOKENIZER.vocab_size


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tasks")
    assert prepare(folder, ROWS, "text_to_text").counts["used"] == len(ROWS)
    return str(folder / "chats")


def _settings(prefix: str, steps: int, samples: int, **changes: dict[str, Any]) -> Settings:
    groups = {
        "training": {"train_iters": steps, "micro_batch_size": 1, "global_batch_size": samples},
        "learning_rate": {"lr": 1e-2},
        "logging": {"tensorboard": False, "peak_tflops_per_s": 1.0},
        "data": {"mock_data": False, "data_path": [prefix], "tokenizer_model": "bytes"},
        **{k: v for k, v in changes.items() if k not in ("moe", "model", "adaptation")},
    }
    model = {"vocab_size": VOCABULARY, **changes.get("model", {})}
    adaptation = {"sft": True, **changes.get("adaptation", {})}
    moe = {**ROUTED, **changes.get("moe", {})}
    return stack_settings(model, moe, adaptation=adaptation, **groups)


def _rows(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.mark.parametrize("normalisation", ["token", "sample"])
def test_packing_changes_nothing(tmp_path: Path, prefix: str, normalisation: str) -> None:
    """One epoch as a global batch of dropless experts: loss and gradient norm."""
    steps = []
    for packed in (True, False):
        stream = open_text_to_text(
            [prefix], (ENCODER, DECODER), TOKENIZER.fingerprint, TOKENIZER.pad, 1, packed
        )
        count, save = stream.rows_per_epoch, tmp_path / f"{packed}"
        chosen = {"sft_packing": packed, "sft_loss_normalisation": normalisation}
        saved = {"save": str(save)}
        assert (
            train(
                _settings(prefix, 1, count, adaptation=chosen, checkpoint=saved),
                TOKENIZER,
                VOCABULARY,
            )
            == 0
        )
        steps.append((count, *_rows(save)))
    (few, packed), (many, alone) = steps
    assert few < many == len(ROWS)
    assert packed["loss_tokens"] == alone["loss_tokens"] == 4 * len(ROWS)
    assert packed["lm_loss"] == pytest.approx(alone["lm_loss"], rel=1e-6)
    assert packed["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-5)


def test_held_out_loss_falls_with_dropout_and_frozen_experts(tmp_path: Path, prefix: str) -> None:
    """From a checkpoint of span corruption; ST-MoE's 0.4 inside experts, its non-MoE update."""
    base, save = tmp_path / "base", tmp_path / "tuned"
    prepare(tmp_path, HELD_OUT, "text_to_text")
    before = _settings(
        prefix,
        1,
        4,
        adaptation={"sft": False},
        data={"mock_data": True},
        checkpoint={"save": str(base)},
    )
    assert train(before, TOKENIZER, VOCABULARY) == 0
    tuned = _settings(
        prefix,
        12,
        4,
        model={"hidden_dropout": 0.1, "attention_dropout": 0.1},
        moe={
            "moe_expert_dropout": 0.4,
            "moe_expert_capacity_factor": 1.25,
            "moe_eval_capacity_factor": 2.0,
            "moe_aux_loss_coeff": 1e-2,
        },
        optimizer={"expert_lr_mult": 0.0, "router_lr_mult": 0.0},
        validation={"eval_interval": 4, "eval_iters": 1},
        data={
            "mock_data": False,
            "data_path": [prefix],
            "valid_data_path": [str(tmp_path / "chats")],
            "tokenizer_model": "bytes",
        },
        checkpoint={"save": str(save), "load": str(base), "finetune": True},
    )
    assert train(tuned, TOKENIZER, VOCABULARY) == 0
    losses = [row["validation_loss"] for row in _rows(save, "validation.jsonl")]
    assert losses[-1] < 0.7 * losses[0], losses
    rows = _rows(save)
    assert all(row["encoder_aux_loss"] > 0 and row["decoder_aux_loss"] > 0 for row in rows)
    (first, last) = (CheckpointTensors(find(folder)) for folder in (base, save))
    for name in first.names():
        same = torch.equal(first.read(name), last.read(name))
        assert same == (".experts." in name or ".router." in name), name
    # The analysis reads inputs and targets too: two rows of 9 letters and an end, 3 and an end.
    stacks = analyze_run(parser().parse_args([str(save)]))["stacks"]
    assert [stacks[stack]["tokens"] for stack in ("encoder", "decoder")] == [2 * 10, 2 * 4]


def test_checks() -> None:
    given = {
        "encoder_num_layers": 2,
        "encoder_seq_length": ENCODER,
        "seq_length": ENCODER + DECODER,
        "position_embedding_type": "relative",
        "sft": True,
        "mock_data": False,
        "data_path": ["tasks"],
    }
    assert MODEL["encoder_num_layers"] == given["encoder_num_layers"]
    assert found(**given) == []
    refused = {
        "preference_loss": "dpo",
        "objective": "span_corruption",
        "examples_per_sample": 2,
    }
    for name, value in refused.items():
        flag = "--" + name.replace("_", "-")
        assert any(flag in problem for problem in found(**{**given, name: value})), name
