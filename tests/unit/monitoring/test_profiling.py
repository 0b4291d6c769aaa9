"""Profiles of real steps on a CPU, by the flags of the group "profiling"."""

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.pipeline_parallel import combined_1f1b, schedules

from moetron.moe.monitoring import profiling
from moetron.moe.monitoring.trace_ranges import EXCHANGE, MODULES, named_parts
from moetron.moe.training.loop import Loop
from tests.parallel.support.checkpoint_runs import metrics, run
from tests.parallel.support.checkpoint_runs import settings as run_settings

TRACE = {"profile": True, "use_pytorch_profiler": True, "profile_step_start": 1}


def _run(folder: Path, steps: int = 4, **chosen: Any) -> list[str]:
    """Train; return the names of the profiles."""
    settings = run_settings(
        "dp",
        training={"train_iters": steps, "micro_batch_size": 1, "global_batch_size": 2},
        profiling=chosen,
        checkpoint={"save": str(folder)},
    )
    run(settings)
    return sorted(path.name for path in (folder / "profile").glob("*"))


def _events(path: Path) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return [event for event in events if event.get("cat") in ("user_annotation", "cpu_op")]


def test_two_steps_in_a_trace(tmp_path: Path) -> None:
    name = "rank_0_steps_2_to_3.pt.trace.json"
    assert _run(tmp_path, **TRACE, profile_step_end=3, nvtx_ranges=True) == [name]
    names = [event["name"] for event in _events(tmp_path / "profile" / name)]
    assert [name for name in names if name.startswith("step ")] == ["step 2", "step 3"]
    assert (names.count("forward"), names.count("backward")) == (4, 4)  # micro-batches
    assert names.count("router") == 2 * 4  # layers
    assert names.count("update") == 2
    assert {*MODULES.values(), *EXCHANGE.values()} - set(names) <= {"shared experts"}
    assert "aten::mm" in names
    rows = metrics(tmp_path)
    _run(tmp_path / "without")
    assert rows == metrics(tmp_path / "without")


def test_without_ranges_nothing_is_named(tmp_path: Path) -> None:
    (name,) = _run(tmp_path, **TRACE, profile_step_end=2)
    names = [event["name"] for event in _events(tmp_path / "profile" / name)]
    assert "step 2" in names and "router" not in names


def test_passes_of_the_combined_schedule_have_one_range(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for the pass and the optimizer."""

    class Optimizer:
        def step_with_ready_grads(self) -> None: ...

    name = "combined_forward_backward_step"
    monkeypatch.setattr(combined_1f1b, name, lambda: None)
    with named_parts([], Optimizer()), torch.profiler.profile() as profile:
        combined_1f1b.combined_forward_backward_step()
    assert "forward and backward" in [event.name for event in profile.events()]


def test_a_profile_leaves_no_patch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, loops = schedules.forward_step, []
    made = Loop.__init__
    monkeypatch.setattr(Loop, "__init__", lambda loop, *a: loops.append(loop) or made(loop, *a))  # type: ignore[func-returns-value]
    _run(tmp_path, **TRACE, profile_step_end=2, nvtx_ranges=True)
    assert schedules.forward_step is forward
    modules = [module for chunk in loops[0].trainer.chunks for module in chunk.modules()]
    assert not any("forward" in vars(module) for module in modules)


def test_a_run_that_stops_early_keeps_what_it_has(tmp_path: Path) -> None:
    settings = run_settings(
        "dp",
        profiling={**TRACE, "profile_step_end": 5},
        checkpoint={"save": str(tmp_path)},
        training={
            "train_iters": 6,
            "micro_batch_size": 1,
            "global_batch_size": 2,
            "exit_interval": 3,
        },
    )
    run(settings)
    assert (tmp_path / "profile" / "rank_0_steps_2_to_3.pt.trace.json").exists()


def test_other_ranks_profile_nothing(tmp_path: Path) -> None:
    assert _run(tmp_path, **TRACE, profile_step_end=3, profile_ranks=[1]) == []


def test_nsight_systems_is_started_and_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for CUDA's profiler."""
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: calls.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: calls.append("stop"))
    monkeypatch.setattr(torch.autograd.profiler, "emit_nvtx", _Emit(calls))
    assert _run(tmp_path, profile=True, profile_step_start=1, profile_step_end=3) == []
    assert calls == ["start", "emit", "no emit", "stop"]


class _Emit:
    def __init__(self, calls: list[str]) -> None:
        self._calls = calls

    def __call__(self, record_shapes: bool) -> "_Emit":
        return self

    def __enter__(self) -> None:
        self._calls.append("emit")

    def __exit__(self, *error: object) -> None:
        self._calls.append("no emit")


def test_memory_of_a_gpu_is_recorded_until_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for the allocator's recorder (--record-memory-history)."""
    calls: list[Any] = []
    monkeypatch.setattr(
        torch.cuda.memory, "_record_memory_history", lambda **given: calls.append(given)
    )
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", calls.append)
    settings = run_settings(
        "dp",
        profiling={"record_memory_history": True, "memory_snapshot_path": "m.pickle"},
        checkpoint={"save": str(tmp_path)},
    )
    profiler = profiling.Profiler(settings, 0, torch.device("cuda"), [], None)
    with pytest.raises(MemoryError), profiler.step(0):
        raise MemoryError
    profiler.close()
    profiler.close()
    assert calls[1:] == [str(tmp_path / "profile" / "m_rank_0.pickle"), {"enabled": None}]


def test_garbage_is_collected_at_given_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    is_on: list[bool] = []
    monkeypatch.setattr(Loop, "_after_step", lambda loop: is_on.append(gc.isenabled()))
    monkeypatch.setattr(gc, "collect", lambda: steps.append(len(is_on) + 1))
    _run(tmp_path, manual_gc=True, manual_gc_interval=2)
    assert steps == [1, 2, 4] and is_on == [False] * 4  # once before the first step
    assert gc.isenabled()
