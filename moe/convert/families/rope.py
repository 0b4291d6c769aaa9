"""Rotary embeddings as keys of HuggingFace's ``config.json``, for transformers 4 and 5."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moetron.common.errors import UserError
from moetron.moe.convert.families.config_keys import Values

YARN = "yarn"


@dataclass(frozen=True)
class RopeScaling:
    """Keys of one type of rotary frequency scaling in HuggingFace's configurations."""

    names: Mapping[str, str]
    """Our setting -> key."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """Keys that must be present with these values for our modules to compute the same."""
    optional: Mapping[str, Any] = field(default_factory=dict)
    """Keys that must have these values if present."""


@dataclass(frozen=True)
class Rope:
    """Rotary base and scaling.

    transformers 5 reads ``rope_parameters``, transformers 4 ``rope_theta`` and ``rope_scaling``.
    Exports hold all of them.
    """

    scalings: Mapping[str, RopeScaling]
    """Types other than ``default`` that our modules implement for this family."""
    default: float = 10_000.0
    """Base if the file gives none."""

    def to_hf(self, values: Values) -> dict[str, Any]:
        """Return keys from settings."""
        theta, kind = float(values["model.rotary_base"]), values["attention.rope_type"]
        if kind not in self.scalings:
            plain = {"rope_type": "default", "rope_theta": theta}
            return {"rope_theta": theta, "rope_parameters": plain}
        scaling = self.scalings[kind]
        keys = {key: values[setting] for setting, key in scaling.names.items()}
        keys = {"rope_type": kind, **scaling.constants, **keys}
        if kind == YARN:
            keys.update(_attention_factor(keys))
        return {
            "rope_theta": theta,
            "rope_scaling": keys,
            "rope_parameters": {**keys, "rope_theta": theta},
        }

    def from_hf(self, config: Values) -> dict[str, Any]:
        """Return settings from keys; raise ``UserError`` for an unsupported scaling."""
        keys = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
        kind = keys.get("rope_type", keys.get("type", "default"))
        theta = float(keys.get("rope_theta") or config.get("rope_theta") or self.default)
        if theta != int(theta):
            raise UserError(f"config.json: rope_theta {theta} is not a whole number")
        found = {"model.rotary_base": int(theta)}
        if kind == "default":
            return found
        if kind not in self.scalings:
            raise UserError(f"config.json: rotary embedding of type `{kind}` is not supported")
        scaling = self.scalings[kind]
        wrong = {key for key, value in scaling.constants.items() if keys.get(key) != value}
        wrong |= {key for key, value in scaling.optional.items() if keys.get(key, value) != value}
        if kind == YARN:
            keys, unlike = _yarn_growth(keys)
            wrong |= unlike
        if wrong:
            raise UserError(
                f"config.json: rotary embedding of type `{kind}` with this "
                f"{', '.join(sorted(wrong))} is not supported"
            )
        given = {
            ours: keys[key] for ours, key in scaling.names.items() if keys.get(key) is not None
        }
        return {**found, "attention.rope_type": kind, **given}


def _growth(keys: Values, mscale: float) -> float:
    """Return YaRN's ``1 + 0.1 mscale ln(factor)``, or 1 if factor <= 1."""
    factor = keys.get("factor") or 1.0
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _our_factor(keys: Values) -> float:
    """Return megatron-core's factor of rotated channels (``_yarn_get_concentration_factor``)."""
    return _growth(keys, keys["mscale"]) / _growth(keys, keys["mscale_all_dim"])


def _their_factor(keys: Values) -> float:
    """Return transformers' factor (``_compute_yarn_parameters``), which may ignore ``mscale``."""
    if keys.get("attention_factor") is not None:
        return float(keys["attention_factor"])
    if keys.get("mscale") and keys.get("mscale_all_dim"):
        return _our_factor(keys)
    return _growth(keys, 1.0)


def _attention_factor(keys: Values) -> dict[str, float]:
    """Return ``attention_factor`` if transformers would derive another value."""
    ours = _our_factor(keys)
    return {} if math.isclose(ours, _their_factor(keys)) else {"attention_factor": ours}


def _yarn_growth(keys: Values) -> tuple[dict[str, Any], set[str]]:
    """Return the keys with megatron-core's ``mscale`` and ``mscale_all_dim``.

    Also return the names of keys that megatron-core cannot express.
    """
    all_dim = keys.get("mscale_all_dim") or 0.0
    unused = keys.get("attention_factor") is None and not all_dim
    mscale = 1.0 if unused or keys.get("mscale") is None else keys["mscale"]
    read = {**keys, "mscale": mscale, "mscale_all_dim": all_dim}
    if math.isclose(_our_factor(read), _their_factor(keys), rel_tol=1e-6):
        return read, set()
    return read, {"mscale" if keys.get("attention_factor") is None else "attention_factor"}
