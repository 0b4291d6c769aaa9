"""Options and checks of upcycling a dense model to a mixture of experts.

A dense FFN of width F is split into g = F / f parts of the experts' width f (the granularity g is 1
if experts are full copies); E / g copies of the parts make the E experts.
"""

from collections.abc import Iterator

from pydantic import Field, NonNegativeInt, PositiveFloat

from moetron.moe.config.schema import derived
from moetron.moe.config.schema.experts import MoESettings
from moetron.moe.config.schema.field import Group, flag_name
from moetron.moe.config.schema.settings import Settings

_NEW_PARTS = (
    "moe_shared_expert_intermediate_size",
    "moe_sequential_ffn_hidden_size",
    "moe_expert_multiplicative_bias",
    "moe_router_enable_expert_bias",
)
"""Settings of parts that a dense model lacks."""
_ROUTERS = ("topk", "expert_choice", "random_second", "straight_through")


class UpcyclingSettings(Group):
    """Sparse upcycling; moe/convert/upcycle.py has the sources."""

    router_init_std: PositiveFloat = 0.02
    """Standard deviation of the router's normal initialisation."""
    weight_scaling: bool = True
    """Scale experts so that the initial output equals the dense model's."""
    noise_fraction: float = Field(default=0.0, ge=0, le=1)
    """Fraction of every expert's weights that is reinitialised."""
    noise_std: PositiveFloat = 0.02
    """Standard deviation of reinitialised weights, from a normal."""
    seed: NonNegativeInt = 1234
    """Seed of the router and the noise."""


def granularity(settings: Settings) -> int:
    """Return the number of parts that a dense FFN is split into."""
    return derived.dense_ffn_size(settings.model) // derived.expert_ffn_size(settings)


def output_scale(settings: Settings) -> float:
    """Return the factor of expert outputs that makes a token's weighted sum the dense output.

    A token is routed to all g parts of k / g copies. Its k weights sum to 1, or to about k / E if a
    softmax over all experts is not renormalised (He et al., arXiv 2410.07524).
    """
    moe = settings.moe
    assert moe.num_experts is not None
    scale = granularity(settings) / (moe.moe_router_topk_scaling_factor or 1.0)
    if moe.moe_router_pre_softmax or moe.moe_router_type == "expert_choice":
        scale *= moe.num_experts / moe.moe_router_topk
    return scale


def upcycling_problems(dense: Settings, sparse: Settings) -> list[str]:
    """Return why a model with settings ``dense`` cannot become one with ``sparse``."""
    if dense.moe.num_experts is not None:
        return [f"--num-experts {dense.moe.num_experts}: the model to start from has experts"]
    if not any(derived.moe_layers(sparse)):
        return ["--num-experts: no layer gets experts"]
    return [*_unsupported(sparse), *_sizes(sparse)]


def _unsupported(settings: Settings) -> Iterator[str]:
    moe, defaults = settings.moe, MoESettings()
    for name in _NEW_PARTS:
        if (value := getattr(moe, name)) != getattr(defaults, name):
            yield f"{flag_name(name)} {value}: a dense model has no weights to start it from"
    if moe.moe_router_type not in _ROUTERS:
        yield f"--moe-router-type {moe.moe_router_type}: use one of {', '.join(_ROUTERS)}"
    if moe.moe_router_score_function == "sigmoid" and moe.moe_router_topk == 1:
        yield "--moe-router-score-function sigmoid: needs --moe-router-topk 2 or more"
    if settings.model.mtp_num_layers is not None:
        yield "--mtp-num-layers: multi-token prediction is not upcycled"
    if derived.ffn_type(settings.model) == "double_gated":
        yield "--ffn-type double_gated is not upcycled"
    if settings.model.add_bias_linear:
        yield "--add-bias-linear: experts have no biases"


def _sizes(settings: Settings) -> Iterator[str]:
    width, moe = derived.dense_ffn_size(settings.model), settings.moe
    expert = derived.expert_ffn_size(settings)
    if width % expert:
        yield f"--moe-ffn-hidden-size {expert} must divide the dense FFN's width {width}"
        return
    parts = granularity(settings)
    for name in ("num_experts", "moe_router_topk"):
        if getattr(moe, name) % parts:
            yield (
                f"{flag_name(name)} {getattr(moe, name)} must be a multiple of the {parts} parts "
                f"that --moe-ffn-hidden-size {expert} splits the dense FFN ({width}) into"
            )
