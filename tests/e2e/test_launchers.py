"""Commands that the launchers run on one node and under SLURM."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from moetron.moe.checkpoint import run_folder as checkpoint_folder
from moetron.moe.checkpoint.position import Progress
from moetron.moe.checkpoint.run_folder import Record
from moetron.moe.config.command import load

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
    """Run a launcher with our interpreter and without variables of an outer launcher."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "RANK"))}
    return subprocess.run(
        ["bash", str(ROOT / "examples" / script), *words],
        env={**inherited, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def slurm(folder: Path, srun: str, python: str = "") -> dict[str, str]:
    """Return the environment of a one-node job with fake ``srun`` and optional ``python``."""
    commands = {"srun": srun, "scontrol": 'echo "${@: -1}"'}
    commands |= {"python": python} if python else {}
    for name, text in commands.items():
        path = folder / name
        path.write_text(f"#!/usr/bin/env bash\n{text}\n")
        path.chmod(0o755)
    own = {"PYTHON": str(folder / "python")} if python else {}
    return {**SLURM, "PATH": f"{folder}:{os.environ['PATH']}", **own}


def port_of(command: list[str]) -> int:
    """Return the rendezvous port of a printed command."""
    return int(command[command.index("--master-port") + 1])


def test_one_node_gets_one_rank_per_device_and_every_flag() -> None:
    words = ("olmoe_1b_7b/tiny", "--save", "a folder", "--lr", "1e-3")
    printed = launch("train.sh", *words, PRINT="1", RANKS="4")
    assert shlex.split(printed.stdout) == [
        *(sys.executable, str(ROOT / "tools" / "launch.py"), "--nproc-per-node", "4"),
        *(str(ROOT / "pretrain_moe.py"), "--config", CONFIG, *words[1:]),
    ]


@pytest.mark.parametrize(("visible", "ranks"), [(None, "8"), ("", "1"), ("0,3", "2"), ("-1", "1")])
def test_one_rank_per_visible_device(tmp_path: Path, visible: str | None, ranks: str) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nyes GPU | head -8\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    environment = {"PRINT": "1", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment |= {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    command = shlex.split(launch("train.sh", "olmoe_1b_7b/tiny", **environment).stdout)
    assert command[command.index("--nproc-per-node") + 1] == ranks


def test_a_dry_run_plans_for_the_same_ranks_in_one_process() -> None:
    planned = launch("train.sh", "olmoe_1b_7b/tiny", "--dry-run", *FLAGS, RANKS="2")
    assert planned.returncode == 0, planned.stderr
    assert planned.stdout.count("parameters") == 2  # the section and the memory of a rank
    assert "expert         2 (rank 0 is 0)" in planned.stdout
    wider = launch("train.sh", "olmoe_1b_7b", "--dry-run", *FULL, "--world-size", "64")
    assert "ranks          64" in wider.stdout, wider.stderr


def test_ranks_have_time_to_save_and_a_flag_may_have_an_equals_sign(tmp_path: Path) -> None:
    """SLURM allows 300 s."""
    environment = slurm(tmp_path, 'echo "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT $*"')
    run = tmp_path / "a run"
    words = ("slurm/pretrain.sh", "olmoe_1b_7b/tiny", f"--save={run}")
    printed = launch(*words, **environment)
    seconds, *command = printed.stdout.split()
    assert 200 < int(seconds) < 300
    assert " ".join(command).endswith(f"--load {run} --save={run}")
    own = launch(*words, **environment, TORCH_ELASTIC_SHUTDOWN_TIMEOUT="60")
    assert own.stdout.startswith("60 ")


def test_many_nodes_rendezvous_at_the_first_and_resume_from_save(tmp_path: Path) -> None:
    run = str(tmp_path / "a run")
    environment = slurm(tmp_path, 'printf "%q " "$@"')
    environment |= {"SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "1"}
    environment |= {"SLURM_CPUS_ON_NODE": "96"}
    printed = launch("slurm/pretrain.sh", "olmoe_1b_7b/tiny", "--save", run, **environment)
    assert shlex.split(printed.stdout) == [
        *("--kill-on-bad-exit=1", "--wait=300", "--cpu-bind=none", "--cpus-per-task", "96"),
        *(sys.executable, str(ROOT / "tools" / "launch.py")),
        *("--nnodes", "2", "--nproc-per-node", "1"),
        *("--master-addr", "localhost", "--master-port", "10007"),
        *(str(ROOT / "pretrain_moe.py"), "--config", CONFIG, "--load", run, "--save", run),
    ]


def test_jobs_that_share_a_node_use_different_ports(tmp_path: Path) -> None:
    """Ports are below 32768, where Linux starts ephemeral ports; MASTER_PORT overrides."""
    environment = slurm(tmp_path, 'printf "%q " "$@"', python=":")

    def port(**more: str) -> int:
        command = ("slurm/pretrain.sh", "olmoe_1b_7b/tiny")
        return port_of(shlex.split(launch(*command, **{**environment, **more}).stdout))

    found = [port(SLURM_JOB_ID=job) for job in ("4711", "4712", "19999", "20000", "123456789")]
    assert len(set(found)) == len(found)
    assert all(1024 <= one < 32768 for one in found)
    assert port(MASTER_PORT="12345") == 12345


@pytest.mark.parametrize("script", ["train.sh", "slurm/pretrain.sh"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--lr-warmup-iters", "900"), "--lr-warmup-iters 900 is longer than the run"),
        (("--global-batch-size", "12"), "--global-batch-size 12"),
        (("--no-mock-data", "--data-path", "x", "--tokenizer-model", "bytes"), "--data-path x"),
        (("--load", "elsewhere"), "--load elsewhere: there is no such folder"),
    ],
)
def test_a_user_error_is_one_message_before_any_rank_starts(
    tmp_path: Path, script: str, words: tuple[str, ...], message: str
) -> None:
    """For settings of several ranks, for data and for folders."""
    started = tmp_path / "started"
    environment = slurm(tmp_path, f"touch {started}")
    done = launch(script, "olmoe_1b_7b/tiny", *words, **{"RANKS": "2", **environment})
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) <= 3, done.stderr
    assert done.stdout == "" and not started.exists()


def test_under_plain_torchrun_one_rank_reports_and_the_cause_is_last() -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3")
    flags = ("--config", CONFIG, "--global-batch-size", "12", "--lr-warmup-iters", "900")
    done = subprocess.run(
        [sys.executable, *torchrun, str(ROOT / "pretrain_moe.py"), *flags],
        capture_output=True,
        text=True,
        timeout=120,
    )
    report, _, rest = done.stderr.partition("Traceback")
    message = "--lr-warmup-iters 900 is longer than the run"
    assert report.count(message) == 1
    cause, line, frame = rest.rstrip().splitlines()[-3:]
    assert "1 problem in the settings" in cause and message in line and set(frame) == {"="}
    assert "exitcode  : 2" in rest


@pytest.mark.parametrize("reached", [50, 100, 101])
def test_a_check_exits_as_a_start_would(tmp_path: Path, reached: int) -> None:
    """Silent if the run can start; a checkpoint after the last step is refused."""
    write_checkpoint(tmp_path / "run", reached)
    words = ("olmoe_1b_7b/tiny", "--load", str(tmp_path / "run"), "--check")
    done = launch("train.sh", *words, RANKS="2")
    message = f"step_0000{reached} is at step {reached} already" if reached > 100 else ""
    assert (done.returncode, done.stdout) == (2 if message else 0, "")
    assert message in done.stderr and bool(done.stderr) == bool(message)


def write_checkpoint(run: Path, step: int) -> None:
    """Write the parts of a tiny checkpoint that a start reads before it imports torch."""
    settings = load(["--config", CONFIG, "--dry-run"]).settings
    temporary = checkpoint_folder.prepare(checkpoint_folder.step_folder(run, step))
    (temporary / "data.distcp").write_bytes(b"123")
    stream = {"kind": "mock"}
    record = Record(
        Progress(step, 16 * step, 2048 * step),
        settings.model_dump(mode="json"),
        {},
        stream,
        {},
        checkpoint_folder.file_sizes(temporary),
    )
    checkpoint_folder.write_record(temporary, record, {})
    checkpoint_folder.commit(checkpoint_folder.step_folder(run, step), None)


def test_a_dry_run_under_slurm_plans_in_one_process(tmp_path: Path) -> None:
    environment = slurm(tmp_path, "echo ranks started")
    words = ("slurm/pretrain.sh", "olmoe_1b_7b/tiny", *FLAGS, "--dry-run")
    planned = launch(*words, **environment)
    assert planned.returncode == 0, planned.stderr
    assert "ranks          2" in planned.stdout and "started" not in planned.stdout


def test_a_requeued_run_resumes_from_its_own_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    environment = slurm(tmp_path, 'printf "%q " "$@"', python=":")
    words = ["--load", "other", "--save", str(run), "--reset-progress"]
    own = ["--load", str(run)]

    def flags(**more: str) -> list[str]:
        command = ("slurm/pretrain.sh", "olmoe_1b_7b/tiny", *words)
        return shlex.split(launch(*command, **environment, **more).stdout.partition(CONFIG)[2])

    assert flags(SLURM_RESTART_COUNT="1") == [*own, *words]  # stopped before its first save
    (run / "latest").write_text("step_0000002")
    assert flags() == [*own, *words]
    expected = [*own, *words, *own, "--no-finetune", "--no-reset-progress"]
    assert flags(SLURM_RESTART_COUNT="1") == expected


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
        ("slurm/pretrain.sh", [], SLURM, "no recipe: give"),
    ],
)
def test_user_errors_are_reported_at_once(
    script: str, words: list[str], environment: dict[str, str], message: str
) -> None:
    done = launch(script, *words, **environment)
    assert done.returncode == 2 and message in done.stderr


@pytest.mark.slow
def test_two_ranks_train_on_a_node_and_a_slurm_job_resumes(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    words = ("olmoe_1b_7b/tiny", *FLAGS, "--eval-iters", "0", "--save", run, "--exit-interval", "2")
    first = launch("train.sh", *words, RANKS="2")
    assert first.returncode == 0, first.stderr
    environment = slurm(tmp_path, 'shift 3; exec "$@"') | {"SLURM_JOB_ID": str(os.getpid())}
    second = launch("slurm/pretrain.sh", *words, **environment)
    assert second.returncode == 0, second.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["lm_loss"] < rows[0]["lm_loss"]
