"""Training in several layouts: the same losses from the same weights, the same bits twice."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moetron.data.stream.mock_stream import ENDLESS, MockStream
from moetron.moe.checkpoint.position import Progress
from moetron.moe.checkpoint.save_load import load_checkpoint, save_checkpoint
from moetron.moe.config.command import load
from moetron.moe.config.schema.settings import Settings
from moetron.moe.health.events import NotFiniteError
from moetron.moe.monitoring.sinks import MACHINE_METRICS, Row
from moetron.moe.training.build_trainer import build_trainer
from moetron.moe.training.evaluate import evaluate
from moetron.moe.training.loop import Loop
from moetron.moe.training.runtime import divide
from moetron.moe.training.sample_stream import SampleStream, StreamFrom, Streams
from moetron.moe.training.trainer import Trainer
from tests.parallel.support.harness import RankFailed, run_ranks
from tests.unit.training.training_cases import CountingStream

RECIPE = Path(__file__).parents[2] / "examples" / "olmoe_1b_7b" / "tiny.yaml"
ZERO1 = ["--use-distributed-optimizer"]
SMALL_BUCKETS = ["--ddp-bucket-size", "20000"]


class _Rows:
    """Sink that keeps everything."""

    closed = False

    def __init__(self) -> None:
        self.steps: list[Row] = []
        self.validations: list[Row] = []

    def step(self, row: Row) -> None:
        self.steps.append({key: value for key, value in row.items() if key not in MACHINE_METRICS})

    def validation(self, row: Row) -> None:
        self.validations.append(row)

    def close(self) -> None:
        self.closed = True


def _settings(flags: list[str]) -> Settings:
    return load(
        ["--config", str(RECIPE), "--seq-length", "64", "--num-layers", "4", *flags]
    ).settings


def _trainer(settings: Settings) -> Trainer:
    assert settings.model.vocab_size is not None
    runtime = divide(settings, torch.device("cpu"))
    return build_trainer(settings, runtime, settings.model.vocab_size)


def _streams(settings: Settings) -> Streams:
    assert settings.model.vocab_size is not None
    mock = MockStream(1, settings.model.vocab_size, settings.model.seq_length)
    return Streams(mock, StreamFrom(mock, ENDLESS // 2))


def _train(
    flags: list[str],
    weights: str,
    save: bool = False,
    streams: Callable[[Settings], SampleStream] | None = None,
) -> dict[str, Any]:
    """Train from ``weights`` (written first, if ``save``); return the main rank's metrics."""
    settings = _settings(flags)
    trainer = _trainer(settings)
    sources = _streams(settings) if streams is None else Streams(streams(settings), None)
    state = sources.training.state()
    if save:
        args = (trainer.chunks, trainer.optimizer, settings, state)
        save_checkpoint(Path(weights), Progress(), *args)
    finetune = settings.checkpoint.model_copy(update={"finetune": True})
    fresh = settings.model_copy(update={"checkpoint": finetune})
    load_checkpoint(Path(weights), trainer.chunks, trainer.optimizer, fresh, state)
    rows = _Rows()
    loop = Loop(trainer, sources, Progress(), [rows], peak=None)
    assert not loop.run(lambda: False)
    assert rows.closed
    return {"steps": rows.steps, "validations": rows.validations}


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """Return (weights, metrics) of 20 steps on one rank."""
    weights = str(tmp_path_factory.mktemp("weights"))
    return weights, run_ranks(_train, 1, ["--train-iters", "20"], weights, True)[0]


def test_a_loss_falls(one_rank: tuple[str, dict[str, Any]]) -> None:
    losses = [row["lm_loss"] for row in one_rank[1]["steps"]]
    assert len(losses) == 20
    assert losses[-1] < losses[0] - 0.5
    assert one_rank[1]["validations"][0]["validation_loss"] < losses[0] - 0.5


def test_a_repeated_run_is_bit_identical(one_rank: tuple[str, dict[str, Any]]) -> None:
    weights, report = one_rank
    again = run_ranks(_train, 1, ["--train-iters", "20"], weights)[0]
    assert again == report


