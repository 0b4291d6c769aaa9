"""The start block: numbers of a recipe, its layout and data, and the basis of MFU."""

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moetron.moe.checkpoint.position import Progress
from moetron.moe.config import recipe
from moetron.moe.config.command import load
from moetron.moe.config.schema.derived import smallest_world_size
from moetron.moe.config.schema.parallel import ParallelSettings
from moetron.moe.config.schema.settings import Settings
from moetron.moe.monitoring.peak_flops import DATASHEET, GIVEN, Peak, peak_of_rank
from moetron.moe.training.sample_stream import SourceUse, Streams
from moetron.moe.training.start_record import Start, describe
from tests.unit.training.training_cases import CountingStream, settings

EXAMPLES = Path(__file__).parents[3] / "examples"
RECIPES = sorted(EXAMPLES.glob("*/pretrain.yaml"))


def start_and_rows(
    chosen: Settings,
    world_size: int = 1,
    uses: list[SourceUse] | None = None,
    peak: Peak | None = None,
    modules: torch.nn.Module | None = None,
) -> tuple[Start, dict[str, str]]:
    """Return the start, and the block's rows by name."""
    runtime = SimpleNamespace(world_size=world_size, device=torch.device("cpu"))
    vocab_size = chosen.model.vocab_size or 1000
    chunks = [modules or torch.nn.Linear(1, 1)]
    trainer: Any = SimpleNamespace(
        settings=chosen, runtime=runtime, vocab_size=vocab_size, chunks=chunks
    )
    streams = Streams(CountingStream(), None, uses or [])
    start, block = describe(trainer, streams, Progress(), peak)
    title, *lines = block.splitlines()
    assert title == "start"
    return start, {line.split()[0]: line.strip().split(maxsplit=1)[1] for line in lines}


def test_the_block_of_a_sparse_model_in_every_dimension() -> None:
    """Sizes by hand: a layer has 4 d^2 of attention, 2 norms, E d of router, 3 E d f of experts."""
    chosen = settings(
        model={"num_layers": 4, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 128},
        moe={"num_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 16},
        parallel={
            "tensor_model_parallel_size": 2,
            "pipeline_model_parallel_size": 2,
            "num_layers_per_virtual_pipeline_stage": 1,
            "expert_model_parallel_size": 2,
            "expert_tensor_parallel_size": 1,
        },
        precision={"bf16": True},
        checkpoint={"save": "runs/x", "save_interval": 5, "keep_last": 1},
    )
    uses = [SourceUse(f"s{n}", 100 - n, n / 10) for n in range(7)]
    start, rows = start_and_rows(chosen, 8, uses, Peak(989.0, DATASHEET))
    layer, experts, vocabulary = 4 * 64 + 2 * 8 + 4 * 8, 4 * 3 * 8 * 16, 2 * 256 * 8
    total = 4 * (layer + experts) + vocabulary + 8
    assert start.parameters == total and start.active_parameters == total - 4 * experts // 2
    assert rows["model"] == (
        f"{total:,} parameters, {total - 2 * experts:,} active a token; "
        "4 layers, 4 of them with 4 experts, top 2; vocabulary 128"
    )
    assert rows["layout"] == (
        "8 ranks on 1 host: TP 2, PP 2, VPP 2, CP 1, DP 2, EP 2, ETP 1, expert DP 2"
    )
    assert rows["batch"] == (
        "8 samples of 4 tokens = 32 tokens a step; 4 micro-batches of 1 a data-parallel rank"
    )
    assert rows["data"] == (
        "320 tokens in 10 steps, 7 sources; "
        "epochs of each: s0 0, s1 0.1, s2 0.2, s3 0.3, 3 more 0.4 to 0.6"
    )
    assert rows["layers"] == "local implementation, bf16 with fp32 main parameters"
    assert rows["MFU"] == "of 989 TFLOP/s a rank, datasheet, dense bf16"
    assert rows["from"] == "random weights, seed 1234"
    assert rows["saves"] == "to runs/x every 5 steps and at the end, the last 1 kept"
    assert json.loads(json.dumps(asdict(start)))["sources"][1] == asdict(uses[1])


def test_rows_that_do_not_apply_are_omitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    _, rows = start_and_rows(settings(training={"rampup_batch_size": (2, 2, 64)}), 4)
    assert "dense" in rows["model"] and "experts" not in rows["model"]
    assert rows["layout"] == "4 ranks on 2 hosts: TP 1, PP 1, CP 1, DP 4"
    assert "growing from 2 over 64 samples; 2 micro-batches of 1" in rows["batch"]
    assert "synthetic" in rows["data"]
    assert rows["MFU"].startswith("none: the peak of this device is unknown")
    assert rows["saves"].startswith("nothing: no --save FOLDER")


def test_the_implementation_is_read_from_the_built_layers() -> None:
    class Engine(torch.nn.Linear):
        pass

    class Wrapped(Engine):
        pass

    Engine.__module__ = "transformer_engine.pytorch.module.linear"
    Wrapped.__module__ = "megatron.core.extensions.transformer_engine"
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), Wrapped(1, 1))
    start, _ = start_and_rows(settings(precision={"fp8_format": "hybrid"}), modules=model)
    assert start.implementation == "Transformer Engine"
    assert start.precision == "fp32, FP8 hybrid (delayed scaling) in all layers"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.parent.name)
def test_every_recipe_has_a_block_for_its_layout(path: Path) -> None:
    parallel = ParallelSettings.model_validate(recipe.read(path).get("parallel", {}))
    world_size = smallest_world_size(parallel)
    argv = ["--config", str(path), "--dry-run", f"--world-size={world_size}", "--device=cuda"]
    chosen = load([*argv, "--vocab-size=300000"]).settings  # above every tokenizer's
    start, rows = start_and_rows(chosen, world_size)
    layout = start.layout
    dense = layout["TP"] * layout["PP"] * layout["CP"] * layout["DP"]
    assert dense == world_size == layout["world_size"]
    if chosen.moe.num_experts is not None:
        assert layout["ETP"] * layout["EP"] * layout["PP"] * layout["expert DP"] == world_size
        assert start.active_parameters < start.parameters
    assert len(rows) == 9 and all(len(row) < 220 for row in rows.values())


def test_a_peak_names_its_basis(monkeypatch: pytest.MonkeyPatch) -> None:
    given = settings(logging={"peak_tflops_per_s": 2.0})
    assert peak_of_rank(given, torch.device("cpu")) == Peak(2.0, GIVEN)
    state = torch.get_rng_state()
    measured = peak_of_rank(settings(), torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state), "a resumed run has restored it by now"
    assert measured is not None and measured.tflops_per_s > 0
    assert measured.basis.startswith("measured at start: fastest 1024^3 float32 product")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    assert peak_of_rank(settings(), torch.device("cuda", 0)) == Peak(989.0, DATASHEET)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some Other GPU")
    assert peak_of_rank(settings(), torch.device("cuda", 0)) is None
