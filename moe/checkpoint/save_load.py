"""Saving and loading a run: weights, optimizer state, position, random-number states.

Tensors are saved with megatron-core's dist_checkpointing, so that any layout loads what any other
wrote (for the optimizer see ``optimizer_state``), next to ``run.json`` and ``settings.yaml``. Every
rank writes and reads the tensors of its own shards; rank 0 alone handles folder names, records and
``latest``, while the others wait. All public functions here are collectives over all ranks.
"""

import importlib.metadata
import logging
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedStateDict,
)
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.utils import unwrap_model

from moetron import __version__
from moetron.common.files import write_text
from moetron.common.watch import activity
from moetron.moe.checkpoint import optimizer_state
from moetron.moe.checkpoint import run_folder as checkpoint_folder
from moetron.moe.checkpoint.checksums import Sums
from moetron.moe.checkpoint.collective_checks import (
    on_rank_0,
    require_space,
    verifying,
)
from moetron.moe.checkpoint.compatibility import require_fit, starts_run
from moetron.moe.checkpoint.position import Progress
from moetron.moe.checkpoint.random_states import HOST, mismatch, reseed, restore_rng, rng_entries
from moetron.moe.checkpoint.run_folder import Checkpoint, Record
from moetron.moe.checkpoint.states.fp8_state import fp8_entries, restore_fp8
from moetron.moe.checkpoint.states.router_state import is_wanted
from moetron.moe.checkpoint.tensor_reader import (
    load_entries,
    refuse_nan,
    require_entries,
    without_future_warnings,
)
from moetron.moe.checkpoint.tensor_writer import Contents, write_format_files
from moetron.moe.checkpoint.vocabulary import require_vocabulary
from moetron.moe.checkpoint.writer.writer_process import WriterProcess
from moetron.moe.config import recipe
from moetron.moe.config.schema.derived import expert_tensor_parallel_size
from moetron.moe.config.schema.pipeline_split import chunk_sizes
from moetron.moe.config.schema.settings import Settings

logger = logging.getLogger(__name__)

OPTIMIZER = "optimizer"
"""Part of a request, beside the model's chunks."""
MODEL_METADATA = {"non_homogeneous_layers": True}
"""Save each layer under its own name, also if all layers are alike."""


def save_checkpoint(
    run_folder: Path,
    progress: Progress,
    model: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
    settings: Settings,
    stream_state: Mapping[str, Any],
    texts: Mapping[str, str] | None = None,
) -> Path:
    """Write ``run_folder/step_NNNNNNN`` and move ``latest`` to it; return the new folder.

    Args:
        run_folder: on storage visible to all ranks; made if it is missing.
        progress: position of the run.
        model: the model's chunks on this rank, wrapped or not.
        optimizer: from ``get_megatron_optimizer``.
        settings: the run's; ``checkpoint`` says which older checkpoints are deleted.
        stream_state: identity of the stream of samples (``SampleStream.state()``).
        texts: further files of the checkpoint, by name.

    Raises:
        UserError: the folder cannot be written, or the run has saved this step already.
        RunError: the disk has too little space, or a rank could not write.
        OSError: rank 0 could not complete the folder.
    """
    return take_checkpoint(run_folder, progress, model, optimizer, settings, stream_state, texts)()


def take_checkpoint(
    run_folder: Path,
    progress: Progress,
    model: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
    settings: Settings,
    stream_state: Mapping[str, Any],
    texts: Mapping[str, str] | None = None,
    writer: WriterProcess | None = None,
) -> Callable[[], Path]:
    """Collect the contents of a checkpoint; return a function that writes them.

    With ``writer`` the contents are copied, and every rank may call the function on a thread while
    training continues.
    """
    folder = checkpoint_folder.step_folder(run_folder, progress.step)
    temporary = on_rank_0(lambda: checkpoint_folder.prepare(folder))
    weights = _model_state(model)
    tensors = {
        **weights,
        "optimizer": optimizer_state.sharded_optimizer_state(optimizer, weights),
        "rng": rng_entries(),
        **fp8_entries(model),
    }
    contents = Contents()
    with without_future_warnings():
        # Collective over all ranks: megatron-core validates that the main replicas cover every
        # global tensor exactly once. Its `save` would then write files on rank 0, whose failure
        # the others would not learn of.
        sharded, common = save_preprocess(tensors)
    contents.save(sharded, temporary)
    require_space(temporary, contents.size_bytes)
    save = PendingSave(
        folder, progress, settings, dict(stream_state), dict(texts or {}), contents, common
    )
    if writer is None:
        return save
    return writer.prepare(save, timedelta(minutes=settings.parallel.distributed_timeout_minutes))


