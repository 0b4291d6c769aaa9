"""From one layout to another and back: the same bits, and training continues unchanged."""

from pathlib import Path

import pytest

from tests.parallel.support.checkpoint_runs import (
    Groups,
    assert_identical,
    metrics,
    read_and_go_on,
    tensors,
    write,
)
from tests.parallel.support.harness import run_ranks

PAIRS = [
    ("1 dp", "2 ep2"),
    ("2 dp", "2 zero"),
    ("1 dp", "2 pp2uneven"),
    ("2 pp2vpp2", "2 pp2"),
    ("4 ep2", "4 ep2etp2"),
    ("1 dp", "2 tp2"),
    ("4 tp2ep2", "4 pp2ep2"),
    ("2 cp2", "2 dp"),
]


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(("here", "there"), PAIRS)
def test_there_and_back(tmp_path: Path, here: str, there: str, bf16: bool) -> None:
    """bf16 has fp32 main parameters, which are saved too."""
    groups: Groups = {
        "model": {"hidden_dropout": 0.0, "num_layers": 4},
        "training": {"train_iters": 3},
        "precision": {"bf16": bf16},
    }
    folders = [tmp_path / name for name in ("first", "there", "back")]
    sources = [folder / "step_0000002" for folder in folders]
    ranks, layout = here.split()
    other_ranks, other = there.split()
    run_ranks(write, int(ranks), str(folders[0]), layout, groups)
    run_ranks(read_and_go_on, int(other_ranks), str(sources[0]), str(folders[1]), other, groups)
    run_ranks(read_and_go_on, int(ranks), str(sources[1]), str(folders[2]), layout, groups)
    first, middle, back = map(tensors, sources)
    assert any("fp32_param" in key for key in first) == bf16
    assert_identical(first, middle)
    assert_identical(first, back)
    third, [elsewhere], [again] = metrics(folders[0])[2], *map(metrics, folders[1:])
    assert again == third
    tolerance = 2e-3 if bf16 else 1e-5 if "tp" in here + there else 1e-6
    assert elsewhere["lm_loss"] == pytest.approx(third["lm_loss"], rel=tolerance)
    assert elsewhere["grad_norm"] == pytest.approx(third["grad_norm"], rel=100 * tolerance)
