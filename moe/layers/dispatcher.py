"""Token dispatcher of a rank that holds all experts."""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher

from moetron.moe.config.bridge import ModelConfig
from moetron.moe.kernels.expert_rows import RowPlan, plan_rows
from moetron.moe.layers.experts import GroupedExperts


class LocalDispatcher(MoETokenDispatcher):
    """Dispatcher that leaves tokens where they are and passes experts a plan of their rows.

    megatron-core's dispatchers copy every row for an exchange with nobody, and wait for the device
    to tell how many rows there are. `GroupedExperts` moves rows itself, as part of its products.

    Args:
        config: ``moe_router_topk`` is read.
        pg_collection: expert groups, of one rank each.
    """

    def __init__(self, config: ModelConfig, pg_collection: ProcessGroupCollection) -> None:
        super().__init__(config, pg_collection)
        assert self.ep_size == self.tp_size == 1
        # What a CUDA graph of the router hands to the operations after it.
        self.cudagraph_attrs = ["routing_map"]

    def dispatch_preprocess(
        self, tokens: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tokens [T, H] of the [s, b, H] given, and weights [T, E]."""
        self.hidden_shape = tokens.shape
        self.routing_map = routing_map
        return tokens.reshape(-1, tokens.shape[-1]), probs

    def token_dispatch(
        self, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the arguments."""
        return hidden_states, probs

    def dispatch_postprocess(
        self, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, RowPlan, torch.Tensor]:
        """Return tokens, the plan of their rows, and weights [T, E]."""
        return hidden_states, plan_rows(self.routing_map, self.config.moe_router_topk), probs

    def combine_preprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the argument: experts have combined their outputs."""
        return hidden_states

    def token_combine(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the argument."""
        return hidden_states

    def combine_postprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the outputs [s, b, H]."""
        return hidden_states.view(self.hidden_shape)


def keep_tokens_local(layer: MoELayer, groups: ProcessGroupCollection) -> None:
    """Replace the dispatcher of ``layer`` by `LocalDispatcher` where tokens need no exchange.

    The layer needs `GroupedExperts`, all on this rank, at most k per token (not so when experts
    choose, or maps are padded), and no shared experts that run during the exchange.
    """
    config: ModelConfig = layer.config
    at_most_k = not (
        config.moe_router_type == "expert_choice"
        or config.moe_pad_expert_input_to_capacity
        or config.moe_router_padding_for_quantization
        or config.moe_permute_fusion  # asks for megatron-core's permutation
    )
    alone = groups.ep.size() == groups.expt_tp.size() == 1
    if (
        at_most_k
        and alone
        and isinstance(layer.experts, GroupedExperts)
        and not config.moe_shared_expert_overlap
    ):
        layer.token_dispatcher = LocalDispatcher(config, groups)
