"""Text of a run's plan, for ``--dry-run``."""

from itertools import chain

from moetron.moe.config.schema import derived
from moetron.moe.config.schema.pipeline_split import stage_chunks
from moetron.moe.config.schema.settings import Settings
from moetron.moe.plan.flops import flops_per_token
from moetron.moe.plan.layout import position
from moetron.moe.plan.memory import memory_per_rank
from moetron.moe.plan.parameters import count_parameters


def render(settings: Settings, vocab_size: int, world_size: int, rank: int) -> str:
    """Return the plan of settings that passed ``checks.problems`` for ``world_size``."""
    sections = {
        "parameters": _parameters(settings, vocab_size),
        "layout": _layout(settings, world_size, rank),
        f"memory of rank {rank}": _memory(settings, vocab_size, world_size, rank),
        "run": _run(settings, vocab_size, world_size),
        "learning rate": _learning_rate(settings),
    }
    return "\n".join(section(title, rows) for title, rows in sections.items())


def section(title: str, rows: list[tuple[str, str]]) -> str:
    """Return a titled table of names and values."""
    width = max(len(name) for name, _ in rows)
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows)])


def gib(number_bytes: int) -> str:
    """Return a number of bytes as text in GiB."""
    return f"{number_bytes / 2**30:,.3f} GiB"


def _parameters(settings: Settings, vocab_size: int) -> list[tuple[str, str]]:
    count = count_parameters(settings, vocab_size)
    rows = derived.padded_vocab_size(vocab_size, settings)
    return [
        ("total", f"{count.total:,}"),
        ("active", f"{count.active:,}"),
        *((part, f"{number:,}") for part, number in count.parts.items() if number),
        ("vocabulary", f"{vocab_size:,}, padded to {rows:,}"),
    ]


def _layout(settings: Settings, world_size: int, rank: int) -> list[tuple[str, str]]:
    parallel, place = settings.parallel, position(settings, world_size, rank)
    sizes = [
        ("tensor", place.tensor, parallel.tensor_model_parallel_size),
        ("context", place.context, parallel.context_parallel_size),
        ("data", place.data, derived.data_parallel_size(parallel, world_size)),
        ("pipeline", place.pipeline, parallel.pipeline_model_parallel_size),
    ]
    if settings.moe.num_experts is not None:
        sizes += [
            ("expert", place.expert, parallel.expert_model_parallel_size),
            (
                "expert tensor",
                place.expert_tensor,
                derived.expert_tensor_parallel_size(parallel),
            ),
            (
                "expert data",
                place.expert_data,
                derived.expert_data_parallel_size(parallel, world_size),
            ),
        ]
    lengths = derived.stack_lengths(settings)
    stacks = [
        (stack, f"layers {held[0]} to {held[-1]}, {lengths[stack]:,} tokens of a sample")
        for stack, held in derived.stack_layers(settings.model).items()
        if len(lengths) > 1
    ]
    stages = range(parallel.pipeline_model_parallel_size)
    layers = [list(chain(*stage_chunks(settings, stage))) for stage in stages]
    return [
        ("ranks", f"{world_size:,}"),
        *((name, f"{size:,} (rank {rank} is {at})") for name, at, size in sizes),
        ("layers", ", ".join(map(str, layers[place.pipeline])) or "none"),
        ("stage layers", ", ".join(str(len(held)) for held in layers)),
        *stacks,
    ]


def _memory(
    settings: Settings, vocab_size: int, world_size: int, rank: int
) -> list[tuple[str, str]]:
    stage = position(settings, world_size, rank).pipeline
    memory = memory_per_rank(settings, vocab_size, world_size, stage)
    return [
        ("parameters", gib(memory.parameters)),
        ("gradients", gib(memory.gradients)),
        ("optimizer", gib(memory.optimizer)),
        ("activations", f"{gib(memory.activations)} (estimate, balanced routing)"),
        ("logits", gib(memory.logits)),
        ("total", f"{gib(memory.total)} and allocator slack"),
    ]


def _run(settings: Settings, vocab_size: int, world_size: int) -> list[tuple[str, str]]:
    training, length = settings.training, settings.model.seq_length
    tokens = derived.total_samples(settings) * length
    flops = flops_per_token(settings, vocab_size)
    batch = training.global_batch_size
    return [
        ("steps", f"{training.train_iters:,}"),
        ("global batch", f"{batch:,} samples, {batch * length:,} tokens"),
        ("micro-batches", f"{derived.num_microbatches(settings, world_size):,} a step and rank"),
        ("tokens", f"{tokens:,}"),
        ("model FLOPs", f"{flops:,} a token, {flops * tokens:.3e} in all"),
    ]


def _learning_rate(settings: Settings) -> list[tuple[str, str]]:
    """Return the ends of the schedule's segments."""
    rate, lengths = settings.learning_rate, derived.schedule_lengths(settings)
    unit = lengths.unit.removesuffix("s")
    points: list[tuple[str, str]] = [("style", rate.lr_decay_style)]
    if lengths.warmup:
        points.append((f"{unit} 0", f"{rate.lr_warmup_init:g}"))
    points.append((f"{unit} {lengths.warmup:,}", f"{rate.lr:g}"))
    if rate.lr_decay_style == "WSD" and lengths.final_decay is not None:
        points.append((f"{unit} {lengths.end - lengths.final_decay:,}", f"{rate.lr:g}"))
    if rate.lr_decay_style in ("linear", "cosine", "WSD"):
        beyond = f" (the run ends at {lengths.run:,})" if lengths.end > lengths.run else ""
        points.append((f"{unit} {lengths.end:,}", f"{rate.min_lr:g}{beyond}"))
    return points
