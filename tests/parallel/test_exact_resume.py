"""A killed and resumed run ends bit for bit as an uninterrupted one, random-number states included.

Every router that draws, dropout, loader workers, background saves, one and two ranks. The fast
cases cover each of them once; `pytest -m slow tests/parallel/test_exact_resume.py` runs them all.
"""

import itertools
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from moetron.moe.checkpoint.run_folder import latest_step
from tests.parallel.support.checkpoint_runs import (
    Groups,
    metrics,
    parallel_of,
    settings,
    start,
    tensors,
)
from tests.parallel.support.harness import RankFailed, run_ranks

KILLED_AFTER = 4
"""Steps after which a rank is killed; saves are at steps 2, 4 and 6, the last one."""
LAYOUTS = {1: "dp", 2: "ep2_zero"}
_NO_LOSS = {"moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.0}
ROUTERS: dict[str, dict[str, object]] = {
    "topk": {"moe_input_jitter_eps": 0.1},
    "random_second": {
        "moe_router_pre_softmax": False,
        "moe_expert_capacity_factor": 1.25,
        "moe_second_expert_threshold": 0.2,
    },
    "noisy_topk": {"moe_router_load_balancing_type": "noisy_load"},
    "gumbel": {"moe_router_pre_softmax": True, "moe_router_temperature": 2.0},
    "relaxed_topk": {"moe_router_temperature": 2.0},
    "reinforce": {"moe_router_pre_softmax": False},
    "expert_choice": {
        "moe_router_pre_softmax": True,
        "moe_expert_capacity_factor": 1.25,
        "moe_input_jitter_eps": 0.1,
        **_NO_LOSS,
    },
    "base": {"moe_router_topk": 1, "moe_router_score_function": "sigmoid", **_NO_LOSS},
    "hash": {"moe_router_pre_softmax": False, "moe_z_loss_coeff": None, **_NO_LOSS},
}


def _train(folder: str, router: str, workers: int, background: bool, killed: bool) -> None:
    for _ in range(os.getpid() % 11):  # states at the start of a process must not matter
        random.random(), np.random.random(), torch.rand(1)
    groups: Groups = {
        "model": {"hidden_dropout": 0.1, "attention_dropout": 0.1},
        "moe": {"moe_router_type": router, **ROUTERS[router]},
        "data": {"num_workers": workers},
        "validation": {"eval_interval": 3, "eval_iters": 1},
        "logging": {"peak_tflops_per_s": None},  # measured at each start
    }
    checkpoint = {"save": folder, "load": folder, "save_interval": 2, "async_save": background}
    chosen = settings(LAYOUTS[torch.distributed.get_world_size()], checkpoint=checkpoint, **groups)
    with parallel_of(chosen):
        loop = start(chosen)

        def die() -> bool:
            if loop.progress.step == KILLED_AFTER and killed:
                os.kill(os.getpid(), signal.SIGKILL)
            return False

        loop.run(die)


def _assert_exact(folder: Path, ranks: int, router: str, workers: int, background: bool) -> None:
    straight, resumed = folder / "straight", folder / "resumed"
    how = router, workers, background
    run_ranks(_train, ranks, str(straight), *how, False)
    with pytest.raises(RankFailed, match=r"exit code -9|raised"):
        run_ranks(_train, ranks, str(resumed), *how, True)
    assert latest_step(resumed) in (2, KILLED_AFTER)
    run_ranks(_train, ranks, str(resumed), *how, False)
    assert metrics(resumed) == metrics(straight)
    evaluations = [(path / "validation.jsonl").read_text() for path in (straight, resumed)]
    assert evaluations[0] == evaluations[1] != ""
    one, other = (tensors(path / "step_0000006", states=True) for path in (straight, resumed))
    assert one.keys() == other.keys() > {"rng.python", "rng.numpy", "rng.torch"}
    assert not [key for key in one if not torch.equal(one[key], other[key])]


@pytest.mark.parametrize(
    ("ranks", "router", "workers", "background"),
    [(1, "topk", 2, False), (2, "gumbel", 0, True)],
)
def test_a_killed_run_resumes_exactly(
    tmp_path: Path, ranks: int, router: str, workers: int, background: bool
) -> None:
    _assert_exact(tmp_path, ranks, router, workers, background)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "router", "workers", "background"),
    list(itertools.product((1, 2), ROUTERS, (0, 2, 4), (False, True))),
)
def test_every_killed_run_resumes_exactly(
    tmp_path: Path, ranks: int, router: str, workers: int, background: bool
) -> None:
    _assert_exact(tmp_path, ranks, router, workers, background)
