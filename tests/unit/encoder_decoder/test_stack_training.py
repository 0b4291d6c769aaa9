"""Training of an encoder-decoder in the loop: label smoothing, both stacks' losses, fine-tuning."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moetron.assembly import train
from moetron.moe.config.schema.settings import Settings
from moetron.moe.routing.router import Router
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


def test_output_z_loss() -> None:
    """Of the decoder's tokens with loss: its gradient alone, the returned loss has none."""
    batch, coefficient = stack_batch(), 0.1
    mask = batch["loss_mask"].clone()
    mask[0, ENCODER:] = 0.0
    gradients, losses = [], []
    with model_parallel():
        weights = stack_model(stack_settings()).state_dict()
        for own in (coefficient, None):
            model = stack_model(stack_settings({"output_z_loss_coeff": own})).train()
            model.load_state_dict(weights)
            loss = model(batch["tokens"], labels=batch["labels"], loss_mask=mask) * mask
            total = loss.sum()
            if own is None:
                log_z = model(batch["tokens"]).logsumexp(-1)
                total = total + coefficient * (log_z.square() * mask[:, ENCODER:]).sum()
            total.backward()
            gradients.append({name: p.grad for name, p in model.named_parameters()})
            losses.append(loss.sum().detach())
    torch.testing.assert_close(*losses)
    for name, gradient in gradients[1].items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(gradients[0][name], gradient, rtol=0, atol=1e-5 * scale)


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
        # Jitter draws from a position that the first run had no need to save.
        moe={"moe_expert_dropout": 0.4, "moe_input_jitter_eps": 1e-2},
        checkpoint={"load": str(tmp_path / "one"), "finetune": True},
        data={"mean_noise_span_length": 2.0},
    )
    assert train(tuned, None, VOCABULARY) == 0
    after = _rows(tmp_path / "two")
    assert after[0]["step"] == 1
    assert after[0]["lm_loss"] != rows[0]["lm_loss"]


def test_a_resumed_run_has_the_same_bits(tmp_path: Path) -> None:
    """With dropout in both stacks and experts, and the optimizer's state of both tables."""
    dropout = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
    losses = []
    for name, parts in (("once", (3,)), ("twice", (2, 3))):
        folder = tmp_path / name
        for steps in parts:
            load = {"load": str(folder)} if steps != parts[0] else {}
            chosen = _settings(folder, model=dropout, checkpoint=load)
            rate = chosen.learning_rate.model_copy(update={"lr_decay_iters": 3})
            training = chosen.training.model_copy(update={"train_iters": steps})
            changes = {"training": training, "learning_rate": rate}
            assert train(chosen.model_copy(update=changes), None, VOCABULARY) == 0
        losses.append([(row["lm_loss"], row["grad_norm"]) for row in _rows(folder)])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3


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


@pytest.mark.parametrize("training", [True, False])
def test_a_stack_drops_by_its_own_factor(training: bool) -> None:
    """The encoder in training and the decoder in evaluation, each with few slots."""
    few, many = 0.25, 4.0
    moe = {
        **ROUTED,
        "moe_encoder_capacity_factor": few,
        "moe_encoder_eval_capacity_factor": many,
        "moe_expert_capacity_factor": many,
        "moe_eval_capacity_factor": few,
    }
    with model_parallel():
        model = stack_model(stack_settings(moe=moe)).train(training)
        drops = {}
        for module in model.modules():
            if isinstance(module, Router):
                layer = module.layer_number - 1

                def count(router: Router, _: Any, out: Any, layer: int = layer) -> None:
                    drops[layer] = int(router.chosen.sum() - out[1].sum())

                module.register_forward_hook(count)
        model(stack_batch()["tokens"])
    assert set(drops) == {1, 3, 4}
    assert (drops[1] > 0) == training
    assert (drops[3] > 0) == (drops[4] > 0) == (not training)