@dataclass(frozen=True)
class PendingSave:
    """Checkpoint whose contents are collected; a call, on all ranks, writes it."""

    folder: Path
    progress: Progress
    settings: Settings
    stream_state: dict[str, Any]
    texts: dict[str, str]
    contents: Contents
    common: dict[str, Any]

    def __call__(self) -> Path:
        """Write the checkpoint and return its folder; collective over all ranks."""
        temporary = checkpoint_folder.temporary_folder(self.folder)
        try:
            sums = _merged(self.contents.write(temporary))
            on_rank_0(partial(self._complete, sums))
        except Exception:
            # On all ranks, and each has ended its writing: the files would only fill the disk.
            if dist.get_rank() == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        return self.folder

    def _complete(self, sums: Mapping[str, str]) -> None:
        """Write settings and record after the tensors, and rename the folder to its final name."""
        temporary = checkpoint_folder.temporary_folder(self.folder)
        write_format_files(temporary, self.common)
        recipe.write(self.settings, temporary / "settings.yaml")
        for name, text in self.texts.items():
            write_text(temporary / name, text)
        record = Record(
            progress=self.progress,
            settings=self.settings.model_dump(mode="json"),
            layout=_layout(self.settings),
            stream=self.stream_state,
            versions=versions(),
            files=checkpoint_folder.file_sizes(temporary),
        )
        checkpoint_folder.write_record(temporary, record, sums)
        options = self.settings.checkpoint
        checkpoint_folder.commit(self.folder, options.keep_last, options.save_retain_interval)


@activity.doing("load")
def load_checkpoint(
    path: Path,
    model: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
    settings: Settings,
    stream_state: Mapping[str, Any],
    verified: bool = False,
) -> Progress:
    """Load ``path``, a run's folder (its latest checkpoint) or a step folder; return its position.

    ``settings.checkpoint`` excludes parts: ``finetune`` loads only the weights and starts at step
    0, ``reset_progress`` starts there with weights and optimizer, ``no_load_optim`` keeps the
    optimizer fresh, ``no_load_rng`` the random numbers. A checkpoint of the same layout resumes bit
    by bit; with another layout or kind of device random numbers are reseeded from (seed, step).

    If --load equals --save and holds no checkpoint yet, the run starts at step 0: one command
    starts a run and resumes it. ``verified``: all files match their sums already.

    Raises:
        UserError: no checkpoint, incomplete or damaged, or of another architecture, vocabulary or
            tokenizer.
    """
    checkpoint = on_rank_0(lambda: _read_compatible(path, settings, stream_state))
    if checkpoint is None:
        return Progress()
    options, record = settings.checkpoint, checkpoint.record
    has_state = not (options.finetune or options.no_load_optim)
    with nullcontext(Sums()) if verified else verifying(checkpoint.folder) as sums:
        _load_state(checkpoint, model, optimizer if has_state else None, sums)
    restore_fp8(checkpoint.folder, checkpoint.keys, model, record.layout == _layout(settings))
    if not has_state:
        optimizer.reload_model_params()
    if options.finetune or options.reset_progress:
        return Progress()
    if not options.no_load_rng:
        _load_rng(checkpoint, settings)
    return record.progress


def load_weights(path: Path, model: Sequence[torch.nn.Module], vocab_size: int) -> None:
    """Load only the weights, into any layout, without an optimizer, for inference.

    Args:
        path: a run's folder (its latest checkpoint) or one step folder.
        model: the model's chunks on this rank.
        vocab_size: the model's, before padding.

    Raises:
        UserError: no checkpoint, incomplete or damaged, or of another architecture or vocabulary.
    """
    checkpoint = on_rank_0(lambda: checkpoint_folder.read(path))
    require_vocabulary(checkpoint, vocab_size)
    with verifying(checkpoint.folder) as sums:
        _load_state(checkpoint, model, None, sums)
    restore_fp8(checkpoint.folder, checkpoint.keys, model, same_layout=False)


def _read_compatible(
    path: Path, settings: Settings, stream_state: Mapping[str, Any]
) -> Checkpoint | None:
    if starts_run(settings.checkpoint):
        return None
    checkpoint = checkpoint_folder.read(path)
    rows = checkpoint.embedding_rows
    require_fit(checkpoint.folder, checkpoint.record, settings, stream_state, rows)
    return checkpoint


