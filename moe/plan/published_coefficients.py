"""Carry a published coefficient of a balance loss or z-loss over to ours.

Ours: every layer with experts injects coefficient x E sum_i f_i P_i, f_i the share of the choices
that expert i got (sum f = 1, so that balance gives the coefficient), and coefficient x mean over
tokens of the squared log-sum-exp. Losses of layers add up.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Convention:
    """How an implementation weighs its losses; M layers have experts, a token makes k choices."""

    layers: Literal["sum", "mean"]
    """How losses of layers combine; a mean divides by M."""
    balanced: Literal["one", "topk", "inverse_experts_squared"]
    """The balance loss of even routing, without its coefficient: 1, k, or 1 / E^2."""
    first_choice_only: bool = False
    """f counts each token's best expert alone: --moe-aux-loss-first-choice-only."""
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
    """``--moe-aux-loss-coeff`` that pulls as hard as ``theirs``.

    Args:
        theirs: as published.
        convention: of the implementation that it was published for.
        moe_layers: M.
        topk: k.
        experts: E.
    """
    balanced = {"one": 1.0, "topk": float(topk), "inverse_experts_squared": experts**-2.0}
    return theirs * balanced[convention.balanced] / _layers(convention, moe_layers)


def z_coefficient(theirs: float, convention: Convention, moe_layers: int, topk: int) -> float:
    """``--moe-z-loss-coeff`` that pulls as hard as ``theirs``; arguments as above."""
    divisor = _layers(convention, moe_layers) * (topk if convention.z_divided_by_topk else 1)
    return theirs / divisor


def _layers(convention: Convention, moe_layers: int) -> int:
    return moe_layers if convention.layers == "mean" else 1