@pytest.mark.parametrize(
    "layout",
    [
        [*ZERO1, "--overlap-grad-reduce", "--overlap-param-gather", *SMALL_BUCKETS],
        ["--overlap-grad-reduce", *SMALL_BUCKETS],
        ["--pipeline-model-parallel-size", "2", "--num-layers-per-virtual-pipeline-stage", "1"],
        ["--pipeline-model-parallel-size", "2", "--pipeline-model-parallel-layout", "E|tt|t|tL"],
        ["--no-calculate-per-token-loss"],
    ],
    ids=["dp2-zero1-overlapped", "dp2-overlapped", "pp2-interleaved", "pp2-uneven", "dp2-means"],
)
def test_two_ranks_equal_one(one_rank: tuple[str, dict[str, Any]], layout: list[str]) -> None:
    """Every step's loss to 1e-6, from the same weights, fp32; its other metrics to 1e-4.

    Layouts have tests of their own (test_layout_parity.py); here also of the validation loss.
    Without masked tokens the mean over tokens is the mean of micro-batch means.
    """
    weights, single = one_rank
    double = run_ranks(_train, 2, ["--train-iters", "20", *layout], weights)[0]
    for ours, theirs in zip(single["steps"], double["steps"], strict=True):
        assert theirs["lm_loss"] == pytest.approx(ours["lm_loss"], rel=1e-6)
        for name in ("grad_norm", "aux_loss", "z_loss"):
            assert theirs[name] == pytest.approx(ours[name], rel=1e-4)
        assert theirs["loss_tokens"] == ours["loss_tokens"] == 16 * 64
        assert theirs.keys() == ours.keys()
    assert double["validations"][0]["validation_loss"] == pytest.approx(
        single["validations"][0]["validation_loss"], rel=1e-6
    )


class _PrefixStream(MockStream):
    """Mock samples of two sources and two objectives, each with a prefix without loss."""

    def __init__(self, settings: Settings) -> None:
        assert settings.model.vocab_size is not None
        super().__init__(1, settings.model.vocab_size, settings.model.seq_length)
        self.source_names, self.objective_names = ["a", "b"], ["x", "y"]

    def __getitem__(self, n: int) -> dict[str, Any]:
        sample, prefix = super().__getitem__(n), 1 + n % 50
        sample["loss_mask"][: prefix - 1] = 0
        return {**sample, "prefix": prefix, "source": n % 2, "objective": n // 2 % 2}


def _train_parts(weights: str, flags: list[str]) -> list[Row]:
    short = ["--train-iters", "3", "--lr-warmup-iters", "0", "--eval-iters", "0"]
    return _train([*short, *flags], weights, streams=_PrefixStream)["steps"]


def test_losses_by_source_and_objective_and_prefixes_equal_in_every_layout(
    one_rank: tuple[str, dict[str, Any]],
) -> None:
    """The two inner ones of four pipeline stages read samples only for the mask."""
    weights, _ = one_rank
    prefix = ["--bidirectional-prefix"]
    causal, single = (run_ranks(_train_parts, 1, weights, flags)[0] for flags in ([], prefix))
    assert causal[0]["lm_loss"] != pytest.approx(single[0]["lm_loss"], rel=1e-5)
    pipeline = [*prefix, "--pipeline-model-parallel-size", "4"]
    for reference, ranks, flags in (
        (single, 4, pipeline),
        (causal, 2, ["--context-parallel-size", "2"]),
    ):
        for ours, theirs in zip(
            reference, run_ranks(_train_parts, ranks, weights, flags)[0], strict=True
        ):
            for name in ("source_losses", "objective_losses"):
                assert theirs[name] == pytest.approx(ours[name], rel=2e-6)
                assert min(ours[name].values()) < ours["lm_loss"] < max(ours[name].values())
            assert theirs["lm_loss"] == pytest.approx(ours["lm_loss"], rel=2e-6)
            assert theirs["source_tokens"] == ours["source_tokens"]
            assert sum(ours["source_tokens"].values()) == ours["loss_tokens"]
            assert theirs["loss_tokens"] == ours["loss_tokens"] < 16 * 64
            assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-4)


@pytest.mark.slow
def test_four_ranks_of_an_interleaved_pipeline_overlap_everything(
    one_rank: tuple[str, dict[str, Any]],
) -> None:
    weights, single = one_rank
    layout = ["--pipeline-model-parallel-size", "2", "--num-layers-per-virtual-pipeline-stage", "1"]
    overlaps = ["--overlap-grad-reduce", "--overlap-param-gather", *SMALL_BUCKETS]
    flags = ["--train-iters", "20", *layout, *ZERO1, *overlaps]
    report = run_ranks(_train, 4, flags, weights)[0]
    for ours, theirs in zip(single["steps"], report["steps"], strict=True):
        assert theirs["lm_loss"] == pytest.approx(ours["lm_loss"], rel=1e-6)


