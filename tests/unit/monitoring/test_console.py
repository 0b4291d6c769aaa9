"""Console progress: plain lines in a log, a bar on a terminal."""

import sys
from typing import Any

import pytest

from moetron.moe.monitoring.console import Console


def _row(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "lm_loss": 2.5,
        "grad_norm": 0.75,
        "lr": 1e-3,
        "expert_load_max_over_mean": 1.5,
        "tokens_per_s": 12_345.6,
        "tflops_per_s": 0.25,
        "mfu": 0.125,
        "peak_memory_bytes": 3 * 2**28,
    }


def _drive(console: Console) -> None:
    for step in range(11, 16):
        console.step(_row(step))
    console.validation({"step": 15, "validation_loss": 2.0, "source_losses": {"a": 1.0, "b": 3.0}})
    console.close()


def test_lines_are_printed_at_the_interval_and_at_the_end(
    capsys: pytest.CaptureFixture[str],
) -> None:
    _drive(Console(10, 15, interval=2))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" |")[0] for line in lines] == [
        *("step 12/15", "step 14/15", "step 15/15", "step 15")
    ]
    assert " | ".join(lines[0].split(" | ")[1:-1]) == (
        "loss 2.5000 | grad norm 0.750 | lr 1.00e-03 | fullest expert 1.50x mean | "
        "12,346 tokens/s | 0.25 TFLOP/s a rank | MFU 12.5 % | peak memory 0.75 GiB a rank"
    )
    assert "ETA 0 s" in lines[2]
    assert lines[3].endswith("validation loss 2.0000 (a 1.0000, b 3.0000)")


def test_a_limited_capacity_shows_what_it_drops(capsys: pytest.CaptureFixture[str]) -> None:
    Console(10, 15, interval=1).step({**_row(11), "dropped_fraction": 0.27136})
    assert " | fullest expert 1.50x mean | dropped 27.1 % | " in capsys.readouterr().out


def test_preferences_show_their_loss(capsys: pytest.CaptureFixture[str]) -> None:
    console, found = Console(10, 15, interval=1), {"preference_loss": 0.6875, "accuracy": 0.5}
    console.step({**_row(11), **found})
    validation = {"step": 15, "validation_loss": 2.0, "source_losses": {"a": 2.0}}
    console.validation({**validation, **found})
    step, evaluation = capsys.readouterr().out.splitlines()
    assert " | preference loss 0.6875 | grad norm" in step and "loss 2.5" not in step
    assert evaluation.endswith("validation loss 2.0000 | preference loss 0.6875 | accuracy 0.5000")


def test_a_terminal_gets_a_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    _drive(Console(10, 15, interval=1))
    out, err = capsys.readouterr()
    assert "15/15" in err
    assert "loss 2.5000" in err
    assert out.splitlines() == ["step 15 | validation loss 2.0000 (a 1.0000, b 3.0000)"]


def test_a_redirected_output_gets_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``| tee log``: stderr is a terminal, stdout is not."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    _drive(Console(10, 15, interval=5))
    assert capsys.readouterr().out.startswith("step 15/15 | loss 2.5000")
