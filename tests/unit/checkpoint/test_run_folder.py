"""The latest checkpoint at any instant of a save; rejected checkpoints."""

import contextlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.distributed.checkpoint as dcp

from moetron.common import files as atomic
from moetron.common.errors import UserError
from moetron.moe.checkpoint import run_folder as checkpoint_folder
from moetron.moe.checkpoint.checksums import SUMS, write_sums
from moetron.moe.checkpoint.position import Progress
from moetron.moe.checkpoint.run_folder import Record, step_folder, temporary_folder
from moetron.moe.config.checks import problems
from moetron.moe.convert.families.family import function_of
from moetron.moe.convert.initial_checkpoint import write_start
from tests.unit.config.config_cases import make

TENSORS = {"weight": torch.arange(6.0)}


def write(run: Path, step: int, keep_last: int | None = None) -> Path:
    """Save one tensor in the order of save_load.py."""
    folder = step_folder(run, step)
    temporary = checkpoint_folder.prepare(folder)
    dcp.save(dict(TENSORS), checkpoint_id=temporary, no_dist=True)
    files = checkpoint_folder.file_sizes(temporary)
    record = Record(Progress(step, 4 * step, 64 * step), {}, {}, {}, {}, files)
    checkpoint_folder.write_record(temporary, record, {})
    checkpoint_folder.commit(folder, keep_last)
    return folder


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", 100)
    assert folder.name == "step_0000100"
    for path in (folder, tmp_path / "run"):
        found = checkpoint_folder.read(path)
        assert found.folder == folder
        assert found.record.progress == Progress(100, 400, 6400)
        assert found.keys == {"weight"}
    assert not list(tmp_path.rglob("*.tmp"))


def test_settings_of_another_version_are_named() -> None:
    known = make().model_dump(mode="json")
    record = Record(Progress(1, 4, 64), known, {}, {}, {"moetron": "0.0.1"}, {})
    assert checkpoint_folder.one_rank_settings(record).model == make().model
    known["model"] |= {"num_heads": 4, "hidden_size": "wide"}
    with pytest.raises(UserError, match=r"version 0\.0\.1(.|\n)*num_heads(.|\n)*--hidden-size"):
        checkpoint_folder.one_rank_settings(record)


def test_a_run_on_gpus_is_used_on_any_machine() -> None:
    """Whatever needs GPUs or several ranks is left behind, the model is not."""
    gpus = make(
        transformer_impl="transformer_engine", bf16=True, fp8_format="hybrid",
        moe_token_dispatcher_type="flex", expert_model_parallel_size=8, moe_experts_impl="te",
        moe_shared_expert_intermediate_size=64, moe_shared_expert_overlap=True,
        moe_permute_fusion=True, moe_router_fusion=True, cross_entropy_loss_fusion=True,
        cross_entropy_fusion_impl="te", moe_router_padding_for_quantization=True,
    )  # fmt: skip
    record = Record(Progress(1, 4, 64), gpus.model_dump(mode="json"), {}, {}, {}, {})
    here = checkpoint_folder.one_rank_settings(record)
    assert problems(here, 1, device="cpu", te=False) == []
    assert function_of(here) == function_of(gpus)
    assert here.precision == gpus.precision
    local = make(transformer_impl="local")
    record = Record(Progress(1, 4, 64), local.model_dump(mode="json"), {}, {}, {}, {})
    assert checkpoint_folder.one_rank_settings(record) == local


class _Crash(BaseException):
    """Power failure: nothing may catch it."""


CRASH_POINTS = [
    (checkpoint_folder.shutil, "rmtree"),
    (checkpoint_folder, "write_record"),
    (atomic.Path, "rename"),
    (atomic, "sync_folder"),
    (atomic.os, "fsync"),
    (checkpoint_folder, "sync_folder"),
]


