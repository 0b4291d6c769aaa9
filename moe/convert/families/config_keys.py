"""Mapping between our settings and keys of HuggingFace's ``config.json``, in both directions.

Settings are a flat mapping, ``{"model.num_layers": 16, ...}``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from moetron.common.errors import UserError

Values = Mapping[str, Any]
REQUIRED = object()
"""Default of keys that every config.json has."""


class Key(Protocol):
    """Settings and the keys of equal meaning."""

    def to_hf(self, values: Values) -> dict[str, Any]:
        """Return keys from settings."""
        ...

    def from_hf(self, config: Values) -> dict[str, Any]:
        """Return settings from keys."""
        ...


def look_up(config: Values, key: str, default: Any) -> Any:
    """Return a key of ``config.json``; raise ``UserError`` if it is required and missing."""
    if default is REQUIRED and key not in config:
        raise UserError(f"config.json: `{key}` is missing")
    return config.get(key, default)


@dataclass(frozen=True)
class Same:
    """Setting and key of equal value."""

    setting: str
    key: str
    default: Any = REQUIRED
    """Default of HuggingFace's class for a missing key."""
    alias: str = ""
    """Name of the key in some versions of transformers."""

    def to_hf(self, values: Values) -> dict[str, Any]:
        """Return the key from the setting."""
        return {self.key: values.get(self.setting)}

    def from_hf(self, config: Values) -> dict[str, Any]:
        """Return the setting from the key."""
        key = self.alias if self.alias in config else self.key
        return {self.setting: look_up(config, key, self.default)}


@dataclass(frozen=True)
class Not:
    """Switch whose key has the opposite meaning."""

    setting: str
    key: str
    default: bool

    def to_hf(self, values: Values) -> dict[str, Any]:
        """Return the key from the setting."""
        return {self.key: not values.get(self.setting, True)}

    def from_hf(self, config: Values) -> dict[str, Any]:
        """Return the setting from the key."""
        return {self.setting: not config.get(self.key, self.default)}


@dataclass(frozen=True)
class DenseWidth:
    """``intermediate_size`` or ``key``, the width of the FFN of layers without experts.

    transformers 5 refuses null. Without such layers the experts' width is written, which no module
    reads.
    """

    key: str = "intermediate_size"

    def to_hf(self, values: Values) -> dict[str, Any]:
        """Return the key from the setting."""
        width = values.get("model.ffn_hidden_size")
        return {self.key: width or values["moe.moe_ffn_hidden_size"]}

    def from_hf(self, config: Values) -> dict[str, Any]:
        """Return the setting from the key."""
        return {"model.ffn_hidden_size": look_up(config, self.key, REQUIRED)}


@dataclass(frozen=True)
class SparseStep:
    """Qwen's expert placement: every ``decoder_sparse_step``-th layer but ``mlp_only_layers``."""

    def to_hf(self, values: Values) -> dict[str, Any]:
        """Return the keys from the list of sparse layers."""
        dense = [i for i, sparse in enumerate(values.get("moe.moe_layer_freq", [])) if not sparse]
        return {"decoder_sparse_step": 1, "mlp_only_layers": dense}

    def from_hf(self, config: Values) -> dict[str, Any]:
        """Return the list of sparse layers from the keys."""
        step = config.get("decoder_sparse_step", 1)
        dense = config.get("mlp_only_layers") or []
        layers = range(look_up(config, "num_hidden_layers", REQUIRED))
        pattern = [int(i not in dense and (i + 1) % step == 0) for i in layers]
        return {"moe.moe_layer_freq": pattern}


@dataclass(frozen=True)
class FirstDense:
    """DeepSeek's expert placement: all layers but the first few."""

    def to_hf(self, values: Values) -> dict[str, Any]:
        """Return the key from the list of sparse layers."""
        pattern = values.get("moe.moe_layer_freq", [])
        return {"first_k_dense_replace": pattern.index(1) if 1 in pattern else len(pattern)}

    def from_hf(self, config: Values) -> dict[str, Any]:
        """Return the list of sparse layers from the key."""
        layers = look_up(config, "num_hidden_layers", REQUIRED)
        dense = look_up(config, "first_k_dense_replace", REQUIRED)
        return {"moe.moe_layer_freq": [0] * dense + [1] * (layers - dense)}


@dataclass(frozen=True)
class OneAsUnset:
    """Setting that is unset if the key is 1: a scale, or a number of groups."""

    setting: str
    key: str
    default: float | None

    def to_hf(self, values: Values) -> dict[str, Any]:
        """Return the key from the setting."""
        value = values.get(self.setting)
        return {self.key: self.default if value is None else value}

    def from_hf(self, config: Values) -> dict[str, Any]:
        """Return the setting from the key."""
        value = config.get(self.key, self.default)
        return {self.setting: None if value == 1 else value}


@dataclass(frozen=True)
class SharedExperts:
    """Shared experts: DeepSeek counts them in units of a routed one, we give the total width."""

    def to_hf(self, values: Values) -> dict[str, Any]:
        """Return the key from settings."""
        width = values.get("moe.moe_shared_expert_intermediate_size") or 0
        return {"n_shared_experts": width // values["moe.moe_ffn_hidden_size"]}

    def from_hf(self, config: Values) -> dict[str, Any]:
        """Return the setting from keys."""
        width = look_up(config, "moe_intermediate_size", REQUIRED)
        shared = look_up(config, "n_shared_experts", REQUIRED) or 0
        return {"moe.moe_shared_expert_intermediate_size": shared * width or None}
