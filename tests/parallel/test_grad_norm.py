"""The gradient norm counts every parameter once, however it is sharded or replicated."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from moetron.data.stream.mock_stream import MockStream
from moetron.moe.config.command import load
from moetron.moe.training.batches import micro_batches
from moetron.moe.training.build_trainer import build_trainer
from moetron.moe.training.model_chunks import needs_samples
from moetron.moe.training.runtime import divide
from moetron.moe.training.step import run_schedule
from tests.parallel.support.harness import run_ranks
from tests.parallel.support.sharded import assemble, local_shards

RECIPE = Path(__file__).parents[2] / "examples" / "olmoe_1b_7b" / "tiny.yaml"
CLIP = 0.01
TP2 = ["--tensor-model-parallel-size", "2"]
EP2 = ["--expert-model-parallel-size", "2"]
ETP1 = ["--expert-tensor-parallel-size", "1"]
SHARED = ["--moe-shared-expert-intermediate-size", "64"]


def _loss(batch: Any, losses: torch.Tensor) -> Any:
    return losses.sum(), torch.tensor(losses.numel(), dtype=torch.int), losses.detach().sum()


def _step(flags: list[str]) -> dict[str, Any]:
    """Return the optimizer's norm, and gradients before and after clipping."""
    sizes = ["--seq-length", "16", "--num-layers", "2", "--micro-batch-size", "1"]
    sizes += ["--init-method-std", "0.3", "--clip-grad", str(CLIP)]
    settings = load(["--config", str(RECIPE), "--fp32", *sizes, *SHARED, *flags]).settings
    assert settings.model.vocab_size is not None
    runtime = divide(settings, torch.device("cpu"))
    trainer = build_trainer(settings, runtime, settings.model.vocab_size)
    stream = MockStream(1, settings.model.vocab_size, 16)
    numbers = [[2 * runtime.dp_rank], [2 * runtime.dp_rank + 1]]
    batches = [
        micro_batches(stream, 16, numbers) if needs_samples(chunk, settings) else None
        for chunk in trainer.chunks
    ]
    for chunk in trainer.chunks:
        chunk.zero_grad_buffer()
    run_schedule(trainer, batches, len(numbers), _loss)

    def gradients() -> list[dict[str, Any]]:
        return local_shards(trainer.chunks, lambda parameter: parameter.main_grad)

    before = gradients()
    norm = trainer.optimizer.step()[1]
    return {"norm": float(norm), "before": before, "after": gradients()}


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        pytest.param(2, [*TP2, *ETP1], id="TP2 ETP1"),
        pytest.param(2, [*TP2, *ETP1, *EP2], id="TP2 EP2 ETP1"),
        pytest.param(2, [*TP2, *ETP1, "--no-moe-grouped-gemm"], id="TP2 ETP1 sequential"),
        pytest.param(2, TP2, id="TP2 ETP2", marks=pytest.mark.slow),
        pytest.param(2, EP2, id="EP2", marks=pytest.mark.slow),
        pytest.param(4, [*TP2, *EP2], id="TP2 EP2 ETP2", marks=pytest.mark.slow),
        pytest.param(4, [*TP2, *EP2, *ETP1], id="DP2 TP2 EP2", marks=pytest.mark.slow),
    ],
)
def test_every_parameter_counts_once(ranks: int, flags: list[str]) -> None:
    results = run_ranks(_step, ranks, flags)
    before = assemble(result["before"] for result in results)
    after = assemble(result["after"] for result in results)
    norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in before.values()))
    experts = [gradient for name, gradient in before.items() if ".experts." in name]
    assert sum(float(gradient.double().square().sum()) for gradient in experts) > 0.01 * norm**2
    for result in results:
        assert result["norm"] == pytest.approx(norm, rel=1e-6)
    for name, gradient in before.items():
        torch.testing.assert_close(after[name], gradient * CLIP / norm, rtol=1e-4, atol=1e-12)
