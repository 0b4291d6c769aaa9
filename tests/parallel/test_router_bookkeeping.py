"""Counts and weights of routers in real training steps: exact in bf16, with masked losses."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.utils import unwrap_model

from moetron.moe.routing import expert_bias
from moetron.moe.routing.router import Router
from moetron.moe.routing.routing_record import RoutingSummary
from moetron.moe.training.sample_stream import Streams
from tests.parallel.support import checkpoint_runs
from tests.parallel.support.harness import run_ranks

BIAS = {
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_bias_update_rate": 0.01,
}
PREVIOUS = {
    "moe_router_load_balancing_type": "global_aux_loss",
    "moe_global_aux_loss_counts": "previous_step",
}
MASKED = {"mock_data": False, "data_path": ["x"], "eod_mask_loss": True}
LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "TP2": (2, {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1}),
    "CP2": (2, {"context_parallel_size": 2}),
    "PP2 in four chunks": (
        2,
        {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1},
    ),
}


def _settings(precision: str, save: Path, steps: int, load: Path | None = None) -> Any:
    return checkpoint_runs.settings(
        "dp",
        moe={**BIAS, **PREVIOUS},
        precision={"bf16": precision == "bf16"},
        training={"train_iters": steps, "micro_batch_size": 1, "global_batch_size": 80},
        learning_rate={"lr": 1e-3, "lr_warmup_iters": 0},
        checkpoint={"save": str(save), "save_interval": 1}
        | ({} if load is None else {"load": str(load)}),
    )


def _routers(chunks: Any) -> list[Router]:
    modules = (module for chunk in chunks for module in chunk.modules())
    return [module for module in modules if isinstance(module, Router)]


def _count_steps(chosen: Any) -> list[dict[str, torch.Tensor]]:
    """Train; return for each step the choices int64 [L, E], and the biases [L, E] after it."""
    with checkpoint_runs.parallel_of(chosen):
        loop = checkpoint_runs.start(chosen)
        routers, seen = _routers(loop.trainer.chunks), []
        read, judge = RoutingSummary.of, expert_bias.surplus_signs
        counted: list[torch.Tensor] = []

        def summary(counts: torch.Tensor) -> Any:
            biases = torch.stack([router.expert_bias.clone() for router in routers])
            previous = torch.stack([router.previous_choices.clone() for router in routers])
            found = read(counts)
            seen.append({"chosen": found.chosen, "bias": biases, "previous": previous})
            seen[-1]["counted"] = counted[-1]
            return found

        def signs(counts_LE: torch.Tensor) -> torch.Tensor:
            counted.append(counts_LE)
            return judge(counts_LE)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RoutingSummary, "of", summary)
            patch.setattr(expert_bias, "surplus_signs", signs)
            loop.run(lambda: False)
        return seen


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_biases_follow_the_counts_of_a_step(precision: str, tmp_path: Path) -> None:
    """80 micro-batches of 16 tokens, 2 choices each: 640 per expert, where bf16 steps by 4."""
    steps = _count_steps(_settings(precision, tmp_path / "run", 2))
    bias_LE = torch.zeros_like(steps[0]["bias"])
    for step in steps:
        chosen_LE = step["chosen"]
        assert torch.equal(step["counted"], chosen_LE)
        assert int(chosen_LE.sum(1).min()) == 80 * 16 * 2 and int(chosen_LE.amax()) > 512
        bias_LE = bias_LE + 0.01 * (chosen_LE.double().mean(1, keepdim=True) - chosen_LE).sign()
        torch.testing.assert_close(step["bias"], bias_LE.float())
        assert step["bias"].dtype == torch.float32
    assert torch.equal(steps[0]["previous"], steps[0]["chosen"])  # biases are still zero
    folder = checkpoint_runs.tensors(tmp_path / "run" / "step_0000002")
    held = [tensor for name, tensor in folder.items() if name.endswith("router.expert_bias")]
    assert held and all(tensor.dtype == torch.float32 for tensor in held)

    resumed = _count_steps(
        _settings(precision, tmp_path / "resumed", 2, tmp_path / "run" / "step_0000001")
    )
    (again,) = resumed
    for name, tensor in steps[1].items():
        assert torch.equal(again[name], tensor), name


class _Masked:
    """Mock samples: sample n has a loss only on its first 1 + 5 n mod S tokens."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __len__(self) -> int:
        return len(self._stream)

    def __getitem__(self, number: int) -> Any:
        sample = dict(self._stream[number])
        length = len(sample["loss_mask"])
        sample["loss_mask"] = (np.arange(length) < 1 + 5 * number % length).astype(np.float32)
        return sample


def _masked_run(chosen: Any) -> dict[str, Any]:
    """Run one step over masked samples; return its metrics and the loss tokens of each router."""
    with checkpoint_runs.parallel_of(chosen):
        loop = checkpoint_runs.start(chosen)
        loop.streams = Streams(_Masked(loop.streams.training), None)  # type: ignore[arg-type]
        rows: list[Any] = []
        loop.sinks = [type("Rows", (), {"step": rows.append, "close": lambda: None})]  # type: ignore[list-item]
        loop.step(loop.batches(), lambda: False)
        routers = _routers(unwrap_model(loop.trainer.chunks))
        known = [int(router._loss_tokens) for router in routers]  # type: ignore[arg-type]
        names = ("lm_loss", "grad_norm", "aux_loss", "z_loss")
        return {"known": known, **{name: rows[0][name] for name in names}}


def _masked_settings(parallel: dict[str, int], **checkpoint: Any) -> Any:
    return checkpoint_runs.settings(
        "dp",
        model={"num_layers": 4, "hidden_dropout": 0.0},
        moe={"moe_aux_loss_coeff": 1.0, "moe_z_loss_coeff": 0.5},
        parallel=parallel,
        precision={"bf16": False},
        training={"train_iters": 2},
        data=MASKED,
        checkpoint={"save_interval": 1, **checkpoint},
    )


def _save_one_step(folder: str) -> None:
    checkpoint_runs.run(_masked_settings({}, save=folder))


def test_router_losses_are_weighted_by_loss_tokens(tmp_path: Path) -> None:
    """Every layout runs the same step from the same weights, on samples 4 to 7."""
    run_ranks(_save_one_step, 1, str(tmp_path))
    first = str(tmp_path / "step_0000001")
    (one_rank,) = run_ranks(_masked_run, 1, _masked_settings({}, load=first))
    assert one_rank["known"] == [1 + 5 * 7 % 16] * 4  # of the last sample
    for ranks, parallel in LAYOUTS.values():
        for rank, found in enumerate(
            run_ranks(_masked_run, ranks, _masked_settings(parallel, load=first))
        ):
            assert set(found["known"]) == {1 + 5 * 7 % 16}
            for name in ("lm_loss", "grad_norm", "aux_loss", "z_loss"):
                expected = pytest.approx(one_rank[name], rel=2e-5)
                assert found[name] == expected, (parallel, rank, name)
