"""Conversion of published balance-loss and z-loss coefficients to Moetron's.

Moetron's losses: each of the M layers with experts adds coefficient x E sum_i f_i P_i and
coefficient x mean over tokens of the squared log-sum-exp. f_i is the fraction of the choices that
expert i got (sum f = 1, so balanced routing gives the coefficient).
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Convention:
    """Scaling of an implementation's losses; a token makes k choices among E experts."""

    layers: Literal["sum", "mean"]
    """How the losses of layers combine; a mean divides by M."""
    balanced: Literal["one", "topk", "inverse_experts_squared"]
    """Balance loss of even routing, without its coefficient: 1, k, or 1 / E^2."""
    first_choice_only: bool = False
    """f counts each token's first choice only: --moe-aux-loss-first-choice-only."""
    z_divided_by_topk: bool = False


CONVENTIONS = {
    "megatron": Convention("sum", "one"),
    "switch": Convention("sum", "one"),
    "flaxformer": Convention("mean", "topk"),
    "mesh_tensorflow": Convention("sum", "one", first_choice_only=True),
    "megablocks": Convention("mean", "one", z_divided_by_topk=True),
    "gshard": Convention("sum", "inverse_experts_squared", first_choice_only=True),
}
"""Sources: docs/numerics.md. Pooling all layers before the product (HuggingFace's
``load_balancing_loss_func``) is no sum over layers and has no counterpart here."""


def balance_coefficient(
    theirs: float, convention: Convention, moe_layers: int, topk: int, experts: int
) -> float:
    """Return the ``--moe-aux-loss-coeff`` whose gradient equals that of ``theirs``.

    Args:
        theirs: published coefficient.
        convention: of the implementation that it was published for.
        moe_layers: M.
        topk: k.
        experts: E.
    """
    balanced = {"one": 1.0, "topk": float(topk), "inverse_experts_squared": experts**-2.0}
    return theirs * balanced[convention.balanced] / _layers(convention, moe_layers)


def z_coefficient(theirs: float, convention: Convention, moe_layers: int, topk: int) -> float:
    """Return the ``--moe-z-loss-coeff`` whose gradient equals that of ``theirs``."""
    divisor = _layers(convention, moe_layers) * (topk if convention.z_divided_by_topk else 1)
    return theirs / divisor


def _layers(convention: Convention, moe_layers: int) -> int:
    return moe_layers if convention.layers == "mean" else 1
