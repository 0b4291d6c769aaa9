"""Health files that are damaged or hostile."""

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from moetron.common.errors import UserError
from moetron.moe.health.events import Event, append_event, read_events
from moetron.moe.health.monitor import FILE, HealthMonitor, HealthState
from tests.unit.training.training_cases import settings


class Config:
    """What a monitor needs of megatron-core's configuration."""

    finalize_model_grads_func: Any = None


def monitor() -> HealthMonitor:
    return HealthMonitor(settings(), [], Config())


def test_a_state_comes_back_to_the_last_bit(tmp_path: Path) -> None:
    values = [1 / 3, 2e-308, 7.000000000000001]
    state = HealthState.model_validate({"spikes": {"loss": values, "skipped_steps": 2}})
    (tmp_path / FILE).write_text(state.model_dump_json())
    found = monitor()
    found.restore(tmp_path)
    assert HealthState.model_validate_json(found.state()) == state


def test_a_checkpoint_without_the_file_starts_afresh(tmp_path: Path) -> None:
    found = monitor()
    found.restore(tmp_path)
    assert HealthState.model_validate_json(found.state()) == HealthState()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{" * 9,
        '{"spikes": 1}',
        '{"spikes": {"loss": ["x"]}}',
        '{"spikes": {"loss": [NaN]}}',
        '{"experts": {"idle": {"layer_0": [1.5]}}}',
        '{"other": 1}',
        "[" * 100_000,
    ],
)
def test_a_damaged_state_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(UserError, match=f"{FILE}: damaged"):
        monitor().restore(tmp_path)


def test_a_state_outside_the_folder_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text(HealthState().model_dump_json())
    folder = tmp_path / "step_0000002"
    folder.mkdir()
    (folder / FILE).symlink_to("../elsewhere")
    with pytest.raises(UserError, match="leads out of the folder"):
        monitor().restore(folder)


def _append(folder: Path, writer: int) -> None:
    for step in range(200):
        append_event(folder, Event(step, "hang", "warn", "x" * 3000, ranks=[writer]))


def test_lines_of_several_processes_do_not_mix(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_append, args=(tmp_path, number)) for number in range(3)]
    for each in writers:
        each.start()
    for each in writers:
        each.join()
    # A writer that finds another one in the middle of its line leaves an empty line.
    lines = [line for line in (tmp_path / "events.jsonl").read_text().splitlines() if line]
    rows = [json.loads(line) for line in lines]
    for number in range(3):
        assert [row["step"] for row in rows if row["ranks"] == [number]] == list(range(200))


def test_a_line_after_one_that_a_full_disk_cut_is_whole(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text('{"step": 1}\n{"st')
    append_event(tmp_path, Event(5, "hang", "stop", "rank 1 hangs", ranks=[1]))
    found = [(row["step"], row.get("ranks")) for row in read_events(tmp_path / "events.jsonl")]
    assert found == [(1, None), (5, [1])]


def test_lines_that_are_no_events_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    assert list(read_events(path)) == []
    rows: list[Any] = [{"step": 1}, 3, {"step": 2}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "[" * 100_000 + '\n{"st')
    assert list(read_events(path)) == [{"step": 1}, {"step": 2}]
