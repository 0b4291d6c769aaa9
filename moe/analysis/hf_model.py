"""Routing of a HuggingFace MoE folder (OLMoE, Mixtral, Qwen2-MoE, Qwen3-MoE, ...)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from moetron.common.errors import UserError
from moetron.moe.analysis.own_model import ranked, selected
from moetron.moe.analysis.routing_trace import Routed


class HuggingFaceModel:
    """Model with ``output_router_logits`` [tokens, experts] for each sparse layer.

    A token is routed to the k experts of the largest logits and never dropped. Families that route
    by a bias or groups are refused, since their logits do not determine the chosen experts.
    """

    def __init__(self, folder: Path, layers: Sequence[int] | None = None) -> None:
        from transformers import AutoModelForCausalLM  # optional; imports take seconds

        self._model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
        config = self._model.config
        experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
        if not hasattr(config, "output_router_logits") or experts is None:
            raise UserError(f"{folder}: a {config.model_type} model does not return router logits")
        self.num_experts, self.topk = int(experts), int(config.num_experts_per_tok)
        self.vocab_size = int(config.vocab_size)
        self.layers: list[int] = selected(self._sparse(), layers)

    def route(self, tokens_BS: np.ndarray, predict: bool = True) -> Routed:
        """Run the model over windows int64 [B, S] in evaluation mode; always predict."""
        with torch.no_grad():
            output = self._model(
                torch.from_numpy(tokens_BS), output_router_logits=True, use_cache=False
            )
        by_layer = dict(zip(self._sparse(), output.router_logits, strict=True))
        logits_LTE = torch.stack([by_layer[layer].float() for layer in self.layers])
        kth = logits_LTE.topk(self.topk, dim=-1).values[..., -1:]
        ranked_LTK = ranked(logits_LTE.masked_fill(logits_LTE < kth, -torch.inf))[..., : self.topk]
        predicted_T = output.logits.argmax(-1).flatten().numpy()
        kept_LTE = np.zeros(logits_LTE.shape, dtype=bool)
        np.put_along_axis(kept_LTE, ranked_LTK.astype(np.int64), True, axis=2)
        return Routed(ranked_LTK, kept_LTE, predicted_T)

    def weights(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return for each layer the router rows [E, H] and all weights of each expert [E, n]."""
        rows = []
        for layer in self.layers:
            mlp = self._model.model.layers[layer].mlp
            experts_En = [p.detach().float().flatten(1).numpy() for p in mlp.experts.parameters()]
            router = mlp.gate.weight.detach().float().numpy()
            rows.append((router, np.concatenate(experts_En, axis=1)))
        return rows

    def _sparse(self) -> list[int]:
        return [n for n, layer in enumerate(self._model.model.layers) if hasattr(layer.mlp, "gate")]
