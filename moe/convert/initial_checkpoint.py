"""Checkpoints of step 0 with weights only, for ``--load RUN --finetune``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import yaml
from torch import Tensor

from moetron.common.files import write_text
from moetron.moe.checkpoint import run_folder as checkpoint_folder
from moetron.moe.checkpoint.position import Progress
from moetron.moe.checkpoint.run_folder import Record
from moetron.moe.checkpoint.save_load import versions
from moetron.moe.config import recipe
from moetron.moe.config.schema.settings import Settings
from moetron.moe.convert.checkpoint_tensors import write_tensors

MODEL_FILE = "model.yaml"


class Weights(Protocol):
    """Global tensors of a model under our names, read one at a time."""

    def names(self) -> list[str]:
        """Return all names."""
        ...

    def empty(self, name: str) -> Tensor:
        """Return a meta tensor of the same shape and dtype."""
        ...

    def read(self, name: str) -> Tensor:
        """Return the tensor."""
        ...


def write_start(
    output: Path,
    weights: Weights,
    settings: Settings,
    tree: Mapping[str, Mapping[str, Any]],
    fingerprint: str | None,
) -> None:
    """Write ``weights`` to the run folder ``output`` as a checkpoint of step 0 without optimizer.

    Memory holds one tensor at a time: at most the experts of one layer.

    Args:
        output: a run folder without checkpoints; created if missing.
        weights: of the model.
        settings: of the checkpoint.
        tree: sections of ``settings`` that describe the model, written to ``output/model.yaml``.
        fingerprint: of the tokenizer, required of later runs; None: unknown.

    Raises:
        UserError: the folder already has a checkpoint of step 0, or cannot be written.
    """
    target = checkpoint_folder.step_folder(output, 0)
    temporary = checkpoint_folder.prepare(target, "--output")
    write_tensors(temporary, {name: weights.empty(name) for name in weights.names()}, weights.read)
    write_text(output / MODEL_FILE, yaml.safe_dump(dict(tree), sort_keys=False))
    recipe.write(settings, temporary / "settings.yaml")
    record = Record(
        progress=Progress(),
        settings=settings.model_dump(mode="json"),
        layout={"world_size": 1},
        stream={"sources": [{"tokenizer": fingerprint}]} if fingerprint else {},
        versions=versions(),
        files=checkpoint_folder.file_sizes(temporary),
    )
    checkpoint_folder.write_record(temporary, record, {})
    checkpoint_folder.commit(target, keep_last=None)
