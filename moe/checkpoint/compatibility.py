"""Whether a checkpoint fits the settings that are to load it."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moetron.common.errors import UserError
from moetron.common.text import value_text
from moetron.moe.checkpoint.run_folder import (
    Record,
    find,
    latest_step,
    make_run_folder,
    read_record,
    refuse_to_rewrite,
    verify_files,
)
from moetron.moe.checkpoint.vocabulary import vocabulary_problem
from moetron.moe.config.schema.field import flag_name
from moetron.moe.config.schema.settings import Settings

SHAPE = {
    "model": (
        "num_layers",
        "hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "kv_channels",
        "ffn_hidden_size",
        "ffn_type",
        "normalization",
        "norm_affine",
        "qk_layernorm",
        "qk_layernorm_scope",
        "swiglu",
        "add_bias_linear",
        "untie_embeddings_and_output_weights",
        "mtp_num_layers",
    ),
    "attention": (
        "add_qkv_bias",
        "multi_latent_attention",
        "q_lora_rank",
        "kv_lora_rank",
        "qk_head_dim",
        "qk_pos_emb_head_dim",
        "v_head_dim",
    ),
    "moe": (
        "num_experts",
        "moe_layer_freq",
        "moe_layer_position",
        "first_k_dense_replace",
        "moe_ffn_hidden_size",
        "moe_router_enable_expert_bias",
        "moe_router_type",
        "moe_global_aux_loss_counts",
        "moe_shared_expert_intermediate_size",
        "moe_shared_expert_gate",
        "moe_sequential_ffn_hidden_size",
        "moe_expert_multiplicative_bias",
    ),
}
"""Settings that say which tensors there are, beside the vocabulary's size."""
FUNCTION = {
    "model": ("position_embedding_type", "rotary_base", "rotary_percent", "norm_epsilon"),
    "attention": (
        "softmax_scale",
        "rope_type",
        "rotary_scaling_factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
    ),
    "moe": (
        "moe_router_topk",
        "moe_router_pre_softmax",
        "moe_router_score_function",
        "moe_router_topk_scaling_factor",
        "moe_router_num_groups",
        "moe_router_group_topk",
    ),
    "optimizer": ("optimizer",),
}
"""Settings that a run cannot change half-way; --finetune may."""


def check_folders(settings: Settings, stream_state: Mapping[str, Any]) -> None:
    """What is wrong with --load and --save, before anything heavy starts; imports no torch.

    Files are looked at by rank 0 alone, since thousands of ranks may share a disk.

    Raises:
        UserError: nothing to load, damage, another architecture, no permission to save, or a longer
            run at --save than the one that starts.
    """
    options, step = settings.checkpoint, 0
    begins = options.load is not None and options.load == options.save
    if options.load is not None and not (begins and latest_step(Path(options.load)) is None):
        folder = find(Path(options.load))
        record = read_record(folder)
        require_fit(folder, record, settings, stream_state)
        if os.environ.get("RANK", "0") == "0":
            verify_files(folder, record)
        step = 0 if options.finetune or options.reset_progress else record.progress.step
    if options.save is not None:
        make_run_folder(Path(options.save))
        refuse_to_rewrite(Path(options.save), step)


def require_fit(
    folder: Path,
    record: Record,
    settings: Settings,
    stream_state: Mapping[str, Any],
    embedding_rows: int | None = None,
) -> None:
    """``UserError`` with every difference between a checkpoint and the settings that load it."""
    problems = differences(record, settings, stream_state, embedding_rows)
    if problems:
        raise UserError("\n".join([f"--load {folder}: does not fit:", *problems]))


def differences(
    record: Record,
    settings: Settings,
    stream_state: Mapping[str, Any],
    embedding_rows: int | None = None,
) -> list[str]:
    """One line for each difference that forbids loading.

    ``embedding_rows``: the checkpoint's, where its tensors have been looked at.
    """
    options = settings.checkpoint
    checked = [(group, name) for group, names in SHAPE.items() for name in names]
    if not options.finetune:
        checked += [(group, name) for group, names in FUNCTION.items() for name in names]
    if options.no_load_optim:
        checked.remove(("optimizer", "optimizer"))
    ours = settings.model_dump(mode="json")
    problems = [
        f"  - {flag_name(name)} {value_text(ours[group][name], 'none')}: "
        f"the checkpoint has {value_text(theirs, 'none')}"
        for group, name in checked
        if (theirs := record.settings.get(group, {}).get(name, ours[group][name]))
        != ours[group][name]
    ]
    vocab_size = settings.model.vocab_size
    if vocab_size and (problem := vocabulary_problem(record, vocab_size, embedding_rows)):
        problems.append(f"  - {problem}")
    tokenizers = tokenizer_fingerprints(stream_state), tokenizer_fingerprints(record.stream)
    if all(tokenizers) and tokenizers[0] != tokenizers[1]:
        new, old = map(value_text, tokenizers)
        problems.append(f"  - tokenizer {new}: the checkpoint has {old}")
    return problems


def changed_data(record: Record, stream_state: Mapping[str, Any]) -> list[str]:
    """What differs between a checkpoint's stream of samples and this one: its parts' names."""
    ours, theirs = json.loads(json.dumps(stream_state)), record.stream
    return sorted(key for key in theirs | ours if theirs.get(key) != ours.get(key))


def tokenizer_fingerprints(stream_state: Mapping[str, Any]) -> list[str]:
    """Fingerprints of the tokenizers that the sources name."""
    sources = stream_state.get("sources", [])
    return sorted({source["tokenizer"] for source in sources if source.get("tokenizer")})