def _crash_at(monkeypatch: pytest.MonkeyPatch, countdown: int) -> Callable[[], bool]:
    """Crash before call ``countdown`` that changes the disk; return a function: did it crash?"""
    left = [countdown]

    def interrupt(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                raise _Crash
            return original(*args, **kwargs)

        return call

    for owner, name in CRASH_POINTS:
        monkeypatch.setattr(owner, name, interrupt(getattr(owner, name)))
    return lambda: left[0] <= 0


def test_a_crash_at_any_instant_leaves_a_checkpoint_to_resume_from(tmp_path: Path) -> None:
    """Crash before each change of the disk in turn; then resume over the leftovers."""
    write(tmp_path / "before", 1)
    write(tmp_path / "before", 2)
    for countdown in range(1, 100):
        run = tmp_path / str(countdown)
        shutil.copytree(tmp_path / "before", run)
        with pytest.MonkeyPatch.context() as monkeypatch:
            crashed = _crash_at(monkeypatch, countdown)
            with contextlib.suppress(_Crash, dcp.CheckpointException):
                write(run, 3, keep_last=1)
        step = checkpoint_folder.read(run).record.progress.step
        if not crashed():
            break
        assert step in (2, 3)
        for folder in run.glob("step_???????"):
            checkpoint_folder.read(folder)
        if step == 2:
            write(run, 3, keep_last=1)
        write(run, 4, keep_last=1)
        assert sorted(path.name for path in run.iterdir()) == ["latest", "step_0000004"]
    assert step == 3
    assert countdown > 10


def test_a_saved_step_is_never_overwritten(tmp_path: Path) -> None:
    write(tmp_path, 5)
    write(tmp_path, 6)
    for step in (5, 6):
        with pytest.raises(UserError, match=f"step_000000{step} exists"):
            checkpoint_folder.prepare(step_folder(tmp_path, step))


def test_a_conversion_that_would_overwrite_names_its_own_flag(tmp_path: Path) -> None:
    write(tmp_path, 0)
    with pytest.raises(UserError, match=f"--output {tmp_path}: step_0000000 exists"):
        write_start(tmp_path, Mock(), Mock(), {}, None)


def test_a_run_does_not_start_over_a_longer_one(tmp_path: Path) -> None:
    checkpoint_folder.refuse_to_rewrite(tmp_path / "new", 0)
    write(tmp_path, 5)
    checkpoint_folder.refuse_to_rewrite(tmp_path, 5)
    with pytest.raises(UserError, match="reached step 5"):
        checkpoint_folder.refuse_to_rewrite(tmp_path, 4)


def test_keep_last_keeps_the_last(tmp_path: Path) -> None:
    for step in (2, 10, 9_999_999, 10_000_000):
        write(tmp_path, step, keep_last=2)
    assert checkpoint_folder.saved_steps(tmp_path) == [9_999_999, 10_000_000]


def test_retained_checkpoints_are_never_deleted(tmp_path: Path) -> None:
    """Those of --save-retain-interval, besides those of --keep-last."""
    for step in (2, 3, 4, 5, 6, 7):
        write(tmp_path, step)
    checkpoint_folder.prune(tmp_path, 2, retain_interval=3)
    assert checkpoint_folder.saved_steps(tmp_path) == [3, 6, 7]
    checkpoint_folder.commit(_unfinished(tmp_path, 8), None, retain_interval=6)
    assert checkpoint_folder.saved_steps(tmp_path) == [6, 8]


def _unfinished(run: Path, step: int) -> Path:
    checkpoint_folder.prepare(step_folder(run, step))
    return step_folder(run, step)


def test_a_checkpoint_stays_if_old_ones_cannot_be_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, 1)
    monkeypatch.setattr(checkpoint_folder, "prune", Mock(side_effect=OSError(5, "I/O error")))
    write(tmp_path, 2, keep_last=1)
    assert checkpoint_folder.latest_step(tmp_path) == 2
    assert "cannot delete old checkpoints: [Errno 5]" in caplog.text


