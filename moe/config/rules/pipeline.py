"""Rules on the assignment of layers to pipeline stages."""

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
    """Check the split of layers into stages."""
    stages = case.settings.parallel.pipeline_model_parallel_size
    ways = [_used(case, _LAYOUT), _used(case, *_ENDS), _used(case, *_ACCOUNTS, _CHUNK)]
    layout, ends, even = ways
    if sum(map(bool, ways)) > 1:
        yield (
            f"{case.given(*layout, *ends, *even)} are different ways to split stages: use one "
            f"({flag_name(_LAYOUT)} can express all)"
        )
    elif stages == 1 and (ends or even):
        used = case.given(*ends, *even)
        yield f"{used} needs --pipeline-model-parallel-size above 1: leave it out"
    elif layout:
        yield from _written(case, case.settings.parallel.pipeline_model_parallel_layout or "")
    elif ends:
        yield from _uneven(case)
    else:
        yield from _even(case)


def _written(case: Case, layout: str) -> Iterator[str]:
    """Check an explicit layout; megatron-core asserts the same when it builds the model."""
    stages, chunks = case.settings.parallel.pipeline_model_parallel_size, expand(layout)
    used, text = case.given(_LAYOUT), "".join(chunks)
    unknown = sorted(set(text) - set("EtmL"))
    if unknown:
        yield (
            f"{used}: {' '.join(unknown)} is unknown; write E (embedding), t (layer), "
            "m (multi-token prediction), L (loss), | between stages, and t*3 or (tt|)*3 to repeat"
        )
        return
    if stages == 1 and len(chunks) > 1:
        yield f"{used}: {len(chunks)} stages need --pipeline-model-parallel-size above 1"
    elif len(chunks) % stages:
        yield (
            f"{used}: {len(chunks)} stages are not a multiple of "
            f"{case.given('pipeline_model_parallel_size')}: write "
            f"{nearest_multiples(len(chunks), stages)}"
        )
    tail = "m" * (case.settings.model.mtp_num_layers or 0) + "L"
    ends = chunks[0].startswith("E") and chunks[-1].endswith(tail)
    if not ends or [text.count(letter) for letter in "EmL"] != [1, len(tail) - 1, 1]:
        yield (
            f"{used}: the first stage must begin with the only E, the last one end with the only "
            f"{tail}"
        )
    if text.count("t") != case.settings.model.num_layers:
        yield (
            f"{used}: it has {text.count('t')} layers t, but {case.given('num_layers')}: write as "
            "many"
        )
    if "" in chunks:
        yield f"{used}: stage {chunks.index('')} is empty: give it a layer t, or drop a |"


def _uneven(case: Case) -> Iterator[str]:
    """Check first and last stages of a given size."""
    parallel, layers = case.settings.parallel, case.settings.model.num_layers
    used = _used(case, *_ENDS)
    others = parallel.pipeline_model_parallel_size - len(used)
    rest = layers - sum(getattr(parallel, name) for name in used)
    if others == 0 and rest:
        yield (
            f"{case.given(*used)} must add up to {case.given('num_layers')} with two stages: "
            "give one of them only"
        )
    elif others and (rest < others or rest % others):
        yield (
            f"{case.given(*used)} leave {max(rest, 0)} of {case.given('num_layers')} for {others} "
            "other stage(s), which need equal numbers, 1 or more each: use --num-layers "
            f"{nearest_multiples(max(rest, others), others, plus=layers - rest)}"
        )


def _even(case: Case) -> Iterator[str]:
    """Check equal stages, where embedding and loss may count as a layer."""
    parallel, layers = case.settings.parallel, case.settings.model.num_layers
    stages, extra = parallel.pipeline_model_parallel_size, accounted(parallel)
    if not extra:
        yield from not_multiple(case, "num_layers", layers, "pipeline_model_parallel_size", stages)
    elif (layers + extra) % stages:
        yield (
            f"{case.given('num_layers')} + {extra} for {case.given(*_used(case, *_ACCOUNTS))} is "
            f"not a multiple of {case.given('pipeline_model_parallel_size')}: use --num-layers "
            f"{nearest_multiples(layers + extra, stages, plus=-extra)}"
        )
    chunk, per_stage = parallel.num_layers_per_virtual_pipeline_stage, (layers + extra) // stages
    if chunk is not None and (layers + extra) % stages == 0 and per_stage % chunk:
        yield (
            f"{case.given(_CHUNK)} does not divide the {per_stage} layers of a stage: "
            f"use {nearest_divisors(per_stage, chunk)}"
        )


def recomputed_layers(case: Case) -> Iterator[str]:
    """Check --recompute-num-layers against a chunk's layers; megatron-core fails beyond."""
    wanted, sizes = case.settings.parallel.recompute_num_layers, chunk_sizes(case.settings)
    if wanted is None:
        return
    used = case.given("recompute_num_layers")
    if case.settings.parallel.recompute_method != "uniform":
        if wanted > max(*sizes, 1):
            yield f"{used} exceeds the {max(sizes)} layers of a stage: use at most {max(sizes)}"
    elif any(size % wanted for size in sizes):
        yield (
            f"{used} with --recompute-method uniform does not divide the layers of every (virtual) "
            f"stage: use {nearest_divisors(gcd(*sizes) or 1, wanted)}"
        )


RULES = (split, recomputed_layers)
