"""Which of our settings is which key of HuggingFace's ``config.json``, in both directions.

Settings travel as a flat mapping, ``{"model.num_layers": 16, ...}``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from moetron.common.errors import UserError

Values = Mapping[str, Any]
_REQUIRED = object()


class Key(Protocol):
    """Some settings and the keys that say the same."""

    def to_hf(self, values: Values) -> dict[str, Any]:
        """Keys from settings."""
        ...

    def from_hf(self, config: Values) -> dict[str, Any]:
        """Settings from keys."""
        ...


def look_up(config: Values, key: str, default: Any) -> Any:
    """A key of ``config.json``; ``UserError`` where it must be there and is not."""
    if default is _REQUIRED and key not in config:
        raise UserError(f"config.json: `{key}` is missing")
    return config.get(key, default)


@dataclass(frozen=True)
class Same:
    """A setting and a key of equal value."""

    setting: str
    key: str
    default: Any = _REQUIRED
    """What HuggingFace's class assumes where the file does not have the key."""
    alias: str = ""
    """Another name that some versions of transformers write."""

    def to_hf(self, values: Values) -> dict[str, Any]:
        """Key from setting."""
        return {self.key: values.get(self.setting)}

    def from_hf(self, config: Values) -> dict[str, Any]:
        """Setting from key."""
        key = self.alias if self.alias in config else self.key
        return {self.setting: look_up(config, key, self.default)}


@dataclass(frozen=True)
class Not:
    """A switch whose key says the opposite."""

    setting: str
    key: str
    default: bool

    def to_hf(self, values: Values) -> dict[str, Any]:
        """Key from setting."""
        return {self.key: not values.get(self.setting, True)}

    def from_hf(self, config: Values) -> dict[str, Any]:
        """Setting from key."""
        return {self.setting: not config.get(self.key, self.default)}


@dataclass(frozen=True)
class Rope:
    """Rotary base: ``rope_parameters`` since transformers 5, ``rope_theta`` before: writes both.

    ``scalings`` name what stretches the frequencies, for families where our modules can: its
    constants, and its keys by our setting.
    """

    scalings: Mapping[str, tuple[Mapping[str, Any], Mapping[str, str]]]
    default: float = 10_000.0

    def to_hf(self, values: Values) -> dict[str, Any]:
        """Keys from settings."""
        theta, kind = float(values["model.rotary_base"]), values["attention.rope_type"]
        parameters = {"rope_type": "default", "rope_theta": theta}
        if kind in self.scalings:
            constants, names = self.scalings[kind]
            scaled = {key: values[setting] for setting, key in names.items()}
            parameters |= {"rope_type": kind, **constants, **scaled}
        return {"rope_theta": theta, "rope_parameters": parameters}

    def from_hf(self, config: Values) -> dict[str, Any]:
        """Settings from keys; ``UserError`` for a scaling that our modules do not have."""
        old = config.get("rope_scaling") or {}
        parameters = {**old, **(config.get("rope_parameters") or {})}
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        theta = float(parameters.get("rope_theta") or config.get("rope_theta") or self.default)
        if theta != int(theta):
            raise UserError(f"config.json: rope_theta {theta} is not a whole number")
        found = {"model.rotary_base": int(theta)}
        if kind == "default":
            return found
        if kind not in self.scalings:
            raise UserError(f"config.json: rotary embedding of type `{kind}` is not supported")
        constants, names = self.scalings[kind]
        wrong = {key for key, value in constants.items() if parameters.get(key) != value}
        if wrong:
            raise UserError(
                f"config.json: rotary embedding of type `{kind}` with this "
                f"{', '.join(sorted(wrong))} is not supported"
            )
        given = {setting: parameters[key] for setting, key in names.items() if key in parameters}
        return {**found, "attention.rope_type": kind, **given}


@dataclass(frozen=True)
class SparseStep:
    """Qwen's placement: one of each ``decoder_sparse_step`` layers but ``mlp_only_layers``."""

    def to_hf(self, values: Values) -> dict[str, Any]:
        """Keys from the list of sparse layers."""
        dense = [i for i, sparse in enumerate(values.get("moe.moe_layer_freq", [])) if not sparse]
        return {"decoder_sparse_step": 1, "mlp_only_layers": dense}

    def from_hf(self, config: Values) -> dict[str, Any]:
        """The list of sparse layers from keys."""
        step = config.get("decoder_sparse_step", 1)
        dense = config.get("mlp_only_layers") or []
        layers = range(look_up(config, "num_hidden_layers", _REQUIRED))
        pattern = [int(i not in dense and (i + 1) % step == 0) for i in layers]
        return {"moe.moe_layer_freq": pattern}


@dataclass(frozen=True)
class FirstDense:
    """DeepSeek's placement of experts: in all layers but the first few."""

    def to_hf(self, values: Values) -> dict[str, Any]:
        """The key from the list of sparse layers."""
        pattern = values.get("moe.moe_layer_freq", [])
        return {"first_k_dense_replace": pattern.index(1) if 1 in pattern else len(pattern)}

    def from_hf(self, config: Values) -> dict[str, Any]:
        """The list of sparse layers from the key."""
        layers = look_up(config, "num_hidden_layers", _REQUIRED)
        dense = look_up(config, "first_k_dense_replace", _REQUIRED)
        return {"moe.moe_layer_freq": [0] * dense + [1] * (layers - dense)}


@dataclass(frozen=True)
class OneAsUnset:
    """A setting that is left out where the key says 1: a scale, or a number of groups."""

    setting: str
    key: str
    default: float | None

    def to_hf(self, values: Values) -> dict[str, Any]:
        """Key from setting."""
        value = values.get(self.setting)
        return {self.key: self.default if value is None else value}

    def from_hf(self, config: Values) -> dict[str, Any]:
        """Setting from key."""
        value = config.get(self.key, self.default)
        return {self.setting: None if value == 1 else value}


@dataclass(frozen=True)
class SharedExperts:
    """DeepSeek counts shared experts of a routed one's width; we say the width of them all."""

    def to_hf(self, values: Values) -> dict[str, Any]:
        """The key from settings."""
        width = values.get("moe.moe_shared_expert_intermediate_size") or 0
        return {"n_shared_experts": width // values["moe.moe_ffn_hidden_size"]}

    def from_hf(self, config: Values) -> dict[str, Any]:
        """The setting from keys."""
        width = look_up(config, "moe_intermediate_size", _REQUIRED)
        shared = look_up(config, "n_shared_experts", _REQUIRED) or 0
        return {"moe.moe_shared_expert_intermediate_size": shared * width or None}
