"""Sparse upcycling: initialization of a mixture of experts from a trained dense model.

Every expert is a copy of the dense FFN (Komatsuzaki et al., arXiv 2212.05055), or a slice of it
(granular upcycling: He et al., arXiv 2410.07524). All other weights are kept, the router is
initialized randomly, optimizer and data start from zero (as in OLMoE's ablation, arXiv 2409.02060,
section 4.1).
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moetron.common.errors import ConfigError
from moetron.moe.checkpoint import run_folder as checkpoint_folder
from moetron.moe.checkpoint.compatibility import tokenizer_fingerprints
from moetron.moe.config.schema import derived
from moetron.moe.config.schema.experts import MoESettings
from moetron.moe.config.schema.settings import Settings
from moetron.moe.config.upcycling import (
    UpcyclingSettings,
    granularity,
    output_scale,
    upcycling_problems,
)
from moetron.moe.convert.checkpoint_tensors import CheckpointTensors
from moetron.moe.convert.families.decoder_blocks import our_layer
from moetron.moe.convert.families.family import CONFIG, OTHER_GROUPS
from moetron.moe.convert.from_huggingface import HuggingFaceModel
from moetron.moe.convert.initial_checkpoint import Weights, write_start


@dataclass(frozen=True)
class DenseModel:
    """Dense model to upcycle."""

    weights: Weights
    settings: Settings
    fingerprint: str | None
    """Fingerprint of its tokenizer."""


def is_huggingface(path: Path) -> bool:
    """Return whether a folder is a HuggingFace folder, not a run."""
    return (path / CONFIG).is_file()


def dense_run(path: Path) -> DenseModel:
    """Open our checkpoint, of any layout: a run folder (its latest) or one step folder.

    Raises:
        UserError: the checkpoint is missing or damaged.
    """
    checkpoint = checkpoint_folder.read(path)
    checkpoint_folder.verify(checkpoint.folder)
    fingerprints = tokenizer_fingerprints(checkpoint.record.stream)
    return DenseModel(
        CheckpointTensors(checkpoint.folder),
        checkpoint_folder.one_rank_settings(checkpoint.record),
        fingerprints[0] if fingerprints else None,
    )


def dense_folder(path: Path, tokenizer: str | None, fingerprint: str | None) -> DenseModel:
    """Open a HuggingFace folder; ``tokenizer`` and its fingerprint as in `from_hf`.

    Raises:
        UserError: another architecture, or missing or unexpected tensors.
    """
    model = HuggingFaceModel(path, tokenizer)
    return DenseModel(model, model.settings, fingerprint)


def upcycle(
    dense: DenseModel, output: Path, moe: MoESettings, options: UpcyclingSettings
) -> Settings:
    """Upcycle ``dense`` to a run folder (`write_start`); return the settings of the mixture.

    Args:
        dense: model to start from.
        output: a run folder without checkpoints; created if missing.
        moe: number, width and placement of the experts, and routing.
        options: router, scaling, noise.

    Raises:
        UserError: the dense model cannot become that mixture; lists all reasons.
    """
    settings = dense.settings.model_copy(update={"moe": moe})
    if problems := upcycling_problems(dense.settings, settings):
        raise ConfigError(problems)
    weights = UpcycledWeights(dense.weights, settings, options)
    write_start(output, weights, settings, _model_sections(settings), dense.fingerprint)
    return settings


def _model_sections(settings: Settings) -> dict[str, dict[str, Any]]:
    """Return the recipe sections that describe the model and its tokenizer."""
    tree = settings.model_dump(mode="json", exclude_defaults=True)
    kept = {group: section for group, section in tree.items() if group not in OTHER_GROUPS}
    kept["moe"] |= {"moe_router_topk": settings.moe.moe_router_topk}  # always explicit
    kept["precision"] = {"bf16": settings.precision.bf16}
    data = {
        name: getattr(settings.data, name) for name in ("tokenizer_model", "encoder_seq_length")
    }
    if data := {name: value for name, value in data.items() if value is not None}:
        kept["data"] = data
    return kept


@dataclass(frozen=True)
class _Tensor:
    empty: Tensor
    make: Callable[[], Tensor]


class UpcycledWeights:
    """Weights of the mixture, produced one at a time; expert i is slice i mod g of copy i // g.

    The g experts of a copy start with equal router rows, so that a token's best k experts are all
    slices of its best k / g copies (He et al.); the rows differ after one step.

    Args:
        dense: weights of the dense model.
        settings: of the mixture.
        options: router, scaling, noise.
    """

    def __init__(self, dense: Weights, settings: Settings, options: UpcyclingSettings) -> None:
        assert settings.moe.num_experts is not None
        self._experts = settings.moe.num_experts
        self._parts = granularity(settings)
        self._matrices = derived.ffn_inner_matrices(settings.model)
        scale = output_scale(settings) if options.weight_scaling else 1.0
        # Scale the factors that the output is linear in: not the gate, nor the input of gelu.
        both = derived.ffn_type(settings.model) != "gelu"
        self._up_scale = math.sqrt(scale) if both else 1.0
        self._down_scale = scale / self._up_scale
        self._options = options
        self._dense = dense
        self._tensors = {name: self._kept(name) for name in dense.names()}
        for layer, sparse in enumerate(derived.moe_layers(settings)):
            if sparse:
                self._replace_ffn(our_layer(layer))

    def names(self) -> list[str]:
        """Return the names of all weights."""
        return list(self._tensors)

    def empty(self, name: str) -> Tensor:
        """Return a meta tensor of the same shape and dtype."""
        return self._tensors[name].empty

    def read(self, name: str) -> Tensor:
        """Return the tensor."""
        return self._tensors[name].make()

    def _kept(self, name: str) -> _Tensor:
        return _Tensor(self._dense.empty(name), lambda: self._dense.read(name))

    def _replace_ffn(self, layer: str) -> None:
        """Replace the dense FFN of a layer (a name prefix) with experts, router and norm."""
        prefix, norm = f"{layer}mlp.linear_fc", f"{layer}mlp.linear_fc1.layer_norm_"
        for part in ("weight", "bias"):
            if kept := self._tensors.pop(norm + part, None):
                self._tensors[f"{layer}pre_mlp_layernorm.{part}"] = kept
        for which, slices in ((1, self._slice_fc1), (2, self._slice_fc2)):
            dense, ours = f"{prefix}{which}.weight", f"{layer}mlp.experts.experts.linear_fc{which}"
            self._tensors[f"{ours}.weight"] = self._stack(dense, f"{ours}.weight", slices)
            del self._tensors[dense]
        fc1, router = self._dense.empty(f"{prefix}1.weight"), f"{layer}mlp.router.weight"
        rows = fc1.new_empty(self._experts, fc1.shape[1])
        self._tensors[router] = _Tensor(rows, lambda: self._router(router, rows))

    def _stack(self, dense: str, ours: str, slices: Callable[[Tensor], Tensor]) -> _Tensor:
        """Return the stack of all experts' slices of one dense matrix."""
        matrix = self._dense.empty(dense)
        empty = matrix.new_empty(self._experts, *slices(matrix).shape[1:])
        return _Tensor(empty, lambda: self._all_experts(ours, slices(self._dense.read(dense))))

    def _slice_fc1(self, fc1: Tensor) -> Tensor:
        """[m F, H] -> [g, m f, H]: a slice has the same rows of each of the m matrices."""
        parts = fc1.unflatten(0, (self._matrices, self._parts, -1)).transpose(0, 1).clone()
        parts[:, -1] *= self._up_scale
        return parts.flatten(1, 2)

    def _slice_fc2(self, fc2: Tensor) -> Tensor:
        """[H, F] -> [g, H, f]."""
        return fc2.unflatten(1, (self._parts, -1)).transpose(0, 1) * self._down_scale

    def _all_experts(self, name: str, parts: Tensor) -> Tensor:
        """[g, ...] -> [E, ...], some of the values redrawn."""
        experts = parts.repeat(self._experts // self._parts, *[1] * (parts.dim() - 1))
        if self._options.noise_fraction:
            random = self._generator(name)
            for expert in experts:
                chosen = torch.rand(expert.shape, generator=random) < self._options.noise_fraction
                noise = torch.randn(expert.shape, generator=random) * self._options.noise_std
                expert[chosen] = noise[chosen].to(expert.dtype)
        return experts

    def _router(self, name: str, empty: Tensor) -> Tensor:
        """Return [E, H]: one random row per copy, repeated for its slices."""
        shape = (self._experts // self._parts, empty.shape[1])
        rows = torch.randn(shape, generator=self._generator(name)) * self._options.router_init_std
        return rows.repeat_interleave(self._parts, dim=0).to(empty.dtype)

    def _generator(self, name: str) -> torch.Generator:
        """Return a generator seeded by the tensor name, independent of other tensors."""
        digest = hashlib.sha256(f"{self._options.seed} {name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
