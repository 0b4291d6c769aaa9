"""Grouped experts against megatron-core's ``SequentialMLP``."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.transformer_config import TransformerConfig

from moetron.moe.checkpoint.tensor_writer import Contents
from moetron.moe.layers.experts import GroupedExperts, grouped_gemm_fits
from tests.parallel.support.harness import model_parallel, run_ranks
from tests.parallel.support.sharded import assemble, fill, local_shards
from tests.unit.training.host_reads import HostReads

EXPERTS, HIDDEN, FFN = 4, 16, 8


def _config(**changes: Any) -> TransformerConfig:
    values: dict[str, Any] = {
        "num_layers": 1,
        "hidden_size": HIDDEN,
        "num_attention_heads": 2,
        "num_moe_experts": EXPERTS,
        "moe_ffn_hidden_size": FFN,
        "moe_router_topk": 2,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "bias_activation_fusion": False,
    }
    return TransformerConfig(**{**values, **changes})


GELU = {"gated_linear_unit": False, "activation_func": F.gelu}
BF16 = {"bf16": True, "params_dtype": torch.bfloat16}


def _pair(config: TransformerConfig, experts: int = EXPERTS) -> list[torch.nn.Module]:
    """Return our experts and megatron-core's, initialised from the same random state."""
    groups = ProcessGroupCollection.use_mpu_process_groups()
    linear = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    modules = []
    for kind, submodules in ((GroupedExperts, None), (SequentialMLP, linear)):
        model_parallel_cuda_manual_seed(5, force_reset_rng=True)
        modules.append(kind(experts, config, submodules, pg_collection=groups))
    return modules


@pytest.fixture(scope="module", autouse=True)
def _parallel_state() -> Iterator[None]:
    with model_parallel():
        yield


def _weights(module: torch.nn.Module, read: Any = torch.nn.Parameter.detach) -> list[torch.Tensor]:
    """Return fc1 [E, rows, H] and fc2 [E, H, F] after ``read``."""
    if isinstance(module, GroupedExperts):
        return [read(module.weight1), read(module.weight2)]
    return [
        torch.stack([read(getattr(expert, name).weight) for expert in module.local_experts])
        for name in ("linear_fc1", "linear_fc2")
    ]


@pytest.mark.parametrize("changes", [{}, GELU, BF16], ids=["swiglu", "gelu", "bf16"])
def test_draws_the_same_weights_with_the_same_attributes(changes: dict[str, Any]) -> None:
    ours, theirs = _pair(_config(**changes))
    for mine, expected in zip(_weights(ours), _weights(theirs), strict=True):
        assert torch.equal(mine, expected)
    fc1, fc2 = theirs.local_experts[0].linear_fc1.weight, theirs.local_experts[0].linear_fc2.weight
    for mine, linear in ((ours.weight1, fc1), (ours.weight2, fc2)):
        assert mine.tensor_model_parallel == linear.tensor_model_parallel
        assert mine.partition_dim == linear.partition_dim + 1  # after the axis of experts
        assert mine.partition_stride == linear.partition_stride
        assert mine.allreduce == linear.allreduce and mine.dtype == linear.dtype


def _compare(changes: dict[str, Any], counts: list[int], tolerance: float) -> None:
    modules = _pair(_config(**changes))
    dtype, rows = _config(**changes).params_dtype, sum(counts)
    x = torch.randn(rows, HIDDEN, dtype=dtype)
    probs, grad = torch.rand(rows), torch.randn(rows, HIDDEN, dtype=dtype)
    results = []
    for module in modules:
        leaves = [x.clone().requires_grad_(), probs.clone().requires_grad_()]
        out, bias = module(leaves[0], torch.tensor(counts), leaves[1])
        assert bias is None and out.dtype == dtype
        out.backward(grad)
        results.append([out, *(leaf.grad for leaf in leaves), *_weights(module, lambda p: p.grad)])
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, rtol=tolerance, atol=tolerance)


@example([0, 0, 0, 0])
@example([0, 9, 0, 0])
@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=EXPERTS, max_size=EXPERTS))
def test_equals_sequential_experts(counts: list[int]) -> None:
    _compare({}, counts, 1e-6)


@pytest.mark.parametrize("counts", [[0, 0, 0, 0], [0, 7, 0, 0], [3, 0, 2, 5]])
@pytest.mark.parametrize("changes", [GELU, BF16], ids=["gelu", "bf16"])
def test_equals_sequential_experts_in_other_configurations(
    changes: dict[str, Any], counts: list[int]
) -> None:
    _compare(changes, counts, 2e-2 if changes is BF16 else 1e-5)


