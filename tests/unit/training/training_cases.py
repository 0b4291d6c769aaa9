"""Settings and streams of the training tests."""

from typing import Any

import numpy as np

from moetron.moe.config.schema.settings import Settings


def settings(**groups: dict[str, Any]) -> Settings:
    """Return tiny settings; ``training={"train_iters": 9}`` changes a group's fields."""
    tree: dict[str, dict[str, Any]] = {
        "model": {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "seq_length": 4},
        "training": {"train_iters": 10, "micro_batch_size": 1, "global_batch_size": 8},
        "learning_rate": {"lr": 1.0},
    }
    for group, fields in groups.items():
        tree[group] = {**tree.get(group, {}), **fields}
    return Settings.model_validate(tree)


class CountingStream:
    """Stream whose sample n is filled with n, the last n % seq_length tokens masked.

    It is of source n modulo 3 and objective n modulo 2; every fifth counts as filtered.
    """

    source_names = ["zero", "one", "two"]
    objective_names = ["even", "odd"]
    bytes_per_token = [4.0, None, 2.0]

    def __init__(self, length: int = 1000, seq_length: int = 4) -> None:
        self.length = length
        self.seq_length = seq_length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, n: int) -> dict[str, Any]:
        if not 0 <= n < self.length:
            raise IndexError(n)
        mask = np.ones(self.seq_length, np.float32)
        mask[self.seq_length - n % self.seq_length :] = 0
        tokens = np.full(self.seq_length, n)
        return {
            "tokens": tokens,
            "labels": tokens + 1,
            "loss_mask": mask,
            "source": n % 3,
            "objective": n % 2,
            "prefix": 0,
            "filtered": int(n % 5 == 0),
        }

    def state(self) -> dict[str, Any]:
        return {"counting": self.length}
