"""Start of a run, and differences from its checkpoint."""

from pathlib import Path
from typing import Any

import pytest

from moetron.common.errors import UserError
from moetron.moe.checkpoint import run_folder as checkpoint_folder
from moetron.moe.checkpoint.position import Progress
from moetron.moe.checkpoint.run_folder import Record
from moetron.moe.config.schema.settings import Settings
from moetron.moe.monitoring.start_banner import announce, opening, origin
from tests.unit.training.training_cases import settings


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Write a run that reached step 6 of 10."""
    folder = checkpoint_folder.step_folder(tmp_path / "run", 6)
    temporary = checkpoint_folder.prepare(folder)
    tree = settings().model_dump(mode="json")
    del tree["optimizer"]["adam_eps"]  # a version without this setting
    checkpoint_folder.write_record(
        temporary, Record(Progress(6, 48, 192), tree, {}, {"seed": 1}, {}, {}), {}
    )
    checkpoint_folder.commit(folder, None)
    return tmp_path / "run"


def resumed(run: Path, **groups: dict[str, Any]) -> Settings:
    options = {"load": str(run), "save": str(run), **groups.pop("checkpoint", {})}
    return settings(checkpoint=options, **groups)


def printed(run: Path, **groups: dict[str, Any]) -> list[str]:
    return opening(resumed(run, **groups), {"seed": 1})


def test_one_rank_prints(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = resumed(run, learning_rate={"lr": 0.5})
    for rank, lines in (("1", 0), ("0", 3)):
        monkeypatch.setenv("RANK", rank)
        announce(changed, {})
        assert len(capsys.readouterr().out.splitlines()) == lines


def test_a_run_that_starts_in_its_own_folder_prints_nothing(tmp_path: Path) -> None:
    assert printed(tmp_path) == []
    assert origin(resumed(tmp_path)) == "random weights, seed 1234" == origin(settings())


def test_every_setting_that_changed_is_named(run: Path) -> None:
    step = run / "step_0000006"
    assert printed(run) == []
    assert origin(resumed(run)) == f"{step}: resumes at step 6, 192 tokens"
    changed = printed(
        run,
        training={"train_iters": 20},
        learning_rate={"lr": 0.5, "lr_decay_style": "linear"},
        optimizer={"adam_eps": 1e-6},
        data={"data_path": ["x" * 100]},
        checkpoint={"save_interval": 3},
        logging={"log_interval": 7},
    )
    assert changed == [
        f"changed since {step}:",
        "  --train-iters 20 (was 10)",
        "  --lr 0.5 (was 1.0)",
        "  --lr-decay-style linear (was cosine)",
        f"  --data-path {'x' * 77}... (was unset)",
    ]


def test_other_data_are_named(run: Path) -> None:
    same = settings(checkpoint={"load": str(run), "save": str(run)})
    _, line = opening(same, {"seed": 2, "sources": ()})
    assert line == "  other data (seed, sources): sample 48 of them comes next"


def test_a_fresh_start_prints_what_it_loads(run: Path) -> None:
    step, rate = run / "step_0000006", {"lr": 0.5}
    for option, taken in (("finetune", "the weights"), ("reset_progress", "weights and optimizer")):
        fresh = resumed(run, checkpoint={option: True}, learning_rate=rate)
        assert opening(fresh, {}) == []
        assert origin(fresh) == f"{taken} of {step}, at step 0"


def test_a_finished_run_is_reported_and_a_shorter_one_rejected(run: Path) -> None:
    assert "--train-iters 6 is reached" in origin(resumed(run, training={"train_iters": 6}))
    with pytest.raises(UserError, match=r"--train-iters 5: .*step_0000006 is at step 6 already"):
        printed(run, training={"train_iters": 5})
    assert printed(run, training={"train_iters": 5}, checkpoint={"finetune": True}) == []
