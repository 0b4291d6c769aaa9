"""The wheel in an environment of its own, from a folder without the checkout.

The environment sees the packages of this interpreter through a .pth file, but not the .pth files
beside them: an editable Moetron there stays hidden.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
SOURCES = ("moetron", "moe", "data", "tokenizers", "examples")
FILES = ("setup.py", "pyproject.toml", "pretrain_moe.py", "README.md", "LICENSE")
TRAIN = ("--config", "olmoe_1b_7b/tiny", "--mock-data", "--lr-warmup-iters", "0", "--eval-iters")
SWEEP = """
sweep: {base: olmoe_1b_7b/tiny.yaml, seeds: [1]}
overrides:
  training: {train_iters: 2}
  learning_rate: {lr_warmup_iters: 0}
  logging: {tensorboard: false}
variants: {one: {}}
"""


class Installed(NamedTuple):
    bin: Path
    work: Path
    """Working directory of commands."""

    def run(self, program: str, *arguments: object) -> str:
        dropped = ("PYTHONPATH", "RANK", "WORLD_SIZE")
        inherited = {k: v for k, v in os.environ.items() if k not in dropped}
        done = subprocess.run(
            [str(self.bin / program), *map(str, arguments)],
            cwd=self.work,
            env=inherited | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=250,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def moetron(self, *arguments: object) -> str:
        return self.run("moetron", *arguments)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("installed")
    source, wheels = folder / "source", folder / "wheels"
    for name in SOURCES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in FILES:
        shutil.copy(ROOT / name, source)
    pip, quiet = [sys.executable, "-m", "pip"], ("-q", "--no-deps", "--no-index")
    build = [*pip, "wheel", *quiet, "--no-build-isolation", "-w", wheels, source]
    subprocess.run(build, check=True, timeout=250)
    environment = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    site = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = subprocess.check_output([python, "-c", site], text=True).strip()
    (Path(packages) / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (wheel,) = wheels.glob("*.whl")
    install = [*pip, "--python", python, "install", *quiet, "--ignore-installed", wheel]
    subprocess.run(install, check=True, timeout=250)
    shutil.rmtree(source)
    work = folder / "work"
    work.mkdir()
    return Installed(environment / "bin", work)


def test_the_checkout_is_not_imported(installed: Installed) -> None:
    program = "import moetron, moetron.moe as m; print(*moetron.__path__, *m.__path__)"
    folders = installed.run("python", "-c", program).split()
    assert all(Path(folder).is_relative_to(installed.bin.parent) for folder in folders)


def test_recipes_are_inside(installed: Installed) -> None:
    listed = installed.moetron("plan", "--list")
    examples = {path.parent.name for path in (ROOT / "examples").glob("*/pretrain.yaml")}
    assert all(f"| {name} |" in listed for name in examples - {"quickstart"})
    found = installed.run(
        "python", "-c", "from moetron.common import recipes as r; print(r.recipes_folder())"
    )
    shipped = {str(p.relative_to(found.strip())) for p in Path(found.strip()).rglob("*.yaml")}
    assert shipped == {
        str(p.relative_to(ROOT / "examples")) for p in (ROOT / "examples").rglob("*.yaml")
    }
    assert (Path(found.strip()) / "evaluation" / "questions.py").is_file()


def test_a_run_is_trained_resumed_and_used(installed: Installed) -> None:
    save = ("--save", "run", "--no-tensorboard")
    printed = installed.moetron("train", *TRAIN, "0", "--train-iters", "3", *save)
    assert "step 3/3 | loss" in printed
    resumed = installed.moetron("train", *TRAIN, "0", "--train-iters", "5", *save, "--load", "run")
    assert "resumes at step 3" in resumed and "step 5/5 | loss" in resumed
    assert "report: run/report.html" in installed.moetron("report", "run")
    assert "step 5" in installed.moetron("convert", "inspect", "--load", "run")
    program = (
        "from moetron import api\n"
        "with api.load_run('run') as run:\n"
        "    print(run.step, sum(p.numel() for p in run.model.parameters()))"
    )
    assert installed.run("python", "-c", program).split() == ["5", "297536"]


def test_two_ranks_train(installed: Installed) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    words = ("-m", "moetron", "train", *TRAIN, "0", "--train-iters", "3")
    printed = installed.run("python", *launcher, *words, "--expert-model-parallel-size", "2")
    assert "step 3/3 | loss" in printed and "EP 2" in printed


def test_the_machine_is_examined(installed: Installed) -> None:
    assert "megatron-core" in installed.moetron("doctor")
    assert "moetron 0." in installed.moetron("--version")


def test_text_becomes_shards(installed: Installed) -> None:
    (installed.work / "x.txt").write_text("one two three\n" * 20)
    words = ("--input", "x.txt", "--tokenizer", "bytes", "--output-prefix", "x", "--workers", "1")
    assert "1 documents, 280 tokens" in installed.moetron("prepare", *words)
    assert "280" in installed.moetron("inspect", "x")


def test_sweeps_run(installed: Installed) -> None:
    """A shipped sweep is checked, and one beside the recipes of the wheel is run."""
    assert "z_loss/seed_1" in installed.moetron("ablate", "st_moe", "--dry-run")
    program = "from moetron.common import recipes as r; print(r.recipe_path('olmoe_1b_7b/tiny'))"
    recipe = installed.run("python", "-c", program).strip()
    sweep = SWEEP.replace("olmoe_1b_7b/tiny.yaml", recipe)
    (installed.work / "sweep.yaml").write_text(sweep)
    printed = installed.moetron("ablate", "sweep.yaml", "--output", "sweep", "--jobs", "1")
    assert "| one |" in printed and "| 1/1 |" in printed
