"""All routing analyses of a model or of the checkpoints of a run, on the same windows."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moetron.common.progress import report_batches
from moetron.moe.analysis.routing_statistics import CoActivation, Drops, mean_similarity, saturation
from moetron.moe.analysis.routing_trace import RoutedModel, Windows
from moetron.moe.analysis.specialization import (
    ClassCounts,
    by_token_class,
    routing_entropy,
    spread,
    top_classes,
    vocabulary_specialization,
)

Result = dict[str, Any]
"""Content of analysis.json; arrays as nested lists."""
FORMAT = 1
TOKENS_AT_ONCE = 8192
IDS = ("input", "predicted", "next")
POSITION_BUCKETS = 16
TOKEN_CLASSES = {
    "sentinels": r"<extra_id_\d+>",
    "white space": r"\s+",
    "numbers": r"\s*\d+",
    "punctuation": r"\s*[^\w\s]+",
    "words": r"\s*[^\W\d_]+",
}
"""Regular expressions that must match the full text of a token; other tokens are "other"."""


@dataclass(frozen=True)
class Text:
    """Windows to analyse, and the decoder of token ids."""

    windows: Sequence[Windows]
    show: Callable[[int], str]
    token_classes: Mapping[str, str] = field(default_factory=TOKEN_CLASSES.copy)
    """Name -> regular expression, see ``TOKEN_CLASSES``."""

    @property
    def seq_length(self) -> int:
        """Return the tokens per window."""
        return int(self.windows[0].tokens_BS.shape[1])

    def batches(self, name: str) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield (class of each token [b x S], tokens [b, S], labels [b, S]) of all windows.

        Progress on standard error is labelled ``name``.
        """
        windows = sum(len(part.tokens_BS) for part in self.windows)
        return report_batches(self._batches(), math.ceil(windows / self._windows_at_once), name)

    @property
    def _windows_at_once(self) -> int:
        return max(1, TOKENS_AT_ONCE // self.seq_length)

    def _batches(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        counts = [len(part.tokens_BS) for part in self.windows]
        classes = np.repeat(np.arange(len(counts)), counts)
        tokens_BS = np.concatenate([part.tokens_BS for part in self.windows])
        labels_BS = np.concatenate([part.labels_BS for part in self.windows])
        for start in range(0, len(classes), self._windows_at_once):
            rows = slice(start, start + self._windows_at_once)
            classes_T = np.repeat(classes[rows], self.seq_length)
            yield classes_T, tokens_BS[rows], labels_BS[rows]


def study(model: RoutedModel, text: Text, adjacent_pairs: bool = False) -> tuple[Result, list]:
    """Return every analysis of one model, and its choices [L, t, K] of each batch for `compare`.

    Memory: counts of vocabulary x experts per layer and kind of id (12 L V E bytes), and choices
    (2 L N K bytes for N tokens).
    """
    layers, experts = len(model.layers), model.num_experts
    domains = [ClassCounts(layers, len(text.windows), experts, top) for top in (None, 1)]
    ids = {kind: ClassCounts(layers, model.vocab_size, experts, 1) for kind in IDS}
    positions = ClassCounts(layers, text.seq_length, experts, 1)
    pairs = CoActivation(layers, experts, adjacent_pairs)
    drops = Drops(layers, text.seq_length)
    choices = []
    for classes_T, tokens_BS, labels_BS in text.batches("model"):
        routed = model.route(tokens_BS)
        choices.append(routed.ranked_LTK)
        for counts in domains:
            counts.add(classes_T, routed)
        for kind, of in zip(IDS, (tokens_BS, routed.predicted_T, labels_BS), strict=True):
            ids[kind].add(of.ravel(), routed)
        positions.add(np.tile(np.arange(text.seq_length), len(tokens_BS)), routed)
        pairs.add(routed)
        drops.add(routed)
    result = {
        **_of_domains(text, *domains),
        **_of_ids(text, ids, positions),
        "coactivation": pairs.matrix().tolist(),
        "dropped_by_position": drops.fractions(min(POSITION_BUCKETS, text.seq_length)).tolist(),
        **_of_weights(model),
    }
    return result, choices


def token_choices(
    model: RoutedModel, text: Text, choices: Sequence[np.ndarray]
) -> dict[str, np.ndarray]:
    """Return every token's choices, for statistics of one's own.

    ``choices`` int16 [L, N, K], best first, -1: fewer; ``layers`` int [L]; of the N tokens, window
    after window of ``seq_length``: ``tokens`` int32 [N], and ``texts`` int16 [N], the index of each
    one's text in ``names``.
    """
    sizes = [part.tokens_BS.size for part in text.windows]
    most = max(part.shape[2] for part in choices)  # where experts choose, it varies
    padding = [((0, 0), (0, 0), (0, most - part.shape[2])) for part in choices]
    padded = [np.pad(*pair, constant_values=-1) for pair in zip(choices, padding, strict=True)]
    return {
        "choices": np.concatenate(padded, axis=1),
        "layers": np.array(model.layers),
        "tokens": np.concatenate([part.tokens_BS.ravel() for part in text.windows]).astype("int32"),
        "texts": np.repeat(np.arange(len(sizes)), sizes).astype(np.int16),
        "names": np.array([part.name for part in text.windows]),
        "seq_length": np.array(text.seq_length),
    }


def compare(
    model: RoutedModel, text: Text, final: Sequence[np.ndarray], read: Iterable[int]
) -> list[Result]:
    """Return saturation and expert load at each checkpoint.

    Args:
        model: its weights are replaced by ``read``.
        text: as in ``study``.
        final: choices that ``study`` returned for the final checkpoint.
        read: loads each checkpoint into ``model`` and yields its step.
    """
    rows = []
    for step in read:
        tops = {"1": 1, "k": model.topk}
        sums = {name: np.zeros(len(model.layers)) for name in tops}
        load = ClassCounts(len(model.layers), 1, model.num_experts)
        tokens = 0
        batches = text.batches(f"checkpoint of step {step}")
        for (_, tokens_BS, _), final_LTK in zip(batches, final, strict=True):
            routed = model.route(tokens_BS, predict=False)
            for name, top in tops.items():
                share = saturation(routed.ranked_LTK, final_LTK, model.num_experts, top)
                sums[name] += share * tokens_BS.size
            load.add(np.zeros(tokens_BS.size, dtype=np.int64), routed)
            tokens += tokens_BS.size
        shares = {name: (total / tokens).tolist() for name, total in sums.items()}
        load_LE = load.distribution()[:, 0] * model.num_experts
        rows.append({"step": step, "saturation": shares, "load": load_LE.tolist()})
    return rows


def summary(model: RoutedModel, text: Text) -> Result:
    """Return the shape of the model, the token counts and the values expected by chance."""
    experts, topk = model.num_experts, model.topk
    return {
        "format": FORMAT,
        "layers": model.layers,
        "num_experts": experts,
        "topk": topk,
        "seq_length": text.seq_length,
        "tokens": {part.name: int(part.tokens_BS.size) for part in text.windows},
        "chance": {"1": 1 / experts, "k": topk / experts, "entropy": float(np.log(experts))},
    }


def _of_domains(text: Text, best_k: ClassCounts, best_1: ClassCounts) -> Result:
    entropy = routing_entropy(best_k)
    return {
        "domains": [part.name for part in text.windows],
        "domain_specialization": {
            "k": best_k.shares().tolist(),
            "1": best_1.shares().tolist(),
        },
        "domain_entropy": entropy.tolist(),
        "load": (_overall(best_k) * best_k.counts.shape[2]).tolist(),
    }


def _overall(counts: ClassCounts) -> np.ndarray:
    """Return the share of all choices that each expert has, float64 [L, E]."""
    total = counts.counts.sum(1, dtype=np.int64)
    return total / np.maximum(total.sum(1, keepdims=True), 1)


def _of_ids(text: Text, ids: dict[str, ClassCounts], positions: ClassCounts) -> Result:
    def shown(best: list[list[tuple[int, float]]]) -> list[list[list[Any]]]:
        return [[[text.show(token), share] for token, share in expert] for expert in best]

    layers = range(len(positions.counts))
    classes = by_token_class(ids["input"], text.show, text.token_classes)
    return {
        "token_classes": {
            "names": [*text.token_classes, "other"],
            "tokens": classes.tokens.tolist(),
            "entropy": routing_entropy(classes).tolist(),
        },
        "vocabulary_specialization": {
            kind: vocabulary_specialization(counts).tolist() for kind, counts in ids.items()
        },
        "spread": {
            "token ids": spread(ids["input"]).tolist(),
            "positions": spread(positions, min_tokens=1).tolist(),
        },
        "top_ids": {kind: [shown(top_classes(ids[kind], n)) for n in layers] for kind in IDS},
    }


def _of_weights(model: RoutedModel) -> Result:
    pairs = model.weights()
    return {
        "similarity": {
            "router": [mean_similarity(router) for router, _ in pairs],
            "experts": [mean_similarity(experts) for _, experts in pairs],
        }
    }
