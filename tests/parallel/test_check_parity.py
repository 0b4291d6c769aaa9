"""The parity check passes a correct layout and finds a fault; the command as a user runs it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moetron.data.stream.mock_stream import MockStream
from moetron.moe.config.command import load
from moetron.moe.config.schema.settings import Settings
from moetron.moe.plan.named_layouts import parse
from moetron.moe.training.build_trainer import build_loop, build_trainer
from moetron.moe.training.runtime import divide
from moetron.moe.training.sample_stream import Streams
from moetron.moe.verify.parity import Tolerance, compare, read_result
from tests.parallel.support.harness import run_ranks

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "examples" / "olmoe_1b_7b" / "tiny.yaml")
SMALL = ["--seq-length", "32", "--num-experts", "4", "--moe-router-topk", "2"]


def _settings(layout: str, flags: list[str]) -> Settings:
    recipe = ["--config", TINY, *SMALL, "--eval-iters=0", "--no-tensorboard", *flags]
    sizes = parse(layout)
    world = ["--dry-run", f"--world-size={sizes.smallest_world_size}"]
    return load([*recipe, *sizes.flags(load([*recipe, "--dry-run"]).settings), *world]).settings


def _train(layout: str, flags: list[str]) -> None:
    settings = _settings(layout, flags)
    assert settings.model.vocab_size is not None
    trainer = build_trainer(
        settings, divide(settings, torch.device("cpu")), settings.model.vocab_size
    )
    mock = MockStream(1, settings.model.vocab_size, settings.model.seq_length)
    build_loop(trainer, Streams(mock, None)).run(lambda: False)


def test_a_correct_layout_passes_and_a_fault_is_found(tmp_path: Path) -> None:
    """Two expert ranks against one; then the same with another auxiliary loss."""
    start = ["--save", str(tmp_path / "start"), "--exit-interval", "1"]
    run_ranks(_train, 1, "dp1", start)
    common = ["--load", str(tmp_path / "start"), "--finetune", "--save-interval", "1"]
    common += ["--exit-interval", "2"]
    runs = {
        "one": ("dp1", []),
        "two": ("ep2", []),
        "faulty": ("ep2", ["--moe-aux-loss-coeff", "1e-2"]),
    }
    results = {}
    for name, (layout, flags) in runs.items():
        save = tmp_path / name
        ranks = parse(layout).smallest_world_size
        run_ranks(_train, ranks, layout, [*common, "--save", str(save), *flags])
        results[name] = read_result(save, _settings(layout, flags))
    one = results["one"]
    assert len(one.losses) == len(one.grad_norms) == 2
    assert any("experts" in name for name in one.gradients)
    assert all(gradient.isfinite().all() for gradient in one.gradients.values())
    same = compare(one, results["two"])
    assert same.within(Tolerance(loss=1e-6, grad_norm=1e-5, gradient=1e-5)), same
    fault = compare(one, results["faulty"])
    assert not fault.within(Tolerance())
    assert fault.loss < 1e-4  # too small to see in the loss
    assert "router" in fault.parameter


def _check(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "check_parity.py"), "--config", TINY]
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=280, check=False
    )


def test_mistakes_are_reported_before_anything_runs() -> None:
    done = _check("--layouts", "ep2,ep3", "--", *SMALL)
    assert done.returncode == 2, done.stderr
    assert "ep3: --num-experts 4" in done.stderr
    assert "training in" not in done.stderr


def test_optimizers_without_a_first_moment_are_rejected() -> None:
    done = _check("--layouts", "ep2", "--", *SMALL, "--optimizer", "adafactor")
    assert done.returncode == 2, done.stderr
    assert "add --optimizer adam after --" in done.stderr


@pytest.mark.slow
def test_the_command_on_several_layouts() -> None:
    done = _check("--layouts", "ep2,pp2,tp2ep2etp1", "--steps", "2", "--", *SMALL)
    assert done.returncode == 0, done.stderr + done.stdout
    for name in ("ep2", "pp2", "tp2ep2etp1"):
        assert any(line.startswith(name) and "same" in line for line in done.stdout.splitlines())


@pytest.mark.slow
def test_the_command_reports_a_difference() -> None:
    done = _check("--layouts", "ep2", "--steps", "1", "--gradient-tolerance", "0", "--", *SMALL)
    assert done.returncode == 1, done.stderr + done.stdout
    assert "DIFFERS" in done.stdout


@pytest.mark.slow
def test_the_command_shows_the_effect_of_a_layout_dependent_setting() -> None:
    scope = ["--moe-expert-capacity-factor", "0.5", "--moe-capacity-scope", "rank"]
    done = _check("--layouts", "tp2", "--steps", "2", "--", *SMALL, *scope)
    assert done.returncode == 1, done.stderr + done.stdout
    by_rank, by_batch = done.stdout.split("with --moe-capacity-scope=micro_batch")
    assert "depends on the layout: --moe-capacity-scope rank" in by_rank and "DIFFERS" in by_rank
    assert "same" in by_batch and "DIFFERS" not in by_batch
