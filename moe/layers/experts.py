"""A rank's experts as grouped matrix products.

T tokens, E experts on this rank, F this rank's part of their inner width, H hidden size. R ``rows``
are token copies sorted by local expert: of this rank's tokens if it holds all experts
(`dispatcher`), or those that a dispatcher's all-to-all brought here.
"""

from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import (
    get_cuda_rng_tracker,
    get_expert_parallel_rng_tracker_name,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_object_for_checkpoint

from moetron.moe.kernels.activation import Activation
from moetron.moe.kernels.expert_rows import ExpertRows, SortedRows
from moetron.moe.overlap.delayed_gradients import DelayedGradients

Layer = Literal["fc1", "fc2"]
"""Layer of an expert."""
_ALIGNMENT_BYTES = 16  # of the rows of every operand of grouped_mm


def grouped_gemm_fits(config: TransformerConfig, expert_tensor_ranks: int) -> bool:
    """Return whether `GroupedExperts` supports this configuration: no biases, aligned rows."""
    assert config.moe_ffn_hidden_size is not None
    rows = (config.hidden_size, config.moe_ffn_hidden_size // expert_tensor_ranks)
    aligned = all(row * config.params_dtype.itemsize % _ALIGNMENT_BYTES == 0 for row in rows)
    return aligned and not config.add_bias_linear


def mark_gradient_ranks(experts: torch.nn.Module, groups: ProcessGroupCollection) -> None:
    """Set ``allreduce`` on experts: True if gradients are reduced over the dense DP group.

    False: over the expert data-parallel group. megatron-core 0.16.1 (tensor_parallel/layers.py,
    extensions/transformer_engine.py) looks only at the expert-parallel size, so that with one
    expert rank and ETP other than TP it silently omits ranks.
    """
    like_dense = groups.ep.size() == 1 and groups.expt_tp.size() == groups.tp.size()
    for parameter in experts.parameters():
        parameter.allreduce = like_dense  # type: ignore[attr-defined]


class _Fused(torch.autograd.Function):
    """Experts and the movement of their rows as one operation.

    Kept for the backward pass: the tokens, the output of the first layer [R, 2F or F] and the rows'
    weights [R]. The rows [R, H] and the activation [R, F] are made again: they are larger than
    the time to make them is worth.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        probs: torch.Tensor,
        weight1: torch.Tensor,
        weight2: torch.Tensor,
        rows: ExpertRows,
        experts: "GroupedExperts",
    ) -> torch.Tensor:
        hidden = experts.multiply("fc1", experts.expert_input(x, rows), weight1, rows)
        weight_R = rows.weights(probs)
        activated = experts.activation.forward(hidden, weight_R)
        out = experts.multiply("fc2", activated, weight2, rows)
        ctx.save_for_backward(x, hidden, weight_R, weight1, weight2)
        ctx.rows, ctx.experts = rows, experts
        return rows.combine(out)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, hidden, weight_R, weight1, weight2 = ctx.saved_tensors
        rows, experts, needed = ctx.rows, ctx.experts, ctx.needs_input_grad
        grad_x = grad_weight1 = grad_weight2 = None
        # grouped_mm rejects expanded gradients such as those of ``sum()``.
        grad_out = rows.gather(grad.contiguous())
        grad_activated = experts.input_gradient("fc2", grad_out, weight2, rows)
        grad_hidden, grad_weight_R, activated = experts.activation.backward(
            grad_activated, hidden, weight_R
        )
        del grad_activated  # temporaries of [R, ...] are the peak of a step's memory
        if needed[3]:
            grad_weight2 = experts.gradient(
                weight2, partial(experts.weight_gradient, "fc2", grad_out, activated, rows)
            )
        del grad_out, activated
        if needed[0]:
            grad_x = rows.combine(experts.input_gradient("fc1", grad_hidden, weight1, rows))
        if needed[2]:
            grad_weight1 = experts.gradient(
                weight1, partial(fc1_gradient, experts, grad_hidden, x, rows)
            )
        grad_probs = rows.weight_gradient(grad_weight_R) if needed[1] else None
        return grad_x, grad_probs, grad_weight1, grad_weight2, None, None


def fc1_gradient(
    experts: "GroupedExperts", grad: torch.Tensor, x: torch.Tensor, rows: ExpertRows
) -> torch.Tensor:
    """Return the first layer's weight gradient; makes the rows of the tokens again."""
    return experts.weight_gradient("fc1", grad, experts.expert_input(x, rows), rows)


class GroupedExperts(DelayedGradients, MegatronModule):
    """The experts of this rank, down(act(x W1)), weighted by the token's probability.

    Replaces megatron-core's ``SequentialMLP``: same constructor and ``forward``, same numbers drawn
    at initialisation, same global tensors in a checkpoint, so that either loads the other's.
    ``weight1`` [E, 2F or F, H] (gate above up) and ``weight2`` [E, H, F] hold E local experts of
    width F; with expert tensor parallelism F is this rank's shard of the width.

    No collective here: the dispatcher exchanges tokens over the expert group before and after, and
    sums the partial outputs over the expert tensor group.

    Args:
        num_local_experts: experts on this rank.
        config: megatron-core's; see `grouped_gemm_fits`.
        submodules: ignored.
        pg_collection: ``ep``, ``expt_tp``, ``expt_dp`` and ``tp`` are read.
        name: ignored.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: Any = None,
        pg_collection: ProcessGroupCollection | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(config=config)
        assert pg_collection is not None
        assert grouped_gemm_fits(config, pg_collection.expt_tp.size())
        self.num_local_experts = num_local_experts
        self.ep_group = pg_collection.ep
        self.tp_group = pg_collection.expt_tp
        self.dp_group = pg_collection.expt_dp
        ffn = config.moe_ffn_hidden_size // self.tp_group.size()
        self.activation = Activation(config.activation_func, config.gated_linear_unit)
        parts = self.fc1_parts(config)
        self.weight1 = self._empty_weight(parts * ffn, config.hidden_size)
        self.weight2 = self._empty_weight(config.hidden_size, ffn)
        set_tensor_model_parallel_attributes(self.weight1, True, 1, parts)
        set_tensor_model_parallel_attributes(self.weight2, True, 2, 1)
        mark_gradient_ranks(self, pg_collection)
        if config.delay_wgrad_compute:
            self.delay(self.weight1, self.weight2)
        if config.perform_initialization:
            self._draw_weights()
        self._register_load_state_dict_pre_hook(_drop_extra_states)

    @staticmethod
    def fc1_parts(config: TransformerConfig) -> int:
        """Return the number of matrices [F, H] per expert in ``weight1``."""
        return 2 if config.gated_linear_unit else 1

    def _empty_weight(self, rows: int, columns: int) -> torch.nn.Parameter:
        weight = torch.empty(
            self.num_local_experts,
            rows,
            columns,
            dtype=self.config.params_dtype,
            device=torch.cuda.current_device(),
        )
        return torch.nn.Parameter(weight)

    def _draw_weights(self) -> None:
        """Initialise expert by expert, in the order of ``SequentialMLP``."""
        with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
            for fc1, fc2 in zip(self.weight1.detach(), self.weight2.detach(), strict=True):
                self.config.init_method(fc1)
                self.config.output_layer_init_method(fc2)

    def forward(
        self, x: torch.Tensor, rows: torch.Tensor | ExpertRows, probs: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """Run every expert on its rows.

        Args:
            x: tokens of this rank [T, H]; or [R, H], exchanged and sorted by local expert.
            rows: plan of the rows of the tokens; or number of rows of each expert, int [E], zeros
                are fine.
            probs: weights of the tokens [T, E]; or of the rows [R]. They multiply the activation.

        Returns:
            Output of the shape of ``x`` (partial sums over expert tensor ranks) and no bias.
        """
        if isinstance(rows, torch.Tensor):
            # megatron-core's all-to-all leaves the counts in pinned memory. A blocking copy would
            # let the host wait here, in every layer, until the tokens have arrived.
            counts_E = rows.to(x.device, non_blocking=True)
            rows = SortedRows(counts_E.cumsum(0).to(torch.int32))
        return self.run(x, probs, rows), None

    def run(self, x: torch.Tensor, probs: torch.Tensor, rows: ExpertRows) -> torch.Tensor:
        """Return the output of `forward`."""
        out: torch.Tensor = _Fused.apply(x, probs, self.weight1, self.weight2, rows, self)  # type: ignore[no-untyped-call]
        return out

    def expert_input(self, x: torch.Tensor, rows: ExpertRows) -> Any:
        """Return the input of the first layer in the form that products of "fc1" take."""
        return rows.gather(x)

    def multiply(
        self, layer: Layer, operand: Any, weight: torch.Tensor, rows: ExpertRows
    ) -> torch.Tensor:
        """Multiply each expert's rows by its transposed weight."""
        return F.grouped_mm(operand, weight.transpose(1, 2), offs=rows.ends_E)

    def input_gradient(
        self, layer: Layer, grad: torch.Tensor, weight: torch.Tensor, rows: ExpertRows
    ) -> torch.Tensor:
        """Multiply each expert's output gradients by its weight."""
        return F.grouped_mm(grad, weight, offs=rows.ends_E)

    def weight_gradient(
        self, layer: Layer, grad: torch.Tensor, operand: Any, rows: ExpertRows
    ) -> torch.Tensor:
        """Multiply each expert's transposed output gradients by its inputs: [E, outputs, inputs].

        Rows after the last expert's are not read; an expert without rows gets 0.
        """
        return F.grouped_mm(grad.t(), operand, offs=rows.ends_E)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return shards of ``SequentialMLP``'s tensors: fc1 [experts, 2F or F, H], fc2 [.., H, F].

        fc1 of a gated unit has separate shards of gate and up: a tensor rank holds rows of both.
        """
        assert not (metadata or {}).get("singleton_local_shards", False)
        axis = len(sharded_offsets)
        tensor = partial(
            sharded_tensor,
            offsets=(*sharded_offsets, (axis, self.ep_group.rank(), self.ep_group.size())),
            prepended=axis,
        )
        rank, ranks = self.tp_group.rank(), self.tp_group.size()
        replica = (0, 0, self.dp_group.rank())
        fc1_key, fc2_key = (f"{prefix}experts.linear_fc{i}.weight" for i in (1, 2))

        parts = self.fc1_parts(self.config)

        def by_part(
            key: str, weight: torch.Tensor, replica_id: Any, flattened_range: slice | None
        ) -> list[ShardedTensor]:
            assert flattened_range is None
            return [
                tensor(key, matrix, (axis + 1, part * ranks + rank, parts * ranks), replica_id)
                for part, matrix in enumerate(weight.chunk(parts, dim=1))
            ]

        if parts > 1:
            fc1 = ShardedTensorFactory(fc1_key, self.weight1, by_part, _joined, replica)
        else:
            fc1 = tensor(fc1_key, self.weight1, (axis + 1, rank, ranks), replica)
        return {
            f"{prefix}weight1": fc1,
            f"{prefix}weight2": tensor(fc2_key, self.weight2, (axis + 2, rank, ranks), replica),
            **self._extra_states(prefix, sharded_offsets),
        }

    def _extra_states(
        self, prefix: str, sharded_offsets: tuple[tuple[int, int, int], ...]
    ) -> dict[str, Any]:
        """Return the empty objects that ``SequentialMLP``'s linear layers write to a checkpoint."""
        first = self.ep_group.rank() * self.num_local_experts
        total = self.ep_group.size() * self.num_local_experts
        replica = (0, self.tp_group.rank(), self.dp_group.rank())
        return {
            f"{prefix}expert{expert}.{layer}._extra_state": make_sharded_object_for_checkpoint(
                None,
                f"{prefix}experts.{layer}._extra_state",
                (*sharded_offsets, (len(sharded_offsets), expert, total)),
                replica,
            )
            for expert in range(first, first + self.num_local_experts)
            for layer in ("linear_fc1", "linear_fc2")
        }


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """Join gate and up of all experts, without a copy if they were loaded into one matrix."""
    whole = parts[0]._base
    if whole is not None and whole.shape[1] == sum(part.shape[1] for part in parts):
        expected = whole.chunk(len(parts), dim=1)
        pairs = zip(parts, expected, strict=True)
        if all(part.data_ptr() == same.data_ptr() for part, same in pairs):
            return whole
    return torch.cat(parts, dim=1)


def sharded_tensor(
    key: str,
    data: torch.Tensor,
    shard: tuple[int, int, int],
    replica_id: Any,
    offsets: tuple[tuple[int, int, int], ...],
    prepended: int,
) -> ShardedTensor:
    """Return a shard of the global tensor ``key``.

    ``shard`` and ``offsets`` hold (axis, number, count).
    """
    return ShardedTensor.from_rank_offsets(
        key, data, *offsets, shard, replica_id=replica_id, prepend_axis_num=prepended
    )


def _drop_extra_states(state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    extra = [key for key in state_dict if key.startswith(prefix) and key.endswith("_extra_state")]
    for key in extra:
        del state_dict[key]
