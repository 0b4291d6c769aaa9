"""End-to-end sweep: interrupted, resumed, upcycled, written as a table."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moetron.common.process import EXIT_STOPPED, EXIT_USER

ROOT = Path(__file__).parents[2]
SWEEP = f"""
sweep:
  base: {ROOT}/examples/olmoe_1b_7b/tiny.yaml
  seeds: [1, 2]
overrides:
  model: {{seq_length: 32, ffn_hidden_size: 64}}
  moe: {{num_experts: 4, moe_router_topk: 2, moe_ffn_hidden_size: 64}}
  training: {{train_iters: 30}}
  logging: {{tensorboard: false, peak_tflops_per_s: 1.0}}
variants:
  dense:
    moe:
      num_experts: null
      moe_ffn_hidden_size: null
      moe_aux_loss_coeff: 0.0
      moe_z_loss_coeff: null
  upcycled:
    upcycle: {{variant: dense}}
"""


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "tools" / "ablate.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_two_variants_two_seeds(tmp_path: Path) -> None:
    sweep, output = tmp_path / "sweep.yaml", tmp_path / "out"
    sweep.write_text(SWEEP)
    arguments = (str(sweep), "--output", str(output), "--jobs", "2")
    first = start(*arguments)
    metrics = output / "dense" / "seed_1" / "metrics.jsonl"
    deadline = time.monotonic() + 100
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    text, errors = first.communicate(timeout=100)
    assert first.returncode == EXIT_STOPPED, text + errors
    assert len(metrics.read_text().splitlines()) < 30
    second = start(*arguments)
    text, errors = second.communicate(timeout=250)
    assert second.returncode == 0, text + errors
    assert "| upcycled |" in text and text.count("| 2/2 |") == 2
    assert (output / "table.png").is_file()
    for seed in (1, 2):
        for variant in ("dense", "upcycled"):
            rows = (output / variant / f"seed_{seed}" / "metrics.jsonl").read_text().splitlines()
            assert len(rows) == 30
    third = start(*arguments, "--run", "3")
    assert "upcycled/seed_2 is finished" in third.communicate(timeout=100)[0]


def test_user_errors_are_reported(tmp_path: Path) -> None:
    for words, expected in (
        (("nothing",), "no such file or sweep; the sweeps are dense_vs_moe, olmoe, st_moe"),
        (("st_moe",), "--output: required"),
        (("st_moe", "--dry-run", "--", "--lr", "0"), "baseline: --lr 0: must be"),
    ):
        done = start(*words)
        assert expected in done.communicate(timeout=100)[1]
        assert done.returncode == EXIT_USER
