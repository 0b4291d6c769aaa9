"""A router under megatron-core's schedule, and the losses of the papers' formulas.

Only the router's own losses have a gradient. `run_router` returns the result in a layout,
`reference` that of the full global batch in one process, in float64.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection

from moetron.moe.config.bridge import ddp_config, transformer_config
from moetron.moe.config.schema.settings import Settings
from moetron.moe.routing.expert_bias import finalize_gradients
from moetron.moe.routing.losses import forget_auxiliary_losses
from moetron.moe.routing.reinforce import ReinforceRouter
from moetron.moe.routing.router import Router
from moetron.moe.routing.router_types import router_class
from tests.parallel.support.auxiliary import read_auxiliary_losses
from tests.parallel.support.harness import model_parallel

SAMPLES, SEQUENCE, EXPERTS, HIDDEN, TOPK = 16, 16, 6, 8, 2
BALANCE, Z = 0.7, 0.3


@dataclass(frozen=True)
class Case:
    """A balance loss, and the split and masking of its global batch."""

    kind: str = "aux_loss"
    micro_batch_size: int = 1
    per_token: bool = True
    masked: str = "nothing"
    """Or "losses" (tokens without language-model loss), or "padding"."""
    moe: tuple[tuple[str, Any], ...] = ()
    parallel: tuple[tuple[str, int], ...] = ()

    @property
    def previous(self) -> bool:
        """Return whether the loss counts the previous step."""
        return ("moe_global_aux_loss_counts", "previous_step") in self.moe

    def settings(self) -> Settings:
        """Return the full settings."""
        moe: dict[str, Any] = {
            "num_experts": EXPERTS,
            "moe_ffn_hidden_size": 8,
            "moe_router_topk": TOPK,
            "moe_router_load_balancing_type": self.kind,
            "moe_aux_loss_coeff": BALANCE,
            "moe_z_loss_coeff": Z,
            **dict(self.moe),
        }
        return Settings.model_validate(
            {
                "model": {
                    "num_layers": 1,
                    "hidden_size": HIDDEN,
                    "num_attention_heads": 2,
                    "seq_length": SEQUENCE,
                },
                "moe": moe,
                "parallel": dict(self.parallel),
                "precision": {"bf16": False},
                "training": {
                    "train_iters": 1,
                    "micro_batch_size": self.micro_batch_size,
                    "global_batch_size": SAMPLES,
                    "calculate_per_token_loss": self.per_token,
                },
                "learning_rate": {"lr": 1e-3},
            }
        )


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return hidden states [N, S, H], a mask bool [N, S] (True: counts), router weights [E, H]."""
    generator = torch.Generator().manual_seed(11)
    hidden_NSH = torch.randn(SAMPLES, SEQUENCE, HIDDEN, generator=generator)
    share_N1 = torch.rand(SAMPLES, 1, generator=generator)
    mask_NS = torch.rand(SAMPLES, SEQUENCE, generator=generator) < share_N1
    mask_NS[:, 0] = True
    return hidden_NSH, mask_NS, torch.randn(EXPERTS, HIDDEN, generator=generator)


class _Alone(torch.nn.Module):
    """The router as a model for the schedule."""

    def __init__(self, router: Router, config: Any) -> None:
        super().__init__()
        self.router, self.config, self.vp_stage = router, config, None
        self.model_type = ModelType.encoder_or_decoder

    def set_input_tensor(self, _: Any) -> None:
        """Do nothing: there is one stage."""

    def forward(self, hidden_BSH: torch.Tensor, padding_BS: torch.Tensor | None) -> torch.Tensor:
        own = self.router.tokens.own
        padding = None if padding_BS is None else own(padding_BS.transpose(0, 1))
        probs, _ = self.router(own(hidden_BSH.transpose(0, 1)).contiguous(), padding)
        return probs.sum() * 0


def run_router(cases: list[Case]) -> list[dict[str, Any]]:
    """Return the router's gradient [E, H] and logged losses per case, on every rank."""
    assert len({case.parallel for case in cases}) == 1
    with model_parallel(**dict(cases[0].parallel)):
        return [_run(case) for case in cases]


def _run(case: Case) -> dict[str, Any]:
    settings = case.settings()
    config = transformer_config(settings)
    config.finalize_model_grads_func = finalize_gradients
    groups = ProcessGroupCollection.use_mpu_process_groups()
    router = router_class(config)(config, pg_collection=groups)
    router.set_layer_number(1)
    if case.kind == "noisy_load":
        assert router.draws is not None
        router.draws.normal = torch.zeros_like  # type: ignore[method-assign]
    if isinstance(router, ReinforceRouter):
        router.reward(torch.zeros(case.micro_batch_size, SEQUENCE))
    router.weight.data.copy_(inputs()[2])
    model = DistributedDataParallel(config, ddp_config(settings), _Alone(router, config))
    count = SAMPLES // groups.dp.size() // case.micro_batch_size
    for _ in range(2 if case.previous else 1):
        forget_auxiliary_losses()
        model.zero_grad_buffer()
        get_forward_backward_func()(
            forward_step_func=_forward,
            data_iterator=_micro_batches(case, router),
            model=model,
            num_microbatches=count,
            seq_length=SEQUENCE,
            micro_batch_size=case.micro_batch_size,
            forward_only=False,
        )
    losses = read_auxiliary_losses(settings, count, groups)
    return {"gradient": router.weight.main_grad.clone(), **losses}


