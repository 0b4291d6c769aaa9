"""Output of several ranks: one start block, and the highest peak memory."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import torch

from moetron.moe.host.allocator import peak_memory_bytes
from tests.parallel.support.checkpoint_runs import parallel_of, settings, start
from tests.parallel.support.harness import run_ranks

EXTRA_BYTES = 300 * 2**20


def _train(folder: str, layout: str) -> dict[str, Any]:
    """Run three steps, the last rank with more memory in use."""
    printed = io.StringIO()
    chosen = settings(layout, checkpoint={"save": folder}, training={"train_iters": 3})
    with contextlib.redirect_stdout(printed), parallel_of(chosen):
        loop = start(chosen)
        if loop.trainer.runtime.rank == 1:
            torch.ones(EXTRA_BYTES // 4)
        loop.run(lambda: False)
        own = peak_memory_bytes(loop.trainer.runtime.device)
    return {"printed": printed.getvalue(), "peak_memory_bytes": own}


def test_one_rank_prints_the_start_block_and_all_count(tmp_path: Path) -> None:
    """On a pipeline, where the rank that prints does not hold the loss."""
    main, other = run_ranks(_train, 2, str(tmp_path), "pp2")
    assert other["printed"] == ""
    lines = main["printed"].splitlines()
    assert lines.count("start") == 1 and lines[0] == "start"
    assert "2 ranks on 1 host: TP 1, PP 2," in lines[2]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    [begun] = [json.loads(line) for line in (tmp_path / "starts.jsonl").open()]
    assert (begun["step"], begun["layout"]["PP"], len(rows)) == (0, 2, 3)
    peaks = [row["peak_memory_bytes"] for row in rows]
    assert peaks == sorted(peaks)
    assert main["peak_memory_bytes"] + EXTRA_BYTES / 2 < peaks[-1]
    assert other["peak_memory_bytes"] * 0.99 < peaks[-1] <= other["peak_memory_bytes"]
    [last] = [line for line in lines if line.startswith("step 3/3 |")]
    assert f"peak memory {peaks[-1] / 2**30:.2f} GiB a rank" in last
