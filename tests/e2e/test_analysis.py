"""Commands from a short run with limited capacity to its analysis and report page."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "examples" / "olmoe_1b_7b" / "tiny.yaml")


def _done(*arguments: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, *arguments],
        env={**inherited, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def _python(*arguments: str) -> None:
    done = _done(*arguments)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train four steps with checkpoints after steps 2 and 4."""
    folder = tmp_path_factory.mktemp("run")
    _python(
        *(str(ROOT / "pretrain_moe.py"), "--config", TINY, "--train-iters", "4"),
        *("--lr-warmup-iters", "1", "--eval-iters", "0", "--save", str(folder / "run")),
        *("--save-interval", "2", "--no-tensorboard", "--cpu-threads", "1"),
        *("--moe-expert-capacity-factor", "0.5", "--moe-token-drop-policy", "position"),
    )
    for name, pattern in (("code", "moe/*/*.py"), ("prose", "*.md")):
        _python(
            *(str(ROOT / "tools" / "preprocess_corpus.py"), "--input", str(ROOT / pattern)),
            *("--tokenizer", "bytes", "--workers", "1", "--output-prefix", str(folder / name)),
        )
    return folder / "run"


def test_a_tokenizer_other_than_the_runs_is_refused(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    record, sums = (copy / "step_0000004" / name for name in ("run.json", "SHA256SUMS"))
    before, content = record.read_bytes(), json.loads(record.read_text())
    content["stream"]["sources"] = [{"tokenizer": "f" * 64}]
    record.write_text(json.dumps(content))
    old, new = (hashlib.sha256(data).hexdigest() for data in (before, record.read_bytes()))
    sums.write_text(sums.read_text().replace(old, new))
    tool = str(ROOT / "tools" / "analyze_routing.py")
    shard = f"code={run.parent / 'code'}"
    done = _done(tool, str(copy), "--tokenizer-model", "bytes", "--data", shard)
    assert done.returncode == 2, done.stderr
    assert "not the tokenizer that the run was trained with" in done.stderr


def test_analysis_and_page_of_a_run(run: Path) -> None:
    shards = [f"{name}={run.parent / name}" for name in ("code", "prose")]
    _python(
        *(str(ROOT / "tools" / "analyze_routing.py"), str(run), "--tokenizer-model", "bytes"),
        *("--tokens-per-class", "1024", "--save-choices", "--data", *shards),
    )
    found = json.loads((run / "analysis" / "analysis.json").read_text())
    assert found["domains"] == ["code", "prose"] and found["tokens"] == {
        "code": 1024,
        "prose": 1024,
    }
    assert [row["step"] for row in found["checkpoints"]] == [2, 4]
    assert found["checkpoints"][-1]["saturation"] == {"1": [1.0, 1.0], "k": [1.0, 1.0]}
    assert max(found["checkpoints"][0]["saturation"]["1"]) < 1.0
    np.testing.assert_allclose(np.mean(found["load"], axis=1), 1.0)
    shares = np.array(found["domain_specialization"]["k"])
    np.testing.assert_allclose(shares.sum(2), found["topk"])
    with np.load(run / "analysis" / "choices.npz") as saved:
        choices_LNK, texts_N = saved["choices"], saved["texts"]
        assert saved["names"].tolist() == ["code", "prose"] and saved["tokens"].shape == (2048,)
    for text in (0, 1):  # the same shares from the choices
        visits_LNKE = choices_LNK[:, texts_N == text, :, None] == np.arange(shares.shape[2])
        np.testing.assert_allclose(visits_LNKE.sum(2).mean(1), shares[:, text])
    drops = np.array(found["dropped_by_position"])  # [layers, buckets]
    assert (drops[:, -4:].mean(1) > drops[:, :4].mean(1)).all()  # left to right: the end is dropped
    assert len(list((run / "analysis").glob("*.png"))) == 8
    _python(str(ROOT / "tools" / "report.py"), str(run))
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "Where are tokens dropped?" in page and "Which experts specialise in code?" in page
