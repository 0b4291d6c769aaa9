"""The run: learning rate, data, checkpoints, evaluation and logs."""

from collections.abc import Iterator

from moetron.moe.config.derived import total_samples
from moetron.moe.config.field import flag_name
from moetron.moe.config.rules.case import Case


def _steps_or_tokens(case: Case, stem: str) -> tuple[float | None, Iterator[str]]:
    """A length given as ``stem_iters`` or ``stem_tokens``: (share of the run, problems)."""
    rate, training = case.settings.learning_rate, case.settings.training
    steps, tokens = getattr(rate, f"{stem}_iters"), getattr(rate, f"{stem}_tokens")
    problems = []
    if steps is not None and tokens is not None:
        problems.append(
            f"{case.said(f'{stem}_iters', f'{stem}_tokens')} say the same thing twice: give one"
        )
    if steps is not None:
        return steps / training.train_iters, iter(problems)
    if tokens is not None:
        total = total_samples(case.settings) * case.settings.model.seq_length
        return tokens / total, iter(problems)
    return None, iter(problems)


def learning_rate(case: Case) -> Iterator[str]:
    """The schedule's segments must fit into each other."""
    rate = case.settings.learning_rate
    for name in ("min_lr", "lr_warmup_init"):
        if getattr(rate, name) > rate.lr:
            yield f"{case.said(name)} exceeds {case.said('lr')}: use at most {rate.lr}"
    warmup, problems = _steps_or_tokens(case, "lr_warmup")
    yield from problems
    decay, problems = _steps_or_tokens(case, "lr_decay")
    yield from problems
    final, problems = _steps_or_tokens(case, "lr_wsd_decay")
    yield from problems
    if warmup is not None and warmup > 1:
        yield (
            f"the warm-up is {warmup:.3g} times as long as the run of {case.said('train_iters')}: "
            "shorten --lr-warmup-iters (or -tokens) or lengthen the run"
        )
    if warmup is not None and decay is not None and decay <= warmup:
        yield (
            "the decay ends (--lr-decay-iters or -tokens) before the warm-up does "
            "(--lr-warmup-iters or -tokens): it counts from the start of the run, so make it longer"
        )
    yield from _wsd(case, warmup or 0.0, decay or 1.0, final)


def _wsd(case: Case, warmup: float, decay: float, final: float | None) -> Iterator[str]:
    """Lengths are shares of the run."""
    if case.settings.learning_rate.lr_decay_style != "WSD":
        if final is not None:
            yield "--lr-wsd-decay-iters (or -tokens) needs --lr-decay-style WSD"
    elif final is None:
        yield "--lr-decay-style WSD needs --lr-wsd-decay-iters (or --lr-wsd-decay-tokens)"
    elif warmup + final > decay:
        yield (
            f"--lr-wsd-decay-iters (or -tokens) and the warm-up take {warmup + final:.3g} of a run "
            f"whose schedule ends at {decay:.3g}: shorten one"
        )


def data(case: Case) -> Iterator[str]:
    """Where samples come from."""
    source, vocab = case.settings.data, case.settings.model.vocab_size
    if source.mock_data and source.data_path:
        yield "--mock-data and --data-path exclude each other: drop one"
    if not source.mock_data and not source.data_path:
        yield "no data: give --data-path PREFIX (or WEIGHT PREFIX ...), or --mock-data to try"
    if source.mock_data and vocab is None and source.tokenizer_model is None:
        yield "--mock-data needs --vocab-size (or a --tokenizer-model to take it from)"
    if source.data_path and source.tokenizer_model is None:
        yield "--data-path needs --tokenizer-model: the one its shards were written with"
    for name in ("data_path", "valid_data_path"):
        yield from _blend(name, getattr(source, name))


def _blend(name: str, items: list[str] | None) -> Iterator[str]:
    """PREFIX, or WEIGHT PREFIX WEIGHT PREFIX ..."""
    flag = flag_name(name)
    if items is None or len(items) == 1:
        return
    if len(items) % 2:
        yield (
            f"{flag} has {len(items)} items: give one PREFIX, or pairs WEIGHT PREFIX"
            if items
            else f"{flag} is empty: give PREFIX, or pairs WEIGHT PREFIX"
        )
        return
    for weight in items[::2]:
        try:
            valid = 0 < float(weight) < float("inf")
        except ValueError:
            valid = False
        if not valid:
            yield f"{flag}: {weight!r} must be a weight, a number above 0 before each PREFIX"


def checkpoint(case: Case) -> Iterator[str]:
    """Saving and loading."""
    wanted = case.settings.checkpoint
    for name in ("save_interval", "keep_last"):
        if getattr(wanted, name) is not None and wanted.save is None:
            yield f"{case.said(name)} needs --save FOLDER"
    for name in ("finetune", "no_load_optim", "no_load_rng", "reset_progress"):
        if getattr(wanted, name) and wanted.load is None:
            yield f"{flag_name(name)} needs --load FOLDER"
    if wanted.finetune and wanted.reset_progress:
        yield (
            "--finetune (fresh optimizer) and --reset-progress (its state kept) exclude each other: "
            "drop one"
        )
    if case.settings.training.exit_interval is not None and wanted.save is None:
        yield f"{case.said('exit_interval')} needs --save FOLDER: else its work is lost"


def logs(case: Case) -> Iterator[str]:
    """Evaluation and logs."""
    validation, log = case.settings.validation, case.settings.logging
    source, interval = case.settings.data, validation.eval_interval
    if interval is not None and validation.eval_iters == 0:
        yield f"{case.said('eval_interval')} needs --eval-iters above 0"
    if interval is not None and not source.mock_data and source.valid_data_path is None:
        yield f"{case.said('eval_interval')} needs --valid-data-path"
    if log.wandb_project is not None and case.settings.checkpoint.save is None:
        yield f"{case.said('wandb_project')} needs --save FOLDER for its files"


RULES = (learning_rate, data, checkpoint, logs)
