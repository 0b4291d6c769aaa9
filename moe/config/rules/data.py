"""Rules on data: blends, stages, objectives, attention inside documents."""

from collections.abc import Iterator

from moetron.common.data_path import data_path_problems, weight_or_none
from moetron.moe.config.rules.case import Case
from moetron.moe.config.schema.data import StageSettings
from moetron.moe.config.schema.field import flag_name

_MASK = "--reset-attention-mask"


def data(case: Case) -> Iterator[str]:
    """Check data sources and the vocabulary's size."""
    source = case.settings.data
    if source.mock_data and source.data_path is not None:
        yield "--mock-data and --data-path exclude each other: drop one"
    if case.settings.model.vocab_size is None and source.tokenizer_model is None:
        yield "the vocabulary size is unknown: give --tokenizer-model or --vocab-size N"
    for name in ("data_path", "valid_data_path"):
        if (words := getattr(source, name)) is not None:
            yield from data_path_problems(words, flag_name(name))
    if source.stages is not None:
        yield from _stages(case, source.stages)
    yield from _fim_sources(case)


def _stages(case: Case, stages: list[StageSettings]) -> Iterator[str]:
    """Check the sequence of stages."""
    if not stages:
        yield "--stages is empty: give at least one stage, or leave it out"
    if case.settings.data.data_path:
        yield (
            "--stages and --data-path exclude each other: drop one (in a recipe over another, with "
            "`data_path: null`)"
        )
    if case.settings.data.objective != "causal":
        yield f"{case.given('objective')}: with --stages, each stage names its own objective"
    last_end = 0
    for number, stage in enumerate(stages, 1):
        yield from data_path_problems(stage.data_path, f"--stages, stage {number}")
        rate = stage.learning_rate
        if rate is not None and rate.min_lr > rate.lr:
            yield f"--stages, stage {number}: min_lr {rate.min_lr} exceeds lr {rate.lr}"
        end, is_last = stage.until_tokens, number == len(stages)
        if (end is None) != is_last:
            rule = "the last ends with the run" if is_last else "another follows it"
            yield f"--stages, stage {number}: until_tokens {end}: {rule}"
        elif end is not None:
            if end - last_end < case.settings.model.seq_length:
                yield f"--stages, stage {number}: until_tokens {end} leaves it no sample"
            last_end = end


def _fim_sources(case: Case) -> Iterator[str]:
    """Check that sources of infilling are used by a stage."""
    data = case.settings.data
    objectives = {stage.objective for stage in data.planned_stages()}
    if data.fim_sources == []:
        yield "--fim-sources is empty: name sources, or leave it out for all"
    elif data.fim_sources and not data.mock_data and "fim" not in objectives:
        yield f"{case.given('fim_sources')} needs --objective fim (in a stage, at least)"


def bidirectional_prefix(case: Case) -> Iterator[str]:
    """Check bidirectional attention in the prefix of samples."""
    data, model = case.settings.data, case.settings.model
    if not data.bidirectional_prefix:
        return
    objectives = {stage.objective for stage in data.planned_stages()}
    if not data.mock_data and not objectives & {"prefix_lm", "ul2"}:
        yield "--bidirectional-prefix needs --objective prefix_lm or ul2 (in a stage, at least)"
    if case.settings.parallel.context_parallel_size > 1:
        yield (
            f"--bidirectional-prefix and {case.given('context_parallel_size')}: context "
            "parallelism supports only causal attention; use --context-parallel-size 1"
        )
    if case.local and model.attention_backend == "unfused":
        yield ("--bidirectional-prefix needs attention with a mask: use --attention-backend sdpa")


def documents(case: Case) -> Iterator[str]:
    """Check settings that separate documents."""
    data = case.settings.data
    if data.reset_position_ids and not data.reset_attention_mask:
        yield (
            f"--reset-position-ids needs {_MASK}: without it a rotary distance to another document "
            "would not be that of their positions; add it or leave this out"
        )
    if data.reset_attention_mask:
        objectives = {stage.objective for stage in data.planned_stages()}
        if others := sorted(objectives - {"causal", "fim"}):
            yield (
                f"{_MASK} with --objective {' or '.join(others)}: such samples end their parts "
                "with the end-of-document token, and would be cut there; use causal or fim"
            )
        if data.bidirectional_prefix:
            yield f"{_MASK} and --bidirectional-prefix exclude each other: drop one"
    for flag, used in ((_MASK, data.reset_attention_mask), ("--sft", case.settings.adaptation.sft)):
        if used:
            yield from _attention(case, flag)
            yield from _transformer_engine(case, flag)


def _attention(case: Case, flag: str) -> Iterator[str]:
    """Check what the attention of either kind cannot do."""
    model = case.settings.model
    if case.local and model.attention_backend == "unfused":
        yield f"{flag} needs attention inside documents: use --attention-backend sdpa"
    if case.settings.performance.cuda_graph_impl != "none":
        yield (
            f"{flag} and {case.given('cuda_graph_impl')} exclude each other: the number of "
            "documents changes; use --cuda-graph-impl none"
        )
    if model.mtp_num_layers is not None and model.mtp_num_layers > 1:
        yield (
            f"{flag} with {case.given('mtp_num_layers')}: the mask of losses that cross documents "
            "is exact for one module; use --mtp-num-layers 1"
        )