def _load_state(
    checkpoint: Checkpoint,
    model: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer | None,
    sums: Sums,
) -> None:
    """Load parameters and, if given, the optimizer's state, in one pass over the files."""
    weights = _model_state(model)
    parameters = [(entry.key, entry.data.detach()) for entry in _entries(weights)]
    requests = {chunk: _saved_part(checkpoint, state) for chunk, state in weights.items()}
    wanted = require_entries(checkpoint, requests, "give the --load of a run with the same model")
    restore = None
    if optimizer is not None:
        fresh = _model_state(model)  # reading replaces the data of entries by views
        own, restore = optimizer_state.load_request(optimizer, fresh, checkpoint.keys)
        keys = require_entries(checkpoint, own, "--no-load-optim starts with a fresh optimizer")
        if wanted.isdisjoint(keys):
            requests[OPTIMIZER] = own
    loaded = load_entries(checkpoint, requests, sums)
    if restore is not None and OPTIMIZER not in loaded:
        # Weights and main parameters come from the same tensors, and one pass reads each once.
        loaded[OPTIMIZER] = load_entries(checkpoint, own)
    for chunk, module in zip(weights, unwrap_model(list(model)), strict=True):
        module.load_state_dict(loaded[chunk], strict=False)
    refuse_nan(checkpoint, parameters)
    if restore is not None:
        refuse_nan(checkpoint, loaded[OPTIMIZER].items())
        restore(loaded[OPTIMIZER])


def _saved_part(checkpoint: Checkpoint, state: ShardedStateDict) -> ShardedStateDict:
    """Return the entries of a chunk to read: its tensors, and objects that were saved."""
    is_entry = optimizer_state.is_entry
    return {
        name: optimizer_state.exact_entry(entry, checkpoint.keys) if is_entry(entry) else entry
        for name, entry in state.items()
        if is_wanted(entry, checkpoint.keys)
    }


def _load_rng(checkpoint: Checkpoint, settings: Settings) -> None:
    """Restore random-number states, or reseed them if they do not apply here.

    States belong to ranks of one layout and to one kind of device. Others are seeded from (seed,
    step), with a warning on rank 0.
    """
    step, request = checkpoint.record.progress.step, rng_entries()
    reason: str | None
    if checkpoint.record.layout != _layout(settings):
        reason, request = "another layout", {}
    else:
        reason = mismatch(request, checkpoint.keys)
    if reason is not None:
        reseed(settings.training.seed, step)
        request = {key: request[key] for key in request.keys() & HOST & checkpoint.keys}
        if dist.get_rank() == 0:
            logger.warning("%s: random numbers are reseeded from seed and step %d", reason, step)
    if request:
        require_entries(checkpoint, request, "--no-load-rng resumes without")
        restore_rng(load_entries(checkpoint, request))


def _model_state(model: Sequence[torch.nn.Module]) -> ShardedStateDict:
    """Return the sharded state of each chunk, without the empty FP8 objects of layers."""
    return {
        f"model{number}": {
            name: value
            for name, value in chunk.sharded_state_dict(metadata=dict(MODEL_METADATA)).items()
            if optimizer_state.is_entry(value) or value.data is not None
        }
        for number, chunk in enumerate(unwrap_model(list(model)))
    }


def _entries(state: ShardedStateDict) -> list[optimizer_state.Entry]:
    return [entry for entry in nested_values(state) if optimizer_state.is_entry(entry)]


def _layout(settings: Settings) -> dict[str, Any]:
    parallel = settings.parallel
    return {
        "world_size": dist.get_world_size(),
        "tensor": parallel.tensor_model_parallel_size,
        "pipeline": parallel.pipeline_model_parallel_size,
        "pipeline_chunks": chunk_sizes(settings),
        "expert": parallel.expert_model_parallel_size,
        "expert_tensor": expert_tensor_parallel_size(parallel),
        "context": parallel.context_parallel_size,
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a checkpoint depends on."""
    packages = ("torch", "megatron-core", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version(), "moetron": __version__, **versions}


def _merged(own: dict[str, str]) -> dict[str, str]:
    """Merge the dictionaries of all ranks on rank 0."""
    parts: list[Any] = [None] * dist.get_world_size()
    # Gather to rank 0, which alone writes the list of sums.
    dist.gather_object(own, parts if dist.get_rank() == 0 else None, dst=0)
    return {name: value for part in parts for name, value in (part or {}).items()}
