"""Loss-free balancing by an expert bias (arXiv 2408.15664), updated from int64 counts.

Shape suffixes: L layers with experts in this pipeline stage, E experts.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.process_groups_config import ProcessGroupCollection

from moetron.moe.routing.router import Router


def surplus_signs(counts_LE: torch.Tensor) -> torch.Tensor:
    """Return the sign of count - mean count for counts int64 [L, E], exact at any size.

    megatron-core's mean is fp32, which has no odd integers above 2^24.
    """
    return (counts_LE * counts_LE.shape[-1] - counts_LE.sum(-1, keepdim=True)).sign()


def update_expert_biases(chunks: Sequence[torch.nn.Module]) -> None:
    """Move every bias by its rate against the surplus of the step, and clear the counts.

    Collective over TP x CP x DP.
    """
    modules = (module for chunk in chunks for module in chunk.modules())
    routers = [m for m in modules if isinstance(m, Router) and m.enable_expert_bias]
    if not routers:
        return
    counts_LE = torch.stack([router.local_tokens_per_expert for router in routers])
    group = routers[0].tp_dp_cp_group
    if group.size() > 1:
        # All-reduce over TP x CP x DP: these ranks replicate the layers of a stage but route
        # different tokens, and the replicas of the bias must stay equal.
        torch.distributed.all_reduce(counts_LE, group=group)
    for router, sign_E in zip(routers, surplus_signs(counts_LE), strict=True):
        router._maintain_float32_expert_bias()
        router.expert_bias -= router.config.moe_router_bias_update_rate * sign_E
        router.local_tokens_per_expert.zero_()


def finalize_gradients(
    model: list[DistributedDataParallel],
    num_tokens: torch.Tensor | None = None,
    pg_collection: ProcessGroupCollection | None = None,
    **kwargs: Any,
) -> None:
    """Run `update_expert_biases`, megatron-core's ``finalize_model_grads``, and its last part.

    megatron-core finds zero counts and leaves the biases unchanged. Its collectives: gradient
    reduction over the data-parallel groups; all-reduces over the tensor group for parameters marked
    ``sequence_parallel``; over the first and last pipeline stage for tied embeddings.

    Args:
        model: chunks of this rank.
        num_tokens: loss tokens of this rank, by whose sum all gradients are divided, if any; not on
            other stages than the last. megatron-core would divide too, but reads the sum on the
            host first, for every chunk.
        pg_collection: ``pp`` and ``dp_cp`` are read here.
        kwargs: further arguments of ``finalize_model_grads``.
    """
    update_expert_biases(model)
    groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
    finalize_model_grads(model, None, pg_collection=groups, **kwargs)
    if num_tokens is None:
        return
    if groups.pp.size() > 1:
        # Broadcast over the pipeline group from its last stage, which alone counted loss tokens.
        last = torch.distributed.get_process_group_ranks(groups.pp)[-1]
        torch.distributed.broadcast(num_tokens, src=last, group=groups.pp)
    if groups.dp_cp.size() > 1:
        # All-reduce over DP x CP, which hold other samples and positions of the global batch.
        torch.distributed.all_reduce(num_tokens, group=groups.dp_cp)
    scaling = 1.0 / num_tokens.clamp(min=1)
    for chunk in model:
        chunk.scale_gradients(scaling)
