"""Text description of a checkpoint."""

import math
from pathlib import Path

from moetron.common.errors import UserError
from moetron.moe.checkpoint import run_folder as checkpoint_folder
from moetron.moe.convert.checkpoint_tensors import CheckpointTensors
from moetron.moe.convert.families.family import function_of
from moetron.moe.convert.families.registry import family_of


def describe(path: Path, verify: bool = False) -> str:
    """Describe position, layout, model, weights and matching family of a checkpoint.

    Reads no values; ``verify`` checks the SHA-256 of every file, of all checkpoints of a run.

    Raises:
        UserError: the checkpoint is missing, incomplete or damaged; with ``verify``, any of them.
    """
    sound = _verified(path) if verify else []
    checkpoint = checkpoint_folder.read(path)
    record = checkpoint.record
    values = function_of(checkpoint_folder.one_rank_settings(record))
    tensors = CheckpointTensors(checkpoint.folder)
    shapes = {name: tensors.empty(name) for name in tensors.names()}
    parameters = sum(math.prod(tensor.shape) for tensor in shapes.values())
    size = sum(record.files.values())
    try:
        fit = family_of(values).architecture
    except UserError as error:
        fit = str(error)
    lines = [
        f"checkpoint   {checkpoint.folder}",
        f"position     step {record.progress.step}, {record.progress.consumed_tokens:,} tokens",
        f"written by   {', '.join(f'{name} {value}' for name, value in record.versions.items())}",
        f"layout       {', '.join(f'{name} {value}' for name, value in record.layout.items())}",
        f"on disk      {len(record.files)} files, {size / 1e9:.3f} GB",
        f"weights      {len(shapes)} tensors, {parameters:,} parameters",
        f"HuggingFace  {fit}",
        *sound,
        "",
    ]
    width = max(map(len, shapes))
    lines += [
        f"{name:{width}}  {str(tensor.dtype).removeprefix('torch.'):8}  {list(tensor.shape)}"
        for name, tensor in shapes.items()
    ]
    return "\n".join(lines)


def _verified(path: Path) -> list[str]:
    """Return a line for each checkpoint, all of them sound."""
    found = checkpoint_folder.verify_all(path)
    damaged = [text for text in found.values() if text is not None]
    if damaged:
        sound = ", ".join(folder.name for folder, text in found.items() if text is None)
        head = f"{len(damaged)} of {len(found)} checkpoints are damaged (sound: {sound or 'none'})"
        raise UserError("\n".join([f"{head}:", *damaged]))
    return [f"verified     {folder.name}: SHA-256 of every file matches" for folder in found]
