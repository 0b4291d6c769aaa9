"""The training loop: steps, evaluations, checkpoints, metrics and stop conditions."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from moetron.common.watch import activity
from moetron.moe.checkpoint.background_save import Saver, report
from moetron.moe.checkpoint.position import Progress
from moetron.moe.config.schema.derived import global_batch_size_at, stage_at
from moetron.moe.health.events import Event, ReplicasDifferError
from moetron.moe.health.monitor import FILE as HEALTH_FILE
from moetron.moe.health.monitor import HealthMonitor
from moetron.moe.health.replicas import compare_replicas
from moetron.moe.health.rerun import Ending, RerunError
from moetron.moe.health.spikes import Place
from moetron.moe.host.allocator import GarbageCollector
from moetron.moe.host.layer_graphs import LayerGraphs
from moetron.moe.monitoring.peak_flops import Peak
from moetron.moe.monitoring.profiling import Profiler
from moetron.moe.monitoring.sinks import Row, Sink
from moetron.moe.monitoring.stragglers import Stragglers
from moetron.moe.plan.flops import flops_per_token
from moetron.moe.training.batches import Replay, lost_workers, micro_batches, training_numbers
from moetron.moe.training.evaluate import bits_per_byte, evaluate
from moetron.moe.training.loss_tally import Losses, Tally
from moetron.moe.training.model_chunks import needs_samples, parameters_gathered
from moetron.moe.training.rollback import roll_back
from moetron.moe.training.sample_stream import Streams
from moetron.moe.training.schedule import LearningRate
from moetron.moe.training.step import BatchIterators, has_baseline, train_step
from moetron.moe.training.step_metrics import StepMetrics
from moetron.moe.training.trainer import Trainer

_REMEDY = (
    "checkpoints are from before it: resume from one with a lower --lr or --clip-grad, or with "
    "--spike-policy skip or rollback; --no-check-for-nan-in-loss-and-grad continues anyway"
)


class Loop:
    """Training loop from ``progress`` to the end of the run.

    Every rank runs the same loop; only the main rank has ``sinks``. ``peak`` is one rank's,
    None if unknown.
    """

    def __init__(
        self,
        trainer: Trainer,
        streams: Streams,
        progress: Progress,
        sinks: list[Sink],
        peak: Peak | None,
    ) -> None:
        self.trainer = trainer
        self.streams = streams
        self.progress = progress
        self.sinks = sinks
        self._peak = peak
        self._rate = LearningRate.of(trainer.settings)
        self._tally = Tally(streams.training, trainer.settings.adaptation.preference_loss)
        self._flops_per_token = flops_per_token(trainer.settings, trainer.vocab_size)
        self._evaluated: int | None = None
        profiling, runtime = trainer.settings.profiling, trainer.runtime
        saved = progress if progress.step else None
        self._saver = Saver(trainer.settings, runtime.writer, saved)
        self._profiler = Profiler(
            trainer.settings, runtime.rank, runtime.device, trainer.chunks, trainer.optimizer
        )
        self._graphs = LayerGraphs(
            trainer.settings, trainer.config, trainer.chunks, trainer.optimizer
        )
        self._stragglers = Stragglers(trainer.settings, runtime.device)
        self._garbage = GarbageCollector(profiling.manual_gc, profiling.manual_gc_interval)
        self.health = HealthMonitor(trainer.settings, trainer.chunks, trainer.config)

    def run(self, stop_requested: Callable[[], bool]) -> bool:
        """Train to the end, to --exit-interval or until a rank gets a stop request; then save.

        Returns whether the run was stopped before its end. The sinks are always closed. With
        --skip-train only evaluate.
        """
        settings = self.trainer.settings
        try:
            if settings.validation.skip_train:
                self._evaluate()
                return False
            with lost_workers():
                stopped = self._train(stop_requested)
            ended = self.progress.step == settings.training.train_iters
            if ended:
                self._evaluate()
            self._save(self._saver.save_at_end)
        finally:
            self._profiler.close()
            self._stragglers.close()
            self._garbage.close()
            self._saver.close()
            for sink in self.sinks:
                sink.close()
            self._graphs.close()
        return stopped and not ended

    def _train(self, stop_requested: Callable[[], bool]) -> bool:
        """Run steps up to the first stop condition; return whether it was a stop request."""
        training = self.trainer.settings.training
        batches = self.batches()
        while self.progress.step < training.train_iters:
            with self._profiler.step(self.progress.step):
                stopped = self.step(batches, stop_requested)
            self._garbage.after_step(self.progress.step)
            if self.health.verdict.action == "rollback":
                self._roll_back()
                batches = self.batches()
                continue
            self._after_step()
            exit_interval = training.exit_interval
            if stopped or (exit_interval is not None and self.progress.step % exit_interval == 0):
                return stopped
        return False

    def batches(self) -> BatchIterators:
        """Return iterators over the remaining micro-batches, for each chunk that reads any."""
        settings, runtime = self.trainer.settings, self.trainer.runtime
        length, workers = settings.model.seq_length, settings.data.num_workers
        found = [
            micro_batches(
                self.streams.training,
                length,
                training_numbers(settings, self.progress, runtime.dp_rank, runtime.dp_size),
                workers,
                runtime.device,
            )
            if needs_samples(chunk, settings)
            else None
            for chunk in self.trainer.chunks
        ]
        if not (self.health.reruns.enabled or has_baseline(settings)):
            return found
        return [None if each is None else Replay(each) for each in found]

    def step(self, batches: BatchIterators, stop_requested: Callable[[], bool]) -> bool:
        """Run one step and write its metrics; return whether any rank got a stop request."""
        settings, runtime = self.trainer.settings, self.trainer.runtime
        samples = global_batch_size_at(settings, self.progress.consumed_samples)
        count = samples // (settings.training.micro_batch_size * runtime.dp_size)
        learning_rate = self._rate.at(self.progress)
        first = self.progress.consumed_samples
        self.health.begin(Place(self.progress.step + 1, first, first + samples))
        self._graphs.before_step(self.progress.step + 1, count)
        activity.begin(activity.STEP, self.progress.step + 1)
        start_s = time.perf_counter()
        metrics = train_step(
            self.trainer, batches, count, learning_rate, stop_requested, self._tally, self.health
        )
        self._tell(self.health.reruns.events)
        if self.health.reruns.ending is not None:
            self._end_after_rerun(self.health.reruns.ending)
        step_time_s = time.perf_counter() - start_s
        own_times = self._stragglers.after_step(step_time_s)
        self.progress = self.progress.after(samples, settings.model.seq_length)
        if own_times is not None and own_times.slow:
            self._tell([own_times.event(self.progress.step)])
        elif own_times is not None:
            report(self.progress, own_times.text())
        verdict = self.health.verdict
        if verdict.action == "rollback":
            return metrics.stop
        self._tell(verdict.events)
        if verdict.action == "stop":
            raise verdict.error(_REMEDY)
        if self.sinks:
            row = self._row(metrics, samples, learning_rate, step_time_s)
            for sink in self.sinks:
                sink.step(row)
            if self.progress.step % settings.logging.expert_load_interval == 0:
                for sink in self.sinks:
                    sink.expert_load(self.progress.step, metrics.loads)
        return metrics.stop

    def _row(
        self, metrics: StepMetrics, samples: int, learning_rate: float, step_time_s: float
    ) -> Row:
        """Return the step's line of metrics.jsonl; ``tflops_per_s`` and ``mfu`` are per rank."""
        settings = self.trainer.settings
        tokens_per_s = samples * settings.model.seq_length / step_time_s
        tflops_per_s = tokens_per_s * self._flops_per_token / self.trainer.runtime.world_size / 1e12
        row: dict[str, Any] = {
            "step": self.progress.step,
            "tokens": self.progress.consumed_tokens,
            "samples": self.progress.consumed_samples,
            "lm_loss": metrics.losses.loss,
            "loss_tokens": metrics.losses.tokens,
            **self._loss_row(metrics.losses),
            **metrics.extra,
            **self.health.metrics,
            "grad_norm": metrics.grad_norm,
            "lr": learning_rate,
            "step_time_s": step_time_s,
            "tokens_per_s": tokens_per_s,
            "tflops_per_s": tflops_per_s,
            "peak_memory_bytes": metrics.peak_memory_bytes,
        }
        if settings.data.stages is not None:
            row["stage"] = stage_at(settings, self.progress.consumed_samples - samples) + 1
        if self._peak is not None:
            row["mfu"] = tflops_per_s / self._peak.tflops_per_s
            row["mfu_peak_tflops_per_s"] = self._peak.tflops_per_s
            row["mfu_peak_basis"] = self._peak.basis
        return row

    def _loss_row(self, losses: Losses) -> dict[str, Any]:
        """Return losses and tokens by source and losses by objective, if there are several."""
        stream, row = self.streams.training, dict[str, Any]()
        if len(stream.source_names) > 1:
            row["source_losses"] = losses.by_source
            row["source_tokens"] = losses.tokens_by_source
        if len(stream.objective_names) > 1:
            row["objective_losses"] = losses.by_objective
        row |= losses.preferences
        if self.trainer.settings.data.repetition_max_count is not None:
            row["filtered_tokens"] = losses.filtered_tokens
        return row

    def _after_step(self) -> None:
        """Run the evaluation and the checkpoint that are due."""
        self._saver.check()
        settings, step = self.trainer.settings, self.progress.step
        compare_interval = settings.health.check_weight_hash_across_dp_replicas_interval
        if compare_interval is not None and step % compare_interval == 0:
            self._compare_replicas()
        eval_interval = settings.validation.eval_interval
        if eval_interval is not None and step % eval_interval == 0:
            self._evaluate()
        save_interval = settings.checkpoint.save_interval
        if save_interval is not None and step % save_interval == 0:
            self._save(self._saver.save)

    def _evaluate(self) -> None:
        """Evaluate and write the metrics, unless this step was evaluated."""
        stream, step = self.streams.validation, self.progress.step
        if stream is None or self._evaluated == step:
            return
        result = evaluate(self.trainer, stream)
        self._evaluated = step
        found = bits_per_byte(result, stream)
        bits = (
            {"bits_per_byte": found.all, "source_bits_per_byte": found.by_source} if found else {}
        )
        for sink in self.sinks:
            sink.validation(
                {
                    "step": step,
                    "tokens": self.progress.consumed_tokens,
                    "validation_loss": result.loss,
                    "source_losses": result.by_source,
                    "tokens_evaluated": result.tokens,
                    **bits,
                    **result.preferences,
                }
            )

    def _save(self, save: Callable[..., None]) -> None:
        """Save a checkpoint with ``save``, unless this position has one or --save is unset."""
        trainer, state = self.trainer, self.streams.training.state()
        if trainer.settings.checkpoint.save is not None:
            with parameters_gathered(trainer.chunks, trainer.settings):
                texts = {HEALTH_FILE: self.health.state()}
                save(self.progress, trainer.chunks, trainer.optimizer, state, texts)

    def _tell(self, events: Sequence[Event]) -> None:
        """Write events to the sinks."""
        for sink in self.sinks:
            for event in events:
                sink.event(event.row())

    def _end_after_rerun(self, ending: Ending) -> NoReturn:
        """Save the state before the step, if the run may continue from it, and end the run."""
        if ending.saves:
            self._save(self._saver.save_at_end)
        folder = self.trainer.settings.checkpoint.save
        assert folder is not None, "rules refuse reruns without --save"
        self.health.reruns.write(Path(folder), self.progress.step)
        raise RerunError(ending.text, ending.exit_code)

    def _compare_replicas(self) -> None:
        """Raise on all ranks if data-parallel replicas differ, before a checkpoint is saved."""
        trainer = self.trainer
        with parameters_gathered(trainer.chunks, trainer.settings):
            found = compare_replicas(trainer.chunks, trainer.runtime.groups)
        if found is not None:
            self._tell([found.event(self.progress.step)])
            raise ReplicasDifferError(f"{found.text} in step {self.progress.step}")

    def _roll_back(self) -> None:
        """Return to an earlier checkpoint, with the data after the step that caused it."""
        self._saver.wait()
        verdict, before = self.health.verdict, self.health.rollbacks
        found = roll_back(self.trainer, self.streams.training, self.progress)
        if found is None:
            self._tell([replace(event, action="stop") for event in verdict.events])
            raise verdict.error("there is no checkpoint to roll back to yet")
        self.progress, folder = found
        position = (
            self.progress.step,
            self.progress.consumed_samples,
            self.progress.consumed_tokens,
        )
        self._tell([event.rolled_back(*position, before + 1) for event in verdict.events])
        self.health.restore(folder)
        self.health.rollbacks = before + 1
        for sink in self.sinks:
            sink.rewind(self.progress.step)
        self._saver.saved, self._evaluated = self.progress, None
