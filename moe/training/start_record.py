"""The start block: model, data, device and checkpoints of a run."""

import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from moetron.moe.checkpoint.position import Progress
from moetron.moe.config.schema import derived
from moetron.moe.config.schema.pipeline_split import virtual_pipeline_size
from moetron.moe.config.schema.settings import Settings
from moetron.moe.monitoring.peak_flops import Peak
from moetron.moe.monitoring.start_banner import origin
from moetron.moe.monitoring.start_text import counted, layout_text, peak_text
from moetron.moe.plan.parameters import count_parameters
from moetron.moe.plan.render import section
from moetron.moe.training.sample_stream import Streams
from moetron.moe.training.step import Trainer

FILE = "starts.jsonl"
SHOWN_SOURCES = 4


@dataclass(frozen=True)
class Start:
    """One start of a run, as a line of ``starts.jsonl``."""

    step: int
    """Steps done before this start."""
    tokens: int
    time: str
    """UTC, ISO 8601."""
    origin: str
    """Source of weights and position."""
    parameters: int
    active_parameters: int
    """Parameters that one token uses."""
    vocab_size: int
    layout: dict[str, int]
    """World size, hosts, and the size of each parallel dimension."""
    num_microbatches: int
    """Micro-batches per rank and step at the full batch size."""
    sources: list[dict[str, Any]]
    """Tokens and epochs of the run by source; empty: synthetic samples."""
    device: str
    threads: int | None
    """Threads of a rank on a CPU; None: a GPU."""
    implementation: str
    precision: str
    mfu_peak_tflops_per_s: float | None
    """Peak of one rank; None: unknown, no MFU is reported."""
    mfu_peak_basis: str | None


def describe(
    trainer: Trainer, streams: Streams, progress: Progress, peak: Peak | None
) -> tuple[Start, str]:
    """Return the start of a run for ``starts.jsonl`` and the block that the main rank prints."""
    settings, runtime = trainer.settings, trainer.runtime
    count = count_parameters(settings, trainer.vocab_size)
    on_cpu = runtime.device.type == "cpu"
    start = Start(
        step=progress.step,
        tokens=progress.consumed_tokens,
        time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        origin=origin(settings),
        parameters=count.total,
        active_parameters=count.active,
        vocab_size=trainer.vocab_size,
        layout=_layout(settings, runtime.world_size),
        num_microbatches=derived.num_microbatches(settings, runtime.world_size),
        sources=[asdict(use) for use in streams.uses],
        device=device_name(runtime.device),
        threads=torch.get_num_threads() if on_cpu else None,
        implementation=implementation(trainer.chunks),
        precision=precision(settings),
        mfu_peak_tflops_per_s=peak.tflops_per_s if peak else None,
        mfu_peak_basis=peak.basis if peak else None,
    )
    return start, section("start", list(_rows(start, settings)))


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"CPU ({next(names, '') or platform.processor() or platform.machine()})"


def implementation(chunks: Sequence[torch.nn.Module]) -> str:
    """Return the layers' implementation; megatron-core's classes inherit from the engine's."""
    kinds = {type(module) for chunk in chunks for module in chunk.modules()}
    packages = {base.__module__.split(".")[0] for kind in kinds for base in kind.__mro__}
    return "Transformer Engine" if "transformer_engine" in packages else "local"


def precision(settings: Settings) -> str:
    """Return a description of the dtypes of parameters and products."""
    chosen = settings.precision
    base = "bf16 with fp32 main parameters" if chosen.bf16 else "fp32"
    if chosen.fp8_format is None:
        return base
    layers = derived.fp8_layers(settings)
    where = "all layers" if all(layers) else f"{sum(layers)} of {len(layers)} layers"
    return f"{base}, FP8 {chosen.fp8_format} ({chosen.fp8_recipe} scaling) in {where}"


