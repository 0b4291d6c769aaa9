"""AdamW in one kernel against torch's, in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moetron.moe.kernels.availability import triton_is_installed
from tests.parallel.support.checkpoint_runs import metrics

ROOT = Path(__file__).resolve().parents[3]


def compare() -> None:
    """Train a few tensors with both; one has a bf16 copy, gradients are clipped in one step."""
    from moetron.moe.optim.one_pass_adamw import OnePassAdamW

    options = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}
    generator = torch.Generator().manual_seed(5)
    shapes = [(3, 50, 21), (7,), (0,), (4096,)]
    ours = [torch.randn(shape, generator=generator) for shape in shapes]
    theirs = [tensor.clone() for tensor in ours]
    copy = torch.empty(shapes[0], dtype=torch.float32)  # the interpreter lacks bf16
    one = OnePassAdamW([{"params": ours}], {ours[0]: copy}, **options)
    other = torch.optim.AdamW([{"params": theirs}], **options)
    for factor in (1.0, 0.25, 1.0):
        for left, right in zip(ours, theirs, strict=True):
            left.grad = torch.randn(left.shape, generator=generator)
            right.grad = left.grad * factor
        one.grad_factor = factor
        one.step()
        other.step()
        assert one.copied and torch.equal(copy, ours[0])
        for left, right in zip(ours, theirs, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)
            for name in ("exp_avg", "exp_avg_sq", "step"):
                torch.testing.assert_close(
                    one.state[left][name], other.state[right][name], rtol=1e-5, atol=1e-7
                )


def train(folder: str, interpreted: bool) -> None:
    """Train three steps with clipping in bf16 and fp32, the last two from a checkpoint."""
    from moetron.moe.kernels import availability
    from moetron.moe.optim.one_pass_adamw import OnePassAdamW
    from moetron.moe.training import optimizer
    from tests.parallel.support import checkpoint_runs

    for bf16 in (True, False):
        for part, load in (("first", None), ("second", f"{folder}/first_{bf16}/step_0000001")):
            save = f"{folder}/{part}_{bf16}"
            chosen = checkpoint_runs.settings(
                "dp",
                model={"hidden_dropout": 0.0},
                precision={"bf16": bf16},
                optimizer={"clip_grad": 0.5},
                training={"train_iters": 3, "micro_batch_size": 1, "global_batch_size": 2}
                | ({} if load else {"exit_interval": 1}),
                learning_rate={"lr": 1e-2, "lr_warmup_iters": 0},
                checkpoint={"save": save, "load": load},
            )
            with checkpoint_runs.parallel_of(chosen):
                loop = checkpoint_runs.start(chosen)
                used = [leaf.optimizer for leaf in optimizer.leaves(loop.trainer.optimizer)]
                assert all(isinstance(each, OnePassAdamW) is interpreted for each in used)
                loop.run(lambda: False)
    assert availability.is_interpreted() is interpreted


def _run(call: str, interpreted: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"from {__name__} import compare, train; {call}"],
        env={
            **os.environ,
            "TRITON_INTERPRET": str(int(interpreted)),
            "PYTHONPATH": f"{ROOT}:{':'.join(sys.path)}",
        },
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not triton_is_installed(), reason="triton is not installed")
def test_equals_torchs_adamw() -> None:
    _run("compare()", interpreted=True)


@pytest.mark.slow
@pytest.mark.skipif(not triton_is_installed(), reason="triton is not installed")
def test_a_training_with_a_resume_is_that_of_torchs_adamw(tmp_path: Path) -> None:
    for name, interpreted in (("ours", True), ("torchs", False)):
        _run(f"train({str(tmp_path / name)!r}, {interpreted})", interpreted)
    for part in ("first_True", "second_True", "first_False", "second_False"):
        ours, torchs = (metrics(tmp_path / name / part) for name in ("ours", "torchs"))
        assert len(ours) == len(torchs) == (1 if "first" in part else 2)
        for left, right in zip(ours, torchs, strict=True):
            assert left["grad_norm"] > 0.5  # clipped
            for name in ("lm_loss", "grad_norm"):
                close = 2e-3 if "True" in part else 1e-5
                assert left[name] == pytest.approx(right[name], rel=close), (part, name)
