"""tools/convert_checkpoint.py as commands on a trained checkpoint."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("transformers")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
CONVERT = ROOT / "tools" / "convert_checkpoint.py"
LOAD = """
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokens = torch.arange(3, 23)[None]
with torch.no_grad():
    logits = model(tokens).logits
cached, plain = (model.generate(tokens, max_new_tokens=8, do_sample=False, use_cache=use,
                                pad_token_id=0) for use in (True, False))
assert torch.equal(cached, plain) and cached.shape == (1, 28)
torch.save(logits, sys.argv[2])
"""
"""Program that loads an exported folder with transformers alone."""


def run(*arguments: object, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_trained_openmoe_round_trips(tmp_path: Path) -> None:
    folder, recipe = tmp_path / "run", ROOT / "examples" / "openmoe_base" / "tiny.yaml"
    train = (ROOT / "pretrain_moe.py", "--config", recipe, "--no-tensorboard", "--eval-iters", "0")
    short = ("--train-iters", "2", "--lr-warmup-iters", "1")
    run(*train, *short, "--save", folder)
    text = run(CONVERT, "inspect", "--load", folder, "--verify")
    assert "position     step 2" in text and "HuggingFace  OpenMoeForCausalLM" in text
    run(CONVERT, "to-hf", "--load", folder, "--output", tmp_path / "out")
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {
        *("config.json", "generation_config.json", "model.safetensors", "modeling_openmoe.py"),
        "README.md",
    }
    assert "limited capacity" in (tmp_path / "out" / "README.md").read_text()
    alone = {"PYTHONPATH": "", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    run("-c", LOAD, tmp_path / "out", tmp_path / "logits.pt", **alone)
    logits = torch.load(tmp_path / "logits.pt", weights_only=True)
    assert logits.shape == (1, 20, 512) and logits.std() > 0.1

    run(CONVERT, "from-hf", "--load", tmp_path / "out", "--output", tmp_path / "back")
    run(CONVERT, "to-hf", "--load", tmp_path / "back", "--output", tmp_path / "again")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    more = (*train[:2], tmp_path / "back" / "model.yaml", *train[3:], "--mock-data")
    sizes = ("--micro-batch-size", "1", "--global-batch-size", "2", "--lr", "1e-4")
    start = ("--load", tmp_path / "back", "--finetune", "--train-iters", "1")
    run(*more, *sizes, *start, "--save", tmp_path / "next")
    rows = (tmp_path / "next" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[0])["lm_loss"] < 7  # ln 512 is 6.2