def _transformer_engine(case: Case, flag: str) -> Iterator[str]:
    """Check what megatron-core's packed sequences lack: it flattens a micro-batch to one row."""
    if case.local:
        return
    parallel, training = case.settings.parallel, case.settings.training
    remedy = "or --transformer-impl local"
    if training.micro_batch_size > 1:
        yield (
            f"{flag} in layers of Transformer Engine with {case.given('micro_batch_size')}: its "
            f"packed format has one row; use --micro-batch-size 1 {remedy}"
        )
    if parallel.context_parallel_size > 1:
        yield (
            f"{flag} in layers of Transformer Engine with {case.given('context_parallel_size')}: "
            "its documents must be padded to twice the ranks; use --context-parallel-size 1 "
            f"{remedy}"
        )


_SEES_PADDING = ("expert_choice", "base", "reinforce")
"""Routers whose choices depend on other tokens of the batch, or on their number."""
_NO_CHATS: dict[tuple[str, str], object] = {
    ("data", "mock_data"): False,
    ("data", "stages"): None,
    ("data", "objective"): "causal",
    ("data", "examples_per_sample"): 1,
    ("data", "bidirectional_prefix"): False,
    ("data", "reset_attention_mask"): False,
    ("data", "eod_mask_loss"): False,
    ("data", "repetition_max_count"): None,
    ("data", "source_max_epochs"): None,
}
"""Settings of pretraining text, with the values to have on chats."""


def chats(case: Case) -> Iterator[str]:
    """Check fine-tuning on chats."""
    settings, chosen = case.settings, case.settings.adaptation
    if not chosen.sft:
        for name, default in (
            ("sft_packing", True),
            ("sft_loss_normalisation", "token"),
            ("preference_loss", None),
        ):
            if getattr(chosen, name) != default:
                yield f"{case.given(name)} needs --sft: add it or leave this out"
    yield from _options_of_losses(case)
    if not chosen.sft:
        return
    for (group, name), value in _NO_CHATS.items():
        if getattr(getattr(settings, group), name) != value:
            yield f"--sft and {case.given(name)} exclude each other: leave it out"
    for name in ("data_path", "valid_data_path"):
        if any(weight_or_none(word) is not None for word in getattr(settings.data, name) or []):
            yield f"--sft with weights in {flag_name(name)}: an epoch has each chat once; drop them"
    if not settings.training.calculate_per_token_loss:
        yield (
            "--sft needs --calculate-per-token-loss: means of micro-batches would give short "
            "answers more weight by what they are batched with"
        )
    if chosen.preference_loss is not None:
        yield from _preferences(case)
    moe = settings.moe
    if moe.num_experts is not None and moe.moe_router_type in _SEES_PADDING:
        yield f"--sft and {case.given('moe_router_type')}: it would choose among padding; use topk"
    if moe.num_experts is not None and moe.moe_router_load_balancing_type == "sinkhorn":
        yield "--sft and --moe-router-load-balancing-type sinkhorn: it would balance padding too"


_OPTIONS_OF_LOSSES: tuple[tuple[str, object, tuple[str, ...]], ...] = (
    ("preference_reference_load", None, ("dpo", "dpo_norm", "kto")),
    ("preference_beta", 0.1, ("dpo", "dpo_norm", "kto")),
    ("preference_label_smoothing", 0.0, ("dpo", "dpo_norm")),
    ("preference_desirable_weight", 1.0, ("kto",)),
    ("preference_undesirable_weight", 1.0, ("kto",)),
)
"""Settings, their defaults, and the losses on preferences that read them."""


def _options_of_losses(case: Case) -> Iterator[str]:
    """Check that settings of losses on preferences have a loss that reads them."""
    chosen = case.settings.adaptation
    for name, default, losses in _OPTIONS_OF_LOSSES:
        if getattr(chosen, name) != default and chosen.preference_loss not in losses:
            yield (
                f"{case.given(name)} needs --preference-loss {' or '.join(losses)}: choose it or "
                "leave this out"
            )


def _preferences(case: Case) -> Iterator[str]:
    """Check the optimisation of preferences."""
    settings, flag = case.settings, case.given("preference_loss")
    for group, name, value in (
        ("adaptation", "sft_loss_normalisation", "token"),
        ("model", "mtp_num_layers", None),
        ("model", "output_z_loss_coeff", None),
        ("training", "rampup_batch_size", None),
    ):
        if getattr(getattr(settings, group), name) != value:
            yield f"{flag} and {case.given(name)} exclude each other: leave it out"
    for name in ("attention_dropout", "hidden_dropout"):
        if getattr(settings.model, name):
            yield f"{flag} with {case.given(name)}: the reference has none; use 0"
    if settings.checkpoint.load is None and settings.checkpoint.save is not None:
        yield f"{flag} needs --load: the model that it starts from is the reference"
    if settings.adaptation.preference_reference_load is not None and not settings.checkpoint.load:
        yield f"{case.given('preference_reference_load')} needs --load: the model to train"


RULES = (data, bidirectional_prefix, documents, chats)
