"""Parts that a load restores, omits and rejects, on one rank."""

import json
import pickle
import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.tensor_parallel import RowParallelLinear, get_cuda_rng_tracker
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.planner import LoadPlan

from moetron.common.errors import UserError
from moetron.moe.checkpoint import optimizer_state
from moetron.moe.checkpoint import random_states as rng
from moetron.moe.checkpoint.checksums import SUMS, write_sums
from moetron.moe.checkpoint.optimizer_state import leaves, optimizer_step
from moetron.moe.checkpoint.position import Progress
from moetron.moe.checkpoint.run_folder import file_sizes, read_record, write_record
from moetron.moe.checkpoint.save_load import load_weights, save_checkpoint
from moetron.moe.training.loop import Loop
from tests.parallel.support.checkpoint_runs import VOCABULARY, parallel_of, settings, start


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a bf16 run at step 2."""
    folder = tmp_path_factory.mktemp("saved")
    chosen = bf16(save=str(folder), training={"train_iters": 2})
    with parallel_of(chosen):
        start(chosen).run(lambda: False)
    return folder


def bf16(training: dict[str, Any] | None = None, **checkpoint: Any) -> Any:
    groups = {"training": training} if training else {}
    return settings("dp", precision={"bf16": True}, checkpoint=checkpoint, **groups)


@pytest.fixture
def single_rank() -> Iterator[None]:
    with parallel_of(bf16()):
        yield


def weights(loop: Loop) -> list[torch.Tensor]:
    return [parameter.detach().float() for parameter in loop.trainer.chunks[0].parameters()]


def mains(loop: Loop) -> list[torch.Tensor]:
    groups = [group for leaf in leaves(loop.trainer.optimizer) for group in leaf.param_groups]
    return [main.detach() for group in groups for main in group["params"]]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.usefixtures("single_rank")
def test_parts_that_each_option_loads(saved: Path) -> None:
    path = str(saved)
    resumed = start(bf16(load=path))
    assert resumed.progress == Progress(2, 8, 128)
    assert optimizer_step(resumed.trainer.optimizer) == 2
    for option, step in (("finetune", 0), ("no_load_optim", 0), ("reset_progress", 2)):
        loop = start(bf16(load=path, **{option: True}))
        assert same(weights(loop), weights(resumed))
        assert optimizer_step(loop.trainer.optimizer) == step
        begins = option in ("finetune", "reset_progress")
        assert loop.progress == (Progress() if begins else resumed.progress)
        assert same(mains(loop), mains(resumed)) == (option == "reset_progress")
        for leaf in leaves(loop.trainer.optimizer):
            for parameter, main, _ in optimizer_state.mains(leaf):
                assert torch.equal(parameter, main.bfloat16())


def _draws() -> list[Any]:
    with get_cuda_rng_tracker().fork():
        tracked = torch.rand(3).tolist()
    plain = torch.rand(3).tolist()
    return [tracked, plain, random.random(), random.gauss(0, 1), np.random.rand(3).tolist()]


@pytest.mark.usefixtures("single_rank")
def test_random_numbers_continue(tmp_path: Path) -> None:
    chosen = bf16(load=str(tmp_path), save=str(tmp_path))
    loop = start(chosen)
    _draws()  # its gauss caches a second number for the next call
    trainer = loop.trainer
    save_checkpoint(tmp_path, Progress(1), trainer.chunks, trainer.optimizer, chosen, {})
    expected = _draws()
    start(chosen)
    assert _draws() == expected
    start(bf16(load=str(tmp_path), no_load_rng=True))
    assert _draws() != expected


@pytest.mark.usefixtures("single_rank")
def test_another_layout_gets_other_random_numbers(
    saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = _edited(saved, tmp_path, lambda record: record["layout"].update(world_size=2))
    start(bf16(load=str(copy)))
    first = _draws()
    assert "another layout" in caplog.text
    start(bf16(load=str(copy)))
    assert _draws() == first


def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make states look like a GPU's: one for the default generator, trackers of 16 bytes."""
    on_cpu = rng._states

    def on_gpu() -> dict[str, torch.Tensor]:
        states = {
            name: torch.zeros(16, dtype=torch.uint8) if name.startswith("tracker.") else state
            for name, state in on_cpu().items()
        }
        return states | {"cuda": torch.zeros(16, dtype=torch.uint8)}

    monkeypatch.setattr(rng, "_states", on_gpu)