def _micro_batches(case: Case, router: Router) -> Iterator[tuple[Any, ...]]:
    """Yield this rank's micro-batches; set the router's loss tokens, as a training step does."""
    hidden_NSH, mask_NS, _ = inputs()
    data = torch.distributed.get_world_size() // router.tp_cp_group.size()
    rank = router.tp_dp_cp_group.rank() // router.tp_cp_group.size()
    size = case.micro_batch_size
    for first in range(rank * size, SAMPLES, data * size):
        mask_BS = mask_NS[first : first + size]
        if case.masked == "nothing":
            mask_BS = torch.ones_like(mask_BS)
        if case.masked == "losses":
            router.loss_tokens.set_next(mask_BS.sum())
        padding_BS = ~mask_BS if case.masked == "padding" else None
        count = router.tokens.own(mask_BS.transpose(0, 1)).sum()
        torch.distributed.all_reduce(count, group=router.tp_group)  # a context rank's tokens
        yield hidden_NSH[first : first + size], padding_BS, count.int()


def _forward(batches: Iterator[tuple[Any, ...]], model: torch.nn.Module) -> Any:
    hidden, padding, count = next(batches)
    output = model(hidden, padding)
    return output, lambda output: (output, count, {})


def reference(case: Case, data_ranks: int) -> dict[str, Any]:
    """Return the expected results of `run_router` from the papers' formulas."""
    hidden_NSH, mask_NS, weight_EH = inputs()
    if case.masked == "nothing":
        mask_NS = torch.ones_like(mask_NS)
    counts_NS = mask_NS if case.masked == "padding" else torch.ones_like(mask_NS)
    weight_EH = weight_EH.double().requires_grad_()
    size = case.micro_batch_size
    logits = [part.double() @ weight_EH.T for part in hidden_NSH.split(size)]  # [B, S, E]
    counted = counts_NS.split(size)
    loss_tokens = [int(part.sum()) for part in mask_NS.split(size)]
    total = weight_EH.new_zeros(())
    sums = {"aux_loss": 0.0, "z_loss": 0.0}
    for number, (x, valid) in enumerate(zip(logits, counted, strict=True)):
        seen = number // data_ranks * data_ranks + data_ranks  # micro-batches so far, all ranks
        past = logits if case.previous else logits[:seen]
        balance = _balance(case, x, valid, list(zip(past, counted, strict=False)))
        z = x[valid].exp().sum(-1).log().square().mean()
        weight = loss_tokens[number] / sum(loss_tokens) if case.per_token else 1 / len(logits)
        total = total + weight * (BALANCE * balance + Z * z)
        sums["aux_loss"] += float(balance.detach()) / len(logits)
        sums["z_loss"] += float(z.detach()) / len(logits)
    total.backward()
    return {"gradient": weight_EH.grad, **sums}


def _balance(case: Case, x_BSE: Any, valid_BS: Any, past: list[Any]) -> torch.Tensor:
    if case.kind == "noisy_load":
        return _noisy(x_BSE[valid_BS])
    if case.kind == "seq_aux_loss":  # per sequence, then the mean
        pairs = zip(x_BSE, valid_BS, strict=True)
        return torch.stack([_switch(case, x[v], x[v]) for x, v in pairs]).mean()
    counted = x_BSE[valid_BS]
    if case.kind == "global_aux_loss":
        counted = torch.cat([x[v] for x, v in past])
    return _switch(case, x_BSE[valid_BS], counted)


def _switch(case: Case, x_TE: torch.Tensor, counted_CE: torch.Tensor) -> torch.Tensor:
    """Return E sum_i f_i P_i: Switch Transformer's equations 4 to 6, f of k (or first) choices."""
    settings = dict(case.moe)
    k = 1 if settings.get("moe_aux_loss_first_choice_only") else TOPK
    chosen = counted_CE.detach().topk(k, dim=1).indices.flatten().tolist()
    f = torch.tensor([chosen.count(e) / len(chosen) for e in range(EXPERTS)]).double()
    if settings.get("moe_router_score_function") == "sigmoid":
        scores = 1 / (1 + (-x_TE).exp())
    else:
        scores = x_TE.exp()
    p = (scores / scores.sum(1, keepdim=True)).mean(0)
    return EXPERTS * (f * p).sum()


def _noisy(x_TE: torch.Tensor) -> torch.Tensor:
    """Return CV(importance)^2 + CV(load)^2 of Shazeer et al. for zero noise; its spread is ln 2."""
    winners = x_TE.detach().topk(TOPK, dim=1).indices
    gates = torch.zeros_like(x_TE).scatter(1, winners, x_TE.gather(1, winners).softmax(1))
    load = []
    for e in range(EXPERTS):
        others = torch.cat([x_TE[:, :e], x_TE[:, e + 1 :]], dim=1)
        kth = others.sort(dim=1, descending=True).values[:, TOPK - 1]
        odds = (x_TE[:, e] - kth) / torch.log(torch.tensor(2.0).double())
        load.append((0.5 * (1 + torch.erf(odds / 2**0.5))).sum())
    totals = (gates.sum(0), torch.stack(load))
    return sum(((t - t.mean()) ** 2).mean() / t.mean() ** 2 for t in totals)  # type: ignore[return-value]