def test_expanded_gradients_are_accepted() -> None:
    ours, _ = _pair(_config())
    out, _ = ours(torch.randn(6, HIDDEN), torch.tensor([2, 0, 3, 1]), torch.ones(6))
    out.sum().backward()
    assert float(ours.weight2.grad[0].abs().sum()) > 0 == float(ours.weight2.grad[1].abs().sum())


@pytest.mark.parametrize(
    ("changes", "ranks", "fits"),
    [
        ({}, 1, True),
        ({}, 4, False),  # rows of 2 floats
        (BF16, 1, True),
        ({**BF16, "moe_ffn_hidden_size": 4}, 1, False),
        ({"hidden_size": 18}, 1, False),
        ({"add_bias_linear": True}, 1, False),
    ],
)
def test_grouped_gemm_fits(changes: dict[str, Any], ranks: int, fits: bool) -> None:
    assert grouped_gemm_fits(_config(**changes), ranks) == fits


LAYOUTS: dict[str, dict[str, int]] = {
    "one_rank": {},
    "EP2": {"expert_model_parallel_size": 2},
    "ETP2": {"expert_tensor_parallel_size": 2, "tensor_model_parallel_size": 2},
}


def _fill_both(
    layout: dict[str, int], changes: dict[str, Any], weights: dict[str, torch.Tensor]
) -> list[dict[str, Any]]:
    with model_parallel(**layout):
        local_experts = EXPERTS // layout.get("expert_model_parallel_size", 1)
        ours, theirs = _pair(_config(**changes, **layout), local_experts)
        fill([ours], weights)
        fill([theirs], weights)
        for mine, expected in zip(_weights(ours), _weights(theirs), strict=True):
            assert torch.equal(mine, expected)
        mine, expected = (
            {
                entry.unique_key: entry.replica_id
                for entry in module.sharded_state_dict(prefix="mlp.experts.").values()
                if isinstance(entry, ShardedObject)
            }
            for module in (ours, theirs)
        )
        assert mine == expected and len(mine) == 2 * local_experts
        return local_shards([ours], torch.nn.Parameter.detach)


@pytest.mark.parametrize("changes", [{}, GELU], ids=["swiglu", "gelu"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_checkpoint_tensors_equal_those_of_sequential_experts(
    layout: dict[str, int], changes: dict[str, Any]
) -> None:
    rows = FFN if changes is GELU else 2 * FFN
    weights = {
        "experts.linear_fc1.weight": torch.randn(EXPERTS, rows, HIDDEN),
        "experts.linear_fc2.weight": torch.randn(EXPERTS, HIDDEN, FFN),
    }
    result = assemble(run_ranks(_fill_both, 2 if layout else 1, layout, changes, weights))
    assert result.keys() == weights.keys()
    for key, expected in weights.items():
        assert torch.equal(result[key], expected), key


def _save_and_load(folder: str, ours_first: bool) -> None:
    with model_parallel():
        pair = _pair(_config())
        source, target = pair if ours_first else reversed(pair)
        for parameter in target.parameters():
            torch.nn.init.zeros_(parameter)
        # megatron-core's own writer would leave a server process running.
        contents = Contents()
        saved_state = source.sharded_state_dict(prefix="mlp.experts.")
        dist_checkpointing.save(saved_state, folder, sharded_strategy=contents)
        contents.write(Path(folder))
        state = dist_checkpointing.load(target.sharded_state_dict(prefix="mlp.experts."), folder)
        prefix = "mlp.experts."
        target.load_state_dict({key.removeprefix(prefix): state[key] for key in state})
        for loaded, saved in zip(_weights(target), _weights(source), strict=True):
            assert torch.equal(loaded, saved) and float(saved.abs().sum()) > 0


@pytest.mark.parametrize("ours_first", [True, False], ids=["to sequential", "from sequential"])
def test_checkpoints_are_exchanged(tmp_path: Path, ours_first: bool) -> None:
    run_ranks(_save_and_load, 1, str(tmp_path), ours_first)


def test_counts_in_host_memory_are_sent_without_a_wait() -> None:
    """As megatron-core's all-to-all leaves them; the meta device stands for a GPU."""
    groups = ProcessGroupCollection.use_mpu_process_groups()
    with torch.device("meta"):
        config = _config(perform_initialization=False, **BF16)
        experts = GroupedExperts(EXPERTS, config, pg_collection=groups)
        x, probs = torch.empty(6, HIDDEN, dtype=torch.bfloat16), torch.empty(6)
    with HostReads() as reads:
        out, _ = experts(x, torch.tensor([1, 0, 3, 2]), probs)
    assert out.shape == x.shape and out.device.type == "meta"
    assert not reads.found