def _without(*names: str) -> Any:
    states = rng._states
    return lambda: {name: state for name, state in states().items() if name not in names}


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("from a GPU", "the checkpoint was written on a GPU"),
        ("to a GPU", "the checkpoint was written on a CPU"),
        ("a tracker", "the checkpoint holds no rng.tracker.expert-parallel-rng"),
        ("numpy", "the checkpoint holds no rng.numpy"),
    ],
)
def test_states_of_another_device_are_replaced_from_the_seed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    reason: str,
) -> None:
    """A resume needs no --no-load-rng, is reproducible, and logs one line."""
    chosen = bf16(load=str(tmp_path), save=str(tmp_path))
    trainer = start(chosen).trainer
    random.seed(99)
    absent = {"a tracker": "tracker.expert-parallel-rng", "numpy": "numpy"}.get(kind)
    with monkeypatch.context() as saving:
        if kind == "from a GPU":
            _as_on_a_gpu(saving)
        if absent is not None:
            saving.setattr(rng, "_states", _without(absent))
        save_checkpoint(tmp_path, Progress(1), trainer.chunks, trainer.optimizer, chosen, {})
    host = random.random()
    found = []
    for seed in (1234, 1234, 77):
        random.seed(5)
        torch.manual_seed(len(found))
        again = bf16(load=str(tmp_path), training={"seed": seed})
        with monkeypatch.context() as loading:
            if kind == "to a GPU":
                _as_on_a_gpu(loading)
            caplog.clear()
            assert start(again).progress.step == 1
        warned = [record.getMessage() for record in caplog.records if "random" in record.message]
        assert warned == [f"{reason}: random numbers are reseeded from seed and step 1"]
        assert random.random() == host  # the host's own state continues
        found.append(_draws()[:2])
    assert found[0] == found[1] != found[2]


def _edited(saved: Path, tmp_path: Path, change: Any) -> Path:
    """Copy a checkpoint by links, with a changed record."""
    folder = tmp_path / "step_0000002"
    folder.mkdir()
    for file in (saved / folder.name).iterdir():
        (folder / file.name).hardlink_to(file)
    record = json.loads((folder / "run.json").read_text())
    change(record)
    (folder / "run.json").unlink()
    (folder / "run.json").write_text(json.dumps(record))
    write_sums(folder, {})
    return folder


@pytest.mark.usefixtures("single_rank")
def test_an_absent_moment_is_named(saved: Path, tmp_path: Path) -> None:
    """The checkpoint is that of an optimizer with other moments."""
    sgd = {"optimizer": {"optimizer": "sgd"}}
    copy = _edited(saved, tmp_path, lambda record: record["settings"].update(**sgd))
    chosen = settings("dp", precision={"bf16": True}, checkpoint={"load": str(copy)}, **sgd)
    with pytest.raises(UserError, match=r"holds no .*momentum_buffer.*--no-load-optim"):
        start(chosen)


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("kind", ["", "optimizer.state.exp_avg.", "optimizer.state.fp32_param."])
def test_a_removed_tensor_is_detected(saved: Path, tmp_path: Path, kind: str) -> None:
    """Removed from the index, so that only its absence shows."""
    key = f"{kind}decoder.final_layernorm.weight"
    copy = _edited(saved, tmp_path, lambda record: record.update(files={}))
    index = FileSystemReader(copy).read_metadata()
    del index.state_dict_metadata[key]
    (copy / ".metadata").unlink()
    (copy / ".metadata").write_bytes(pickle.dumps(index))
    record = replace(read_record(copy), files=file_sizes(copy))
    for name in ("run.json", SUMS):
        del record.files[name]
    write_record(copy, record, {})
    with pytest.raises(UserError, match=f"holds no {re.escape(key)}"):
        start(bf16(load=str(copy)))


