"""A run with FP8 resumes with its amaxes, and with copies of its own weights."""

from pathlib import Path

import pytest
import torch

from moetron.moe.checkpoint.states.fp8_state import Place
from moetron.moe.layers import specs
from tests.parallel.support.checkpoint_runs import Groups, metrics, read_and_go_on, tensors, write
from tests.parallel.support.harness import run_ranks
from tests.parallel.test_resume import _straight_and_resumed

DELAYED: Groups = {
    "precision": {
        "fp8_format": "hybrid",
        "fp8_recipe": "delayed",
        "fp8_amax_history_len": 3,
        "fp8_amax_compute_algo": "max",
    },
    "model": {"hidden_dropout": 0.0},
}


@pytest.mark.parametrize(("layout", "ranks"), [("dp", 1), ("ep2_zero", 2)])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, layout: str, ranks: int) -> None:
    run_ranks(_straight_and_resumed, ranks, str(tmp_path), layout, DELAYED)
    straight = metrics(tmp_path / "straight")
    assert len(straight) == 6
    assert metrics(tmp_path / "resumed") == straight


def _on_tensor_cores(folder: str, layout: str, groups: Groups) -> None:
    """Use the products of tensor cores, by their reference on a CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(specs, "fp8_on_tensor_cores", lambda _: True)
        _straight_and_resumed(folder, layout, groups)


@pytest.mark.parametrize(("layout", "ranks"), [("dp", 1), ("ep2_zero", 2)])
def test_weights_are_quantised_again_after_each_step(
    tmp_path: Path, layout: str, ranks: int
) -> None:
    """Stale FP8 copies of weights would last until the end of a run, but not in a resumed one."""
    groups: Groups = {"precision": {"fp8_format": "e4m3", "fp8_recipe": "tensorwise"}}
    run_ranks(_on_tensor_cores, ranks, str(tmp_path), layout, groups)
    straight = metrics(tmp_path / "straight")
    assert len(straight) == 6
    assert metrics(tmp_path / "resumed") == straight


def _states(folder: Path) -> dict[Place, torch.Tensor]:
    found = {Place.of(key): tensor for key, tensor in tensors(folder).items()}
    return {place: state for place, state in found.items() if place is not None}


def _of_expert(states: dict[Place, torch.Tensor], name: str, expert: int) -> list[torch.Tensor]:
    return [
        state[..., expert - place.first]
        for place, state in states.items()
        if place.name == name and 0 <= expert - place.first < state.shape[-1]
    ]


@pytest.mark.parametrize(
    ("writer", "reader", "grouped"),
    [("2 pp2", "2 ep2", True), ("2 ep2", "1 dp", False), ("2 dp", "2 tp2_etp1", True)],
)
def test_another_layout_takes_the_largest_amaxes(
    tmp_path: Path, writer: str, reader: str, grouped: bool
) -> None:
    groups: Groups = {
        **DELAYED,
        "moe": {"moe_grouped_gemm": grouped},
        "training": {"train_iters": 3},
    }
    written, read = tmp_path / "written", tmp_path / "read"
    ranks, layout = writer.split()
    run_ranks(write, int(ranks), str(written), layout, groups)
    ranks, layout = reader.split()
    source = written / "step_0000002"
    run_ranks(read_and_go_on, int(ranks), str(source), str(read), layout, groups)
    old, new = _states(source), _states(read / "step_0000002")
    assert {place.rank for place in new} == set(range(int(ranks)))
    assert any(".experts." in place.name for place in new)
    assert {place.name for place in new} == {place.name for place in old}
    for place, state in new.items():
        for number, column in enumerate(state.unbind(-1)):
            before = torch.stack(_of_expert(old, place.name, place.first + number))
            assert torch.equal(column[:, :-1], before[..., :-1].amax(0)), place
            assert torch.equal(column[:, -1], before[..., -1].amin(0)), place
    [again] = metrics(read)
    assert again["lm_loss"] == pytest.approx(metrics(written)[2]["lm_loss"], rel=2e-3)
