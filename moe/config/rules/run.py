"""The run: learning rate, data, checkpoints, evaluation and logs."""

from collections.abc import Iterator

from moetron.moe.config.derived import schedule_lengths
from moetron.moe.config.field import flag_name
from moetron.moe.config.rules.case import Case, number_or_none
from moetron.moe.config.run import StageSettings


def learning_rate(case: Case) -> Iterator[str]:
    """The schedule's rates, the unit of its lengths, and how its segments fit into the run."""
    rate = case.settings.learning_rate
    for name in ("min_lr", "lr_warmup_init"):
        if getattr(rate, name) > rate.lr:
            yield f"{case.said(name)} exceeds {case.said('lr')}: use at most {rate.lr}"
    given = {unit: list(_given(case, unit)) for unit in ("iters", "tokens")}
    if given["iters"] and given["tokens"]:
        yield (
            f"{case.said(*given['iters'], *given['tokens'])} measure the schedule in steps and in "
            "tokens: give all of them in one unit"
        )
    else:
        yield from _segments(case)


def _given(case: Case, unit: str) -> Iterator[str]:
    """The fields that give a length in ``unit``."""
    for stem in ("lr_warmup", "lr_decay", "lr_wsd_decay"):
        if getattr(case.settings.learning_rate, f"{stem}_{unit}") is not None:
            yield f"{stem}_{unit}"


def _segments(case: Case) -> Iterator[str]:
    """Warm-up, plateau and decay."""
    lengths, style = schedule_lengths(case.settings), case.settings.learning_rate.lr_decay_style
    suffix = "tokens" if lengths.unit == "tokens" else "iters"
    end, final = f"the schedule, which ends at {lengths.end} {lengths.unit}", lengths.final_decay
    if lengths.warmup > lengths.run:
        yield (
            f"{case.said(f'lr_warmup_{suffix}')} is longer than the run of {lengths.run} "
            f"{lengths.unit}: shorten it, or raise --train-iters"
        )
    elif lengths.warmup >= lengths.end and style != "constant":
        yield (
            f"{case.said(f'lr_warmup_{suffix}')} leaves nothing of {end} from the start of the "
            "run: shorten the warm-up"
        )
    if style != "WSD":
        if final is not None:
            yield f"{case.said(f'lr_wsd_decay_{suffix}')} needs --lr-decay-style WSD"
    elif final is None:
        yield "--lr-decay-style WSD needs --lr-wsd-decay-iters (or --lr-wsd-decay-tokens)"
    elif lengths.warmup + final > lengths.end:
        yield (
            f"{case.said(f'lr_wsd_decay_{suffix}')} and a warm-up of {lengths.warmup} exceed "
            f"{end}: shorten one"
        )


def data(case: Case) -> Iterator[str]:
    """Where samples come from, and how large the vocabulary is."""
    source = case.settings.data
    if source.mock_data and source.data_path:
        yield "--mock-data and --data-path exclude each other: drop one"
    if case.settings.model.vocab_size is None and source.tokenizer_model is None:
        yield "the vocabulary's size is unknown: give --tokenizer-model, or --vocab-size N"
    for name in ("data_path", "valid_data_path"):
        yield from _blend(flag_name(name), getattr(source, name))
    if source.stages is not None:
        yield from _stages(case, source.stages)


def _stages(case: Case, stages: list[StageSettings]) -> Iterator[str]:
    """Stages one after the other."""
    if case.settings.data.data_path or case.settings.data.mock_data or not stages:
        yield "--stages needs at least one stage and excludes --data-path and --mock-data"
    if case.settings.data.objective != "causal":
        yield f"{case.said('objective')}: with --stages, each stage names its own objective"
    last_end = 0
    for number, stage in enumerate(stages, 1):
        yield from _blend(f"--stages, stage {number}", stage.data_path)
        end, is_last = stage.until_tokens, number == len(stages)
        if (end is None) != is_last:
            rule = "the last ends with the run" if is_last else "another follows it"
            yield f"--stages, stage {number}: until_tokens {end}: {rule}"
        elif end is not None:
            if end - last_end < case.settings.model.seq_length:
                yield f"--stages, stage {number}: until_tokens {end} leaves it no sample"
            last_end = end


def _blend(flag: str, items: list[str] | None) -> Iterator[str]:
    """PREFIX PREFIX ..., or WEIGHT PREFIX WEIGHT PREFIX ..."""
    if items is None:
        return
    if not items:
        yield f"{flag} is empty: give PREFIX, or pairs WEIGHT PREFIX"
    weighted = [number_or_none(item) is not None for item in items]
    if not any(weighted):
        return
    if weighted != [True, False] * (len(items) // 2):
        yield f"{flag} {' '.join(items)}: give prefixes alone, or pairs WEIGHT PREFIX"
    for weight in items[::2]:
        number = number_or_none(weight)
        if number is not None and not 0 < number < float("inf"):
            yield f"{flag}: weight {weight!r} must be a number above 0"


def checkpoint(case: Case) -> Iterator[str]:
    """What a load keeps."""
    if case.settings.checkpoint.finetune and case.settings.checkpoint.reset_progress:
        yield (
            "--finetune (fresh optimizer) and --reset-progress (old one) exclude each other: "
            "drop one"
        )


def evaluation(case: Case) -> Iterator[str]:
    """Evaluation inside the run; without validation data there is none."""
    validation = case.settings.validation
    if validation.eval_interval is not None and validation.eval_iters == 0:
        yield f"{case.said('eval_interval')} needs --eval-iters above 0"


RULES = (learning_rate, data, checkpoint, evaluation)