@pytest.mark.usefixtures("single_rank")
def test_a_parameter_of_another_shape_is_rejected(saved: Path, tmp_path: Path) -> None:
    model = {"hidden_size": 32}
    copy = _edited(saved, tmp_path, lambda record: record["settings"]["model"].update(model))
    chosen = settings("dp", precision={"bf16": True}, checkpoint={"load": str(copy)}, model=model)
    with pytest.raises(UserError, match="of another shape"):
        start(chosen)


@pytest.mark.usefixtures("single_rank")
def test_an_embedding_with_other_rows_is_rejected(saved: Path, tmp_path: Path) -> None:
    """The record is that of an older version, without the vocabulary's size."""

    def forget(record: Any) -> None:
        record["settings"]["model"]["vocab_size"] = None
        record["stream"] = {}

    copy = _edited(saved, tmp_path, forget)
    start(bf16(load=str(copy)))
    wide = settings(
        "dp", precision={"bf16": True}, model={"vocab_size": 200}, checkpoint={"load": str(copy)}
    )
    expected = r"--vocab-size 200, .* \(200 rows of the embedding\): the checkpoint has 96 rows"
    with pytest.raises(UserError, match=expected):
        start(wide)
    chunks = start(bf16()).trainer.chunks
    with pytest.raises(UserError, match=expected):
        load_weights(copy, chunks, 200)


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("what", ["weights", "moments"])
def test_nan_is_never_loaded_silently(tmp_path: Path, what: str) -> None:
    loop = start(bf16())
    loop.run(lambda: True)
    trainer = loop.trainer
    if what == "weights":
        next(iter(trainer.chunks[0].parameters())).data.view(-1)[0] = torch.nan
    else:
        [*_, state] = leaves(trainer.optimizer)[-1].optimizer.state.values()
        state["exp_avg"].view(-1)[-1] = torch.nan
    save_checkpoint(tmp_path, Progress(1), trainer.chunks, trainer.optimizer, bf16(), {})
    with pytest.raises(UserError, match="1 tensors hold NaN"):
        start(bf16(load=str(tmp_path)))


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("name", ["final_layernorm", "exp_avg_sq", "fp32_param"])
def test_unread_tensors_are_detected(
    saved: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The plan to read leaves one tensor out."""
    plan_all = DefaultLoadPlanner.create_local_plan

    def leave_out(planner: DefaultLoadPlanner) -> LoadPlan:
        plan = plan_all(planner)
        found = [item for item in plan.items if name in item.dest_index.fqn][:1]
        return replace(plan, items=[item for item in plan.items if item not in found])

    monkeypatch.setattr(DefaultLoadPlanner, "create_local_plan", leave_out)
    with pytest.raises(UserError, match=f"{name}.* elements would be read"):
        start(bf16(load=str(saved)))


@pytest.mark.usefixtures("single_rank")
def test_a_flipped_bit_of_any_file_is_found(saved: Path, tmp_path: Path) -> None:
    files = sorted(path.name for path in (saved / "step_0000002").iterdir())
    assert {".metadata", "__0_0.distcp", "common.pt", "run.json", "settings.yaml", SUMS} < {*files}
    for number, name in enumerate(files):
        (tmp_path / str(number)).mkdir()
        folder = _edited(saved, tmp_path / str(number), lambda record: None)
        contents = bytearray((folder / name).read_bytes())
        contents[-1] ^= 1
        (folder / name).unlink()
        (folder / name).write_bytes(contents)
        with pytest.raises(UserError, match="damaged" if name == SUMS else re.escape(name)):
            start(bf16(load=str(folder)))


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a bf16 run at steps 2 and 4."""
    folder = tmp_path_factory.mktemp("twice")
    chosen = bf16(save=str(folder), save_interval=2, training={"train_iters": 4})
    with parallel_of(chosen):
        start(chosen).run(lambda: False)
    return folder


@pytest.mark.usefixtures("single_rank")
def test_damage_of_any_file_falls_back_to_the_checkpoint_before(
    twice: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One byte of each file in turn, at a random place; then `latest`; then every checkpoint."""
    for number, file in enumerate(sorted((twice / "step_0000004").iterdir())):
        run = tmp_path / str(number)
        shutil.copytree(twice, run)
        damaged = run / "step_0000004" / file.name
        contents = bytearray(damaged.read_bytes())
        contents[random.Random(number).randrange(len(contents))] ^= 1 << number % 8
        damaged.write_bytes(contents)
        caplog.clear()
        kept = start(bf16(load=str(run), load_fallback=True, save=str(tmp_path / "other")))
        assert kept.progress.step == 2
        assert "--load-fallback: --load" in caplog.text and "step_0000004: damaged" in caplog.text
        assert read_record(run / "step_0000002") and damaged.exists()
        own = bf16(load=str(run), load_fallback=True, save=str(run), keep_last=2, training=_to(6))
        start(own).run(lambda: False)
        names = sorted(path.name for path in run.glob("step_*"))
        assert names == ["step_0000002", "step_0000004.damaged", "step_0000006"]
    (run / "latest").write_text("step_7")
    assert start(bf16(load=str(run), load_fallback=True)).progress.step == 6
    for name in ("step_0000002", "step_0000006"):
        (run / name / "run.json").unlink()
    with pytest.raises(UserError, match=r"no checkpoint is sound:(.|\n)*0000006(.|\n)*0000002"):
        start(bf16(load=str(run), load_fallback=True))


def _to(step: int) -> dict[str, Any]:
    return {"train_iters": step}


@pytest.mark.usefixtures("single_rank")
def test_extra_states_of_layers(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in Transformer Engine's layers with FP8: bytes, empty before the first step."""
    nothing = torch.empty(0, dtype=torch.uint8)
    layer = RowParallelLinear
    monkeypatch.setattr(layer, "get_extra_state", lambda self: vars(self).get("amaxes", nothing))
    monkeypatch.setattr(
        layer, "set_extra_state", lambda self, state: setattr(self, "amaxes", state)
    )

    def layers(loop: Loop) -> list[Any]:
        [chunk] = loop.trainer.chunks
        return [part for part in chunk.modules() if isinstance(part, layer)]

    loop = start(bf16())
    for number, part in enumerate(layers(loop)):
        data = pickle.dumps(
            {"scale_fwd": torch.tensor([float(number)]), "extra": {"layer": number}}
        )
        part.amaxes = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    trainer = loop.trainer
    save_checkpoint(tmp_path, Progress(1), trainer.chunks, trainer.optimizer, bf16(), {})
    loaded = [part.amaxes for part in layers(start(bf16(load=str(tmp_path))))]
    found = [pickle.loads(state.numpy().tobytes()) for state in loaded]  # noqa: S301 - our own
    assert [state["extra"]["layer"] for state in found] == list(range(len(found)))
    assert [float(state["scale_fwd"]) for state in found] == list(range(len(found)))
    assert len(found) >= 2
    without = layers(start(bf16(load=str(saved))))
    assert [vars(part).get("amaxes") for part in without] == [None] * len(found)


@pytest.mark.usefixtures("single_rank")
def test_load_only_weights(saved: Path) -> None:
    resumed, other = start(bf16(load=str(saved))), start(bf16(training={"seed": 5}))
    assert not same(weights(resumed), weights(other))
    load_weights(saved, other.trainer.chunks, VOCABULARY)
    assert same(weights(resumed), weights(other))
