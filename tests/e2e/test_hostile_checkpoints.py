"""Untrusted checkpoints execute no code in any command that reads them."""

import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from moetron.moe.checkpoint.checksums import SUMS
from moetron.moe.checkpoint.run_folder import file_sizes, read_record, write_record
from tests.unit.checkpoint.hostile_pickles import hostile, pwned

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "examples" / "olmoe_1b_7b" / "tiny.yaml")
TRAIN = ("pretrain_moe.py", "--config", TINY, "--mock-data", "--no-tensorboard")
COMMANDS = {
    "inspect": ("tools/convert_checkpoint.py", "inspect", "--load", "RUN"),
    "to-hf": ("tools/convert_checkpoint.py", "to-hf", "--load", "RUN", "--output", "OUT"),
    "generate": ("tools/generate.py", "--load", "RUN", "--tokenizer-model", "bytes"),
    "evaluate": (
        "tools/evaluate.py",
        "--load",
        "RUN",
        "--tasks",
        "x",
        "--tokenizer-model",
        "bytes",
    ),
    "analyze": ("tools/analyze_routing.py", "RUN", "--data", "a=SHARD"),
    "resume": (*TRAIN, "--train-iters", "3", "--lr-warmup-iters", "0", "--load", "RUN"),
    "finetune": (*TRAIN, "--finetune", "--load", "RUN"),
    "parity": ("tools/check_parity.py", "--config", TINY, "--layouts", "ep2", "--load", "RUN"),
}


def _run(folder: Path, command: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    names = {"RUN": str(folder / "run"), "OUT": str(folder / "out"), "SHARD": str(folder / "shard")}
    arguments = [names.get(word, word.replace("SHARD", names["SHARD"])) for word in command[1:]]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, str(ROOT / command[0]), *arguments],
        cwd=folder,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a run of two steps."""
    folder = tmp_path_factory.mktemp("saved")
    flags = ("--train-iters", "2", "--lr-warmup-iters", "0", "--eval-iters", "0", "--save", "RUN")
    done = _run(folder, (*TRAIN, *flags))
    assert done.returncode == 0, done.stderr
    return folder


def _index_that_runs_code(index: bytes) -> bytes:
    return hostile()["dotted name in an allowed module"]


def _object_for_a_tensor(index: bytes) -> bytes:
    tree = pickle.loads(index)  # noqa: S301 - written by torch above
    for name in ("optimizer.step", "rng.torch", "embedding.word_embeddings.weight"):
        tree.state_dict_metadata[name] = BytesStorageMetadata()
    return pickle.dumps(tree)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("corrupt", [_index_that_runs_code, _object_for_a_tensor])
def test_no_command_executes_code_of_an_index(
    saved: Path, tmp_path: Path, command: str, corrupt: Callable[[bytes], bytes]
) -> None:
    if command == "evaluate":
        pytest.importorskip("lm_eval")
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    step = tmp_path / "run" / "step_0000002"
    record = read_record(step)
    (step / ".metadata").write_bytes(corrupt((step / ".metadata").read_bytes()))
    sizes = file_sizes(step)
    files = {name: size for name, size in sizes.items() if name not in ("run.json", SUMS)}
    write_record(step, replace(record, files=files), {})  # an attacker also writes the checksums
    done = _run(tmp_path, COMMANDS[command])
    assert not pwned(tmp_path)
    assert done.returncode == 2, done.stderr
    assert "not a checkpoint's index" in done.stderr
    assert "Traceback" not in done.stderr