def test_leftovers_of_dead_writers_are_removed(tmp_path: Path) -> None:
    write(tmp_path, 1)
    (_unfinished(tmp_path, 2).with_suffix(".tmp") / "half").touch()
    checkpoint_folder.remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_0000001"]


def test_the_newest_readable_checkpoint_is_found(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step)
    find, names = checkpoint_folder.find_readable, ["step_0000003", "step_0000002"]
    assert [path.name for path in checkpoint_folder.candidates(tmp_path, True)][:2] == names
    assert find(tmp_path, True).name == names[0]
    _flip("run.json")(tmp_path / names[0])
    (tmp_path / "latest").write_bytes(b"\xff")
    assert find(tmp_path, True).name == names[1]
    assert find(tmp_path / names[0], True).name == names[0]  # named by the user
    with pytest.raises(UserError, match="latest cannot be read"):
        find(tmp_path, False)


def test_all_checkpoints_of_a_run_are_verified(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step)
    assert list(checkpoint_folder.verify_all(tmp_path).values()) == [None] * 3
    _flip(".metadata")(tmp_path / "step_0000002")
    (tmp_path / "step_0000003" / SUMS).unlink()
    third, second, first = checkpoint_folder.verify_all(tmp_path).values()
    assert first is None
    assert second is not None and ".metadata: the contents do not match" in second
    assert third is not None and f"{SUMS} is missing" in third


def test_without_latest_the_last_complete_checkpoint_counts(tmp_path: Path) -> None:
    write(tmp_path, 1)
    write(tmp_path, 2)
    temporary_folder(step_folder(tmp_path, 3)).mkdir()
    (tmp_path / "latest").unlink()
    assert checkpoint_folder.find(tmp_path) == step_folder(tmp_path, 2)


def _truncate(folder: Path) -> None:
    file = next(folder.glob("*.distcp"))
    os.truncate(file, file.stat().st_size - 1)


