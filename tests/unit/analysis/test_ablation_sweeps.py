"""Sweeps: files, scheduling of runs, stability, the table."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from moetron.common.errors import UserError
from moetron.moe.analysis.ablation.execute import (
    finished,
    prepare,
    refuse_others,
    run_all,
    slurm_script,
)
from moetron.moe.analysis.ablation.outcome import is_stable
from moetron.moe.analysis.ablation.sweep import Sweep, read
from moetron.moe.analysis.ablation.table import TABLE, write

ROOT = Path(__file__).resolve().parents[3]
MOCK = {"data": {"mock_data": True}, "model": {"vocab_size": 512}}
UPCYCLED = {"moe": {"num_experts": 4, "moe_router_topk": 2}, "upcycle": {"variant": "dense"}}
DENSE = {"moe": dict.fromkeys(("num_experts", "moe_ffn_hidden_size", "moe_z_loss_coeff"))}
DENSE["moe"]["moe_aux_loss_coeff"] = 0.0


def write_sweep(folder: Path, variants: dict[str, Any], **head: Any) -> Path:
    base = ROOT / "examples" / "olmoe_1b_7b" / "tiny.yaml"
    tree = {"sweep": {"base": str(base), "seeds": [1, 2], **head}, "variants": variants}
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


@pytest.mark.parametrize(
    "path", sorted((ROOT / "examples" / "ablations").glob("*.yaml")), ids=lambda path: path.stem
)
def test_shipped_sweeps(path: Path) -> None:
    """Every variant passes all checks, and all variants differ."""
    sweep = read(path, MOCK)
    assert len(sweep.runs) >= 2 * 3
    first = [sweep.of(variant)[0] for variant in sweep.variants]
    described = [(run.settings.model_dump_json(), str(run.upcycle)) for run in first]
    assert len(set(described)) == len(sweep.variants)


def test_overrides_variants_flags_and_seeds(tmp_path: Path) -> None:
    path = write_sweep(tmp_path, {"base": None, "k2": {"moe": {"moe_router_topk": 2}}})
    sweep = read(path, {"training": {"train_iters": "70"}})
    assert [run.name for run in sweep.runs] == [
        f"{variant}/seed_{seed}" for variant in ("base", "k2") for seed in (1, 2)
    ]
    last = sweep.runs[-1].settings
    assert (last.moe.moe_router_topk, last.moe.num_experts) == (2, 16)
    assert (last.training.seed, last.training.train_iters) == (2, 70)


def test_a_base_may_be_named_as_a_recipe(tmp_path: Path) -> None:
    sweep = read(write_sweep(tmp_path, {"it": {}}, base="olmoe_1b_7b/tiny"), {})
    assert sweep.runs[0].settings.moe.num_experts == 16
    (tmp_path / "olmoe_1b_7b").mkdir()
    (tmp_path / "olmoe_1b_7b" / "tiny").write_text("moe: {num_experts: 7}")
    with pytest.raises(UserError, match="num-layers is missing"):  # a file beside the sweep wins
        read(write_sweep(tmp_path, {"it": {}}, base="olmoe_1b_7b/tiny"), {})


def test_all_problems_of_all_variants_at_once(tmp_path: Path) -> None:
    variants = {
        "typo": {"moe": {"num_expert": 8}},
        "too_many": {"moe": {"moe_router_topk": 17}},
        "good": {},
        "lost": {"upcycle": {"variant": "nowhere"}},
        "from_experts": {"upcycle": {"variant": "good"}},
        "share": {"upcycle": {"variant": "good", "noise_fraction": 2}},
        "a b": {},
    }
    with pytest.raises(UserError) as caught:
        read(write_sweep(tmp_path, variants), {})
    text = str(caught.value)
    for expected in (
        "typo: unknown key `num_expert`",
        "too_many: --moe-router-topk 17",
        "lost: upcycle: `nowhere` is not a variant",
        "from_experts: --num-experts 16: the model to start from has experts",
        "share: upcycle: noise_fraction",
        "a b: a variant's name",
    ):
        assert expected in text
    assert "good: " not in text


@pytest.mark.parametrize("seeds", [[], [1, 1], ["x"]])
def test_seeds_must_be_numbers_each_once(tmp_path: Path, seeds: list[Any]) -> None:
    with pytest.raises(UserError, match="seeds"):
        read(write_sweep(tmp_path, {"a": {}}, seeds=seeds), {})


@pytest.mark.parametrize(
    ("losses", "stable"),
    [
        ([4.0] * 100, True),
        ([4.0] * 50 + [8.0] + [4.0] * 50, True),  # one step: 4.8 is 1.2 times 4
        ([4.0] * 50 + [8.1] + [4.0] * 50, False),
        ([4.0] * 50 + [5.0] * 50, False),
        ([4.0 + 0.02 * n for n in range(100)], False),  # never a jump
        ([8.0 - 0.05 * n for n in range(100)], True),
        ([4.0] * 50 + [float("nan")] * 50, False),
        ([4.0, float("inf")], False),
        ([4.0, 9.0], True),  # too short to judge
    ],
)
def test_stability(losses: list[float], stable: bool) -> None:
    assert is_stable(losses) is stable


FAKE = """
import pathlib, sys, time
folder, log = pathlib.Path(sys.argv[1]), sys.argv[2]
steps, code, seconds = int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5])
def log_line(word):
    with open(log, "a") as file:
        file.write(word + " " + folder.parent.name + "\\n")
