"""The quick start from end to end; takes minutes."""

import json
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
