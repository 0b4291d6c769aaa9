"""Layers that emulate FP8, and the effect of their products on the model."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.moe.experts import SequentialMLP

from moetron.moe.config.bridge import transformer_config
from moetron.moe.config.schema.settings import Settings
from moetron.moe.layers import specs
from moetron.moe.layers.build_model import build_model
from moetron.moe.layers.experts import GroupedExperts
from moetron.moe.layers.fp8_linear import (
    Fp8ColumnParallelLinear,
    Fp8GroupedExperts,
    Fp8RowParallelLinear,
)
from moetron.moe.layers.scaled_experts import ScaledGroupedExperts
from moetron.moe.numerics.fp8_matmul import Fp8Product
from moetron.moe.numerics.scaled_matmul import ScaledProduct
from moetron.moe.routing.router import Router
from tests.parallel.support.harness import model_parallel, run_ranks
from tests.parallel.support.sharded import assemble, fill, local_shards

LINEAR = (Fp8ColumnParallelLinear, Fp8RowParallelLinear)


@pytest.fixture
def _parallel_state() -> Iterator[None]:
    with model_parallel():
        yield


def _build(precision: dict[str, Any], tensor_ranks: int = 1, **moe: Any) -> GPTModel:
    """Return settings of four layers; the second and fourth have experts."""
    settings = Settings.model_validate(
        {
            "model": {
                "num_layers": 4,
                "hidden_size": 64,
                "num_attention_heads": 2,
                "ffn_hidden_size": 64,
                "seq_length": 64,
            },
            "moe": {
                "num_experts": 4,
                "moe_ffn_hidden_size": 64,
                "moe_layer_freq": [0, 1, 0, 1],
                "moe_shared_expert_intermediate_size": 64,
                **moe,
            },
            "parallel": {"tensor_model_parallel_size": tensor_ranks},
            "precision": precision,
            "training": {"train_iters": 1, "micro_batch_size": 1, "global_batch_size": 1},
            "learning_rate": {"lr": 1e-3},
        }
    )
    return build_model(settings, transformer_config(settings), 256)


def _kinds(module: torch.nn.Module, *bases: type) -> list[type]:
    return [type(part) for part in module.modules() if isinstance(part, bases)]


@pytest.mark.usefixtures("_parallel_state")
def test_only_middle_layers_emulate() -> None:
    kept = {"first_last_layers_bf16": True, "num_layers_at_end_in_bf16": 2}
    model = _build({"fp8_format": "e4m3", "fp8_recipe": "mxfp8", **kept})
    for number in (0, 2, 3):
        plain = _kinds(model.decoder.layers[number], ColumnParallelLinear, RowParallelLinear)
        assert plain and not set(plain) & set(LINEAR)
        assert _kinds(model.decoder.layers[number], GroupedExperts) == [GroupedExperts] * (
            number == 3
        )
    layer = model.decoder.layers[1]
    linear = _kinds(layer, ColumnParallelLinear, RowParallelLinear)
    assert sorted(kind.__name__ for kind in linear) == sorted(
        kind.__name__ for kind in LINEAR * 2
    )  # attention's two and the shared experts' two
    assert _kinds(layer, GroupedExperts) == [Fp8GroupedExperts]
    assert isinstance(layer.mlp.router, Router)
    assert type(model.output_layer) is ColumnParallelLinear


@pytest.mark.usefixtures("_parallel_state")
def test_sequential_experts_emulate() -> None:
    model = _build({"fp8_format": "hybrid"}, moe_grouped_gemm=False)
    experts = model.decoder.layers[1].mlp.experts
    assert isinstance(experts, SequentialMLP)
    assert set(_kinds(experts, ColumnParallelLinear, RowParallelLinear)) == set(LINEAR)


@pytest.mark.usefixtures("_parallel_state")
@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", "mxfp8"])
def test_weights_and_checkpoints_equal_those_without_fp8(recipe: str) -> None:
    """Same parameters and global tensors; another loss and gradient, but a close one."""
    tokens = torch.arange(64).unsqueeze(0)
    losses, norms, keys = [], [], []
    weights: dict[str, torch.Tensor] = {}
    for precision in ({}, {"fp8_format": "hybrid", "fp8_recipe": recipe}):
        model = _build(precision)
        weights = weights or {name: p.detach().clone() for name, p in model.named_parameters()}
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
        loss = model(tokens, tokens, None, labels=(tokens * 7) % 128).sum()
        loss.backward()
        losses.append(float(loss.detach()))
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))
        keys.append({key for key in model.sharded_state_dict() if "_extra_state" not in key})
    assert keys[0] == keys[1]
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert norms[1] == pytest.approx(norms[0], rel=0.05)


@pytest.mark.usefixtures("_parallel_state")
def test_on_tensor_cores_only_tensorwise_scaling_is_not_emulated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the reference of the products on a CPU: another loss than emulation, but a close one."""
    tokens = torch.arange(64).unsqueeze(0)
    losses = []
    for on_tensor_cores in (False, True):
        monkeypatch.setattr(specs, "fp8_on_tensor_cores", lambda _, on=on_tensor_cores: on)
        model = _build({"fp8_format": "hybrid", "fp8_recipe": "tensorwise"})
        layer = model.decoder.layers[1]
        kind = ScaledGroupedExperts if on_tensor_cores else Fp8GroupedExperts
        assert _kinds(layer, GroupedExperts) == [kind]
        products = _kinds(layer, ScaledProduct, Fp8Product)
        assert set(products) == {ScaledProduct if on_tensor_cores else Fp8Product}
        fill_with = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=fill_with) * 0.05)
        loss = model(tokens, tokens, None, labels=(tokens * 7) % 128).sum()
        loss.backward()
        losses.append(float(loss.detach()))
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=1e-3)


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _tensor_parallel(tensor_ranks: int, weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    with model_parallel(tensor_model_parallel_size=tensor_ranks):
        model = _build({"fp8_format": "hybrid", "fp8_recipe": "mxfp8"}, tensor_ranks)
        if weights:
            fill([model], weights)
        tokens = torch.arange(64).unsqueeze(0)
        loss = model(tokens, tokens, None, labels=(tokens * 7) % 128).sum()
        loss.backward()
        shards = local_shards([model], lambda parameter: parameter.detach())
        # Norms' gradients are summed over tensor ranks later, by finalize_model_grads.
        products = re.compile(r"\.linear_\w+\.weight$")
        grads = local_shards([model], _gradient)
        return {
            "loss": float(loss.detach()),
            "weights": shards,
            "grads": [shard for shard in grads if products.search(shard["key"])],
        }


def test_tensor_ranks_equal_one_if_blocks_do_not_cross_shards() -> None:
    """MXFP8, every rank's shard of a width a multiple of 32: the same blocks, losses and gradients.

    Sequence parallelism is on with two ranks: what is quantised is the gathered sequence.
    """
    one_rank = run_ranks(_tensor_parallel, 1, 1, {})[0]
    ranks = run_ranks(_tensor_parallel, 2, 2, assemble([one_rank["weights"]]))
    assert ranks[0]["loss"] == pytest.approx(one_rank["loss"], rel=1e-5)
    expected = assemble([one_rank["grads"]])
    assert len(expected) == 4 * 2 + 2 * 2 + 2 * 4
    for key, grad in assemble(rank["grads"] for rank in ranks).items():
        error = (grad - expected[key]).norm() / expected[key].norm()
        assert float(error) < 1e-3, (key, float(error))
        assert float(grad.norm()) > 0