log_line("start")
time.sleep(seconds)
log_line("end")
if code == 0:
    (folder / "latest").write_text(f"step_{steps:07d}\\n")
sys.exit(code)
"""


class Fakes:
    """Commands that log their start and end and write the files of a finished run."""

    def __init__(self, sweep: Sweep, output: Path, seconds: float = 0.3) -> None:
        self.sweep, self.output, self.seconds = sweep, output, seconds
        self.log = output.parent / "log"
        self.codes: dict[str, int] = {}

    def __call__(self, number: str) -> list[str]:
        run = self.sweep.runs[int(number)]
        code = self.codes.get(run.variant, 0)
        words = (self.log, run.settings.training.train_iters, code, self.seconds)
        folder = self.output / run.name
        return [sys.executable, "-c", FAKE, str(folder), *map(str, words)]

    def lines(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def fakes(tmp_path: Path) -> Fakes:
    path = write_sweep(tmp_path, {"up": UPCYCLED, "dense": DENSE, "other": {}})
    tree = yaml.safe_load(path.read_text())
    tree["overrides"] = {"model": {"ffn_hidden_size": 64}, "moe": {"moe_ffn_hidden_size": 64}}
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return Fakes(read(path, {}), tmp_path / "out")


def never() -> bool:
    return False


def test_runs_in_parallel_in_order_and_once(fakes: Fakes) -> None:
    codes = run_all(fakes.sweep, fakes.output, 2, fakes, never)
    assert list(codes.values()) == [0] * 6
    lines = fakes.lines()
    running = peak = 0
    for line in lines:
        running += 1 if line.startswith("start") else -1
        peak = max(peak, running)
    assert peak == 2
    assert lines.index("start up") > lines.index("end dense")
    assert all(finished(run, fakes.output) for run in fakes.sweep.runs)
    assert run_all(fakes.sweep, fakes.output, 2, fakes, never) == {}
    assert len(fakes.lines()) == len(lines)


def test_a_failure_fails_only_runs_upcycled_from_it(fakes: Fakes) -> None:
    fakes.codes = {"dense": 3}
    codes = run_all(fakes.sweep, fakes.output, 4, fakes, never)
    assert {(run.variant, code) for run, code in codes.items()} == {
        ("dense", 3),
        ("other", 0),
        ("up", 1),
    }


def test_a_stop_reaches_the_runs_and_starts_no_others(fakes: Fakes) -> None:
    fakes.seconds = 60
    codes = run_all(fakes.sweep, fakes.output, 2, fakes, lambda: bool(fakes.lines()))
    assert len(codes) == 2
    assert all(code != 0 for code in codes.values())


def test_other_settings_in_a_folder_are_refused(fakes: Fakes, tmp_path: Path) -> None:
    """Also for finished runs, whose old results would otherwise be those of the new settings."""
    run_all(fakes.sweep, fakes.output, 6, fakes, never)
    refuse_others(fakes.sweep.runs, fakes.output)
    changed = read(tmp_path / "sweep.yaml", {"learning_rate": {"lr": 1e-3}})
    with pytest.raises(
        UserError, match=r"other settings(.|\n)*dense/seed_2: --lr 0.002, now 0.001"
    ):
        refuse_others(changed.runs, fakes.output)
    with pytest.raises(UserError, match="other settings"):
        prepare(changed.runs[0], fakes.output)


def test_an_output_that_cannot_be_written_is_named(fakes: Fakes, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--output .*cannot write there"):
        prepare(fakes.sweep.runs[0], tmp_path / "file")


def test_the_slurm_script_submits_all_runs_in_two_arrays(fakes: Fakes, tmp_path: Path) -> None:
    """Uses an sbatch that logs its arguments and runs the wrapped command."""
    (tmp_path / "sbatch").write_text(
        '#!/bin/sh\nfor word; do last="$word"; done\necho "$@" >> "$LOG"\n'
        'SLURM_ARRAY_TASK_ID=3 sh -c "$last" >&2\necho "77;cluster"\n'
    )
    (tmp_path / "sbatch").chmod(0o755)
    script = slurm_script(fakes.sweep, ["echo", "it's run", "--run"])
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(fakes.log)}
    done = subprocess.run(
        ["bash", "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stderr == "it's run --run\n" * 2
    first, second = fakes.lines()
    assert "--array 0-3 " in first and "--dependency" not in first
    assert "--array 4-5 --dependency afterany:77 " in second


def write_run_files(folder: Path, losses: list[float], validation: float, speed: float) -> None:
    folder.mkdir(parents=True)
    rows = [
        {"step": n, "tokens": 10 * n, "lm_loss": loss, "tokens_per_s": speed}
        for n, loss in enumerate(losses, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "validation.jsonl").write_text(json.dumps({"validation_loss": validation}) + "\n")
    (folder / "latest").write_text(f"step_{len(losses):07d}\n")


def test_the_table(tmp_path: Path) -> None:
    path = write_sweep(
        tmp_path, {"base": {}, "dense": DENSE, "half_run": {"model": {"swiglu": False}}}
    )
    sweep = read(path, {"training": {"train_iters": 100}, "model": {"hidden_size": 32}})
    output = tmp_path / "out"
    for seed, loss in ((1, 3.0), (2, 3.2)):
        write_run_files(output / f"base/seed_{seed}", [4.0] * 100, loss, 1000 * seed)
    write_run_files(output / "dense/seed_1", [4.0] * 100, 3.5, 3000)
    write_run_files(output / "dense/seed_2", [4.0] * 60 + [float("nan")] * 40, float("nan"), 3000)
    (output / "dense/seed_2/latest").write_text("step_0000070\n")  # stopped after it diverged
    write_run_files(output / "half_run/seed_1", [4.0] * 50 + [6.0] * 50, 6.0, 500)
    text = write(sweep, output)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert rows[0][4:6] == ["validation loss", "against base"]
    assert rows[2][3:] == ["2/2", "3.1000 ± 0.1414", "", "1,500"]
    assert rows[3][3:] == ["1/2", "3.5000", "+0.5000", "3,000"]
    assert rows[4][3:] == ["0/1 (1 to run)", "", "", "500"]
    attention, norms = 2 * 4 * 32 * 32, (2 * 2 + 2 * 2 + 1) * 32
    assert rows[3][1] == f"{attention + norms + 2 * 3 * 32 * 128:,}"
    experts, router = 2 * 3 * 32 * 32, 2 * 16 * 32
    assert rows[2][1:3] == [f"{attention + norms + router + n * experts:,}" for n in (16, 4)]
    assert (output / TABLE).read_text() == text
    assert (output / "table.png").stat().st_size > 10_000
