"""How a dense model becomes a mixture of experts."""

from pydantic import Field, NonNegativeInt, PositiveFloat

from moetron.moe.config.field import Group


class UpcyclingSettings(Group):
    """Sparse upcycling; moe/convert/upcycle.py says what each does."""

    router_init_std: PositiveFloat = 0.02
    """Standard deviation of the router's first weights, drawn from a normal."""
    weight_scaling: bool = True
    """Scale experts so that the first output is the dense model's."""
    noise_fraction: float = Field(default=0.0, ge=0, le=1)
    """Share of every expert's weights that is drawn anew."""
    noise_std: PositiveFloat = 0.02
    """Standard deviation of those, drawn from a normal."""
    seed: NonNegativeInt = 1234
    """Of the router and the noise."""
