"""Generation of tokens with a trained model, on one rank.

Shape suffixes: B sequences, S positions, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from moetron.common.errors import UserError
from moetron.moe.checkpoint.save_load import load_weights
from moetron.moe.config.bridge import transformer_config
from moetron.moe.config.schema.settings import Settings
from moetron.moe.encoder_decoder.build_stacks import build
from moetron.moe.inference.growing_batch import GrowingBatch
from moetron.moe.inference.next_token import draw
from moetron.moe.inference.sampling import Sampling
from moetron.moe.layers.attention import prefix_mask
from moetron.moe.layers.language_model import LanguageModel
from moetron.moe.layers.specs import uses_transformer_engine
from moetron.moe.training.runtime import Runtime


def dropless(settings: Settings) -> Settings:
    """Return settings without expert capacity: no choice is dropped.

    Generation and scoring use this, so that a token's experts depend neither on later tokens nor on
    other sequences of the batch: slots are defined for training batches. For the same reason tokens
    choose their k best after training with --moe-router-type expert_choice.
    """
    changes = {
        "moe_expert_capacity_factor": None,
        "moe_eval_capacity_factor": None,
        "moe_minimum_capacity": 0,
        "moe_pad_expert_input_to_capacity": False,
        "moe_expert_choice_eval": "topk",
    }
    return settings.model_copy(update={"moe": settings.moe.model_copy(update=changes)})


def in_bf16(settings: Settings) -> Settings:
    """Return settings without FP8.

    Transformer Engine's FP8 products need a multiple of 8 tokens, which a prompt need not have. The
    emulation takes any number.
    """
    changes = {"fp8_format": None, "fp8_param_gather": False}
    precision = settings.precision.model_copy(update=changes)
    return settings.model_copy(update={"precision": precision})


def load_model(
    path: Path, settings: Settings, vocab_size: int, runtime: Runtime, limited: bool = False
) -> LanguageModel:
    """Load the model of the checkpoint at ``path`` in evaluation mode.

    Modules of multi-token prediction are omitted: only training uses them, and the next token's
    logits do not depend on them. Transformer Engine's layers run in bf16 after training in FP8, see
    `in_bf16`.

    Args:
        path: a run's folder or one step_* folder, written in any layout.
        settings: of that checkpoint, for one rank.
        vocab_size: before padding.
        runtime: of one rank.
        limited: whether experts have the evaluation capacity of training; otherwise none, see
            `dropless`.

    Raises:
        UserError: the model is an encoder-decoder, of which only the routing can be analysed.
    """
    if settings.model.encoder_num_layers is not None and not limited:
        raise UserError(
            f"{path}: an encoder-decoder; generation and scoring support decoders only. Its "
            "validation loss is in validation.jsonl, tools/analyze_routing.py shows its routing"
        )
    settings = settings if limited else dropless(settings)
    shape = settings.model.model_copy(update={"mtp_num_layers": None})
    settings = settings.model_copy(update={"model": shape})
    transformer_engine = uses_transformer_engine(settings)
    settings = in_bf16(settings) if transformer_engine else settings
    config = transformer_config(settings, transformer_engine)
    model = build(settings, config, vocab_size).to(runtime.device, config.params_dtype)
    load_weights(path, [model], vocab_size)
    return model.eval()


def needed_mask(model: LanguageModel, prefix_B: torch.Tensor, length: int) -> torch.Tensor | None:
    """Return the mask bool [b, 1, s, s] for the first ``length`` tokens of sequences.

    None for a causal model. A model trained with bidirectional prefixes needs a mask in every pass
    over more than one token, even without a prefix.

    Args:
        model: any.
        prefix_B: length of each sequence's bidirectional prefix, int64 [b].
        length: s.
    """
    return prefix_mask(prefix_B, length) if model.bidirectional_prefix else None


def continuation(
    model: LanguageModel,
    prompt: Sequence[int],
    vocab_size: int,
    sampling: Sampling,
    cached: bool = True,
    reads_prefix: bool = False,
) -> Iterator[int]:
    """Yield tokens after ``prompt`` without end.

    Args:
        model: on one rank.
        prompt: at least one token id.
        vocab_size: before padding; padding ids are never chosen.
        sampling: sampling parameters.
        cached: see `GrowingBatch`.
        reads_prefix: whether the prompt is a bidirectional prefix.
    """
    generator = torch.Generator().manual_seed(sampling.seed)
    batch = GrowingBatch(model, cached=cached, prefixes=[len(prompt) if reads_prefix else 0])
    new = list(prompt)
    while True:
        logits_V = batch.extend([new])[0, :vocab_size]
        new = [draw(logits_V.float().cpu(), sampling, generator)]
        yield new[0]
