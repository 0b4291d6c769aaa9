"""Pipeline stages: how layers are dealt out to them."""

from collections.abc import Iterator
from math import gcd

from moetron.moe.config.rules.case import Case, nearest_divisors, nearest_multiples, not_multiple
from moetron.moe.config.schema.field import flag_name
from moetron.moe.config.schema.pipeline_split import accounted, chunk_sizes, expand

_ENDS = ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")
_ACCOUNTS = ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")
_CHUNK = "num_layers_per_virtual_pipeline_stage"
_LAYOUT = "pipeline_model_parallel_layout"


def _used(case: Case, *names: str) -> list[str]:
    parallel = case.settings.parallel
    return [name for name in names if getattr(parallel, name) not in (None, False)]


def split(case: Case) -> Iterator[str]:
    """Which layers a stage holds: one way of saying it, and one that comes out even."""
    stages = case.settings.parallel.pipeline_model_parallel_size
    ways = [_used(case, _LAYOUT), _used(case, *_ENDS), _used(case, *_ACCOUNTS, _CHUNK)]
    layout, ends, even = ways
    if sum(map(bool, ways)) > 1:
        yield (
            f"{case.said(*layout, *ends, *even)} are different ways to cut stages: use one "
            f"({flag_name(_LAYOUT)} can say them all)"
        )
    elif stages == 1 and (ends or even):
        said = case.said(*ends, *even)
        yield f"{said} needs --pipeline-model-parallel-size above 1: leave it out"
    elif layout:
        yield from _written(case, case.settings.parallel.pipeline_model_parallel_layout or "")
    elif ends:
        yield from _uneven(case)
    else:
        yield from _even(case)


def _written(case: Case, layout: str) -> Iterator[str]:
    """A layout spelled out; megatron-core asserts the same when the model is built."""
    stages, chunks = case.settings.parallel.pipeline_model_parallel_size, expand(layout)
    said, text = case.said(_LAYOUT), "".join(chunks)
    unknown = sorted(set(text) - set("EtmL"))
    if unknown:
        yield (
            f"{said}: {' '.join(unknown)} is no part of a model; write E (embedding), t (layer), "
            "m (predicts further tokens), L (loss), | between stages, and t*3 or (tt|)*3 to repeat"
        )
        return
    if stages == 1 and len(chunks) > 1:
        yield f"{said}: {len(chunks)} stages need --pipeline-model-parallel-size above 1"
    elif len(chunks) % stages:
        yield (
            f"{said}: {len(chunks)} stages are not a multiple of "
            f"{case.said('pipeline_model_parallel_size')}: write "
            f"{nearest_multiples(len(chunks), stages)}"
        )
    tail = "m" * (case.settings.model.mtp_num_layers or 0) + "L"
    ends = chunks[0].startswith("E") and chunks[-1].endswith(tail)
    if not ends or [text.count(letter) for letter in "EmL"] != [1, len(tail) - 1, 1]:
        yield (
            f"{said}: the first stage must begin with the only E, the last one end with the only "
            f"{tail}"
        )
    if text.count("t") != case.settings.model.num_layers:
        yield (
            f"{said}: it has {text.count('t')} layers t, but {case.said('num_layers')}: write as "
            "many"
        )
    if "" in chunks:
        yield f"{said}: stage {chunks.index('')} is empty: give it a layer t, or drop a |"


def _uneven(case: Case) -> Iterator[str]:
    """A first or last stage of its own size."""
    parallel, layers = case.settings.parallel, case.settings.model.num_layers
    used = _used(case, *_ENDS)
    others = parallel.pipeline_model_parallel_size - len(used)
    rest = layers - sum(getattr(parallel, name) for name in used)
    if others == 0 and rest:
        yield (
            f"{case.said(*used)} must add up to {case.said('num_layers')} with two stages: "
            "give one of them only"
        )
    elif others and (rest < others or rest % others):
        yield (
            f"{case.said(*used)} leave {max(rest, 0)} of {case.said('num_layers')} for {others} "
            "other stage(s), which must share them evenly, 1 or more each: use --num-layers "
            f"{nearest_multiples(max(rest, others), others, plus=layers - rest)}"
        )


def _even(case: Case) -> Iterator[str]:
    """Stages that are all alike, where embedding and loss may count as a layer."""
    parallel, layers = case.settings.parallel, case.settings.model.num_layers
    stages, extra = parallel.pipeline_model_parallel_size, accounted(parallel)
    if not extra:
        yield from not_multiple(case, "num_layers", layers, "pipeline_model_parallel_size", stages)
    elif (layers + extra) % stages:
        yield (
            f"{case.said('num_layers')} + {extra} for {case.said(*_used(case, *_ACCOUNTS))} is not "
            f"a multiple of {case.said('pipeline_model_parallel_size')}: use --num-layers "
            f"{nearest_multiples(layers + extra, stages, plus=-extra)}"
        )
    chunk, per_stage = parallel.num_layers_per_virtual_pipeline_stage, (layers + extra) // stages
    if chunk is not None and (layers + extra) % stages == 0 and per_stage % chunk:
        yield (
            f"{case.said(_CHUNK)} does not divide the {per_stage} layers of a stage: "
            f"use {nearest_divisors(per_stage, chunk)}"
        )


def recomputed_layers(case: Case) -> Iterator[str]:
    """--recompute-num-layers counts the layers of a chunk; megatron-core fails beyond its end."""
    wanted, sizes = case.settings.parallel.recompute_num_layers, chunk_sizes(case.settings)
    if wanted is None:
        return
    said = case.said("recompute_num_layers")
    if case.settings.parallel.recompute_method != "uniform":
        if wanted > max(*sizes, 1):
            yield f"{said} exceeds the {max(sizes)} layers of a stage: use at most {max(sizes)}"
    elif any(size % wanted for size in sizes):
        yield (
            f"{said} with --recompute-method uniform does not divide the layers of every (virtual) "
            f"stage: use {nearest_divisors(gcd(*sizes) or 1, wanted)}"
        )


RULES = (split, recomputed_layers)
