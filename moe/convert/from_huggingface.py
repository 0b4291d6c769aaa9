"""Folders of HuggingFace's to checkpoints that ``--load`` takes, one tensor at a time."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from moetron.moe.config import recipe
from moetron.moe.config.errors import UserError
from moetron.moe.config.settings import Settings
from moetron.moe.convert.checkpoint_tensors import write_tensors
from moetron.moe.convert.family import CONFIG, PLACEHOLDERS, Family, function_of, require_same
from moetron.moe.convert.registry import family_named
from moetron.moe.convert.rules import Rule
from moetron.moe.convert.safetensors_folder import TensorFolder
from moetron.moe.training import checkpoint_folder
from moetron.moe.training.atomic import write_text
from moetron.moe.training.checkpoint import versions
from moetron.moe.training.checkpoint_folder import Record
from moetron.moe.training.progress import Progress

MODEL_FILE = "model.yaml"
_DERIVED = ("rotary_emb.inv_freq",)
"""Ends of names that some files hold although they follow from the configuration."""


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a folder of HuggingFace's.

    Raises:
        UserError: it is not there or no JSON object.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{folder}: no {CONFIG} there; give a folder of HuggingFace's")
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise UserError(f"{path}: damaged: {error}") from error


def from_hf(
    folder: Path, output: Path, tokenizer: str | None, fingerprint: str | None
) -> tuple[Family, Settings]:
    """Write ``folder`` as the run folder ``output``: a checkpoint of step 0, without optimizer.

    ``output/model.yaml`` holds the sections of a recipe that describe the model;
    ``--load output --finetune`` starts from the weights in any layout. Memory holds one of our
    tensors at a time: at most a layer's experts.

    Args:
        folder: ``config.json`` and safetensors.
        output: a run folder without checkpoints; made where it is missing.
        tokenizer: what ``--tokenizer-model`` should say; None: nothing.
        fingerprint: the tokenizer's, which later runs must share; None: unknown.

    Raises:
        UserError: another architecture, or tensors too many or too few.
    """
    config = read_config(folder)
    family = family_named(str(config.get("model_type")))
    if "quantization_config" in config:
        raise UserError(f"{folder}: quantized weights are not read; give the original ones")
    tree = family.settings(config)
    tree["precision"] = {"bf16": _named_dtype(config) == "bfloat16"}
    if tokenizer is not None:
        tree["data"] = {"tokenizer_model": tokenizer}
    settings = Settings.model_validate({**PLACEHOLDERS, **tree})
    rules = {rule.ours: rule for rule in family.rules(function_of(settings))}
    source = TensorFolder(folder)
    expected = [name for rule in rules.values() for name in rule.theirs]
    require_same(_parameters(source, settings), expected, f"{folder}", family)
    shapes = {
        name: _join(rule, [source.empty(part) for part in rule.theirs])
        for name, rule in rules.items()
    }
    target = checkpoint_folder.step_folder(output, 0)
    temporary = checkpoint_folder.prepare(target)
    write_tensors(
        temporary,
        shapes,
        lambda name: _join(rules[name], [source.read(part) for part in rules[name].theirs]),
    )
    write_text(output / MODEL_FILE, yaml.safe_dump(tree, sort_keys=False))
    _finish(target, settings, fingerprint)
    return family, settings


def _finish(target: Path, settings: Settings, fingerprint: str | None) -> None:
    """Describe a written checkpoint, and make it the run's latest."""
    temporary = checkpoint_folder.temporary_folder(target)
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


def _named_dtype(config: Mapping[str, Any]) -> str:
    return str(config.get("dtype", config.get("torch_dtype"))).removeprefix("torch.")


def _parameters(source: TensorFolder, settings: Settings) -> list[str]:
    """Names of the folder's tensors, without copies of a tied matrix and derived ones."""
    untied = settings.model.untie_embeddings_and_output_weights
    return [
        name
        for name in source.names()
        if not name.endswith(_DERIVED) and (untied or name != "lm_head.weight")
    ]


def _join(rule: Rule, theirs: list[Tensor]) -> Tensor:
    """Our tensor; fp16, which we do not train in, becomes fp32."""
    ours = rule.transform.join(theirs)
    return ours.float() if rule.fp32 or ours.dtype == torch.float16 else ours
