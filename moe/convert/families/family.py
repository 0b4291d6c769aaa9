"""A model family of HuggingFace: what it is called, its keys, its tensors; what fits into it."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from moetron.common.errors import UserError
from moetron.common.text import value_text
from moetron.moe.config.schema import derived
from moetron.moe.config.schema.field import flag_name
from moetron.moe.config.schema.settings import Settings, fields
from moetron.moe.convert.families.config_keys import Key, Values
from moetron.moe.convert.families.tensor_rules import Rule

CONFIG = "config.json"
OTHER_GROUPS = {
    "parallel",
    "precision",
    "training",
    "optimizer",
    "learning_rate",
    "data",
    "validation",
    "checkpoint",
    "logging",
}
"""Groups of settings that say nothing about the model."""
TRAINING_ONLY = {
    "model": {
        "init_method",
        "init_method_cutoff",
        "init_method_scale",
        "embedding_init_method_std",
        "query_init_folds_scale",
        "scaled_output_init",
        "hidden_dropout",
        "attention_dropout",
        "make_vocab_size_divisible_by",
        "transformer_impl",
        "attention_backend",
        "mtp_num_layers",
        "mtp_loss_scaling_factor",
        "output_z_loss_coeff",
    },
    "moe": {
        "moe_router_dtype",
        "moe_router_bias_update_rate",
        "moe_router_init_method_std",
        "moe_expert_dropout",
        "moe_router_load_balancing_type",
        "moe_aux_loss_coeff",
        "moe_z_loss_coeff",
        "moe_input_jitter_eps",
        "moe_global_aux_loss_counts",
        "moe_aux_loss_first_choice_only",
        "moe_capacity_scope",
        "moe_expert_capacity_factor",
        "moe_eval_capacity_factor",
        "moe_minimum_capacity",
        "moe_capacity_includes_topk",
        "moe_pad_expert_input_to_capacity",
        "moe_token_drop_policy",
        "moe_token_dispatcher_type",
        "moe_grouped_gemm",
        "moe_shared_expert_overlap",
    },
}
"""Settings of the model that a trained dropless model no longer shows. All others must fit."""
PLACEHOLDERS: dict[str, dict[str, Any]] = {
    "training": {"train_iters": 1, "micro_batch_size": 1, "global_batch_size": 1},
    "learning_rate": {"lr": 1e-5},
}
"""What settings must say and a folder of HuggingFace's does not."""


@dataclass(frozen=True)
class Family:
    """One architecture of HuggingFace's transformers."""

    model_type: str
    architecture: str
    experts: bool
    """Whether its models are mixtures."""
    keys: tuple[Key, ...]
    fixed: Mapping[str, Any]
    """Settings that the architecture has no key for."""
    constants: Mapping[str, Any]
    """Keys that must say this (or be absent) for our modules to be the same function."""
    rules: Callable[[Values], list[Rule]]
    """The tensors, from the settings that `function_of` gives."""
    whole_heads: bool = False
    """transformers 5 refuses a hidden size that is not a multiple of the number of heads."""
    code: str | None = None
    """A file of convert/families that goes into the folder: the model, where transformers has none.
    It is loaded with ``trust_remote_code=True``."""

    def config(self, values: Values) -> dict[str, Any]:
        """``config.json`` of a model with these settings."""
        config: dict[str, Any] = {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            **self.constants,
        }
        for key in self.keys:
            config.update(key.to_hf(values))
        return config

    def settings(self, config: Values) -> dict[str, dict[str, Any]]:
        """The sections of settings that describe a model with this ``config.json``.

        Raises:
            UserError: it says something that is not supported; all such keys at once.
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
        """Why a model with these settings is not exactly one of this family; empty if it is.

        Found by going there and back: a setting that does not survive has no place there.
        """
        if (values["moe.num_experts"] is not None) != self.experts:
            kind = "a mixture of experts" if self.experts else "a dense model"
            return [f"--num-experts {values['moe.num_experts']}: {self.model_type} is {kind}"]
        width, heads = values["model.hidden_size"], values["model.num_attention_heads"]
        if self.whole_heads and width % heads:
            return [f"--hidden-size {width}: {self.model_type} has a multiple of its {heads} heads"]
        try:
            tree = self.settings(self.config(values))
        except UserError as error:
            return str(error).splitlines()
        theirs = function_of(Settings.model_validate({**PLACEHOLDERS, **tree}))
        return [
            f"{flag_name(name.split('.')[1])} {value_text(value)}: {self.model_type} has "
            f"{value_text(theirs.get(name))}"
            for name, value in values.items()
            if theirs.get(name) != value
        ]


def function_of(settings: Settings) -> dict[str, Any]:
    """``{"model.num_layers": 16, ...}``: what a trained model computes, unset sizes resolved.

    ``model.vocab_size`` is the number of rows that a single rank has; unset stays unset.
    """
    model, tree = settings.model, settings.model_dump(mode="json")
    values = {
        f"{group}.{name}": tree[group][name]
        for group, name, _ in fields()
        if group not in OTHER_GROUPS and name not in TRAINING_ONLY.get(group, set())
    }
    del values["moe.moe_layer_position"], values["moe.first_k_dense_replace"]
    del values["model.swiglu"]
    values["model.ffn_type"] = derived.ffn_type(model)
    if settings.moe.moe_router_load_balancing_type == "sinkhorn":  # weighs its choices otherwise
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
    if not model.qk_layernorm:
        del values["model.qk_layernorm_scope"]
    values["moe.moe_ffn_hidden_size"] = derived.expert_ffn_size(settings)
    if not any(sparse):
        values = {name: value for name, value in values.items() if not name.startswith("moe.")}
        values["moe.num_experts"] = None
    return values


def require_same(found: Iterable[str], expected: Iterable[str], where: str, family: Family) -> None:
    """No tensor is left over and none is missing: experts are not lost without a word.

    Raises:
        UserError: names the first few.
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
