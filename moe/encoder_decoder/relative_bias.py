"""T5's relative biases: one table for each stack, shared by all its layers (Raffel et al. 2020).

Shape suffixes: A heads on this rank, S positions of a stack.
"""

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.common.embeddings.relative_pos_embedding import RelativePositionEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import scatter_to_tensor_model_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)

from moetron.moe.config.bridge import ModelConfig
from moetron.moe.config.schema.model import ModelSettings
from moetron.moe.routing.expert_bias import finalize_gradients

STACKS = ("encoder", "decoder")
INITIAL_STD = 0.02
"""Of a table's entries: small beside the logits; HuggingFace's T5 draws with hidden size^-0.5."""


class RelativeBiases(MegatronModule):
    """The tables of both stacks, [buckets, heads] in full on every rank and every chunk.

    Chunks hold replicas, so that a pipeline sends no biases: `sum_over_chunks` adds up their
    gradients. Replicas start equal since all are drawn from the run's seed.

    Args:
        config: megatron-core's.
        model: buckets and the largest distance.
        seed: of the run.
        groups: ``tp`` and ``pp`` are read.
        chunk: number of the chunk on its rank; the replica of the first stage's first chunk counts
            in norms and is written to checkpoints.
    """

    def __init__(
        self,
        config: ModelConfig,
        model: ModelSettings,
        seed: int,
        groups: ProcessGroupCollection,
        chunk: int,
    ) -> None:
        super().__init__(config=config)
        self._tp_group = groups.tp
        self._replica = groups.pp.rank() + chunk * groups.pp.size()
        generator = torch.Generator("cpu").manual_seed(seed)

        def draw(weight: torch.Tensor) -> None:
            with torch.device("cpu"):
                drawn = torch.empty(weight.shape).normal_(0.0, INITIAL_STD, generator=generator)
            with torch.no_grad():
                weight.copy_(drawn)

        for stack in STACKS:
            table = RelativePositionEmbedding(
                bidirectional=stack == "encoder",
                init_method=draw,
                num_attention_heads=config.num_attention_heads,
                relative_attention_num_buckets=model.relative_attention_num_buckets,
                relative_attention_max_distance=model.relative_attention_max_distance,
            )
            self.add_module(stack, table.to(config.params_dtype))
        for parameter in self.parameters():
            # A bucket of its own in the distributed optimizer, so that all chunks split it alike;
            # `shared`: replicas of the first chunk do not count in the gradient norm.
            parameter.shared_embedding = True  # type: ignore[attr-defined]
            parameter.shared = self._replica > 0  # type: ignore[attr-defined]

    def forward(self, stack: str, length: int) -> torch.Tensor:
        """Return the biases [A, S, S] (query, key); of the decoder -inf above the diagonal."""
        table = getattr(self, stack)
        weight = table.relative_attention_bias.weight
        distance = torch.arange(1 - length, length, device=weight.device)  # key - query
        bucket = table._relative_position_bucket(
            distance,
            bidirectional=table.bidirectional,
            num_buckets=table.relative_attention_num_buckets,
            max_distance=table.relative_attention_max_distance,
        )
        # No communication forward: a rank takes its heads' columns. Backward all-gathers them over
        # the tensor group, so that every rank has the full gradient.
        local = scatter_to_tensor_model_parallel_region(weight, self._tp_group)
        by_distance = torch.nn.functional.embedding(bucket, local).t()  # [A, 2 S - 1]
        if stack == "decoder":
            by_distance = by_distance.masked_fill(distance > 0, -torch.inf)
        # Row q of the matrix starts at distance -q: a window of S entries, the last one first.
        return by_distance.unfold(1, length, 1).flip(1)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return one entry for each table, of which the first chunk's replica is written."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        entries: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {},
            sharded_offsets,
            tp_group=self._tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        for entry in entries.values():
            _, *others = entry.replica_id
            entry.replica_id = (self._replica, *others)
        return entries


def finalize_stack_gradients(
    model: list[DistributedDataParallel],
    num_tokens: torch.Tensor | None = None,
    pg_collection: ProcessGroupCollection | None = None,
    **kwargs: Any,
) -> None:
    """Run `finalize_gradients`, then add up the gradients of the tables' replicas on all chunks."""
    groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
    finalize_gradients(model, num_tokens, groups, **kwargs)
    sum_over_chunks(model, groups)


def sum_over_chunks(chunks: list[DistributedDataParallel], groups: ProcessGroupCollection) -> None:
    """Add up the gradients of the tables' replicas, which are reduced over data ranks already."""
    modules = [module for chunk in chunks for module in chunk.modules()]
    replicas = [
        [parameter.main_grad for parameter in module.parameters()]  # type: ignore[attr-defined]
        for module in modules
        if isinstance(module, RelativeBiases)
    ]
    for same in zip(*replicas, strict=True):
        total = torch.stack(same).sum(0)
        if groups.pp.size() > 1:
            # All-reduce over the pipeline group: each stage has the gradient of its own layers.
            torch.distributed.all_reduce(total, group=groups.pp)
        for grad in same:
            grad.copy_(total)
