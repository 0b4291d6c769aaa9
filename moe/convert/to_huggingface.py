"""Conversion of our checkpoints to folders for transformers, one tensor at a time."""

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moetron.common.errors import UserError
from moetron.common.files import rename, sync_folder, write_text
from moetron.moe.checkpoint import run_folder as checkpoint_folder
from moetron.moe.checkpoint.vocabulary import require_vocabulary
from moetron.moe.config.schema import derived
from moetron.moe.convert import families
from moetron.moe.convert.checkpoint_tensors import CheckpointTensors
from moetron.moe.convert.families.family import CONFIG, Family, function_of, require_same
from moetron.moe.convert.families.registry import family_named, family_of
from moetron.moe.convert.families.tensor_rules import Rule
from moetron.moe.convert.model_card import CARD, card, differences, refuse_two_way_reading
from moetron.moe.convert.safetensors_folder import shards, write_folder

logger = logging.getLogger(__name__)
PREDICTION = "mtp."
"""Prefix of multi-token prediction tensors, which transformers cannot load."""
SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Export:
    """Options of an export."""

    model_type: str | None = None
    """HuggingFace's ``model_type``; None: the matching family."""
    dtype: torch.dtype | None = None
    """Dtype of the weights; None: that of the run's parameters. fp32 exports the optimizer's main
    parameters if the checkpoint has them."""
    shard_bytes: int = SHARD_BYTES
    """Largest size of one file."""
    as_causal: bool = False
    """Export a model trained with bidirectional prefixes as a causal one."""
    turn_end: int | None = None
    """Id that ends an answer, at which generation ends as at ``eos_token_id``; None: no chat model,
    or no single token."""


def to_hf(
    path: Path,
    output: Path,
    options: Export,
    vocab_size: int,
    special_ids: Mapping[str, int | None],
    companions: Mapping[str, bytes],
    check: Callable[[Path], str | None] = lambda folder: None,
) -> Family:
    """Export the checkpoint at ``path`` to a HuggingFace folder; return its family.

    Memory holds one of our tensors at a time: at most the experts of one layer.

    Args:
        path: a run folder (its latest checkpoint) or one step folder, of any layout.
        output: must not exist; written atomically.
        options: see `Export`.
        vocab_size: before padding.
        special_ids: ``bos_token_id``, ``eos_token_id``, ``pad_token_id``.
        companions: tokenizer files, name -> content.
        check: called with the complete folder before it is renamed; returns the reason to remove
            the companions, or None to keep them.

    Raises:
        UserError: the checkpoint is damaged or of another vocabulary, or its model does not match
            the family exactly (`Export.as_causal` allows one difference).
    """
    checkpoint = checkpoint_folder.read(path)
    require_vocabulary(checkpoint, vocab_size)
    checkpoint_folder.verify(checkpoint.folder)
    settings = checkpoint_folder.one_rank_settings(checkpoint.record)
    settings = derived.with_vocabulary(settings, vocab_size)
    if not options.as_causal:
        refuse_two_way_reading(settings)
    values = function_of(settings)
    family = _fitting(options.model_type, values)
    dtype = options.dtype or (torch.bfloat16 if settings.precision.bf16 else torch.float32)
    source = CheckpointTensors(checkpoint.folder, exact=dtype == torch.float32)
    rules = family.rules(values)
    ahead = [name for name in source.names() if name.startswith(PREDICTION)]
    kept = set(source.names()).difference(ahead)
    require_same(kept, [rule.ours for rule in rules], f"{path}", family)
    differing = differences(settings, ahead)
    plan = {
        name: part for rule in rules for name, part in _split(rule, source.empty(rule.ours), dtype)
    }
    generation = dict(special_ids)
    if family.has_encoder:
        generation["decoder_start_token_id"] = special_ids.get("pad_token_id")
    config = {**family.config(values), **generation, **_dtype_keys(dtype)}
    with _new_folder(output) as folder:
        tensors = (pair for rule in rules for pair in _split(rule, source.read(rule.ours), dtype))
        write_folder(folder, shards(plan, options.shard_bytes), tensors)
        _write_json(folder / CONFIG, config)
        generation |= _generation(special_ids, options.turn_end)
        _write_json(folder / "generation_config.json", generation)
        if family.code is not None:
            shutil.copyfile(Path(families.__path__[0]) / family.code, folder / family.code)
        for name, content in companions.items():
            (folder / name).write_bytes(content)
        if companions and (reason := check(folder)) is not None:
            for name in companions:
                (folder / name).unlink()
            logger.warning("without a tokenizer: %s", reason)
        if differing:
            write_text(folder / CARD, card(family.architecture, checkpoint.record, differing))
    for sentence in differing:
        logger.warning("%s", sentence)
    return family


def _fitting(model_type: str | None, values: Mapping[str, Any]) -> Family:
    if model_type is None:
        return family_of(values)
    family = family_named(model_type)
    if problems := family.problems(values):
        raise UserError(
            "\n".join([f"--model-type {model_type}: does not match this model:", *problems])
        )
    return family


def _generation(special_ids: Mapping[str, int | None], turn_end: int | None) -> dict[str, Any]:
    """Return the configuration of transformers' ``generate``."""
    if turn_end in (None, special_ids.get("eos_token_id")):
        return dict(special_ids)
    return {**special_ids, "eos_token_id": [turn_end, special_ids["eos_token_id"]]}


def _dtype_keys(dtype: torch.dtype) -> dict[str, str]:
    """Return the weights' dtype under the keys of transformers 5 and of versions before 4.56."""
    return dict.fromkeys(("dtype", "torch_dtype"), str(dtype).removeprefix("torch."))


def _split(rule: Rule, ours: Tensor, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    target = torch.float32 if rule.fp32 else dtype
    parts = rule.transform.split(ours)
    return ((name, part.to(target)) for name, part in zip(rule.theirs, parts, strict=True))


@contextmanager
def _new_folder(output: Path) -> Iterator[Path]:
    """Yield a temporary folder; rename it to ``output`` when it is complete."""
    if output.exists():
        raise UserError(f"--output {output}: exists and is never overwritten")
    temporary = output.with_name(output.name + ".tmp")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    except OSError as error:
        raise UserError(f"--output {output}: cannot write there: {error}") from error
    yield temporary
    sync_folder(temporary)
    rename(temporary, output)


def _write_json(path: Path, tree: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(tree, indent=2, sort_keys=True) + "\n")