def _stop(at_call: int) -> tuple[bool, int]:
    """Return (stopped early, steps done) of a run of 3 steps with a stop request in one of them."""
    settings = _settings(["--train-iters", "3", "--lr-warmup-iters", "0"])
    streams = Streams(_streams(settings).training, None)
    calls = itertools.count(1)
    loop = Loop(_trainer(settings), streams, Progress(), [], None)
    return loop.run(lambda: next(calls) == at_call), loop.progress.step


def test_a_stop_request_applies_at_the_step_boundary_unless_it_is_the_last() -> None:
    assert run_ranks(_stop, 1, 2)[0] == (True, 2)
    assert run_ranks(_stop, 1, 3)[0] == (False, 3)


def _evaluate(flags: list[str], samples: int) -> dict[str, Any]:
    settings = _settings(["--vocab-size", "512", "--eval-iters", "100", *flags])
    stream = CountingStream(samples, settings.model.seq_length)
    result = evaluate(_trainer(settings), stream)
    return {"loss": result.loss, "sources": result.by_source, "tokens": result.tokens}


def test_evaluation_counts_every_sample_once() -> None:
    """13 samples fill neither two ranks nor micro-batches of 3; sample n has n masked tokens."""
    few = ["--micro-batch-size", "1", "--global-batch-size", "2"]
    more = ["--micro-batch-size", "3", "--global-batch-size", "6"]
    (single,) = run_ranks(_evaluate, 1, few, 13)
    double = run_ranks(_evaluate, 2, more, 13)
    assert single["tokens"] == 13 * 64 - sum(range(13))
    assert list(single["sources"]) == ["zero", "one", "two"]
    for result in double:
        assert result["tokens"] == single["tokens"]
        assert result["loss"] == pytest.approx(single["loss"], rel=1e-6)
        assert result["sources"] == pytest.approx(single["sources"], rel=1e-6)


def _evaluate_twice() -> tuple[float, float]:
    settings = _settings(["--hidden-dropout", "0.3"])
    trainer, stream = _trainer(settings), _streams(settings).validation
    assert stream is not None
    losses = evaluate(trainer, stream).loss, evaluate(trainer, stream).loss
    assert all(chunk.training for chunk in trainer.chunks)
    return losses


def test_evaluation_has_no_dropout() -> None:
    first, second = run_ranks(_evaluate_twice, 1)[0]
    assert first == second


def _weight_decays(flags: list[str]) -> dict[str, list[float]]:
    """Return the distinct weight decays of vectors and of matrices."""
    optimizer = _trainer(_settings(flags)).optimizer
    found: dict[str, set[float]] = {"vectors": set(), "matrices": set()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            found["vectors" if parameter.dim() == 1 else "matrices"].add(group["weight_decay"])
    return {kind: sorted(values) for kind, values in found.items()}


def test_weight_decay_exempts_vectors_by_default() -> None:
    spared = run_ranks(_weight_decays, 1, ["--no-decay-norms-and-biases"])[0]
    assert spared == {"vectors": [0.0], "matrices": [0.1]}
    assert run_ranks(_weight_decays, 1, [])[0] == {"vectors": [0.1], "matrices": [0.1]}


def _spoil_and_step() -> None:
    settings = _settings(["--train-iters", "20"])
    trainer = _trainer(settings)
    with torch.no_grad():
        next(trainer.chunks[0].parameters()).fill_(float("inf"))
    Loop(trainer, _streams(settings), Progress(), [], None).run(lambda: False)


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    with pytest.raises(RankFailed, match=f"{NotFiniteError.__name__}: lm_loss is nan.*of rank 0"):
        run_ranks(_spoil_and_step, 1)


def _spoil_gradient_and_step() -> dict[str, Any]:
    settings = _settings(["--train-iters", "20"])
    trainer = _trainer(settings)
    parameters = list(trainer.chunks[0].parameters())
    before = [parameter.detach().clone() for parameter in parameters]
    parameters[-1].register_hook(lambda gradient: gradient * float("inf"))
    try:
        Loop(trainer, _streams(settings), Progress(), [], None).run(lambda: False)
    except NotFiniteError as error:
        same = [torch.equal(old, new) for old, new in zip(before, parameters, strict=True)]
        return {"message": str(error), "same": all(same)}
    raise AssertionError("an infinite gradient was not detected")


def test_weights_are_unchanged_if_a_gradient_is_not_finite() -> None:
    (found,) = run_ranks(_spoil_gradient_and_step, 1)
    assert "gradient norm" in found["message"]
    assert found["same"]
