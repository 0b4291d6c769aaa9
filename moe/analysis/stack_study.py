"""Routing in the two stacks of an encoder-decoder: entropy of token classes, sentinel experts.

ST-MoE (arXiv 2202.08906), section 6.1 and table 14: encoder experts specialise, in sentinels too,
decoder experts hardly do. Shapes: L layers of a stack, E experts, b samples, s tokens of a stack.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moetron.common.text import table
from moetron.moe.analysis.routing_study import FORMAT, Result
from moetron.moe.analysis.routing_trace import Routed
from moetron.moe.analysis.specialization import (
    SENTINELS,
    ClassCounts,
    by_token_class,
    entropy_rows,
    routing_entropy,
    top_classes,
)
from moetron.moe.config.schema import derived
from moetron.moe.config.schema.settings import Settings
from moetron.moe.layers.language_model import LanguageModel
from moetron.moe.routing.router import Router
from moetron.moe.training.batches import Batch

SHOWN_EXPERTS, SHOWN_IDS = 3, 5


@dataclass(frozen=True)
class Vocabulary:
    """Ids of the model, and the classes of their texts."""

    size: int
    show: Callable[[int], str]
    classes: Mapping[str, str]
    """Name -> regular expression, see ``TOKEN_CLASSES``; without sentinels no expert is theirs."""


def study_stacks(
    model: LanguageModel, settings: Settings, batches: Iterable[Batch], vocabulary: Vocabulary
) -> Result:
    """Return routing by stack for samples of the run's own objective.

    Every choice of a token counts, before capacity drops any; padding does not count.

    Args:
        model: an encoder-decoder in evaluation mode.
        settings: of its run.
        batches: micro-batches on the model's device.
        vocabulary: token ids and classes.
    """
    flags, experts = derived.moe_layers(settings), settings.moe.num_experts
    assert experts is not None
    sparse = {
        stack: [layer for layer in layers if flags[layer]]
        for stack, layers in derived.stack_layers(settings.model).items()
    }
    counts = {
        stack: ClassCounts(len(layers), vocabulary.size, experts)
        for stack, layers in sparse.items()
    }
    routers = {m.layer_number - 1: m for m in model.modules() if isinstance(m, Router)}
    lengths = derived.stack_lengths(settings)
    for batch in batches:
        with torch.no_grad():
            model(batch["tokens"], segments=batch.get("segments"))
        segments = batch.get("segments", torch.ones_like(batch["tokens"]))
        parts = (x.split(list(lengths.values()), dim=1) for x in (batch["tokens"], segments))
        for stack, tokens_bs, segments_bs in zip(lengths, *parts, strict=True):
            real = (segments_bs > 0).flatten().cpu()
            chosen = [_batch_major(routers[layer], len(tokens_bs)) for layer in sparse[stack]]
            routed = _routed(torch.stack(chosen)[:, real], settings.moe.moe_router_topk)
            counts[stack].add(tokens_bs.flatten().cpu()[real].numpy(), routed)
    return {
        "format": FORMAT,
        "num_experts": experts,
        "topk": settings.moe.moe_router_topk,
        "chance": {"entropy": float(np.log(experts)), "k": settings.moe.moe_router_topk / experts},
        "stacks": {
            stack: {"layers": sparse[stack], **_of_stack(counts[stack], vocabulary)}
            for stack in sparse
        },
    }


def _batch_major(router: Router, batch: int) -> torch.Tensor:
    """Return the choices of a router's last pass, bool [b x s, E] on the CPU."""
    assert router.chosen is not None
    chosen = router.chosen.view(-1, batch, router.chosen.shape[1])
    return chosen.transpose(0, 1).flatten(0, 1).cpu()


def _routed(chosen_LTE: torch.Tensor, most: int) -> Routed:
    """Return choices as `Routed`, in no particular order of rank."""
    found, experts = chosen_LTE.to(torch.int8).topk(most, dim=-1)
    ranked = experts.masked_fill(found == 0, -1).to(torch.int16).numpy()
    return Routed(ranked, chosen_LTE.numpy(), np.full(chosen_LTE.shape[1], -1))


def _of_stack(counts: ClassCounts, vocabulary: Vocabulary) -> Result:
    """Return entropies by token class, the load, and who reads the sentinels."""
    classes = by_token_class(counts, vocabulary.show, vocabulary.classes)
    names = [*vocabulary.classes, "other"]
    load_LE = counts.counts.sum(1) / np.maximum(counts.counts.sum((1, 2)), 1)[:, None]
    result = {
        "tokens": int(counts.tokens.sum()),
        "token_classes": {
            "names": names,
            "tokens": classes.tokens.tolist(),
            "entropy": routing_entropy(classes).tolist(),
        },
        "entropy": routing_entropy(_total(counts))[:, 0].tolist(),
        "load": (load_LE * counts.counts.shape[2]).tolist(),
    }
    if SENTINELS in vocabulary.classes:
        shares_LE = classes.distribution()[:, names.index(SENTINELS)]
        result["sentinel_experts"] = _specialists(shares_LE, load_LE, counts, vocabulary)
    return result


def _total(counts: ClassCounts) -> ClassCounts:
    """Return the counts of all tokens as one class."""
    layers, _, experts = counts.counts.shape
    total = ClassCounts(layers, 1, experts)
    total.counts[:, 0] = counts.counts.sum(1)
    total.tokens[0] = counts.tokens.sum()
    return total


def _specialists(
    shares_LE: np.ndarray, load_LE: np.ndarray, counts: ClassCounts, vocabulary: Vocabulary
) -> list[list[dict[str, Any]]]:
    """Return for each layer the experts with the largest shares of the sentinels' choices."""
    layers = []
    for layer, shares_E in enumerate(shares_LE):
        best = np.argsort(-shares_E, kind="stable")[:SHOWN_EXPERTS]
        ids = top_classes(counts, layer, size=SHOWN_IDS)
        layers.append(
            [
                {
                    "expert": int(expert),
                    "share": float(shares_E[expert]),
                    "share_of_all": float(load_LE[layer, expert]),
                    "top_ids": [[vocabulary.show(token), share] for token, share in ids[expert]],
                }
                for expert in best
            ]
        )
    return layers


def entropy_table(result: Result) -> str:
    """Return `entropy_rows` as text."""
    return table(entropy_rows(result))
