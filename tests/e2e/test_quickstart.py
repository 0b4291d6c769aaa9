"""The quick start from end to end; takes minutes."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_model_beats_the_bigram_and_a_second_run_reuses_everything(tmp_path: Path) -> None:
    first = quickstart(tmp_path)
    checkpoint = Path(first["paths"]["checkpoint"])
    written = checkpoint.stat().st_mtime_ns
    assert first["validation_loss"] < first["bigram_cross_entropy"]
    assert first["bigram_cross_entropy"] < first["unigram_cross_entropy"]
    assert all(Path(path).exists() for path in first["paths"].values())
    second = quickstart(tmp_path)
    assert second["validation_loss"] == first["validation_loss"]
    assert checkpoint.stat().st_mtime_ns == written


def quickstart(out: Path) -> dict[str, Any]:
    command = ["bash", "examples/quickstart.sh", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=1500)
    return json.loads((out / "summary.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--corpus", "nowhere"], "--corpus nowhere is neither a folder nor 'debian'"),
        (["--out"], "--out takes a value"),
        (["--steps", "3"], "unknown option '--steps'"),
        (["--out", "s3://bucket/run"], "--out s3://bucket/run: an address, not a path"),
    ],
)
def test_a_wrong_option_is_reported_at_once(arguments: list[str], message: str) -> None:
    command = ["bash", "examples/quickstart.sh", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert done.returncode == 2
    assert message in done.stderr


STAND_IN = r"""#!/usr/bin/env bash
# Python of a fast run: logs its arguments; collects one text, and writes `latest` as training does.
echo "$*" >>"$LOG"
case "$*" in
  *collect_corpus*) mkdir -p "$OUT/corpus"; echo '{"text": "a"}' >"$OUT/corpus/a.jsonl" ;;
  *preprocess_corpus*) mkdir -p "$OUT/data"; echo '{}' >"$OUT/data/a.json" ;;
  *--check*) ;;
  *tools/launch.py*--exit-interval*) echo step_0000350 >"$OUT/run/latest" ;;
  *tools/launch.py*) echo step_0000700 >"$OUT/run/latest" ;;
esac
"""


def test_every_step_of_the_script_runs(tmp_path: Path) -> None:
    """With a stand-in for Python: the script itself, in seconds."""
    checkout, out, log = tmp_path / "checkout", tmp_path / "out", tmp_path / "log"
    for name in ("quickstart.sh", "train.sh", "quickstart/pretrain.yaml"):
        (checkout / "examples" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "examples" / name, checkout / "examples" / name)
    python = checkout / ".venv" / "bin" / "python"
    for path, text in ((python, STAND_IN), (checkout / "tools" / "setup_env.sh", "exit 0\n")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    done = subprocess.run(
        ["bash", "examples/quickstart.sh", "--out", str(out)],
        cwd=checkout,
        env={"PATH": "/usr/bin:/bin", "LOG": str(log), "OUT": str(out)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    launches = [line for line in log.read_text().splitlines() if "tools/launch.py" in line]
    assert len(launches) == 2
    assert all("--nproc-per-node 2" in line for line in launches)
    assert ["--exit-interval 350" in line for line in launches] == [True, False]
    assert "summarize.py" in log.read_text().splitlines()[-1]
