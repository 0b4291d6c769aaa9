"""What an exported model does not do as it did in training, for the log and for its README.md."""

from collections.abc import Sequence

from moetron.common.errors import UserError
from moetron.moe.checkpoint.run_folder import Record
from moetron.moe.config.schema.settings import Settings

CARD = "README.md"
"""What the hub shows of a folder."""


def refuse_two_way_reading(settings: Settings) -> None:
    """``UserError`` for a model that read part of its samples both ways: no family of ours can."""
    if settings.data.bidirectional_prefix:
        raise UserError(
            "--bidirectional-prefix: in training the given part of a sample saw all of itself, and "
            "HuggingFace's models here see only what came before: they would read prompts "
            "otherwise; --as-causal exports the weights all the same"
        )


def differences(settings: Settings, stay_behind: Sequence[str]) -> list[str]:
    """One sentence for each thing that the exported model lacks.

    Args:
        settings: of the checkpoint.
        stay_behind: names of tensors of multi-token prediction that are not exported.
    """
    found, moe = [], settings.moe
    if settings.data.bidirectional_prefix:
        found.append(
            "Trained with --bidirectional-prefix: the given part of a sample saw all of itself. "
            "This model reads causally, which it learned only for what follows that part."
        )
    if stay_behind:
        found.append(
            f"Modules of multi-token prediction stay behind ({settings.model.mtp_num_layers}, in "
            f"{len(stay_behind)} tensors): the next token's logits do not depend on them, but they "
            "cannot draft tokens here."
        )
    if _grows_all_logits(settings):
        found.append(
            "transformers 4.57 leaves YaRN's mscale_all_dim out of DeepSeek-V2's attention scale "
            "and computes other logits; transformers 5.24 computes the run's own."
        )
    if moe.moe_expert_capacity_factor is not None:
        evaluated = moe.moe_eval_capacity_factor or moe.moe_expert_capacity_factor
        found.append(
            "Trained with limited capacity: experts skipped tokens beyond "
            f"--moe-expert-capacity-factor {moe.moe_expert_capacity_factor:g} (in evaluation "
            f"{evaluated:g}). This model skips none, so its logits differ from the run's own "
            "wherever an expert was full."
        )
    return found


def _grows_all_logits(settings: Settings) -> bool:
    """Whether YaRN scales all logits of a DeepSeek-V2, whose routers take the softmax."""
    attention = settings.attention
    return (
        attention.multi_latent_attention
        and attention.rope_type == "yarn"
        and attention.mscale_all_dim != 0
        and settings.moe.moe_router_score_function == "softmax"
    )


def card(architecture: str, record: Record, found: Sequence[str]) -> str:
    """README.md of an exported folder whose model differs from training."""
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
