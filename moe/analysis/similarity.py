"""How alike experts are: cosines between their weights."""

import numpy as np


def cosines(rows_EN: np.ndarray) -> np.ndarray:
    """Cosine of every pair of rows, float64 [E, E]; 0 for rows that are zero."""
    rows = rows_EN.astype(np.float64)
    norms = np.linalg.norm(rows, axis=1)
    unit = rows / np.where(norms > 0, norms, 1.0)[:, None]
    return unit @ unit.T


def mean_similarity(rows_EN: np.ndarray) -> float:
    """Mean cosine over pairs of different rows: 1 for copies, about 0 for random ones."""
    matrix = cosines(rows_EN)
    experts = len(matrix)
    return float((matrix.sum() - np.trace(matrix)) / max(experts * (experts - 1), 1))
