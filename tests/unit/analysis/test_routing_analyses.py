"""Analyses against slow references on random choices, and on routing with known results."""

import itertools
from collections import Counter
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from moetron.common.errors import UserError
from moetron.moe.analysis.routing_statistics import CoActivation, Drops, mean_similarity, saturation
from moetron.moe.analysis.routing_study import Text, token_choices
from moetron.moe.analysis.routing_trace import Routed, RoutedModel, Windows, chosen
from moetron.moe.analysis.specialization import (
    ClassCounts,
    by_token_class,
    routing_entropy,
    spread,
    token_class_entropy,
    token_classes,
    top_classes,
    vocabulary_specialization,
)

LAYERS, TOKENS, K, EXPERTS, CLASSES = 2, 60, 3, 8, 4


def random_choices(
    seed: int, tokens: int = TOKENS, experts: int = EXPERTS, topk: int = K
) -> np.ndarray:
    """Return ranked choices int16 [L, T, K] without repetition."""
    scores = np.random.default_rng(seed).random((LAYERS, tokens, experts))
    return np.argsort(scores, axis=2)[:, :, :topk].astype(np.int16)


def routed(ranked_LTK: np.ndarray, kept_LTE: np.ndarray | None = None) -> Routed:
    kept = chosen(ranked_LTK, EXPERTS) if kept_LTE is None else kept_LTE
    return Routed(ranked_LTK, kept, np.zeros(ranked_LTK.shape[1], dtype=np.int64))


def test_choices_of_batches_are_padded_to_the_most_experts_of_a_token() -> None:
    windows = [
        Windows("a", np.array([[4, 5]]), np.array([[5, 6]])),
        Windows("b", np.array([[7, 8]]), np.array([[8, 9]])),
    ]
    model = SimpleNamespace(layers=[1, 3])
    parts = [np.array([[[2], [1]]] * 2), np.array([[[0, 3], [1, -1]]] * 2)]
    found = token_choices(cast("RoutedModel", model), Text(windows, str), parts)
    assert found["choices"].tolist() == [[[2, -1], [1, -1], [0, 3], [1, -1]]] * 2
    assert found["tokens"].tolist() == [4, 5, 7, 8] and found["texts"].tolist() == [0, 0, 1, 1]
    assert found["layers"].tolist() == [1, 3] and found["names"].tolist() == ["a", "b"]


def test_padding_is_not_in_the_map() -> None:
    ranked = np.array([[[2, 0], [1, -1]]], dtype=np.int16)
    expected = [[[True, False, True], [False, True, False]]]
    assert chosen(ranked, 3).tolist() == expected
    assert routed(ranked).chosen_LTE(top=1)[0].argmax(1).tolist() == [2, 1]


@pytest.mark.parametrize("top", [1, 2, 3])
def test_saturation_against_sets(top: int) -> None:
    now, final = random_choices(0), random_choices(1)
    expected = [
        np.mean([len(set(a[:top]) & set(b[:top])) / top for a, b in zip(x, y, strict=True)])
        for x, y in zip(now, final, strict=True)
    ]
    np.testing.assert_allclose(saturation(now, final, EXPERTS, top), expected)


def test_saturation_of_identical_routing_is_one_and_of_chance_topk_over_experts() -> None:
    assert saturation(random_choices(0), random_choices(0), EXPERTS, K).tolist() == [1.0, 1.0]
    many = saturation(random_choices(2, 20_000), random_choices(3, 20_000), EXPERTS, K)
    np.testing.assert_allclose(many, K / EXPERTS, atol=0.01)


def test_chance_for_olmoes_64_experts_with_top_8() -> None:
    one, two = (random_choices(seed, 20_000, experts=64, topk=8) for seed in (9, 10))
    np.testing.assert_allclose(saturation(one, two, 64, 1), 0.0156, atol=0.003)
    np.testing.assert_allclose(saturation(one, two, 64, 8), 0.125, atol=0.003)
    counts = ClassCounts(LAYERS, 2, 64)
    counts.add(np.arange(20_000) % 2, Routed(one, chosen(one, 64), np.zeros(20_000, np.int64)))
    np.testing.assert_allclose(counts.shares(), 0.125, atol=0.015)


@pytest.mark.parametrize("adjacent", [False, True])
def test_coactivation_against_counted_pairs(adjacent: bool) -> None:
    ranked = random_choices(4)
    found = CoActivation(LAYERS, EXPERTS, adjacent)
    found.add(routed(ranked[:, :20]))
    found.add(routed(ranked[:, 20:]))
    for layer in range(LAYERS):
        singles: Counter[int] = Counter()
        pairs: Counter[tuple[int, int]] = Counter()
        for token in ranked[layer].tolist():
            singles.update(token)
            of_token = itertools.pairwise(token) if adjacent else itertools.combinations(token, 2)
            for a, b in of_token:
                pairs.update([(a, b), (b, a)])
        expected = [
            [pairs[i, j] / singles[i] if i != j else 0.0 for j in range(EXPERTS)]
            for i in range(EXPERTS)
        ]
        np.testing.assert_allclose(found.matrix()[layer], expected)


