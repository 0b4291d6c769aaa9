"""Differences of an exported model from training, for the log and for its README.md."""

from collections.abc import Sequence

from moetron.common.errors import UserError
from moetron.moe.checkpoint.run_folder import Record
from moetron.moe.config.schema.settings import Settings

CARD = "README.md"
"""File that the HuggingFace hub shows for a folder."""


def refuse_two_way_reading(settings: Settings) -> None:
    """Raise ``UserError`` for a model trained with bidirectional prefixes: no family has them."""
    if settings.data.bidirectional_prefix:
        raise UserError(
            "--bidirectional-prefix: in training, attention over the prefix was bidirectional, and "
            "the HuggingFace models here are causal, so they would compute prompts differently; "
            "--as-causal exports the weights anyway"
        )


def differences(settings: Settings, not_exported: Sequence[str]) -> list[str]:
    """Return one sentence for each difference of the exported model.

    Args:
        settings: of the checkpoint.
        not_exported: names of the multi-token prediction tensors.
    """
    found, moe = [], settings.moe
    if settings.data.bidirectional_prefix:
        found.append(
            "Trained with --bidirectional-prefix: attention over the prefix was bidirectional. "
            "This model is causal, as in training only after the prefix."
        )
    if not_exported:
        found.append(
            f"Multi-token prediction modules are not exported ({settings.model.mtp_num_layers}, in "
            f"{len(not_exported)} tensors): next-token logits do not depend on them, but they "
            "cannot draft tokens here."
        )
    if _grows_all_logits(settings):
        found.append(
            "transformers 4.57 omits YaRN's mscale_all_dim from DeepSeek-V2's attention scale and "
            "computes other logits; transformers 5.24 computes those of the run."
        )
    if moe.moe_expert_capacity_factor is not None:
        evaluated = moe.moe_eval_capacity_factor or moe.moe_expert_capacity_factor
        found.append(
            "Trained with limited capacity: experts dropped tokens beyond "
            f"--moe-expert-capacity-factor {moe.moe_expert_capacity_factor:g} (in evaluation "
            f"{evaluated:g}). This model drops none, so its logits differ from those of the run "
            "wherever an expert was full."
        )
    return found


def _grows_all_logits(settings: Settings) -> bool:
    """Return whether this is a DeepSeek-V2 (softmax router) whose YaRN scales all logits."""
    attention = settings.attention
    return (
        attention.multi_latent_attention
        and attention.rope_type == "yarn"
        and attention.mscale_all_dim != 0
        and settings.moe.moe_router_score_function == "softmax"
    )


def card(architecture: str, record: Record, found: Sequence[str]) -> str:
    """Return README.md of an exported folder whose model differs from training."""
    progress = record.progress
    return "\n".join(
        [
            *("---", "library_name: transformers", "---", ""),
            f"# {architecture}",
            "",
            f"Weights after step {progress.step} ({progress.consumed_tokens:,} tokens); exported "
            "by Moetron.",
            "",
            "## What differs from training",
            *(f"- {sentence}" for sentence in found),
            "",
        ]
    )
