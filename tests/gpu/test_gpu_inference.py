"""On the device of this machine: generation and scores of an FP8 run, at any number of tokens."""

from pathlib import Path

import pytest
import torch

from moetron.moe.checkpoint import run_folder
from moetron.moe.config.schema.settings import Settings
from moetron.moe.inference.generation import in_bf16, load_model
from moetron.moe.inference.growing_batch import GrowingBatch
from moetron.moe.inference.scoring import score
from moetron.moe.training import runtime
from tests.gpu.devices import kind_fault
from tests.gpu.gpu_cases import KINDS, ROOT
from tests.gpu.in_process import one_run, pretrain

pytestmark = pytest.mark.gpu

TOKENS = torch.randint(512, (40,), generator=torch.Generator().manual_seed(0)).tolist()
PAIRS = [(TOKENS[:5], TOKENS[5:8]), (TOKENS[:1], TOKENS[1:14]), (TOKENS[3:9], TOKENS[9:10])]


def _log_likelihoods(folder: Path, settings: Settings) -> list[float]:
    """Score `PAIRS` in a batch and one by one, and a growing sequence with and without a cache."""
    with one_run(), runtime.running(settings) as ranks:
        model = load_model(folder, settings, 512, ranks)
        found = score(model, PAIRS, len(PAIRS)) + score(model, PAIRS, 1)
        values = [one.log_likelihood for one in found]
        for cached in (True, False):
            sequence, total, new = GrowingBatch(model, cached=cached), 0.0, TOKENS[:5]
            for token in TOKENS[5:12]:
                logits_V = sequence.extend([new])[0, :512].float()
                total += logits_V.log_softmax(0)[token].item()
                new = [token]
            values.append(total)
    return values


@pytest.mark.parametrize("recipe", ["olmoe_1b_7b", "deepseek_v2_lite"])
@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if "16" in kind or "--fp8-format" in KINDS[kind].flags]
)
def test_any_number_of_tokens(tmp_path: Path, kind: str, recipe: str) -> None:
    if fault := kind_fault(KINDS[kind].te, KINDS[kind].capability):
        pytest.skip(fault)
    config = str(ROOT / "examples" / recipe / "tiny.yaml")
    argv = ["--config", config, *KINDS[kind].flags, "--mock-data", "--eval-iters", "1"]
    argv += ["--train-iters", "2", "--lr-warmup-iters", "1", "--no-tensorboard"]
    argv += ["--save", str(tmp_path)]
    if recipe.startswith("deepseek"):  # its joint projection is too narrow for FP8
        argv += ["--lr-wsd-decay-iters", "1", "--qk-pos-emb-head-dim", "16"]
    pretrain(argv)
    settings = run_folder.one_rank_settings(run_folder.read(tmp_path).record)
    values = _log_likelihoods(tmp_path, settings)
    exact = _log_likelihoods(tmp_path, in_bf16(settings))
    assert values == pytest.approx(exact, rel=1e-2)
    batch, alone, growing = values[:3], values[3:6], values[6:]
    assert batch == pytest.approx(alone, rel=5e-3)
    assert growing[0] == pytest.approx(growing[1], rel=5e-3)
