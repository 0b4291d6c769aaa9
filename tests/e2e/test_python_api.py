"""The Python API as scripts use it: the example of the docs, and training under torchrun."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json, os, sys
from moetron import api

if __name__ == "__main__":
    settings = api.load_settings(
        "olmoe_1b_7b/tiny", seq_length=16, train_iters=2, lr_warmup_iters=0, eval_iters=0,
        expert_model_parallel_size=2, save=sys.argv[1], tensorboard=False, peak_tflops_per_s=1.0,
    )
    rows = api.train(settings)
    with open(f"{sys.argv[1]}/rows_{os.environ['RANK']}.json", "w") as file:
        json.dump([row["step"] for row in rows], file)
"""


def run(*arguments: object) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_of_the_docs_runs(tmp_path: Path) -> None:
    printed = run(ROOT / "docs" / "python_api.py", tmp_path)
    assert "unknown setting num_layer; did you mean num_layers?" in printed
    assert "logits: (1, 64, 512)" in printed
    assert "step 20, tokenizer bytes" in printed
    assert "layer 1: fullest expert" in printed


def test_rows_are_on_the_main_rank_of_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    run(*launcher, script, tmp_path / "run")
    rows = [json.loads((tmp_path / "run" / f"rows_{n}.json").read_text()) for n in (0, 1)]
    assert rows == [[1, 2], []]
