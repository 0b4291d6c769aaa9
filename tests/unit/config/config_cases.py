"""Settings for the tests of this folder."""

from typing import Any

from moetron.moe.config.checks import problems
from moetron.moe.config.schema.settings import Settings, fields

HOME = {name: group for group, name, _ in fields()}
BASE: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "seq_length": 32,
    "vocab_size": 100,
    "num_experts": 8,
    "train_iters": 100,
    "micro_batch_size": 2,
    "global_batch_size": 16,
    "lr": 1e-3,
    "mock_data": True,
}


def make(**changes: Any) -> Settings:
    """Return a small consistent MoE with the named fields changed."""
    tree: dict[str, dict[str, Any]] = {group: {} for group in Settings.model_fields}
    for name, value in {**BASE, **changes}.items():
        tree[HOME[name]][name] = value
    return Settings.model_validate(tree)


def found(world_size: int = 1, device: str = "cpu", te: bool = False, **changes: Any) -> list[str]:
    """Return the problems of ``make(**changes)``."""
    return problems(make(**changes), world_size, device=device, te=te)
