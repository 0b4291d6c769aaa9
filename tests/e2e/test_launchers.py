"""The launchers: what they run, on this node and under SLURM."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "examples" / "olmoe_1b_7b" / "tiny.yaml")
FLAGS = ("--expert-model-parallel-size", "2", "--no-tensorboard", "--cpu-threads", "1")
FULL = ("--mock-data", "--device", "cuda")
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "localhost",
    "SLURM_JOB_NUM_NODES": "1",
    "SLURM_GPUS_ON_NODE": "2",
    "SLURM_SUBMIT_DIR": str(ROOT),
}


def launch(script: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a launcher with our interpreter, and without what an outer launcher set."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "RANK"))}
    return subprocess.run(
        ["bash", str(ROOT / "examples" / script), *words],
        env={**inherited, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def slurm(folder: Path, srun: str) -> dict[str, str]:
    """The environment of a job of one node whose ``srun`` is a script of ours."""
    commands = {"srun": srun, "scontrol": 'echo "${@: -1}"'}
    for name, text in commands.items():
        path = folder / name
        path.write_text(f"#!/usr/bin/env bash\n{text}\n")
        path.chmod(0o755)
    return {**SLURM, "PATH": f"{folder}:{os.environ['PATH']}"}


def test_one_node_gets_a_rank_a_device_and_every_flag() -> None:
    words = ("olmoe_1b_7b/tiny", "--save", "a folder", "--lr", "1e-3")
    printed = launch("train.sh", *words, PRINT="1", RANKS="4")
    assert shlex.split(printed.stdout) == [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"),
        *(str(ROOT / "pretrain_moe.py"), "--config", CONFIG, *words[1:]),
    ]


def test_a_dry_run_plans_for_as_many_ranks_in_one_process() -> None:
    planned = launch("train.sh", "olmoe_1b_7b/tiny", "--dry-run", *FLAGS, RANKS="2")
    assert planned.returncode == 0, planned.stderr
    assert planned.stdout.count("parameters") == 2  # the section, and a rank's memory
    assert "expert         2 (rank 0 is 0)" in planned.stdout
    wider = launch("train.sh", "olmoe_1b_7b", "--dry-run", *FULL, "--world-size", "64")
    assert "ranks          64" in wider.stdout, wider.stderr


def test_ranks_have_time_to_save_and_a_flag_may_have_an_equals_sign(tmp_path: Path) -> None:
    """Ranks are killed after 30 s unless torchrun is told otherwise; SLURM gives 300."""
    environment = slurm(tmp_path, 'echo "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT $*"')
    words = ("slurm/pretrain.sh", "olmoe_1b_7b/tiny", "--save=a run")
    printed = launch(*words, **environment)
    seconds, *command = printed.stdout.split()
    assert 200 < int(seconds) < 300
    assert " ".join(command).endswith("--load a run --save=a run")
    own = launch(*words, **environment, TORCH_ELASTIC_SHUTDOWN_TIMEOUT="60")
    assert own.stdout.startswith("60 ")


def test_many_nodes_meet_at_the_first_and_go_on_from_save(tmp_path: Path) -> None:
    environment = slurm(tmp_path, 'printf "%q " "$@"')
    environment |= {"SLURM_JOB_NUM_NODES": "32", "SLURM_GPUS_ON_NODE": "8"}
    printed = launch("slurm/pretrain.sh", "olmoe_1b_7b/tiny", "--save", "a run", **environment)
    assert shlex.split(printed.stdout) == [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "32", "--nproc-per-node", "8"),
        *("--rdzv-id", "7", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:29500"),
        *(str(ROOT / "pretrain_moe.py"), "--config", CONFIG, "--load", "a run", "--save", "a run"),
    ]


def test_a_requeued_run_that_began_from_another_goes_on_from_its_own(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    environment = slurm(tmp_path, 'printf "%q " "$@"')
    words = ["--load", "other", "--save", str(run), "--reset-progress"]
    own = ["--load", str(run)]

    def flags(**more: str) -> list[str]:
        command = ("slurm/pretrain.sh", "olmoe_1b_7b/tiny", *words)
        return shlex.split(launch(*command, **environment, **more).stdout.partition(CONFIG)[2])

    assert flags(SLURM_RESTART_COUNT="1") == [*own, *words]  # stopped before its first save
    (run / "latest").write_text("step_0000002")
    assert flags() == [*own, *words]
    wanted = [*own, *words, *own, "--no-finetune", "--no-reset-progress"]
    assert flags(SLURM_RESTART_COUNT="1") == wanted


@pytest.mark.parametrize(
    ("script", "words", "environment", "message"),
    [
        ("train.sh", ["olmoe"], {}, "no examples/olmoe/pretrain.yaml"),
        ("train.sh", [], {}, "Train a recipe on this node"),
        ("openmoe_8b/life.sh", ["--help"], {}, "bash examples/openmoe_8b/life.sh [DIR]"),
        ("olmoe_1b_7b/life.sh", ["--help"], {}, "bash examples/olmoe_1b_7b/life.sh [DIR]"),
        ("tiny_corpus.sh", [], {}, "bash examples/tiny_corpus.sh DIR"),
        ("slurm/pretrain.sh", ["olmoe"], SLURM, "olmoe/pretrain.yaml; submit from the checkout"),
        ("slurm/pretrain.sh", ["olmoe_1b_7b"], {}, "submit it with sbatch"),
        ("slurm/pretrain.sh", [], SLURM, "which recipe"),
    ],
)
def test_mistakes_are_answered_at_once(
    script: str, words: list[str], environment: dict[str, str], message: str
) -> None:
    done = launch(script, *words, **environment)
    assert done.returncode == 2 and message in done.stderr


@pytest.mark.slow
def test_two_ranks_train_on_a_node_and_the_job_goes_on_where_they_stopped(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    words = ("olmoe_1b_7b/tiny", *FLAGS, "--eval-iters", "0", "--save", run, "--exit-interval", "2")
    first = launch("train.sh", *words, RANKS="2")
    assert first.returncode == 0, first.stderr
    environment = {**slurm(tmp_path, 'exec "$@"'), "MASTER_PORT": "29517"}
    second = launch("slurm/pretrain.sh", *words, **environment)
    assert second.returncode == 0, second.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["lm_loss"] < rows[0]["lm_loss"]
