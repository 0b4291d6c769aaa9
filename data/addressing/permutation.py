"""Keyed permutation of 0 .. n-1, computed without storing it.

A balanced Feistel network permutes the smallest domain of 2^b >= n numbers; numbers that land
outside [0, n) pass through it again until they land inside (cycle walking: Black and Rogaway,
"Ciphers with arbitrary finite domains", CT-RSA 2002). Memory is constant, every position costs
the same, and so does the inverse.
"""

import hashlib

import numpy as np

ROUNDS = 8
MAX_SIZE = 1 << 62
_MULTIPLIER_A = np.uint64(0xBF58476D1CE4E5B9)  # splitmix64's finaliser (Steele et al., OOPSLA 2014)
_MULTIPLIER_B = np.uint64(0x94D049BB133111EB)
_SHIFT = np.uint64(32)


class Permutation:
    """Bijection on [0, ``size``) given by ``key``.

    The same (size, key) gives the same permutation on every machine: keys are hashed with BLAKE2b,
    rounds use 64-bit integer arithmetic.
    """

    def __init__(self, size: int, key: str) -> None:
        if not 1 <= size <= MAX_SIZE:
            raise ValueError(f"a permutation needs a size in [1, 2^62], not {size}")
        self.size = size
        bits = max(2, (size - 1).bit_length())
        low_bits = bits // 2
        self._low_bits = np.uint64(low_bits)
        self._low_mask = np.uint64((1 << low_bits) - 1)
        self._high_mask = np.uint64((1 << (bits - low_bits)) - 1)
        digest = hashlib.blake2b(key.encode(), digest_size=8 * ROUNDS, person=b"moetron order")
        self._keys = np.frombuffer(digest.digest(), dtype="<u8").astype(np.uint64)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Map positions to images: int64 [N] in [0, size) -> int64 [N] in [0, size)."""
        return self._walk(positions, range(ROUNDS))

    def inverse(self, images: np.ndarray) -> np.ndarray:
        """Map images back to positions: int64 [N] -> int64 [N]."""
        return self._walk(images, range(ROUNDS - 1, -1, -1))

    def _walk(self, numbers: np.ndarray, rounds: range) -> np.ndarray:
        """Apply the network until every number is inside [0, size)."""
        assert numbers.size == 0 or (numbers.min() >= 0 and numbers.max() < self.size)
        walked = self._network(numbers.astype(np.uint64), rounds)
        while (outside := np.flatnonzero(walked >= np.uint64(self.size))).size:
            walked[outside] = self._network(walked[outside], rounds)
        return walked.astype(np.int64)

    def _network(self, numbers: np.ndarray, rounds: range) -> np.ndarray:
        """Run one pass: even rounds change the high half, odd rounds the low half; uint64 [N]."""
        high, low = numbers >> self._low_bits, numbers & self._low_mask
        for i in rounds:
            if i % 2 == 0:
                high ^= _mix(low, self._keys[i]) & self._high_mask
            else:
                low ^= _mix(high, self._keys[i]) & self._low_mask
        return (high << self._low_bits) | low


def _mix(half: np.ndarray, key: np.uint64) -> np.ndarray:
    """Return a keyed hash of each half in the low bits; uint64 [N] -> uint64 [N]."""
    mixed = (half ^ key) * _MULTIPLIER_A
    mixed ^= mixed >> _SHIFT
    mixed *= _MULTIPLIER_B
    return mixed >> _SHIFT
