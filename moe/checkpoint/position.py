"""Position of a run in its steps and its data."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Position of a run at a step boundary; a resume needs no more than this."""

    step: int = 0
    """Optimizer steps done."""
    consumed_samples: int = 0
    """Samples taken from the training stream; the next one has this number."""
    consumed_tokens: int = 0
    """Tokens of those samples, masked ones included."""

    def after(self, samples: int, seq_length: int) -> "Progress":
        """Return the position after one more step of ``samples`` samples."""
        return Progress(
            self.step + 1,
            self.consumed_samples + samples,
            self.consumed_tokens + samples * seq_length,
        )
