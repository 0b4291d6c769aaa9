"""Conversion of HuggingFace folders to checkpoints for ``--load``, one tensor at a time."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moetron.common.errors import UserError
from moetron.common.json_files import read_object
from moetron.moe.config.schema.settings import Settings
from moetron.moe.config.validate import validate
from moetron.moe.convert.families.family import (
    CONFIG,
    PLACEHOLDERS,
    Family,
    function_of,
    require_same,
)
from moetron.moe.convert.families.registry import family_named
from moetron.moe.convert.families.tensor_rules import Rule
from moetron.moe.convert.initial_checkpoint import write_start
from moetron.moe.convert.safetensors_folder import TensorFolder, file_in

logger = logging.getLogger(__name__)
_LAYER_COUNTS = (
    "num_hidden_layers",
    "num_nextn_predict_layers",
    "num_layers",
    "num_decoder_layers",
)
_DERIVED = ("rotary_emb.inv_freq",)
"""Suffixes of tensors that some files have and that the configuration determines."""


def read_config(folder: Path) -> dict[str, Any]:
    """Return ``config.json`` of a HuggingFace folder.

    Raises:
        UserError: the file is missing, leads out of the folder or is not a JSON object.
    """
    path = file_in(folder, CONFIG)
    if path is None:
        raise UserError(f"{folder}: no {CONFIG}; give a HuggingFace folder")
    return read_object(path)


class HuggingFaceModel:
    """HuggingFace folder under our names: its settings, and its weights one at a time.

    Memory holds one of our tensors at a time: at most the experts of one layer.

    Args:
        folder: ``config.json`` and safetensors.
        tokenizer: value for ``--tokenizer-model``, or None.

    Raises:
        UserError: another architecture, or missing or unexpected tensors.
    """

    def __init__(self, folder: Path, tokenizer: str | None) -> None:
        config = read_config(folder)
        self.family = family_named(str(config.get("model_type")))
        if "quantization_config" in config:
            raise UserError(
                f"{folder}: quantized weights are not supported; give the original ones"
            )
        self._source = TensorFolder(folder)
        self.tree = self._described(folder / CONFIG, config)
        if tokenizer is not None:
            self.tree.setdefault("data", {})["tokenizer_model"] = tokenizer
        self.settings = _checked(folder / CONFIG, self.tree)
        self._refuse_size(folder / CONFIG, "experts", self.settings.moe.num_experts or 0)
        self._rules = {rule.ours: rule for rule in self.family.rules(function_of(self.settings))}
        expected = [name for rule in self._rules.values() for name in rule.theirs]
        found = _without_prediction(_parameters(self._source, self.settings, self.family), config)
        require_same(found, expected, f"{folder}", self.family)

    def _described(self, path: Path, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Return the settings sections; raise UserError for values that no model has."""
        for key in _LAYER_COUNTS:
            self._refuse_size(path, "layers", config.get(key) or 0)
        try:
            tree = self.family.settings(config)
        except UserError:
            raise
        except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
            raise UserError(
                f"{path}: a value is of another kind than {self.family.model_type}'s: "
                f"{type(error).__name__}: {error}"
            ) from error
        tree["precision"] = {"bf16": _named_dtype(config) == "bfloat16"}
        return tree

    def _refuse_size(self, path: Path, what: str, count: Any) -> None:
        """Raise UserError for more layers or experts than tensors, before any is listed."""
        tensors = len(self._source.names())
        if type(count) is not int or not 0 <= count <= tensors:
            raise UserError(f"{path}: {count!r:.40} {what} in a folder with {tensors} tensors")

    def names(self) -> list[str]:
        """Return the names of all weights."""
        return list(self._rules)

    def empty(self, name: str) -> Tensor:
        """Return a meta tensor of the same shape and dtype; UserError: it does not fit."""
        rule = self._rules[name]
        parts = [self._source.empty(part) for part in rule.theirs]
        try:
            return _join(rule, parts)
        except (RuntimeError, ValueError, IndexError) as error:
            shapes = ", ".join(str(list(part.shape)) for part in parts[:3])
            raise UserError(
                f"{rule.theirs[0]}: shapes {shapes} do not fit {CONFIG}: {error}"
            ) from None

    def read(self, name: str) -> Tensor:
        """Return the tensor."""
        rule = self._rules[name]
        return _join(rule, [self._source.read(part) for part in rule.theirs])


def from_hf(
    folder: Path, output: Path, tokenizer: str | None, fingerprint: str | None
) -> tuple[Family, Settings]:
    """Convert ``folder`` to a run folder to start from (`write_start`).

    Args:
        folder: see `HuggingFaceModel`.
        output: a run folder without checkpoints; created if missing.
        tokenizer: value for ``--tokenizer-model``, or None.
        fingerprint: of the tokenizer, required of later runs; None: unknown.

    Raises:
        UserError: another architecture, or missing or unexpected tensors.
    """
    model = HuggingFaceModel(folder, tokenizer)
    write_start(output, model, model.settings, model.tree, fingerprint)
    return model.family, model.settings


def _checked(path: Path, tree: Mapping[str, Mapping[str, Any]]) -> Settings:
    """Return the settings of a tree; raise UserError with all its problems."""
    settings, problems, _ = validate({**PLACEHOLDERS, **tree})
    if settings is None or problems:
        lines = "\n".join(f"  - {problem}" for problem in problems)
        raise UserError(f"{path}: not a model that Moetron has:\n{lines}")
    return settings


def _named_dtype(config: Mapping[str, Any]) -> str:
    return str(config.get("dtype", config.get("torch_dtype"))).removeprefix("torch.")


def _parameters(source: TensorFolder, settings: Settings, family: Family) -> list[str]:
    """Return the names of the folder's tensors, without copies and derived ones."""
    untied = settings.model.untie_embeddings_and_output_weights
    return [
        name
        for name in source.names()
        if not name.endswith(_DERIVED)
        and name not in family.unused
        and (untied or name != "lm_head.weight")
    ]


def _without_prediction(names: list[str], config: Mapping[str, Any]) -> list[str]:
    """Drop DeepSeek-V3's multi-token prediction modules, which follow the last layer."""
    first, count = config.get("num_hidden_layers"), config.get("num_nextn_predict_layers") or 0
    if first is None:
        return names
    ahead = tuple(f"model.layers.{layer}." for layer in range(first, first + count))
    kept = [name for name in names if not name.startswith(ahead)]
    if len(kept) < len(names):
        logger.warning("multi-token prediction modules are left out: %s", ", ".join(ahead))
    return kept


def _join(rule: Rule, theirs: list[Tensor]) -> Tensor:
    """Return our tensor; cast fp16, which we do not train in, to fp32."""
    ours = rule.transform.join(theirs)
    return ours.float() if rule.fp32 or ours.dtype == torch.float16 else ours
