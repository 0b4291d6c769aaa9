"""Hash routing: experts by token id, from a fixed table (Roller et al., arXiv 2106.04426)."""

from typing import Any

import torch

from moetron.moe.config.bridge import ModelConfig
from moetron.moe.routing.micro_batch_value import MicroBatchValue
from moetron.moe.routing.random_draws import derived_seed
from moetron.moe.routing.router import Router


def hash_table(ids: int, experts: int, topk: int, seed: int) -> torch.Tensor:
    """Return ``topk`` different experts for each token id: int64 [ids, topk].

    Each block of E consecutive ids maps to every expert equally often, in a random order per
    block. Tokenizers number their pieces roughly from frequent to rare, so that experts also get
    tokens of similar frequency. A longer table begins with the shorter one.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (-(-ids // experts), experts)
    drawn = torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu")
    order = drawn.argsort(dim=1)  # [blocks, E]
    shifted = [order.roll(-place, dims=1) for place in range(topk)]
    return torch.stack(shifted, dim=2).flatten(0, 1)[:ids]


class HashRouter(Router):
    """Router that chooses experts by token id; each of the k has weight 1 / k. No parameters.

    Section 3.1 of the paper, "balanced" by ids instead of counted tokens. Load is as even as the
    text's token counts allow, a token's experts are the same at every position, there is no router
    matrix and no loss; but a choice cannot depend on the context. Each layer has its own table,
    drawn from the run's seed, which checkpoints keep.

    `LanguageModel` passes in the ids before each micro-batch.
    """

    table_seed: torch.Tensor
    """int64 [1]: the run's seed when the model was initialised."""
    table: torch.Tensor
    """int64 [token ids, k]."""

    def __init__(self, config: ModelConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.register_parameter("weight", None)
        device = torch.cuda.current_device()
        seed = torch.full((1,), config.routing_seed, dtype=torch.int64, device=device)
        self.register_buffer("table_seed", seed)
        self.register_buffer("table", torch.empty(0, self.topk, dtype=torch.int64), False)
        self.register_load_state_dict_post_hook(lambda *_: self._draw(int(self.table_seed)))
        self._rows = 0
        self._ids = MicroBatchValue()

    def draw_table(self, ids: int) -> None:
        """Draw the table for token ids below ``ids``; the layer's number must be known."""
        self._rows = ids
        self._draw(self.config.routing_seed)

    def _draw(self, seed: int) -> None:
        layer_seed = derived_seed(seed, "hash", self.layer_number)
        table = hash_table(self._rows, self.num_experts, self.topk, layer_seed)
        self.table = table.to(self.table_seed.device)

    def read(self, ids_bs: torch.Tensor) -> None:
        """Set the token ids [b, s] of this context rank's part of the next micro-batch."""
        self._ids.set_next(self.tokens.of_context_rank(ids_bs.transpose(0, 1)))

    def forward(
        self, input: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weights and map for the tokens of ``input`` [s, b, H], whose values are unused."""
        logits_TE = self.gating(input).flatten(0, 1)
        chosen_TE = counted_TE = logits_TE > 0
        if (padding_sb := self.padding.take(self.training)) is not None:
            counted_TE = chosen_TE & ~padding_sb.reshape(-1, 1)
        self._remember(counted_TE)
        kept_TE = chosen_TE if self.capacity is None else counted_TE
        return self.limit(logits_TE / self.topk, kept_TE, input.shape[1])

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """Return 1 for the experts of each token, 0 for the others: fp32 [s, b, E]."""
        ids_sb = self._ids.take(self.training)
        assert ids_sb is not None and ids_sb.shape == input.shape[:2]
        zeros = torch.zeros(*ids_sb.shape, self.num_experts, device=input.device)
        return zeros.scatter_(2, self.table[ids_sb], 1.0)
