"""Assignment of layers to pipeline chunks.

A pipeline of P stages has P x V chunks: stage 0 of round 0, stage 1 of round 0, ... With V > 1
(virtual stages) it is interleaved. The embedding precedes the layers of the first chunk; the output
layer follows those of the last, after the multi-token prediction modules.
"""

import re
from itertools import accumulate

from moetron.moe.config.schema.parallel import ParallelSettings
from moetron.moe.config.schema.settings import Settings

_MOST_CHUNKS = 1 << 16
"""Bound for settings that are not checked yet: a list of 2^60 chunks fits nowhere."""


def expand(layout: str) -> list[str]:
    """Return the chunks of a --pipeline-model-parallel-layout, each a word of E, t, m and L.

    Megatron's grammar (PipelineParallelLayerLayout.parse_str_to_list of megatron-core 0.16.1):
    ``|`` ends a chunk, ``x*3`` and ``(tt|)*3`` repeat, commas are ignored. Letters are not checked.
    """
    text = re.sub(r"[,\s]", "", layout)
    for group in (r"\(([^()]+)\)\*(\d{1,4})(?!\d)", r"([^()])\*(\d{1,4})(?!\d)"):
        text = re.sub(group, lambda match: match[1] * int(match[2]), text)
    return text.split("|")


def chunk_sizes(settings: Settings) -> list[int]:
    """Return the layers of every chunk in model order; correct only for checked settings."""
    parallel, layers = settings.parallel, settings.model.num_layers
    stages = parallel.pipeline_model_parallel_size
    if parallel.pipeline_model_parallel_layout is not None:
        return [chunk.count("t") for chunk in expand(parallel.pipeline_model_parallel_layout)]
    first = parallel.decoder_first_pipeline_num_layers
    last = parallel.decoder_last_pipeline_num_layers
    if first is not None or last is not None:
        return _between(first, last, layers, stages)
    slots = layers + accounted(parallel)
    per_stage = slots // stages
    chunk = parallel.num_layers_per_virtual_pipeline_stage or max(per_stage, 1)
    sizes = [chunk] * min(stages * max(per_stage // chunk, 1), _MOST_CHUNKS)
    sizes[0] -= parallel.account_for_embedding_in_pipeline_split
    sizes[-1] -= parallel.account_for_loss_in_pipeline_split
    return sizes


def _between(first: int | None, last: int | None, layers: int, stages: int) -> list[int]:
    """Return stages with the given first and last sizes and equal others."""
    ends = [[] if size is None else [size] for size in (first, last)]
    others = stages - len(ends[0]) - len(ends[1])
    rest = layers - sum(ends[0] + ends[1])
    return [*ends[0], *([rest // max(others, 1)] * min(others, _MOST_CHUNKS)), *ends[1]]


def accounted(parallel: ParallelSettings) -> int:
    """Return how many of embedding and loss count as a layer."""
    embedding, loss = (
        parallel.account_for_embedding_in_pipeline_split,
        parallel.account_for_loss_in_pipeline_split,
    )
    return int(embedding) + int(loss)


def virtual_pipeline_size(settings: Settings) -> int | None:
    """Return the rounds V of an interleaved pipeline, or None."""
    rounds = len(chunk_sizes(settings)) // settings.parallel.pipeline_model_parallel_size
    return rounds if rounds > 1 else None


def stage_chunks(settings: Settings, stage: int) -> list[range]:
    """Return the layers of each chunk of a pipeline stage, round by round."""
    sizes = chunk_sizes(settings)
    ends = list(accumulate(sizes))
    chunks = [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    return chunks[stage :: settings.parallel.pipeline_model_parallel_size]


def megatron_layout(settings: Settings) -> list[list[str]] | None:
    """Return TransformerConfig.pipeline_model_parallel_layout, or None for one stage."""
    if settings.parallel.pipeline_model_parallel_size == 1:
        return None
    chunks = [["decoder"] * size for size in chunk_sizes(settings)]
    chunks[0].insert(0, "embedding")
    chunks[-1] += [*(["mtp"] * (settings.model.mtp_num_layers or 0)), "loss"]
    return chunks
