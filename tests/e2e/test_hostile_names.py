"""Names with spaces, quotes and commands stay names in launchers, and ranks listen on loopback."""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
NAME = "a b;touch x$(touch y)`touch z`'\"&"
LISTENS = """
import sys, time
from pathlib import Path
from moetron.common.process import run_guarded

def main():
    import torch
    from moetron.moe.config.command import load
    from moetron.moe.training import runtime
    with runtime.running(load(sys.argv[2:]).settings) as ranks:
        torch.distributed.all_reduce(torch.ones(1))
        (Path(sys.argv[1]) / f"ready{ranks.rank}").touch()
        while not (Path(sys.argv[1]) / "stop").exists():
            time.sleep(0.05)
    return 0

if __name__ == "__main__":
    sys.exit(run_guarded(main))
"""


def _bash(script: Path, folder: Path, *words: str, **environment: str) -> list[list[str]]:
    """Run a launcher in ``folder``; return the words of every command that it prints."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "RANK"))}
    done = subprocess.run(
        ["bash", str(script), *words],
        cwd=folder,
        env={**inherited, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not [path for name in "xyz" for path in folder.rglob(name)], "a name was executed"
    return [shlex.split(line) for line in done.stdout.splitlines()]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return this checkout under a hostile name, in a folder that also holds fake commands."""
    for name, text in {
        "srun": "printf '%q ' \"$@\"; echo",
        "sbatch": 'printf \'%q \' "$@" >&2; printf \'%q \' "$@" >>"$SENT"; echo >>"$SENT"; echo 7',
        "scontrol": "echo host",
        "python": "exit 0",
    }.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{text}\n")
        path.chmod(0o755)
    (tmp_path / NAME.replace("/", "")).symlink_to(ROOT)
    return tmp_path / NAME


def test_one_node(checkout: Path) -> None:
    words = ("--save", NAME, "--data-path", f"{NAME}/$(touch x)")
    script = checkout / "examples" / "train.sh"
    [command] = _bash(script, checkout.parent, "olmoe_1b_7b/tiny", *words, PRINT="1", RANKS="2")
    assert command[-4:] == list(words)
    assert str(checkout / "pretrain_moe.py") in command


def test_slurm(checkout: Path) -> None:
    folder = checkout.parent
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "h", "SLURM_JOB_NUM_NODES": "1"}
    script = checkout / "examples" / "slurm" / "pretrain.sh"
    own = {"PATH": path, "PYTHON": str(folder / "bin" / "python"), "MOETRON_ROOT": str(checkout)}
    words = ("olmoe_1b_7b/tiny", "--save", NAME)
    [command] = _bash(script, folder, *words, SLURM_GPUS_ON_NODE="2", **own, **job)
    assert command[-2:] == ["--save", NAME]
    assert command[command.index("--load") + 1] == NAME


def test_preprocessing_array(checkout: Path) -> None:
    folder = checkout.parent
    sent = folder / "sent"
    words = ("--input", f"{NAME}*.jsonl", "--output-prefix", NAME)
    own = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "SENT": str(sent), "SHARES": "2"}
    own["MOETRON_ROOT"] = str(checkout)
    _bash(checkout / "examples" / "slurm" / "preprocess_array.sh", folder, *words, **own)
    array, merge = (shlex.split(line) for line in sent.read_text().splitlines())
    assert array[-4:] == list(words)
    assert merge[-6:-2] == list(words)


def test_ranks_of_one_node_listen_on_loopback(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(LISTENS)
    config = ("--config", str(ROOT / "examples" / "olmoe_1b_7b" / "tiny.yaml"), "--mock-data")
    launcher = (sys.executable, str(ROOT / "tools" / "launch.py"), "--nproc-per-node", "2")
    environment = {k: v for k, v in os.environ.items() if k != "GLOO_SOCKET_IFNAME"}
    process = subprocess.Popen([*launcher, str(program), str(tmp_path), *config], env=environment)
    try:
        deadline_s = time.monotonic() + 200
        while not all((tmp_path / f"ready{rank}").exists() for rank in range(2)):
            assert process.poll() is None and time.monotonic() < deadline_s
            time.sleep(0.1)
        found = [
            connection.laddr.ip
            for rank in psutil.Process(process.pid).children(recursive=True)
            for connection in rank.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        ]
    finally:
        (tmp_path / "stop").touch()
        assert process.wait(60) == 0
    assert len(found) >= 3, "the rendezvous, and gloo of each rank"
    assert {address.removeprefix("::ffff:") for address in found} == {"127.0.0.1"}