def test_class_counts_against_a_loop() -> None:
    ranked = random_choices(5)
    classes = np.random.default_rng(6).integers(0, CLASSES, TOKENS)
    counts, expected = ClassCounts(LAYERS, CLASSES, EXPERTS), np.zeros((LAYERS, CLASSES, EXPERTS))
    counts.add(classes[:31], routed(ranked[:, :31]))
    counts.add(classes[31:], routed(ranked[:, 31:]))
    for layer, token in itertools.product(range(LAYERS), range(TOKENS)):
        for expert in ranked[layer, token]:
            expected[layer, classes[token], expert] += 1
    np.testing.assert_array_equal(counts.counts, expected)
    tokens = np.bincount(classes, minlength=CLASSES)
    np.testing.assert_allclose(counts.shares(), expected / tokens[:, None])
    np.testing.assert_allclose(counts.distribution().sum(2), 1.0)


def test_uniform_routing_gives_chance_shares_and_full_entropy() -> None:
    counts = ClassCounts(LAYERS, 2, EXPERTS)
    counts.add(np.arange(40_000) % 2, routed(random_choices(7, 40_000)))
    np.testing.assert_allclose(counts.shares(), K / EXPERTS, atol=0.015)
    np.testing.assert_allclose(routing_entropy(counts), np.log(EXPERTS), atol=1e-3)
    np.testing.assert_allclose(spread(counts), 0.0, atol=0.005)


def test_a_router_of_token_ids_is_fully_specialised() -> None:
    ids = np.random.default_rng(8).integers(0, 20, 5_000)
    ranked = np.broadcast_to((ids % EXPERTS)[None, :, None], (LAYERS, 5_000, 1)).astype(np.int16)
    counts = ClassCounts(LAYERS, 21, EXPERTS, top=1)  # id 20 is never seen
    counts.add(ids, routed(ranked))
    assert vocabulary_specialization(counts).tolist() == [1.0, 1.0]
    assert routing_entropy(counts).max() == 0.0
    np.testing.assert_allclose(spread(counts), np.sqrt(EXPERTS - 1) / EXPERTS)
    assert top_classes(counts, layer=0, size=3)[1] == [(1, 1.0), (9, 1.0), (17, 1.0)]


def test_rare_ids_are_left_out() -> None:
    ids = np.array([0] * 10 + [1] * 9)
    ranked = np.zeros((LAYERS, 19, 1), dtype=np.int16)
    ranked[:, :5] = 1  # id 0 is split evenly, id 1 uses one expert
    counts = ClassCounts(LAYERS, 2, EXPERTS, top=1)
    counts.add(ids, routed(ranked))
    assert vocabulary_specialization(counts, min_tokens=10).tolist() == [0.5, 0.5]


def test_drops_are_counted_by_position() -> None:
    ranked = random_choices(9, tokens=24)  # three windows of 8
    kept = chosen(ranked, EXPERTS)
    kept[:, 7::8] = False  # all choices at the last position are dropped
    drops = Drops(LAYERS, seq_length=8)
    drops.add(routed(ranked, kept))
    assert drops.fractions(buckets=4)[0].tolist() == [0.0, 0.0, 0.0, 0.5]


def test_similarity_of_copies_is_one_and_of_opposites_minus_one() -> None:
    assert mean_similarity(np.array([[1.0, 2.0]] * 3)) == pytest.approx(1.0)
    assert mean_similarity(np.array([[1.0, 0.0], [-2.0, 0.0]])) == pytest.approx(-1.0)
    assert abs(mean_similarity(np.random.default_rng(0).normal(size=(8, 4_000)))) < 0.02


def test_entropy_of_token_classes() -> None:
    """Numbers use one expert, words two evenly; "12th" is neither."""
    show = ["7", " 12", "cat", "Dog", "12th"].__getitem__
    by_id = ClassCounts(LAYERS, 5, EXPERTS, top=1)
    ids = np.array([0, 1, 1, 2, 2, 3, 3, 4])
    experts = np.array([3, 3, 3, 5, 6, 5, 6, 7], dtype=np.int16)
    by_id.add(ids, routed(np.broadcast_to(experts[None, :, None], (LAYERS, 8, 1))))
    patterns = token_classes([r"numbers=\s*\d+", "words=[A-Za-z]+"])
    classes = by_token_class(by_id, show, patterns)
    assert classes.tokens.tolist() == [3, 4, 1]
    entropy = routing_entropy(classes)
    np.testing.assert_allclose(entropy, [[0.0, np.log(2), 0.0]] * LAYERS, atol=1e-12)
    result = {"names": [*patterns, "other"], "tokens": [3, 4, 1], "entropy": entropy.tolist()}
    kept = token_class_entropy({"token_classes": result}, min_tokens=3)
    assert list(kept) == ["numbers", "words"] and kept["words"].shape == (LAYERS,)


@pytest.mark.parametrize("wrong", ["digits", "=x", "digits=["])
def test_invalid_token_classes_are_refused(wrong: str) -> None:
    with pytest.raises(UserError, match="--token-class"):
        token_classes([wrong])
