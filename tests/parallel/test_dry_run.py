"""Ranks built in a dry run: parameters equal the plan, groups equal real ones."""

import dataclasses
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moetron.common.errors import ConfigError
from moetron.moe.config.command import load
from moetron.moe.config.schema.settings import Settings
from moetron.moe.layers import build_model as build
from moetron.moe.plan.layout import position
from moetron.moe.plan.memory import memory_per_rank
from moetron.moe.training.build_trainer import build_trainer
from moetron.moe.training.runtime import divide
from moetron.moe.verify import dry_run
from tests.parallel.support.harness import RankFailed, run_ranks

EXAMPLES = Path(__file__).parents[2] / "examples" / "olmoe_1b_7b"
VOCABULARY = 512
SHARED = ["--moe-shared-expert-intermediate-size", "32", "--moe-shared-expert-gate"]


def _settings(recipe: str, world_size: int, flags: list[str]) -> Settings:
    argv = ["--config", str(EXAMPLES / recipe), "--dry-run", "--world-size", str(world_size)]
    return load([*argv, "--num-layers", "4", *flags]).settings


def _built(recipe: str, world_size: int, rank: int, flags: list[str]) -> dict[str, Any]:
    """Run ``build_rank`` in a process after its own group of one rank is destroyed."""
    torch.distributed.destroy_process_group()
    settings = _settings(recipe, world_size, flags)
    built = dry_run.build_rank(settings, VOCABULARY, world_size, rank)
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    return dataclasses.asdict(built)


def _real(recipe: str, world_size: int, flags: list[str]) -> dict[str, Any]:
    """Return the same values of a real rank, with optimizer state after a step."""
    runtime = divide(_settings(recipe, world_size, flags), torch.device("cpu"))
    trainer = build_trainer(_settings(recipe, world_size, flags), runtime, VOCABULARY)
    trainer.optimizer.step()
    bytes_held = 0
    for leaf in dry_run.leaves(trainer.optimizer):
        for main, state in leaf.optimizer.state.items():
            moments = [value for name, value in state.items() if name != "step"]
            bytes_held += sum(value.nbytes for value in moments)
            bytes_held += main.nbytes if trainer.settings.precision.bf16 else 0
    return {
        "parameters": sum(p.numel() for chunk in trainer.chunks for p in chunk.parameters()),
        "optimizer_bytes": bytes_held,
        "groups": {
            name: torch.distributed.get_process_group_ranks(getattr(runtime.groups, attribute))
            for name, attribute in dry_run.GROUPS.items()
        },
    }


@pytest.mark.parametrize(
    "flags",
    [
        ["--bf16", "--expert-model-parallel-size", "2", "--use-distributed-optimizer"],
        ["--pipeline-model-parallel-size", "2", "--optimizer", "sgd"],
        ["--pipeline-model-parallel-size", "2", "--pipeline-model-parallel-layout", "Et|t*3L"],
    ],
    ids=["ep2-zero1-bf16", "pp2-sgd", "uneven-pp2"],
)
def test_a_dry_rank_equals_a_real_one(flags: list[str]) -> None:
    real = run_ranks(_real, 2, "tiny.yaml", 2, flags)
    for rank in range(2):
        (built,) = run_ranks(_built, 1, "tiny.yaml", 2, rank, flags)
        assert sum(built.pop("parameters").values()) == real[rank].pop("parameters")
        assert built == real[rank]


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (1, ["--add-qkv-bias"]),
        (1, ["--moe-router-type", "noisy_topk", "--moe-expert-multiplicative-bias"]),
        (2, ["--tensor-model-parallel-size", "2", *SHARED, "--bf16"]),
        (2, ["--pipeline-model-parallel-size", "2", "--mtp-num-layers", "1"]),
    ],
    ids=["biases", "scales", "tp2-shared-bf16", "pp2-mtp"],
)
def test_muon_state_equals_the_plan(ranks: int, flags: list[str]) -> None:
    """One moment for matrices, two for other parameters, even with two axes."""
    flags = [*flags, "--optimizer", "muon"]
    for rank, real in enumerate(run_ranks(_real, ranks, "tiny.yaml", ranks, flags)):
        settings = _settings("tiny.yaml", ranks, flags)
        stage = position(settings, ranks, rank).pipeline
        planned = memory_per_rank(settings, VOCABULARY, ranks, stage)
        assert real["optimizer_bytes"] == planned.optimizer
        assert real["parameters"] * (2 if settings.precision.bf16 else 4) == planned.parameters


def test_a_large_layout_equals_the_plan() -> None:
    """OLMoE's widths on 256 ranks in every dimension that a CPU supports."""
    flags = [
        *("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"),
        *("--expert-tensor-parallel-size", "1", "--moe-shared-expert-intermediate-size", "512"),
    ]
    rank, world_size = 157, 256
    (built,) = run_ranks(_built, 1, "pretrain.yaml", world_size, rank, flags)
    settings = _settings("pretrain.yaml", world_size, flags)
    place = position(settings, world_size, rank)
    for name, at in dataclasses.asdict(place).items():
        assert built["groups"][name.replace("_", " ")][at] == rank
    planned = memory_per_rank(settings, VOCABULARY, world_size, place.pipeline).optimizer
    assert built["optimizer_bytes"] == pytest.approx(planned, rel=0.05)  # shards differ a little


def _rendered() -> str:
    torch.distributed.destroy_process_group()
    text = dry_run.render_rank(_settings("tiny.yaml", 2, ["--bf16"]), VOCABULARY, 2, 1)
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    return text


def test_printed_section() -> None:
    (text,) = run_ranks(_rendered, 1)
    title, *rows = text.splitlines()
    assert title == "rank 1 as built"
    values = {row[2:23].strip(): row[23:].strip() for row in rows}
    assert values["data group"] == "0, 1"
    assert values["expert group"] == "1"
    assert values["of experts"] == f"{4 * 16 * 3 * 64 * 32:,}"
    total = int(values["parameters"].removesuffix(", as planned").replace(",", ""))
    assert values["optimizer"].startswith(f"{12 * total:,} bytes")


def test_build_requires_a_dry_run() -> None:
    with pytest.raises(ConfigError, match="--build needs --dry-run"):
        load(["--config", str(EXAMPLES / "tiny.yaml"), "--build"])


@pytest.mark.slow
def test_the_entry_point_builds_a_rank_of_4096_in_little_memory() -> None:
    argv = ["--config", str(EXAMPLES / "pretrain.yaml"), "--dry-run", "--build"]
    argv += ["--world-size", "4096", "--rank", "4000", "--global-batch-size", "16384"]
    program = [sys.executable, str(EXAMPLES.parents[1] / "pretrain_moe.py"), *argv]
    done = subprocess.run(program, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "parameters           1,282,017,280, as planned" in done.stdout
    peak_kib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    assert peak_kib < 1.5e9 / 1024


def _share_with_a_wrong_plan() -> None:
    wrong = build.RankParameters(dense=1, expert=2)
    build.per_chunk = lambda *_: wrong
    _built("tiny.yaml", 2, 0, [])


def test_a_difference_from_the_plan_is_an_error() -> None:
    with pytest.raises(RankFailed, match=r"the model built is not .* planned were 1 and 2"):
        run_ranks(_share_with_a_wrong_plan, 1)


def test_long_groups_are_shortened() -> None:
    assert dry_run._ranks_text([1, 9, 17, 25]) == "1, 9, 17, 25"
    assert dry_run._ranks_text(list(range(1, 2000, 8))) == "1, 9, 17, 25 ... 1993 (250 ranks)"