def _layout(settings: Settings, world_size: int) -> dict[str, int]:
    parallel, virtual = settings.parallel, virtual_pipeline_size(settings)
    layout = {
        "world_size": world_size,
        "hosts": -(-world_size // int(os.environ.get("LOCAL_WORLD_SIZE", world_size))),
        "TP": parallel.tensor_model_parallel_size,
        "PP": parallel.pipeline_model_parallel_size,
        **({} if virtual is None else {"VPP": virtual}),
        "CP": parallel.context_parallel_size,
        "DP": derived.data_parallel_size(parallel, world_size),
    }
    if settings.moe.num_experts is not None:
        layout["EP"] = parallel.expert_model_parallel_size
        layout["ETP"] = derived.expert_tensor_parallel_size(parallel)
        layout["expert DP"] = derived.expert_data_parallel_size(parallel, world_size)
    return layout


def _rows(start: Start, settings: Settings) -> Iterator[tuple[str, str]]:
    cpu = "" if start.threads is None else f", {counted(start.threads, 'thread')} a rank"
    yield "model", _model(start, settings)
    yield "layout", layout_text(start.layout)
    yield "batch", _batch(start, settings)
    yield "data", _data(start, settings)
    if settings.adaptation.sft:
        yield "chats", _chats(settings)
    yield "device", f"{start.device}{cpu}"
    yield "layers", f"{start.implementation} implementation, {start.precision}"
    yield "MFU", peak_text(start.mfu_peak_tflops_per_s, start.mfu_peak_basis)
    yield "from", start.origin
    yield "saves", _saves(settings)


def _model(start: Start, settings: Settings) -> str:
    model, moe = settings.model, settings.moe
    sparse = sum(derived.moe_layers(settings))
    kind = f"{counted(model.num_layers, 'layer')}, "
    if moe.num_experts is None:
        kind += "dense"
    else:
        kind += f"{sparse:,} of them with {moe.num_experts:,} experts, top {moe.moe_router_topk}"
    if ahead := settings.model.mtp_num_layers:
        kind += f", {counted(ahead, 'module')} of token prediction (not counted as active)"
    sizes = f"{start.parameters:,} parameters, {start.active_parameters:,} active a token"
    return f"{sizes}; {kind}; vocabulary {start.vocab_size:,}"


def _batch(start: Start, settings: Settings) -> str:
    training, length = settings.training, settings.model.seq_length
    size = training.global_batch_size
    ramp = training.rampup_batch_size
    grown = "" if ramp is None else f", growing from {ramp[0]:,} over {ramp[2]:,} samples"
    return (
        f"{counted(size, 'sample')} of {counted(length, 'token')} = {size * length:,} tokens a step"
        f"{grown}; {counted(start.num_microbatches, 'micro-batch')} of "
        f"{training.micro_batch_size:,} a data-parallel rank"
    )


def _data(start: Start, settings: Settings) -> str:
    tokens = derived.total_samples(settings) * settings.model.seq_length
    run = f"{tokens:,} tokens in {counted(settings.training.train_iters, 'step')}"
    stages = len(settings.data.stages or ())
    run += f", {stages:,} stages" if stages > 1 else ""
    if not start.sources:
        return f"{run}, synthetic samples (--mock-data)"
    most = sorted(start.sources, key=lambda use: -use["tokens"])
    parts = [f"{use['name']} {use['epochs']:.3g}" for use in most[:SHOWN_SOURCES]]
    if rest := [use["epochs"] for use in most[SHOWN_SOURCES:]]:
        parts.append(f"{len(rest):,} more {min(rest):.3g} to {max(rest):.3g}")
    return f"{run}, {counted(len(most), 'source')}; epochs of each: {', '.join(parts)}"


def _chats(settings: Settings) -> str:
    """Return how chats are packed and weighted, and which losses of routers are added."""
    chosen, moe = settings.adaptation, settings.moe
    packing = "packed" if chosen.sft_packing else "one in a sample"
    balance = f"x {moe.moe_aux_loss_coeff:g}" if moe.moe_aux_loss_coeff else "off"
    z_loss = f"x {moe.moe_z_loss_coeff:g}" if moe.moe_z_loss_coeff else "off"
    loss = f"loss on answers, mean over the {chosen.sft_loss_normalisation}s of a global batch"
    if chosen.preference_loss is not None:
        units = "examples" if chosen.preference_loss == "kto" else "pairs"
        loss = f"{chosen.preference_loss}, beta {chosen.preference_beta:g}, mean over {units}"
    return f"{packing}, {loss}; balance loss {balance}, z-loss {z_loss}"


def _saves(settings: Settings) -> str:
    options = settings.checkpoint
    if options.save is None:
        return "nothing: no --save FOLDER, whatever ends the run"
    every = options.save_interval
    when = "at the end" if every is None else f"every {counted(every, 'step')} and at the end"
    retained, kept = options.save_retain_interval, ""
    if options.keep_last is not None or retained is not None:
        kept = f", the last {options.keep_last or 1:,} kept"
    if retained is not None:
        kept += f" and those of every {retained:,} steps"
    return f"to {options.save} {when}{kept}"
