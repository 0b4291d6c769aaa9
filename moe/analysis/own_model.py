"""Routing of our checkpoints, on one rank."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moetron.common.errors import UserError
from moetron.moe.analysis.routing_trace import Routed
from moetron.moe.checkpoint import run_folder as checkpoint_folder
from moetron.moe.checkpoint.save_load import load_weights
from moetron.moe.config.schema import derived
from moetron.moe.config.schema.settings import Settings
from moetron.moe.inference.generation import load_model, needed_mask
from moetron.moe.routing.router import Router
from moetron.moe.training.runtime import Runtime


class OwnModel:
    """Model of a run, with the weights of one checkpoint at a time.

    Args:
        checkpoint: a run folder or one step_* folder, written in any layout.
        settings: of that checkpoint, for one rank.
        vocab_size: before padding.
        runtime: of one rank.
        layers: MoE layers to analyse, from 0; None: all.
    """

    def __init__(
        self,
        checkpoint: Path,
        settings: Settings,
        vocab_size: int,
        runtime: Runtime,
        layers: Sequence[int] | None = None,
    ) -> None:
        sparse = [n for n, flag in enumerate(derived.moe_layers(settings)) if flag]
        if not sparse:
            raise UserError(f"{checkpoint}: a dense model; nothing is routed")
        self.layers = selected(sparse, layers)
        assert settings.moe.num_experts is not None
        self.num_experts, self.topk = settings.moe.num_experts, settings.moe.moe_router_topk
        self.vocab_size = vocab_size
        self._model = load_model(checkpoint, settings, vocab_size, runtime, limited=True)
        self._recorded: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        routers = {m.layer_number - 1: m for m in self._model.modules() if isinstance(m, Router)}
        for layer in self.layers:
            routers[layer].register_forward_hook(partial(self._record, layer))

    def each_checkpoint(self, run: Path, last_step: int) -> Iterator[int]:
        """Load each checkpoint of a run up to ``last_step`` and yield its step."""
        for step in checkpoint_folder.saved_steps(run):
            if step <= last_step:
                folder = checkpoint_folder.step_folder(run, step)
                load_weights(folder, [self._model], self.vocab_size)
                yield step

    def route(self, tokens_BS: np.ndarray, predict: bool = True) -> Routed:
        """Run the model over windows int64 [B, S] in evaluation mode.

        Experts have their evaluation capacity, so drops are recorded. Attention is causal.
        """
        tokens = torch.from_numpy(tokens_BS).to(next(self._model.parameters()).device)
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        self._model.post_process = predict  # False: return hidden states
        mask = needed_mask(self._model, tokens.new_zeros(len(tokens)), tokens.shape[1])
        with torch.no_grad():
            output = self._model(tokens, positions, mask)
        self._model.post_process = True  # needed to load checkpoints
        predicted_T = np.full(tokens_BS.size, -1)
        if predict:
            predicted_T = output[..., : self.vocab_size].argmax(-1).flatten().cpu().numpy()
        batch = len(tokens_BS)
        scores = [_batch_major(self._recorded[layer][0], batch) for layer in self.layers]
        kept = [_batch_major(self._recorded[layer][1], batch) for layer in self.layers]
        self._recorded.clear()
        return Routed(ranked(torch.stack(scores)), torch.stack(kept).cpu().numpy(), predicted_T)

    def weights(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return for each layer the router rows [E, H] and all weights of each expert [E, n].

        Hash routing has no matrix; its rows are zeros.
        """
        rows = []
        for layer in self.layers:
            mlp = self._model.decoder.layers[layer].mlp
            experts_En = _expert_rows(mlp.experts, self.num_experts)
            matrix, none = mlp.router.weight, np.zeros((self.num_experts, 1))
            rows.append((none if matrix is None else _numpy(matrix), experts_En))
        return rows

    def _record(self, layer: int, router: Router, inputs: Any, output: Any) -> None:
        """Record the logits of chosen experts (-inf elsewhere) and the kept choices."""
        assert router.chosen is not None
        logits_TE = router.gating(inputs[0]).reshape(router.chosen.shape).float()
        scores_TE = logits_TE.masked_fill(~router.chosen, -torch.inf)
        self._recorded[layer] = (scores_TE, output[1] & router.chosen)


def selected(sparse: Sequence[int], layers: Sequence[int] | None) -> list[int]:
    """Return ``layers``, which must be in ``sparse``, or all of ``sparse``."""
    unknown = sorted(set(layers or ()) - set(sparse))
    if unknown:
        raise UserError(
            f"--layers {', '.join(map(str, unknown))}: no experts in these layers; MoE layers are "
            f"{', '.join(map(str, sparse))}"
        )
    return sorted(set(layers)) if layers else list(sparse)


def ranked(scores_LTE: torch.Tensor) -> np.ndarray:
    """Return experts by descending score, int16 [L, T, K]; scores are -inf if not chosen."""
    most = int((scores_LTE > -torch.inf).sum(-1).amax())
    best, experts = scores_LTE.topk(most, dim=-1)
    return experts.masked_fill(best == -torch.inf, -1).to(torch.int16).cpu().numpy()


def _batch_major(rows_TE: torch.Tensor, batch: int) -> torch.Tensor:
    """Reorder rows from [S, B] to [B, S]."""
    experts = rows_TE.shape[-1]
    return rows_TE.view(-1, batch, experts).transpose(0, 1).reshape(-1, experts)


def _expert_rows(experts: torch.nn.Module, num_experts: int) -> np.ndarray:
    """Return all weights of each expert, float32 [E, n], from grouped tensors or modules."""
    modules = getattr(experts, "local_experts", None)
    if modules is None:
        parts = [_numpy(p).reshape(num_experts, -1) for p in experts.parameters()]
        return np.concatenate(parts, axis=1)
    flat = [np.concatenate([_numpy(p).ravel() for p in module.parameters()]) for module in modules]
    return np.stack(flat)


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()
