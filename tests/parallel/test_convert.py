"""Checkpoints of all layouts are exported to the same bytes."""

from pathlib import Path

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from moetron.moe.checkpoint import run_folder as checkpoint_folder
from moetron.moe.checkpoint.position import Progress
from moetron.moe.checkpoint.save_load import load_checkpoint, save_checkpoint
from moetron.moe.config.schema.settings import Settings
from moetron.moe.convert.from_huggingface import from_hf
from moetron.moe.convert.to_huggingface import Export, to_hf
from moetron.moe.training.build_trainer import build_trainer
from moetron.moe.training.runtime import Runtime
from tests.parallel.support.checkpoint_runs import LAYOUTS, parallel_of
from tests.parallel.support.harness import run_ranks

pytest.importorskip("transformers")
from tests.unit.convert import hf_models

VOCABULARY = 261
"""Odd, so that two tensor ranks pad it."""


def _load_and_save(source: Path, target: Path, layout: str, bf16: bool) -> None:
    """Load imported weights in a layout, and save before the first step."""
    record = checkpoint_folder.read(source).record
    chosen = Settings.model_validate(
        {
            **record.settings,
            "parallel": LAYOUTS[layout],
            "precision": {"bf16": bf16},
            "training": {"train_iters": 1, "micro_batch_size": 1, "global_batch_size": 2},
            "checkpoint": {"finetune": True},
        }
    )
    assert chosen.model.vocab_size is not None
    with parallel_of(chosen):
        groups = ProcessGroupCollection.use_mpu_process_groups()
        runtime = Runtime(torch.distributed.get_rank(), 2, torch.device("cpu"), groups)
        trainer = build_trainer(chosen, runtime, chosen.model.vocab_size)
        load_checkpoint(source, trainer.chunks, trainer.optimizer, chosen, {})
        save_checkpoint(target, Progress(), trainer.chunks, trainer.optimizer, chosen, {})


def _exported(run: Path, output: Path) -> bytes:
    to_hf(run, output, Export(), VOCABULARY, {}, {})
    return (output / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("model_type", "layout", "bf16"),
    [
        ("olmoe", "tp2", False),
        ("olmoe", "pp2", False),
        ("olmoe", "ep2", True),
        ("qwen3_moe", "tp2_etp1", False),
    ],
)
def test_every_layout_exports_the_same(
    tmp_path: Path, model_type: str, layout: str, bf16: bool
) -> None:
    model = hf_models.build(model_type, num_hidden_layers=2, vocab_size=VOCABULARY)
    model = model.bfloat16() if bf16 else model
    model.save_pretrained(tmp_path / "hf")
    from_hf(tmp_path / "hf", tmp_path / "imported", None, None)
    run_ranks(_load_and_save, 2, tmp_path / "imported", tmp_path / "run", layout, bf16)
    assert _exported(tmp_path / "run", tmp_path / "a") == _exported(
        tmp_path / "imported", tmp_path / "b"
    )
