"""Answers about an encoder-decoder: do its stacks specialise, who reads sentinels (ST-MoE, 6.1)?"""

from typing import Any

import numpy as np

from moetron.moe.analysis.page.answers import Answer
from moetron.moe.analysis.page.runs import Run
from moetron.moe.analysis.specialization import SENTINELS, entropy_rows, token_class_entropy


def has_stacks(analysis: dict[str, Any] | None) -> bool:
    """Return whether an analysis is that of an encoder-decoder."""
    return analysis is not None and "stacks" in analysis


def stack_routing(run: Run) -> list[Answer]:
    """Answer how the stacks route and which experts read sentinels."""
    assert run.analysis is not None
    return [_entropy(run.analysis), *_sentinels(run.analysis)]


def _entropy(analysis: dict[str, Any]) -> Answer:
    """Compare the stacks' entropies: of sentinels if there are any, else of all tokens."""
    stacks, uniform = analysis["stacks"], analysis["chance"]["entropy"]
    texts = []
    for stack, found in stacks.items():
        values = token_class_entropy(found, min_tokens=1).get(SENTINELS)
        of = "sentinels" if values is not None else "all tokens"
        shown = found["entropy"] if values is None else values
        by_layer = ", ".join(f"{value:.2f}" for value in shown)
        texts.append(f"{stack} {np.mean(shown):.2f} nats for {of} (by layer {by_layer})")
    return Answer(
        "Does the encoder specialise more than the decoder?",
        "finding",
        "; ".join(texts),
        f"entropy of a layer's choices, {uniform:.2f} if uniform; ST-MoE, table 14: lower in the "
        "encoder",
    )


def _sentinels(analysis: dict[str, Any]) -> list[Answer]:
    answers = []
    for stack, found in analysis["stacks"].items():
        texts = [
            f"layer {layer}: " + ", ".join(_expert(one) for one in experts)
            for layer, experts in zip(
                found["layers"], found.get("sentinel_experts", []), strict=False
            )
        ]
        if texts:
            rule = "experts with most of the sentinels' choices, and their share of all choices"
            question = f"Which experts of the {stack} read sentinels?"
            answers.append(Answer(question, "finding", "; ".join(texts), rule))
    return answers


def _expert(one: dict[str, Any]) -> str:
    here, everywhere = 100 * one["share"], 100 * one["share_of_all"]
    return f"expert {one['expert']} ({here:.0f} %, of all {everywhere:.0f} %)"


def entropies(name: str, analysis: dict[str, Any]) -> dict[str, Any]:
    """Return ST-MoE's table 14 of a run: the entropy of each stack's layers by token class."""
    heading, *rows = entropy_rows(analysis)
    title = f"Entropy of the choices of each stack's layers, in nats, {name}"
    return {"title": title, "heading": heading, "rows": rows}


def sentinel_words(name: str, analysis: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the token ids of the sentinel experts in the last layer of each stack."""
    sections = []
    for stack, found in analysis["stacks"].items():
        if not found.get("sentinel_experts"):
            continue
        rows = [
            {
                "expert": one["expert"],
                "ids": ", ".join(f"{text!r} {100 * share:.0f} %" for text, share in one["top_ids"]),
            }
            for one in found["sentinel_experts"][-1]
        ]
        title = f"Words of the sentinel experts of {stack} layer {found['layers'][-1]}, {name}"
        sections.append({"title": title, "rows": rows})
    return sections
