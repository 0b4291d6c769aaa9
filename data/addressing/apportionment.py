"""Apportionment of a blend: the source of sample n and the number of earlier samples from it.

The sources are the leaves of a Huffman tree over their integer weights. A node of weight W with a
left child of weight w that has received m samples has sent floor(m w / W + 1/2) of them left and
the rest right. So the path of a sample from the root to its leaf, and its number at each node, are
functions of n.

Bound. Let w_v be a node's weight, x a leaf's, and e(v) = |samples v received - n w_v / w_root|. A
split adds at most 1/2 and propagates its node's error in proportion, so that
e(v) <= 1/2 + (w_v / w_parent) e(parent), with e(root) = 0. Unrolled, for a leaf:
e <= (1/2) (1 + sum of x / w_a over its ancestors a below the root). In a Huffman tree a node's
uncle weighs at least as much as the node, so w_a upwards is at least x, 2x, 3x, 5x, 8x, ...
(Fibonacci), the sum is below 2.36, and e < 1.68 after any number of samples, whatever the weights.

Weights whose common denominator is small, such as percentages or sizes counted in samples, are
exact. Others are rounded to multiples of 2^-31 of their sum, which adds n / 2^31.
"""

import heapq
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from moetron.common.errors import UserError

MAX_TOTAL = 1 << 31  # 2 x remainder x weight stays below 2^63


class Apportionment:
    """Assignment of samples 0, 1, 2, ... to sources, proportional in every prefix.

    For every n, the number of samples from source s among the first n differs from n w_s / sum(w)
    by less than 1.68. With weights in samples it is also at most w_s while n <= sum(w): a blend
    in proportion to size never starts a second epoch of one source before the first epoch of
    another has ended.
    """

    def __init__(self, weights: Sequence[float | Fraction]) -> None:
        """Build the tree; ``weights``: one positive number a source, floats read as they print."""
        self.weights = integer_weights(weights)
        count = len(self.weights)
        weight = list(self.weights)
        left, right = list(range(count)), list(range(count))  # a leaf sends everything to itself
        heap = [(w, node) for node, w in enumerate(weight)]
        heapq.heapify(heap)
        while len(heap) > 1:
            (w_left, node_left), (w_right, node_right) = heapq.heappop(heap), heapq.heappop(heap)
            left.append(node_left)
            right.append(node_right)
            weight.append(w_left + w_right)
            heapq.heappush(heap, (weight[-1], len(weight) - 1))
        self._left, self._right = np.array(left), np.array(right)
        self._weight = np.array(weight)
        self._left_weight = self._weight[self._left]
        self._depth = _depth(left, right, count)

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return each sample's source and its number within that source.

        int64 [N] sample numbers >= 0 -> (source int64 [N], number of earlier samples from this
        source int64 [N]).
        """
        node = np.full(samples.shape, len(self._left) - 1)
        rank = samples.astype(np.int64)
        for _ in range(self._depth):
            weight, left_weight = self._weight[node], self._left_weight[node]
            rounds, rest = np.divmod(rank, weight)
            part, phase = np.divmod(2 * rest * left_weight + weight, 2 * weight)
            sent_left = rounds * left_weight + part
            goes_left = phase + 2 * left_weight >= 2 * weight
            rank = np.where(goes_left, sent_left, rank - sent_left)
            node = np.where(goes_left, self._left[node], self._right[node])
        return node, rank

    def counts(self, n: int) -> list[int]:
        """Return how many of the first ``n`` samples come from each source."""
        received = [0] * len(self._left)
        received[-1] = n
        for node in range(len(self._left) - 1, len(self.weights) - 1, -1):
            weight, left_weight = int(self._weight[node]), int(self._left_weight[node])
            sent_left = (2 * received[node] * left_weight + weight) // (2 * weight)
            received[self._left[node]] = sent_left
            received[self._right[node]] = received[node] - sent_left
        return received[: len(self.weights)]


def integer_weights(weights: Sequence[float | Fraction]) -> list[int]:
    """Return positive integers in the proportions of ``weights``, with a sum of at most 2^31.

    Raises UserError for a weight that is not a positive finite number.
    """
    if not weights:
        raise UserError("a blend needs at least one source")
    try:
        exact = [w if isinstance(w, Fraction) else Fraction(str(w)) for w in weights]
    except ValueError:
        raise UserError(f"weights must be finite numbers, not {list(weights)}") from None
    if min(exact) <= 0:
        raise UserError(f"weights must be greater than 0, not {[float(w) for w in exact]}")
    scale = _common_multiple([w.denominator for w in exact])
    counts = [int(w * scale) for w in exact]
    divisor = np.gcd.reduce(np.array(counts, dtype=object))
    counts = [count // divisor for count in counts]
    return counts if sum(counts) <= MAX_TOTAL else _rounded(counts)


def _rounded(counts: list[int]) -> list[int]:
    """Scale to a sum of 2^31, rounding up the largest remainders; no weight becomes 0."""
    total = sum(counts)
    floors = [max(1, count * MAX_TOTAL // total) for count in counts]
    by_remainder = sorted(range(len(counts)), key=lambda s: -(counts[s] * MAX_TOTAL % total))
    for s in by_remainder[: max(0, MAX_TOTAL - sum(floors))]:
        floors[s] += 1
    floors[floors.index(max(floors))] -= max(0, sum(floors) - MAX_TOTAL)
    return floors


def _common_multiple(numbers: list[int]) -> int:
    """Return the least common multiple."""
    return int(np.lcm.reduce(np.array(numbers, dtype=object)))


def _depth(left: list[int], right: list[int], leaves: int) -> int:
    """Return the number of splits on the longest path from the root (the last node) to a leaf."""
    height = [0] * len(left)
    for node in range(leaves, len(left)):
        height[node] = 1 + max(height[left[node]], height[right[node]])
    return height[-1]
