"""Injected faults in a run of two or three ranks: found in time, on all ranks, policy obeyed."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from megatron.core.utils import unwrap_model

from moetron.moe.checkpoint.optimizer_state import leaves
from moetron.moe.checkpoint.run_folder import latest_step, read_record, saved_steps, step_folder
from moetron.moe.health.events import ReplicasDifferError
from moetron.moe.routing.router import Router
from moetron.moe.training import step as step_module
from moetron.moe.training.loop import Loop
from tests.parallel.support.checkpoint_runs import metrics, parallel_of, settings, start, tensors
from tests.parallel.support.harness import RankFailed, run_ranks

FAULTY = 9
"""Step of an injected fault: the window of 8 steps decides from 4 values on."""
SAMPLES = 4
"""Of a step."""
SPIKES = {"spike_window": 8, "spike_threshold": 6.0}
BIASED = {"moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid"}
CALM = {"learning_rate": {"lr": 1e-3, "lr_warmup_iters": 0}, "moe": BIASED}


def _never() -> bool:
    return False


def _events(folder: str | Path) -> list[dict[str, Any]]:
    lines = (Path(folder) / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _multiply_gradient(loop: Loop, rank: int, factor: float) -> None:
    """Multiply one gradient of one rank in the faulty step, before it is reduced."""
    if torch.distributed.get_rank() != rank:
        return
    parameter = list(loop.trainer.chunks[0].parameters())[-1]
    parameter.register_hook(
        lambda grad: grad * factor if loop.progress.step == FAULTY - 1 else grad
    )


@contextmanager
def _multiplied_loss(loop: Callable[[], Loop], factor: float, steps: list[int]) -> Iterator[None]:
    """Multiply all losses in each of ``steps`` once."""
    ours = step_module.token_loss

    def token_loss(tally: Any, batch: Any, losses_BS: torch.Tensor) -> Any:
        number = loop().progress.step + 1
        bad = number in steps
        if bad and loop().progress.consumed_samples == (number - 1) * SAMPLES:
            losses_BS = losses_BS * factor
        return ours(tally, batch, losses_BS)

    with patch.object(step_module, "token_loss", token_loss):
        yield


def _state(loop: Loop) -> dict[str, torch.Tensor]:
    """Return copies of all weights, buffers and optimizer states."""
    found = {}
    for number, chunk in enumerate(unwrap_model(loop.trainer.chunks)):
        for name, tensor in [*chunk.named_parameters(), *chunk.named_buffers()]:
            found[f"{number}.{name}"] = tensor.detach().clone()
    for number, leaf in enumerate(leaves(loop.trainer.optimizer)):
        for place, state in enumerate(leaf.optimizer.state.values()):
            for name, value in state.items():
                found[f"optimizer.{number}.{place}.{name}"] = torch.as_tensor(value).clone()
    return found


def _skip(folder: str, layout: str, factor: float) -> dict[str, Any]:
    chosen = settings(
        layout,
        **CALM,
        training={"train_iters": FAULTY + 1},
        checkpoint={"save": folder},
        health={"spike_policy": "skip", **SPIKES},
    )
    with parallel_of(chosen):
        loop = start(chosen)
        _multiply_gradient(loop, 1, factor)
        batches = loop.batches()
        actions, same = [], []
        for _ in range(FAULTY + 1):
            before = _state(loop)
            loop.step(batches, _never)
            after = _state(loop)
            actions.append(loop.health.verdict.action)
            equal = [torch.equal(before[name], after[name]) for name in before]
            same.append(all(equal) if actions[-1] == "skip" else any(equal) and not all(equal))
        for sink in loop.sinks:
            sink.close()
        return {"actions": actions, "same": all(same), "samples": loop.progress.consumed_samples}


@pytest.mark.parametrize(
    ("layout", "factor", "kind"),
    [("dp", float("nan"), "non_finite"), ("ep2_zero", 1e4, "grad_norm_spike")],
)
def test_a_bad_gradient_of_one_rank_is_skipped_on_all(
    tmp_path: Path, layout: str, factor: float, kind: str
) -> None:
    """Weights, expert biases, moments and counters keep every bit; the data advances."""
    found = run_ranks(_skip, 2, str(tmp_path), layout, factor)
    assert found[0] == found[1]
    assert found[0]["actions"] == ["none"] * (FAULTY - 1) + ["skip", "none"]
    assert found[0]["same"]
    assert found[0]["samples"] == (FAULTY + 1) * SAMPLES
    [event] = _events(tmp_path)
    assert (event["step"], event["kind"], event["action"]) == (FAULTY, kind, "skip")
    assert event["samples"] == [(FAULTY - 1) * SAMPLES, FAULTY * SAMPLES]
    assert event["ranks"] == [1]
    assert event["sources"] == ["mock"]
    rows = metrics(tmp_path)
    assert rows[-1]["skipped_steps"] == 1
    assert rows[-1]["spike_score"] == 1 / (FAULTY + 1)


def _roll_back(folder: str) -> dict[str, Any]:
    chosen = settings(
        "dp",
        **CALM,
        training={"train_iters": FAULTY + 2},
        checkpoint={"save": folder, "save_interval": 2},
        health={"spike_policy": "rollback", "spike_rollback_checkpoints": 2, **SPIKES},
    )
    with parallel_of(chosen):
        loop = start(chosen)
        read: list[int] = []
        stream = loop.streams.training
        plain = type(stream).__getitem__

        def noted(self: Any, n: int) -> Any:
            read.append(n)
            return plain(self, n)

        with (
            patch.object(type(stream), "__getitem__", noted),
            _multiplied_loss(lambda: loop, 30.0, [FAULTY]),
        ):
            loop.run(_never)
        return {"read": read, "samples": loop.progress.consumed_samples}


def test_a_loss_spike_rolls_back_and_leaves_out_its_samples(tmp_path: Path) -> None:
    """The spike of step 9 returns the run to step 6, the second checkpoint before it."""
    found = run_ranks(_roll_back, 2, str(tmp_path))
    back_to, after = 6, FAULTY * SAMPLES
    # Every rank reads its own two samples of a step, up to the spike and from the next one on.
    for rank, result in enumerate(found):
        expected = [n for n in range(after + (FAULTY + 2 - back_to) * SAMPLES) if n % 2 == rank]
        assert result["read"] == expected
    event = next(row for row in _events(tmp_path) if row["kind"] == "loss_spike")
    assert (event["step"], event["action"], event["ranks"]) == (FAULTY, "rollback", [])
    assert (event["rolled_back_to"], event["next_sample"]) == (back_to, after)
    rows = metrics(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, FAULTY + 3))
    assert [row["samples"] for row in rows[5:7]] == [back_to * SAMPLES, after + SAMPLES]
    assert saved_steps(tmp_path) == [2, 4, 6, 8, 10, 11]
    progress = read_record(step_folder(tmp_path, 8)).progress
    assert progress.consumed_samples == after + 2 * SAMPLES


class Killed(Exception):
    """A run ends without a word."""


def _spike_once(folder: str, fp8: str | None, spikes: bool, killed: bool) -> int:
    chosen = settings(
        "ep2_zero",
        **CALM,
        precision={"fp8_format": fp8},
        training={"train_iters": FAULTY + 2},
        checkpoint={"save": folder, "load": folder, "save_interval": 4},
        health={"spike_policy": "rollback", **SPIKES},
    )
    with parallel_of(chosen):
        loop = start(chosen)
        first = loop.progress.consumed_samples

        def end() -> bool:
            if killed and loop.health.rollbacks:
                raise Killed
            return False

        with _multiplied_loss(lambda: loop, 30.0, [FAULTY] if spikes else []):
            loop.run(end)
        return first


@pytest.mark.parametrize("fp8", [None, "e4m3"])
def test_a_run_that_ends_after_a_rollback_resumes_as_if_it_had_not(
    tmp_path: Path, fp8: str | None
) -> None:
    """Before it has saved again: the samples to leave out are in events.jsonl alone.

    So a rollback inside a job restores all that a new process reads from the same checkpoint.
    """
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    run_ranks(_spike_once, 2, str(straight), fp8, True, False)
    with pytest.raises(RankFailed, match="Killed"):
        run_ranks(_spike_once, 2, str(resumed), fp8, True, True)
    assert latest_step(resumed) == 8
    assert run_ranks(_spike_once, 2, str(resumed), fp8, False, False) == [FAULTY * SAMPLES] * 2
    assert [row["rolled_back_to"] for row in _events(resumed)] == [8] * len(_events(straight))
    assert metrics(resumed) == metrics(straight)
    last = f"step_{FAULTY + 2:07d}"
    one, other = (tensors(folder / last, states=True) for folder in (straight, resumed))
    assert not [key for key in one | other if not torch.equal(one[key], other[key])]


def _stop(folder: str, policy: str) -> None:
    chosen = settings(
        "dp",
        **CALM,
        training={"train_iters": FAULTY + 2},
        checkpoint={"save": folder},
        health={"spike_policy": policy, **SPIKES},
    )
    with parallel_of(chosen):
        loop = start(chosen)
        with _multiplied_loss(lambda: loop, 30.0, [FAULTY]):
            loop.run(_never)


def test_a_loss_spike_stops_or_warns(tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match=rf"SpikeError: lm_loss .* in step {FAULTY}; "):
        run_ranks(_stop, 1, str(tmp_path / "stop"), "stop")
    assert _events(tmp_path / "stop")[0]["action"] == "stop"
    run_ranks(_stop, 1, str(tmp_path / "warn"), "warn")
    assert _events(tmp_path / "warn")[0]["action"] == "warn"
    assert metrics(tmp_path / "warn")[-1]["step"] == FAULTY + 2


def _train(folder: str, exit_interval: int | None) -> None:
    chosen = settings(
        "dp",
        training={"train_iters": 12, "exit_interval": exit_interval},
        checkpoint={"save": folder, "load": folder},
        health={"spike_window": 4, "spike_threshold": 0.5, "spike_grad_norm_ratio": 0.1},
    )
    with parallel_of(chosen):
        start(chosen).run(_never)


def test_a_resumed_run_decides_the_same(tmp_path: Path) -> None:
    """With a threshold that healthy steps exceed; window and score come from the checkpoint."""
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    run_ranks(_train, 2, str(straight), None)
    run_ranks(_train, 2, str(resumed), 5)
    run_ranks(_train, 2, str(resumed), 7)
    run_ranks(_train, 2, str(resumed), None)
    assert metrics(resumed) == metrics(straight)
    events = [
        [{key: value for key, value in row.items() if key != "time"} for row in _events(folder)]
        for folder in (straight, resumed)
    ]
    assert events[0] == events[1] != []


def _diverge(folder: str, part: str) -> None:
    chosen = settings(
        "dp",
        training={"train_iters": 6, "global_batch_size": 3},
        checkpoint={"save": folder, "save_interval": 4},
        health={"check_weight_hash_across_dp_replicas_interval": 2},
    )
    with parallel_of(chosen):
        loop = start(chosen)

        def change() -> bool:
            if loop.progress.step == 2 and torch.distributed.get_rank() == 1:
                for name, parameter in loop.trainer.chunks[0].named_parameters():
                    if part in name:
                        parameter.data.view(-1)[0] += 1e-3
                        break
            return False

        loop.run(change)


@pytest.mark.parametrize("part", ["experts", "word_embeddings"])
def test_a_diverged_replica_is_named(tmp_path: Path, part: str) -> None:
    """One number of one parameter of rank 1 differs from step 3 on; found at step 4, not saved."""
    expected = (
        rf"{ReplicasDifferError.__name__}: replicas: ranks 1 differ from the others in .*{part}"
    )
    with pytest.raises(RankFailed, match=expected):
        run_ranks(_diverge, 3, str(tmp_path), part)
    [event] = _events(tmp_path)
    assert (event["kind"], event["step"], event["ranks"]) == ("replicas_differ", 4, [1])
    assert saved_steps(tmp_path) == []


def _force(folder: str) -> None:
    chosen = settings(
        "dp",
        moe={"num_experts": 6, "moe_router_topk": 2},
        training={"train_iters": 5},
        optimizer={"router_lr_mult": 0.0},
        checkpoint={"save": folder},
        health={"expert_alarm_steps": 3, "expert_alarm_load": 2.5},
    )
    with parallel_of(chosen):
        loop = start(chosen)
        for module in loop.trainer.chunks[0].modules():
            if isinstance(module, Router) and module.layer_number == 1:
                # Along one direction, experts 1 and 2 win on one side, 3 and 4 on the other.
                line = torch.ones(module.weight.shape[1])
                slopes = torch.tensor([0.0, 1.0, 2.0, -1.0, -2.0, 0.0])
                module.weight.data.copy_(slopes[:, None] * line)
        loop.run(_never)


def test_a_dead_expert_raises_an_alarm_in_its_last_step(tmp_path: Path) -> None:
    run_ranks(_force, 2, str(tmp_path))
    events = [row for row in _events(tmp_path) if row["kind"] == "dead_experts"]
    [event] = [row for row in events if row["values"]["layer"] == "layer_0"]
    assert event["step"] == 3
    assert event["values"]["experts"] == [0, 5]
    assert event["action"] == "warn"