def _edit_record(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tree = json.loads((folder / "run.json").read_text())
        change(tree)
        _sign(json.dumps(tree))(folder)

    return edit


def _sign(record: str) -> Callable[[Path], None]:
    """Write another record with a correct sum."""

    def write(folder: Path) -> None:
        (folder / "run.json").write_text(record)
        write_sums(folder, {})

    return write


def _flip(name: str) -> Callable[[Path], None]:
    """Flip one bit of a file."""

    def flip(folder: Path) -> None:
        contents = bytearray((folder / name).read_bytes())
        contents[len(contents) // 2] ^= 1
        (folder / name).write_bytes(contents)

    return flip


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "names step_0000001, which is not there"),
        (lambda folder: (folder / "run.json").unlink(), "run.json is missing"),
        (_sign("{"), "damaged: run.json: damaged: not JSON"),
        (_sign("[]"), "damaged: run.json: damaged: not a JSON object"),
        (_sign("[" * 100_000), "damaged: run.json: damaged: nested too deeply"),
        (_sign('{"format": ' + "1" * 5000 + "}"), "damaged: run.json: damaged: not JSON"),
        (_flip("run.json"), "run.json: the contents do not match SHA256SUMS"),
        (_flip(".metadata"), r"\.metadata: the contents do not match SHA256SUMS"),
        (_flip(SUMS), "damaged"),
        (lambda folder: (folder / SUMS).unlink(), "SHA256SUMS is missing"),
        (lambda folder: (folder / SUMS).write_text("\n"), "SHA256SUMS is not a list of sums"),
        (_edit_record(lambda tree: tree.update(format=2)), "newer Moetron"),
        (_edit_record(lambda tree: tree.pop("progress")), "run.json: progress: Field required"),
        (_edit_record(lambda tree: tree.update(progress=[1])), "damaged: run.json: progress"),
        (_edit_record(lambda tree: tree["progress"].update(step="1")), "json: progress.step"),
        (_edit_record(lambda tree: tree.update(settings=[])), "damaged: run.json: settings"),
        (_edit_record(lambda tree: tree.update(versions={"torch": 2})), "run.json: versions"),
        (_edit_record(lambda tree: tree["files"].update(x=True)), "damaged: run.json: files.x"),
        (_edit_record(lambda tree: tree.update(extra=1)), "damaged: run.json: extra"),
        (_edit_record(lambda tree: tree["files"].pop(".metadata")), r"disagree about \.metadata"),
        (lambda folder: next(folder.glob("*.distcp")).unlink(), "distcp is missing"),
        (_truncate, "bytes instead of"),
        (lambda folder: (folder.parent / "latest").write_text("../elsewhere"), "not the name"),
        (lambda folder: (folder.parent / "latest").write_bytes(b"\xff"), "cannot be read"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(write(tmp_path, 1))
    with pytest.raises(UserError, match=message):
        checkpoint_folder.read(tmp_path)


def test_a_flipped_bit_of_any_file_is_found(tmp_path: Path) -> None:
    source = write(tmp_path / "source", 1)
    sizes = checkpoint_folder.read_record(source).files
    assert checkpoint_folder.verify(source) == sum(sizes.values())
    files = sorted(path.name for path in source.iterdir())
    assert len(files) >= 4
    for number, name in enumerate(files):
        folder = tmp_path / str(number) / source.name
        shutil.copytree(source, folder)
        _flip(name)(folder)
        with pytest.raises(UserError, match=None if name == SUMS else re.escape(name)):
            checkpoint_folder.verify(folder)


def test_readers_divide_the_files_among_them(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    (folder / ".metadata").with_name("more").write_text("more")
    record = checkpoint_folder.read_record(folder)
    record.files["more"] = 4
    checkpoint_folder.write_record(folder, record, {})
    shares = [checkpoint_folder.verify(folder, share, 2) for share in (0, 1)]
    assert all(shares)
    assert sum(shares) == checkpoint_folder.verify(folder)
    # A missing file is noticed by its reader alone, too: thousands of ranks may ask a file system.
    for damage in (_flip("more"), lambda folder: (folder / "more").unlink()):
        damage(folder)
        found = 0
        for share in (0, 1):
            try:
                checkpoint_folder.verify(folder, share, 2)
            except UserError:
                found += 1
        assert found == 1


def test_the_remedy_for_damage_works(tmp_path: Path) -> None:
    write(tmp_path, 1)
    _flip(".metadata")(write(tmp_path, 2))
    with pytest.raises(
        UserError, match="to resume from step_0000001, delete step_0000002"
    ) as error:
        checkpoint_folder.read(tmp_path)
    assert f"and `latest` in {tmp_path}" in str(error.value)
    shutil.rmtree(tmp_path / "step_0000002")
    (tmp_path / "latest").unlink()
    checkpoint_folder.refuse_to_rewrite(
        tmp_path, checkpoint_folder.read(tmp_path).record.progress.step
    )
    write(tmp_path, 2)
    with pytest.raises(UserError) as error:
        _flip("run.json")(tmp_path / "step_0000001")
        checkpoint_folder.read(tmp_path / "step_0000001")
    assert "delete" not in str(error.value)  # a later one is there


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch pwned",)


def test_an_index_cannot_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    index = write(tmp_path, 1) / ".metadata"
    size = index.stat().st_size
    index.write_bytes(pickle.dumps(_Evil()).ljust(size, b"."))
    write_sums(index.parent, {})
    with pytest.raises(UserError, match=r"refers to posix\.system"):
        checkpoint_folder.read(tmp_path)
    assert not (tmp_path / "pwned").exists()


def test_nothing_to_load(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoint_folder.find(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        checkpoint_folder.find(tmp_path / "absent")


def test_a_folder_that_cannot_be_written_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write there"):
        checkpoint_folder.prepare(tmp_path / "file" / "run" / "step_0000001")
