"""Sampling parameters; imports no torch."""

from dataclasses import dataclass

from moetron.common.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """Temperature, top-k and top-p (nucleus) sampling.

    Raises:
        UserError: names all invalid values.
    """

    temperature: float = 1.0
    """Divisor of the logits; 0 takes the most likely token."""
    top_k: int = 0
    """Sample among this many most likely tokens; 0: among all."""
    top_p: float = 1.0
    """Sample among the most likely tokens with this total probability."""
    seed: int = 0
    """Seed of the generator."""
    repetition_penalty: float = 1.0
    """Makes tokens of the prompt and of the answer less likely if above 1; see next_token.py."""

    def __post_init__(self) -> None:
        rules = (
            (f"--temperature {self.temperature}: must be at least 0", self.temperature >= 0),
            (f"--top-k {self.top_k}: must be at least 0", self.top_k >= 0),
            (f"--top-p {self.top_p}: must be above 0 and at most 1", 0 < self.top_p <= 1),
            (
                f"--repetition-penalty {self.repetition_penalty}: must be above 0",
                0 < self.repetition_penalty < float("inf"),
            ),
        )
        if problems := [problem for problem, holds in rules if not holds]:
            raise UserError("\n".join(problems))
