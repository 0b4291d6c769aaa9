"""Each adaptation alone: megatron-core's code fails without it and works with it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing import ShardedTensor, exchange_utils
from megatron.core.distributed import DistributedDataParallel
from megatron.core.enums import ModelType
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.optimizer import clip_grads, get_megatron_optimizer
from megatron.core.pipeline_parallel import schedules
from megatron.core.pipeline_parallel.utils import ScheduleNode, get_comm_stream, set_streams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import data as parallel_data
from megatron.core.tensor_parallel import layers as parallel_layers
from megatron.core.tensor_parallel import mappings
from megatron.core.tensor_parallel import random as parallel_random
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer import utils as transformer_utils
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig

from moetron.moe.config.bridge import ddp_config, optimizer_config, transformer_config
from moetron.moe.config.schema.settings import Settings
from moetron.moe.host.adapt import ADAPTATIONS, EVERYWHERE, adapt_host, restore_host
from moetron.moe.layers.build_model import build_model
from tests.parallel.support.harness import RankFailed, model_parallel, run_ranks
from tests.unit.host.prediction_scenario import prediction_losses

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is adapted on a GPU")


def _config(**changes: Any) -> TransformerConfig:
    values: dict[str, Any] = {
        "num_layers": 1,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_moe_experts": 4,
        "moe_router_topk": 2,
        "moe_router_dtype": "fp32",
        "add_bias_linear": False,
        "bf16": True,
        "params_dtype": torch.bfloat16,
    }
    return TransformerConfig(**{**values, **changes})


def _current_device() -> None:
    assert RotaryEmbedding(kv_channels=8, rotary_percent=1.0)(4).shape == (4, 1, 1, 8)
    with torch.device("meta"):
        layer = tensor_parallel.ColumnParallelLinear(
            4, 4, config=_config(), init_method=torch.nn.init.zeros_, bias=False
        )
    assert layer.weight.is_meta


def _broadcast() -> None:
    batch = {"tokens": torch.arange(6).view(2, 3)}
    assert torch.equal(
        parallel_data.broadcast_data(["tokens"], batch, torch.int64)["tokens"], batch["tokens"]
    )


def _dispatch() -> None:
    """Each rank sends one token to expert 0 and two to expert 1; each rank has one expert."""
    groups = ProcessGroupCollection.use_mpu_process_groups()
    rank, ranks = groups.ep.rank(), groups.ep.size()
    experts = 2 // ranks
    config = _config(
        num_moe_experts=2,
        moe_router_topk=1,
        moe_router_pre_softmax=True,
        expert_model_parallel_size=ranks,
    )
    local = list(range(rank * experts, (rank + 1) * experts))
    dispatcher = MoEAlltoAllTokenDispatcher(experts, local, config, pg_collection=groups)
    hidden = torch.arange(3.0).view(3, 1, 1).expand(3, 1, 16).contiguous() + 10 * rank
    routing = torch.tensor([[False, True], [True, False], [False, True]])
    tokens, probs = dispatcher.dispatch_preprocess(hidden, routing, routing.float())
    tokens, probs = dispatcher.token_dispatch(tokens, probs)
    tokens, counts, probs = dispatcher.dispatch_postprocess(tokens, probs)
    if ranks == 1:
        assert tokens[:, 0].tolist() == [1, 0, 2] and counts.tolist() == [1, 2]
    else:
        assert tokens[:, 0].tolist() == ([1, 11] if rank == 0 else [0, 2, 10, 12])
    combined = dispatcher.token_combine(dispatcher.combine_preprocess(tokens))
    assert torch.equal(dispatcher.combine_postprocess(combined), hidden)


def _combined_schedule() -> None:
    set_streams()
    event = torch.cuda.Event()
    node = ScheduleNode(lambda x: 2 * x, get_comm_stream(), event, free_input=True)
    given = torch.ones(3, requires_grad=True)
    with torch.cuda.nvtx.range("forward"):
        out = node.forward(given)
    assert out.tolist() == [2, 2, 2] and given.untyped_storage().size() == 0
    assert node.backward(torch.ones(3)).tolist() == [2, 2, 2]


def _random_states() -> None:
    tracker = tensor_parallel.get_cuda_rng_tracker()
    before = torch.get_rng_state()
    with tracker.fork():
        first = torch.rand(4)
    assert torch.equal(before, torch.get_rng_state())
    with tracker.fork():
        assert not torch.equal(first, torch.rand(4))


def _rotary_chunks() -> None:
    group = torch.distributed.group.WORLD
    rotary = RotaryEmbedding(kv_channels=8, rotary_percent=1.0, cp_group=group)
    held = {0: [0, 1, 6, 7], 1: [2, 3, 4, 5]}[group.rank()]
    full = rotary(8, packed_seq=True)  # not sharded
    assert torch.equal(rotary(8), full[held])


def _latent_attention() -> None:
    shape = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "seq_length": 8}
    tree = {
        "model": shape,
        "attention": {"multi_latent_attention": True},
        "training": {"train_iters": 1, "micro_batch_size": 1, "global_batch_size": 1},
        "learning_rate": {"lr": 1e-3},
    }
    settings = Settings.model_validate(tree)
    build_model(settings, transformer_config(settings), 32)


def _router(**changes: Any) -> None:
    groups = ProcessGroupCollection.use_mpu_process_groups()
    router = TopKRouter(_config(**changes), pg_collection=groups)
    probs, routing_map = router(torch.randn(3, 2, 16, dtype=torch.bfloat16))
    assert probs.dtype == torch.float32 and routing_map.sum(1).tolist() == [2] * 6


def _router_with_bias() -> None:
    torch.compiler.set_stance("fail_on_recompile")
    _router(moe_router_enable_expert_bias=True, moe_router_score_function="sigmoid")


def _gather_uneven() -> None:
    group = torch.distributed.group.WORLD
    rank = torch.distributed.get_rank()
    for sizes in ([1, 3], [0, 2], [2, 2]):
        rows = torch.full((sizes[rank], 2), float(rank))
        full = mappings._gather_along_first_dim(rows, group, output_split_sizes=sizes)
        assert full[:, 1].tolist() == [0.0] * sizes[0] + [1.0] * sizes[1]


def _settings(bf16: bool, distributed: bool = False) -> Settings:
    return Settings.model_validate(
        {
            "model": {
                "num_layers": 1,
                "hidden_size": 8,
                "num_attention_heads": 1,
                "seq_length": 4,
            },
            "parallel": {"use_distributed_optimizer": distributed},
            "precision": {"bf16": bf16},
            "training": {"train_iters": 1, "micro_batch_size": 1, "global_batch_size": 1},
            "learning_rate": {"lr": 0.1},
        }
    )


def _optimizer_step(bf16: bool, distributed: bool = False) -> None:
    settings = _settings(bf16, distributed)
    config = transformer_config(settings)
    layer = torch.nn.Linear(8, 8, bias=False, dtype=config.params_dtype)
    model = DistributedDataParallel(config, ddp_config(settings), layer)
    optimizer = get_megatron_optimizer(optimizer_config(settings), [model])
    before = layer.weight.detach().clone()
    layer.weight.main_grad.fill_(3.0)
    success, norm, _ = optimizer.step()
    assert success and norm == pytest.approx(24.0) and not torch.equal(before, layer.weight)


def _optimizer_scalars() -> None:
    _optimizer_step(bf16=False)
    weight = torch.nn.Parameter(torch.ones(4))
    weight.main_grad = torch.tensor([0.0, 1.0, 0.0, 2.0])
    weight.grad = weight.main_grad
    world = torch.distributed.group.WORLD
    assert clip_grads.count_zeros_fp32([weight], world) == 2
    assert clip_grads.get_grad_norm_fp32([weight.grad], float("inf"), world) == 2


def _parameter_types() -> None:
    _optimizer_step(bf16=True)
    _optimizer_step(bf16=True, distributed=True)
    _optimizer_step(bf16=False, distributed=True)


def _causal_masks() -> None:
    assert transformer_utils.get_default_causal_mask(3).sum() == 3
    window = transformer_utils.get_sliding_window_causal_mask(3, 3, (1, 0))
    assert window.sum() == 4


def _schedule() -> None:
    config = _config(num_moe_experts=None, bf16=False, params_dtype=torch.float32)
    model = torch.nn.Linear(2, 1)
    model.config, model.model_type = config, ModelType.encoder_or_decoder
    model.set_input_tensor = lambda _: None

    def step(batches: Any, model: torch.nn.Module) -> Any:
        output = model(next(batches))
        return output, lambda out: (out.sum(), {"loss": out.detach().sum()})

    losses = schedules.get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter([torch.ones(3, 2)]),
        model=[model],
        num_microbatches=1,
        seq_length=3,
        micro_batch_size=1,
        forward_only=False,
    )
    assert len(losses) == 1 and model.weight.grad.tolist() == [[3.0, 3.0]]


def _pipeline_outputs() -> None:
    sent = torch.ones(4, requires_grad=True) * 2
    schedules.deallocate_output_tensor(sent, deallocate_pipeline_outputs=True)
    schedules.custom_backward(sent, torch.ones(4))
    assert sent.tolist() == [2.0] * 4


def _discarded_outputs() -> None:
    x = torch.ones(3, requires_grad=True)
    checkpoint = tensor_parallel.CheckpointWithoutOutput()
    sine = checkpoint.checkpoint(torch.sin, x)
    squared = sine * sine
    checkpoint.discard_output_and_register_recompute(squared)
    assert sine.untyped_storage().size() == 0
    squared.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.sin(2 * x.detach()))


def _recomputed_storage() -> None:
    def load_inline(**_: Any) -> None:
        raise AssertionError("compiles")

    parallel_random.load_inline = load_inline
    _discarded_outputs()


def _output_layer() -> None:
    config = _config(gradient_accumulation_fusion=True)
    layer = tensor_parallel.ColumnParallelLinear(
        4, 4, config=config, init_method=torch.nn.init.ones_, bias=False
    )
    layer.weight.main_grad = torch.zeros(4, 4)
    layer(torch.ones(2, 4, dtype=torch.bfloat16))[0].sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.float().eq(2).all()
    assert config.gradient_accumulation_fusion  # for Transformer Engine's layers


def _checkpoint_exchange() -> None:
    tensor = torch.ones(4)
    shard = ShardedTensor.from_rank_offsets("weight", tensor).without_data()
    where: dict[Any, torch.Tensor] = {}
    buffer, _ = exchange_utils._get_empty_tensor_for_exchange("id", {"id": shard}, {}, where)
    assert buffer.shape == (4,) and where["id"] is buffer


SCENARIOS: dict[str, tuple[Callable[[], None], int]] = {
    "current_device": (_current_device, 1),
    "tensor_cuda": (_broadcast, 1),
    "cuda_streams": (_dispatch, 1),
    "combined_schedule": (_combined_schedule, 1),
    "random_states": (_random_states, 1),
    "rotary_chunks": (_rotary_chunks, 2),
    "latent_attention": (_latent_attention, 1),
    "router_gemm": (_router, 1),
    "eager_router": (_router_with_bias, 1),
    "discarded_outputs": (_discarded_outputs, 1),
    "output_layer": (_output_layer, 1),
    "recomputed_storage": (_recomputed_storage, 1),
    "prediction_losses": (prediction_losses, 1),
    "split_sizes": (_dispatch, 2),
    "uneven_gather": (_gather_uneven, 2),
    "schedule_scalars": (_schedule, 1),
    "pipeline_outputs": (_pipeline_outputs, 1),
    "optimizer_scalars": (_optimizer_scalars, 1),
    "parameter_types": (_parameter_types, 1),
    "causal_masks": (_causal_masks, 1),
    "broadcast_sizes": (_broadcast, 1),
    "checkpoint_exchange": (_checkpoint_exchange, 1),
}


def _play(name: str, adapted: bool) -> None:
    scenario, ranks = SCENARIOS[name]
    with model_parallel(expert_model_parallel_size=ranks):
        if not adapted:
            restore_host([name])
        scenario()


def test_every_adaptation_has_a_scenario() -> None:
    assert SCENARIOS.keys() == ADAPTATIONS.keys()


def _has_patches(name: str) -> bool:
    restore_host([name])
    return bool(ADAPTATIONS[name]())


@pytest.mark.parametrize("name", SCENARIOS)
def test_needed_and_sufficient(name: str) -> None:
    if name in (*EVERYWHERE, "recomputed_storage") and not run_ranks(_has_patches, 1, name)[0]:
        pytest.skip("the installed version of megatron-core does not need it")
    run_ranks(_play, SCENARIOS[name][1], name, True)
    with pytest.raises(RankFailed):
        run_ranks(_play, SCENARIOS[name][1], name, False)


def _originals() -> list[Any]:
    cuda = [torch.cuda.current_device, torch.cuda.Stream, torch.Tensor.cuda]
    schedule = schedules.forward_backward_no_pipelining.__code__
    return [*cuda, schedule, tensor_parallel.CheckpointWithoutOutput.__init__.__defaults__]


def _apply_twice_and_undo() -> None:
    before = _originals()
    adapt_host()
    once = _originals()
    assert all(new is not old for new, old in zip(once, before, strict=True))
    adapt_host()
    assert _originals() == once
    restore_host()
    assert _originals() == before


def test_nothing_on_import_idempotent_and_undone() -> None:
    run_ranks(_apply_twice_and_undo, 1)


def _pretend_cuda() -> None:
    """With CUDA, functions of torch and megatron-core that name it are not patched."""
    torch.cuda.is_available = lambda: True
    before, have_te = _originals(), multi_latent_attention.HAVE_TE
    adapt_host()
    after = _originals()
    assert after[:-1] == before[:-1] and after[-1] == (None,)
    assert moe_utils.te_general_gemm is None and not multi_latent_attention.HAVE_TE
    assert not tensor_parallel.CheckpointWithoutOutput().fp8
    restore_host()
    assert _originals() == before and have_te == multi_latent_attention.HAVE_TE


def test_bugs_of_megatron_core_are_fixed_with_cuda_too() -> None:
    known = "router_gemm latent_attention discarded_outputs output_layer prediction_losses"
    assert set(EVERYWHERE) == set(known.split())
    run_ranks(_pretend_cuda, 1)


@pytest.mark.parametrize("name", [name for name in EVERYWHERE if name != "prediction_losses"])
def test_a_fix_leaves_present_packages_alone(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(parallel_random, "HAVE_TE", True)
    monkeypatch.setattr(multi_latent_attention, "TELinear", torch.nn.Linear)
    monkeypatch.setattr(moe_utils, "te_general_gemm", torch.mm, raising=False)
    monkeypatch.setattr(parallel_layers, "_grad_accum_fusion_available", True)
    assert EVERYWHERE[name]() == []


def _skip_one() -> None:
    adapt_host(skip={"discarded_outputs"})
    assert tensor_parallel.CheckpointWithoutOutput.__init__.__defaults__ == (False,)
    adapt_host()
    assert tensor_parallel.CheckpointWithoutOutput.__init__.__defaults__ == (None,)


def test_skip() -> None:
    run_ranks(_skip_one, 1)
