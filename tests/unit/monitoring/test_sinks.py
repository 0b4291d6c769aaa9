"""Sinks: floats keep every bit, no duplicate steps after a resume."""

import io
import json
import math
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from moetron.common.errors import UserError
from moetron.moe.monitoring import sinks
from moetron.moe.monitoring.heat_map import draw, pixels
from moetron.moe.monitoring.sinks import JsonLines, LineFiles, WandB, flat, heat_map, open_sinks
from tests.unit.training.training_cases import settings

LOADS = {"layer_1": np.array([0.0, 1.0, 2.0]), "layer_3": np.ones(3)}


def _steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_floats_keep_every_bit_and_lines_are_flushed(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl", 0)
    value = math.pi * 1e-7
    lines.write({"step": 1, "lm_loss": value})
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["lm_loss"] == value


def test_a_resume_keeps_events_about_the_machine(tmp_path: Path) -> None:
    """It repeats steps 3 to 5 and what they find, but not the hang that ended them."""
    path = tmp_path / "events.jsonl"
    rows = [(2, "loss_spike"), (3, "loss_spike"), (4, "straggler"), (5, "hang")]
    lines = [json.dumps({"step": step, "kind": kind}) + "\n" for step, kind in rows]
    path.write_text("".join(lines) + '{"step": 5, "kind": "ha')
    LineFiles(tmp_path, 2).close()
    assert path.read_text() == lines[0] + lines[2] + lines[3]


def test_a_full_disk_delays_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl", 0)
    real = lines._file

    class Full:
        room = 5

        def write(self, data: bytes) -> int:
            if not self.room:
                raise OSError(28, "No space left on device")
            written = real.write(data[: self.room])
            self.room -= written
            return written

        close = real.close

    lines._file = full = Full()
    for step in (1, 2, 3):
        lines.write({"step": step})
    assert caplog.text.count("lines are kept") == 1
    full.room = 1000
    lines.write({"step": 4})
    full.room = 0
    lines.write({"step": 5})
    lines.close()
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 4
    assert "the last 12 bytes are lost" in caplog.text


def test_tensorboard_ends_with_its_disk_and_the_run_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    board = sinks.TensorBoard(tmp_path, 0)
    full = OSError(28, "No space left on device")
    board._writer.close()
    monkeypatch.setattr(board, "_writer", Mock(add_scalar=Mock(side_effect=full)))
    for step in (1, 2):
        board.step({"step": step, "loss": 1.0})
    board.close()
    assert caplog.text.count("TensorBoard is off until the next start") == 1


def test_a_resume_drops_the_steps_that_it_repeats(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lm_lo')
    lines = JsonLines(path, 2)
    assert _steps(path) == [1, 2]
    lines.write({"step": 3})
    assert _steps(path) == [1, 2, 3]


def test_a_repeated_evaluation_leaves_one_line_per_step(tmp_path: Path) -> None:
    for loss in (2.0, 1.5):
        files = LineFiles(tmp_path, 8)
        for step in (4, 8):
            files.validation({"step": step, "validation_loss": loss})
        files.close()
    rows = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    assert [(row["step"], row["validation_loss"]) for row in rows] == [(4, 1.5), (8, 1.5)]


def test_a_fresh_run_drops_everything(tmp_path: Path) -> None:
    (tmp_path / "validation.jsonl").write_text('{"step": 7}\n')
    LineFiles(tmp_path, 0).close()
    assert (tmp_path / "validation.jsonl").read_text() == ""


def test_a_folder_that_cannot_be_made_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--save .*file/run: cannot write there"):
        LineFiles(tmp_path / "file" / "run", 0)


def test_nested_numbers_are_named_by_path() -> None:
    row = {"step": 3, "loss": 1.5, "sources": {"code": 1, "prose": 2.0}, "note": "text"}
    assert flat(row) == [("loss", 1.5), ("sources/code", 1), ("sources/prose", 2.0)]


def test_tensorboard_scalars_can_be_read_back(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for sink in open_sinks(settings(checkpoint={"save": str(tmp_path)}), 0):
        sink.step({"step": 1, "lm_loss": 2.5})
        sink.validation({"step": 1, "validation_loss": 2.0, "source_losses": {"a": 1.0}})
        sink.expert_load(1, LOADS)
        sink.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    scalars = {name: events.Scalars(name)[0].value for name in events.Tags()["scalars"]}
    assert scalars == {
        "train/lm_loss": 2.5,
        "validation/validation_loss": 2.0,
        "validation/source_losses/a": 1.0,
    }
    assert _steps(tmp_path / "metrics.jsonl") == [1]
    loads = {name: events.Histograms(name)[0] for name in events.Tags()["histograms"]}
    assert {name: (load.step, load.histogram_value.min) for name, load in loads.items()} == {
        "expert_load/layer_1": (1, 0.0),
        "expert_load/layer_3": (1, 1.0),
    }
    image = events.Images("expert_load/all")[0]
    assert image.step == 1
    pixels = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))
    assert (pixels == heat_map(LOADS)).all()


@pytest.mark.parametrize(("layers", "experts"), [(2, 3), (61, 256)])
def test_a_heat_map_names_its_axes_and_its_scale(layers: int, experts: int) -> None:
    loads = {f"layer_{n + 3}": np.linspace(0, 2, experts) for n in range(layers)}
    figure = draw(loads)
    axes, bar = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("expert", "layer")
    assert axes.get_title() == "Load of every expert" and bar.get_ylabel() == "load / even share"
    [image] = axes.get_images()
    assert (np.asarray(image.get_array()) == np.stack(list(loads.values()))).all()
    assert image.get_clim() == (0, 2)
    shown = [label.get_text() for label in axes.get_yticklabels()]
    assert shown[0] == "3" and len(shown) <= 24
    drawn = pixels(figure)
    assert drawn.dtype == np.uint8 and drawn.shape[2] == 3
    blue, _, red = drawn.reshape(-1, 3).astype(int).T
    assert (blue > red + 100).any() and (red > blue + 100).any()


class _WandbServer:
    """Fake of the module wandb: runs by id, and histories that accept each step once."""

    def __init__(self) -> None:
        self.histories: dict[str, dict[int, dict[str, float]]] = {}
        self.inits: list[dict[str, Any]] = []

    def init(self, **words: Any) -> "_WandbRun":
        self.inits.append(words)
        name = words["id"] or f"id{len(self.histories)}"
        assert words["resume"] == "allow"
        return _WandbRun(name, self.histories.setdefault(name, {}))


class _WandbRun:
    def __init__(self, name: str, history: dict[int, dict[str, float]]) -> None:
        self.id = name
        self.starting_step = max(history, default=-1) + 1
        self._history = history

    def log(self, values: dict[str, float], step: int) -> None:
        assert step >= max(self._history, default=0), "wandb drops it with a warning"
        self._history.setdefault(step, {}).update(values)

    def finish(self) -> None:
        pass


def _logging(**values: Any) -> dict[str, Any]:
    return {"wandb_project": "p", "tensorboard": False, **values}


def _train_with_wandb(folder: Path, first: int, last: int, **values: Any) -> None:
    """Start a run at the step after ``first`` and kill it after ``last``."""
    chosen = settings(checkpoint={"save": str(folder)}, logging=_logging(**values))
    sinks = open_sinks(chosen, first)
    for step in range(first + 1, last + 1):
        for sink in sinks:
            sink.step({"step": step, "lm_loss": 0.5 * step})
    for sink in sinks:
        sink.validation({"step": last, "validation_loss": 2.0})
        sink.close()


def test_wandb_resumes_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resume repeats steps 5 and 6; a fresh start in the folder is another run."""
    server = _WandbServer()
    monkeypatch.setitem(sys.modules, "wandb", server)
    folder = tmp_path / "olmoe"
    _train_with_wandb(folder, 0, 6, wandb_entity="team", wandb_exp_name="third try")
    _train_with_wandb(folder, 4, 8, wandb_entity="team", wandb_exp_name="third try")
    [history] = server.histories.values()
    losses = {step: {"train/lm_loss": 0.5 * step} for step in range(1, 9)}
    for step in (6, 8):
        losses[step]["validation/validation_loss"] = 2.0
    assert history == losses
    first, second = server.inits
    assert (first["id"], second["id"]) == (None, "id0")
    for words in server.inits:
        named = {name: words[name] for name in ("project", "entity", "name", "dir")}
        assert named == {
            "project": "p", "entity": "team", "name": "third try", "dir": str(folder),
        }  # fmt: skip
    _train_with_wandb(folder, 0, 2)
    assert (server.inits[2]["id"], server.inits[2]["name"]) == (None, "olmoe")
    _train_with_wandb(folder, 2, 3)
    assert server.inits[3]["id"] == "id1"
    assert [sorted(history) for history in server.histories.values()] == [
        [*range(1, 9)],
        [1, 2, 3],
    ]


def test_wandb_offline_keeps_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_settings = settings(
        checkpoint={"save": str(tmp_path)}, logging={"wandb_project": "p", "tensorboard": False}
    )
    for sink in open_sinks(run_settings, 0):
        sink.step({"step": 100, "lm_loss": 2.5})
        sink.expert_load(100, LOADS)
        sink.validation({"step": 100, "validation_loss": 2.0})
        sink.close()
    [log] = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = log.read_bytes()
    for name in (b"train/lm_loss", b"expert_load/layer_1", b"expert_load/all", b"validation_loss"):
        assert name in content
    [image] = log.parent.glob("files/media/images/**/*.png")
    assert (np.asarray(Image.open(image)) == heat_map(LOADS)).all()


def test_wandb_missing_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="--wandb-project needs"):
        WandB(tmp_path, 0, settings(logging=_logging()))


def test_nothing_is_written_without_a_folder(tmp_path: Path) -> None:
    assert open_sinks(settings(), 0) == []
