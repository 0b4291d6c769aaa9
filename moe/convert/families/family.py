"""HuggingFace model architecture: names, config keys, tensors, and supported settings."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from moetron.common.errors import UserError
from moetron.common.text import value_text
from moetron.moe.config.schema import derived
from moetron.moe.config.schema.field import flag_name
from moetron.moe.config.schema.settings import EXPORTED, Settings, fields
from moetron.moe.convert.families.config_keys import Key, Values
from moetron.moe.convert.families.tensor_rules import Rule

CONFIG = "config.json"
OTHER_GROUPS = set(Settings.model_fields) - {group for group, _ in EXPORTED}
"""Groups of settings that do not describe the model."""
PLACEHOLDERS: dict[str, dict[str, Any]] = {
    "training": {"train_iters": 1, "micro_batch_size": 1, "global_batch_size": 1},
    "learning_rate": {"lr": 1e-5},
}
"""Required settings that a HuggingFace folder lacks."""


@dataclass(frozen=True)
class Family:
    """Architecture of HuggingFace's transformers."""

    model_type: str
    architecture: str
    experts: bool
    """Models are mixtures of experts."""
    keys: tuple[Key, ...]
    fixed: Mapping[str, Any]
    """Settings without a key in the architecture."""
    constants: Mapping[str, Any]
    """Keys that must have these values, or be absent, for our modules to compute the same."""
    rules: Callable[[Values], list[Rule]]
    """Tensor rules, from the settings of `function_of`."""
    whole_heads: bool = False
    """The hidden size must be a multiple of the number of heads (transformers 5)."""
    code: str | None = None
    """Model code in convert/families to copy into the folder, for models that transformers lacks;
    loaded with ``trust_remote_code=True``."""
    unused: tuple[str, ...] = ()
    """Tensors of some files that are copies, or that no module reads."""
    has_encoder: bool = False
    """Models are encoder-decoders; the decoder starts with the padding token."""

    def config(self, values: Values) -> dict[str, Any]:
        """Return ``config.json`` of a model with these settings."""
        config: dict[str, Any] = {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            **self.constants,
        }
        for key in self.keys:
            config.update(key.to_hf(values))
        return config

    def settings(self, config: Values) -> dict[str, dict[str, Any]]:
        """Return the settings sections of a model with this ``config.json``.

        Raises:
            UserError: keys have unsupported values; lists all of them.
        """
        problems = [
            f"config.json: `{key}` is {config[key]!r}, and only {value!r} is supported"
            for key, value in self.constants.items()
            if config.get(key, value) != value
        ]
        if problems:
            raise UserError("\n".join(problems))
        flat = dict(self.fixed)
        for key in self.keys:
            flat.update(key.from_hf(config))
        tree: dict[str, dict[str, Any]] = {}
        for name, value in flat.items():
            group, field = name.split(".")
            tree.setdefault(group, {})[field] = value
        return tree

    def problems(self, values: Values) -> list[str]:
        """Return why this architecture cannot represent these settings; empty if it can.

        Converts them there and back: a setting that changes is not representable.
        """
        if (values["moe.num_experts"] is not None) != self.experts:
            kind = "a mixture of experts" if self.experts else "a dense model"
            return [f"--num-experts {values['moe.num_experts']}: {self.model_type} is {kind}"]
        if (values["model.encoder_num_layers"] is not None) != self.has_encoder:
            kind = "an encoder-decoder" if self.has_encoder else "a decoder"
            given = value_text(values["model.encoder_num_layers"])
            return [f"--encoder-num-layers {given}: {self.model_type} is {kind}"]
        width, heads = values["model.hidden_size"], values["model.num_attention_heads"]
        if self.whole_heads and width % heads:
            return [f"--hidden-size {width}: {self.model_type} has a multiple of its {heads} heads"]
        config, refused = self.config(values), []
        try:
            self.settings(config)
        except UserError as error:
            refused = str(error).splitlines()
        try:  # with the constants in place, every setting that differs is named
            tree = self.settings({**config, **self.constants})
            theirs = function_of(Settings.model_validate({**PLACEHOLDERS, **tree}))
        except ValidationError as error:  # a damaged record: more heads than channels
            found = error.errors()
            return [f"{flag_name(str(each['loc'][-1]))}: {each['msg']}" for each in found]
        except UserError as error:
            return str(error).splitlines()
        different = [
            f"{flag_name(name.split('.')[1])} {value_text(value)}: {self.model_type} has "
            f"{value_text(theirs.get(name))}"
            for name, value in values.items()
            if theirs.get(name) != value
        ]
        return different or refused


def function_of(settings: Settings) -> dict[str, Any]:
    """Return ``{"model.num_layers": 16, ...}``: settings of a trained model, sizes resolved.

    ``model.vocab_size`` is the number of embedding rows at TP 1; None if unset.
    """
    model, tree = settings.model, settings.model_dump(mode="json")
    values = {
        f"{group}.{name}": tree[group][name]
        for group, name, _ in fields()
        if (group, name) in EXPORTED
    }
    del values["moe.moe_layer_position"], values["moe.first_k_dense_replace"]
    del values["model.swiglu"]
    values["model.ffn_type"] = derived.ffn_type(model)
    if settings.moe.moe_router_load_balancing_type == "sinkhorn":  # other weights
        values["moe.moe_router_load_balancing_type"] = "sinkhorn"
    sparse = derived.moe_layers(settings)
    values["moe.moe_layer_freq"] = [int(flag) for flag in sparse]
    values["model.num_query_groups"] = derived.query_groups(model)
    values["model.kv_channels"] = derived.head_dim(model)
    if settings.attention.multi_latent_attention:
        del values["model.num_query_groups"], values["model.kv_channels"]
    if values["moe.moe_router_topk_scaling_factor"] == 1:
        values["moe.moe_router_topk_scaling_factor"] = None
    if model.vocab_size is not None:
        values["model.vocab_size"] = derived.padded_vocab_size(model.vocab_size, settings)
    if all(sparse):
        del values["model.ffn_hidden_size"]
    else:
        values["model.ffn_hidden_size"] = derived.dense_ffn_size(model)
    if model.encoder_num_layers is not None:
        del values["model.seq_length"]  # relative biases have no longest sequence
    if not model.qk_layernorm:
        del values["model.qk_layernorm_scope"]
    values["moe.moe_ffn_hidden_size"] = derived.expert_ffn_size(settings)
    if not any(sparse):
        values = {name: value for name, value in values.items() if not name.startswith("moe.")}
        values["moe.num_experts"] = None
    return values


def require_same(found: Iterable[str], expected: Iterable[str], where: str, family: Family) -> None:
    """Check that no tensor is missing or unexpected.

    Raises:
        UserError: names the first few such tensors.
    """
    missing = sorted(set(expected) - set(found))
    unexpected = sorted(set(found) - set(expected))
    problems = [
        f"{where}: {len(names)} tensors {what} {family.model_type}: {', '.join(names[:3])}"
        for names, what in ((missing, "are missing for"), (unexpected, "have no place in"))
        if names
    ]
    if problems:
        raise UserError("\n".join(problems))
