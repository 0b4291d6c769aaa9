"""Rules on the learning rate, checkpoints, evaluation and profiling."""

from collections.abc import Iterator

from moetron.moe.config.rules.case import Case
from moetron.moe.config.schema.derived import schedule_lengths


def learning_rate(case: Case) -> Iterator[str]:
    """Check the schedule's rates, the unit of its lengths, and its segments."""
    rate = case.settings.learning_rate
    for name in ("min_lr", "lr_warmup_init"):
        if getattr(rate, name) > rate.lr:
            yield f"{case.given(name)} exceeds {case.given('lr')}: use at most {rate.lr}"
    given = {unit: list(_given(case, unit)) for unit in ("iters", "tokens")}
    if given["iters"] and given["tokens"]:
        yield (
            f"{case.given(*given['iters'], *given['tokens'])} measure the schedule in steps and in "
            "tokens: use one unit"
        )
    else:
        yield from _segments(case)


def _given(case: Case, unit: str) -> Iterator[str]:
    """Yield the names of fields that give a length in ``unit``."""
    for stem in ("lr_warmup", "lr_decay", "lr_wsd_decay"):
        if getattr(case.settings.learning_rate, f"{stem}_{unit}") is not None:
            yield f"{stem}_{unit}"


def _segments(case: Case) -> Iterator[str]:
    """Check warm-up, plateau and decay."""
    lengths, style = schedule_lengths(case.settings), case.settings.learning_rate.lr_decay_style
    suffix = "tokens" if lengths.unit == "tokens" else "iters"
    end, final = f"the schedule, which ends at {lengths.end} {lengths.unit}", lengths.final_decay
    if lengths.warmup > lengths.run:
        yield (
            f"{case.given(f'lr_warmup_{suffix}')} is longer than the run of {lengths.run} "
            f"{lengths.unit}: shorten it, or raise --train-iters"
        )
    elif lengths.warmup >= lengths.end and style != "constant":
        yield (
            f"{case.given(f'lr_warmup_{suffix}')} leaves nothing of {end} from the start of the "
            "run: shorten the warm-up"
        )
    if style != "WSD":
        if final is not None:
            yield f"{case.given(f'lr_wsd_decay_{suffix}')} needs --lr-decay-style WSD"
    elif final is None:
        yield "--lr-decay-style WSD needs --lr-wsd-decay-iters (or --lr-wsd-decay-tokens)"
    elif lengths.warmup + final > lengths.end:
        yield (
            f"{case.given(f'lr_wsd_decay_{suffix}')} and a warm-up of {lengths.warmup} exceed "
            f"{end}: shorten one"
        )


def checkpoint(case: Case) -> Iterator[str]:
    """Check what a load restores."""
    if case.settings.checkpoint.finetune and case.settings.checkpoint.reset_progress:
        yield (
            "--finetune (fresh optimizer) and --reset-progress (old one) exclude each other: "
            "drop one"
        )


def evaluation(case: Case) -> Iterator[str]:
    """Check evaluation during training."""
    validation = case.settings.validation
    if validation.eval_interval is not None and validation.eval_iters == 0:
        yield f"{case.given('eval_interval')} needs --eval-iters above 0"
    if not validation.skip_train:
        return
    if validation.eval_iters == 0:
        yield "--skip-train evaluates: give --eval-iters above 0"
    if case.settings.checkpoint.load is None:
        yield "--skip-train evaluates a checkpoint: give --load"


def profiling(case: Case) -> Iterator[str]:
    """Check the profiled steps and ranks, and what profiles need."""
    chosen, save = case.settings.profiling, case.settings.checkpoint.save
    records = chosen.profile or chosen.record_memory_history
    for name in ("use_pytorch_profiler", "nvtx_ranges"):
        if getattr(chosen, name) and not chosen.profile:
            yield f"{case.given(name)} needs --profile"
    for name in ("profile_step_start", "profile_step_end", "profile_ranks"):
        default = type(chosen).model_fields[name].default
        if getattr(chosen, name) != default and not records:
            yield f"{case.given(name)} needs --profile"
    default_path = type(chosen).model_fields["memory_snapshot_path"].default
    if chosen.memory_snapshot_path != default_path and not chosen.record_memory_history:
        yield f"{case.given('memory_snapshot_path')} needs --record-memory-history"
    if chosen.manual_gc_interval and not chosen.manual_gc:
        yield f"{case.given('manual_gc_interval')} needs --manual-gc"
    if not records:
        return
    if chosen.profile_step_end <= chosen.profile_step_start:
        yield (
            f"{case.given('profile_step_end')} is not above {case.given('profile_step_start')}: "
            f"use --profile-step-end {chosen.profile_step_start + 1} to profile one step"
        )
    if chosen.profile_step_end > case.settings.training.train_iters:
        yield (
            f"{case.given('profile_step_end')} exceeds {case.given('train_iters')}: profile "
            "earlier steps"
        )
    if unknown := [rank for rank in chosen.profile_ranks if rank >= case.world_size]:
        yield (
            f"{case.given('profile_ranks')}: there is no rank {unknown[0]} of {case.world_size}: "
            f"use at most {case.world_size - 1}"
        )
    if save is None and (chosen.use_pytorch_profiler or chosen.record_memory_history):
        names = [
            name
            for name in ("use_pytorch_profiler", "record_memory_history")
            if getattr(chosen, name)
        ]
        yield f"{case.given(*names)} writes to SAVE/profile: give --save"
    if case.device == "cpu":
        if chosen.profile and not chosen.use_pytorch_profiler:
            yield "--profile needs --use-pytorch-profiler on a CPU: Nsight Systems profiles GPUs"
        if chosen.record_memory_history:
            yield f"{case.given('record_memory_history')} needs a GPU: leave it out"


RULES = (learning_rate, checkpoint, evaluation, profiling)
