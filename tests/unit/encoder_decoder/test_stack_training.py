"""Training of an encoder-decoder in the loop: label smoothing, both stacks' losses, fine-tuning."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moetron.assembly import train
from moetron.moe.config.schema.settings import Settings
from tests.parallel.support.harness import model_parallel
from tests.unit.encoder_decoder.stack_cases import (
    ENCODER,
    VOCABULARY,
    stack_batch,
    stack_model,
    stack_settings,
)

ROUTED = {
    "num_experts": 4,
    "moe_layer_freq": [0, 1, 0, 1, 1],
    "moe_expert_capacity_factor": 0.5,
    "moe_encoder_capacity_factor": 2.0,
    "moe_aux_loss_coeff": 1e-2,
    "moe_z_loss_coeff": 1e-3,
}


def test_label_smoothing() -> None:
    """1 - a on the label and a / (V - 1) on every other id; only in training."""
    batch = stack_batch()
    labels = batch["labels"]
    with model_parallel():
        model = stack_model(stack_settings({"label_smoothing": 0.1})).train()
        losses = model(batch["tokens"], labels=labels)[:, ENCODER:]
        plain = model.eval()(batch["tokens"], labels=labels)[:, ENCODER:]
        logits = model(batch["tokens"]).transpose(1, 2)
    share = 0.1 * VOCABULARY / (VOCABULARY - 1)  # torch spreads it over the label too
    for found, smoothing in ((losses, share), (plain, 0.0)):
        expected = torch.nn.functional.cross_entropy(
            logits, labels[:, ENCODER:], reduction="none", label_smoothing=smoothing
        )
        torch.testing.assert_close(found, expected)


def _settings(folder: Path, **changes: dict[str, Any]) -> Settings:
    settings = stack_settings(
        changes.get("model"),
        {**ROUTED, **changes.get("moe", {})},
        checkpoint={"save": str(folder), **changes.get("checkpoint", {})},
        validation={"eval_iters": 1},
        logging={"tensorboard": False, "peak_tflops_per_s": 1.0},
        data=changes.get("data", {}),
    )
    training = settings.training.model_copy(update={"train_iters": 3})
    return settings.model_copy(update={"training": training})


def _rows(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_pretraining_and_fine_tuning(tmp_path: Path) -> None:
    assert train(_settings(tmp_path / "one"), None, VOCABULARY) == 0
    rows = _rows(tmp_path / "one")
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        for loss in ("aux_loss", "z_loss"):
            stacks = [row[f"{stack}_{loss}"] for stack in ("encoder", "decoder")]
            assert row[loss] == pytest.approx((stacks[0] + 2 * stacks[1]) / 3)
        assert row["dropped_fractions"]["layer_1"] < row["dropped_fractions"]["layer_3"]
        assert row["loss_tokens"] < 4 * (34 - ENCODER)
    assert _rows(tmp_path / "one", "validation.jsonl")[-1]["validation_loss"] > 0

    tuned = _settings(
        tmp_path / "two",
        model={"hidden_dropout": 0.1},
        moe={"moe_expert_dropout": 0.4},
        checkpoint={"load": str(tmp_path / "one"), "finetune": True},
        data={"mean_noise_span_length": 2.0},
    )
    assert train(tuned, None, VOCABULARY) == 0
    after = _rows(tmp_path / "two")
    assert after[0]["step"] == 1
    assert after[0]["lm_loss"] != rows[0]["lm_loss"]


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({}, (1.0, 3.0)),
        ({"moe_encoder_capacity_factor": 2.0}, (2.0, None)),
        ({"moe_encoder_eval_capacity_factor": 4.0}, (1.0, 4.0)),
        (
            {"moe_encoder_capacity_factor": 2.0, "moe_encoder_eval_capacity_factor": 4.0},
            (2.0, 4.0),
        ),
    ],
)
def test_capacity_factors_of_each_stack(
    own: dict[str, float], expected: tuple[float, float | None]
) -> None:
    moe = {"num_experts": 4, "moe_expert_capacity_factor": 1.0, "moe_eval_capacity_factor": 3.0}
    with model_parallel():
        layers = stack_model(stack_settings(moe={**moe, **own})).decoder.layers
    for layer, factors in ((layers[0], expected), (layers[-1], (1.0, 3.0))):
        capacity = layer.mlp.router.capacity
        assert (capacity.factor, capacity.eval_factor) == factors
