"""Rules on inputs of a real run: data, folders, packages."""

from collections.abc import Iterator
from pathlib import Path

from moetron.common.data_path import prefixes_of
from moetron.common.packages import installed_version
from moetron.moe.config.rules.case import Case
from moetron.moe.config.schema.data import DataSettings
from moetron.moe.config.schema.field import flag_name

_ENDINGS = (".bin", ".idx")
_FIRST_OF_SET = "_00000"
"""Suffix of the prefix of a shard set's first shard."""


def data(case: Case) -> Iterator[str]:
    """Check that shards and their tokenizer exist."""
    source = case.settings.data
    if not source.mock_data and not source.planned_stages():
        yield "no data: give --data-path PREFIX (or WEIGHT PREFIX ...), or --mock-data for a test"
    if not source.mock_data and source.planned_stages() and source.tokenizer_model is None:
        yield "--data-path needs --tokenizer-model: the tokenizer of its shards"
    validation = case.settings.validation
    if not source.mock_data and source.valid_data_path is None:
        if validation.eval_interval is not None:
            yield f"{case.given('eval_interval')} needs --valid-data-path"
        if validation.skip_train:
            yield "--skip-train needs --valid-data-path: what to evaluate"
    if not source.mock_data:
        yield from dict.fromkeys(_missing_shards(source))  # stages share sources
    tokenizer = source.tokenizer_model
    missing = tokenizer not in (None, "bytes") and not Path(str(tokenizer)).exists()
    if missing and not _has_tokenizer(case.settings.checkpoint.load):
        yield (
            f"{case.given('tokenizer_model')}: no such file or folder; give a SentencePiece "
            ".model, a HuggingFace tokenizer.json (or its folder), or bytes; HuggingFace hub names "
            "are not looked up"
        )


def _missing_shards(source: DataSettings) -> Iterator[str]:
    """Yield the problem of each prefix that has no shard."""
    paths = [("data_path", source.data_path), ("valid_data_path", source.valid_data_path)]
    paths += [("stages", stage.data_path) for stage in source.stages or []]
    for name, items in paths:
        for prefix in prefixes_of(source.rooted(items or [])):
            absent = [prefix + end for end in _ENDINGS if not Path(prefix + end).is_file()]
            shard_set = all(Path(prefix + _FIRST_OF_SET + end).is_file() for end in _ENDINGS)
            if absent and not shard_set:
                yield f"{flag_name(name)} {prefix}: {_no_shard(prefix, absent)}"


def _no_shard(prefix: str, absent: list[str]) -> str:
    """Return why a prefix has no shard, with the remedy."""
    path = Path(prefix)
    if path.is_dir():
        return "a folder: give the prefix of a shard in it, such as {}".format(path / "train")
    if path.is_file():
        return "not a token shard: make one with tools/preprocess_corpus.py, and give its prefix"
    if " " in prefix:
        return (
            f"there is no file {' or '.join(absent)}; give each prefix and weight as its own word"
        )
    return f"there is no file {' or '.join(absent)}"


def _has_tokenizer(load: str | None) -> bool:
    """Return whether the run at --load has a copy of its tokenizer (tokenizers/run_copy.py)."""
    if load is None:
        return False
    path = Path(load).resolve()
    run = path.parent if path.name.startswith("step_") else path
    return (run / "tokenizer" / "fingerprint").is_file()


def folders(case: Case) -> Iterator[str]:
    """Check the folders of --save, --load and a reference."""
    wanted = case.settings.checkpoint
    needs_save = {
        "save_interval": wanted.save_interval,
        "keep_last": wanted.keep_last,
        "save_retain_interval": wanted.save_retain_interval,
        "exit_interval": case.settings.training.exit_interval,
        "async_save": wanted.async_save or None,
        "tensorboard_dir": case.settings.logging.tensorboard_dir,
        "wandb_project": case.settings.logging.wandb_project,
    }
    for name, value in needs_save.items():
        if value is not None and wanted.save is None:
            yield f"{case.given(name)} needs --save FOLDER"
    retained, interval = wanted.save_retain_interval, wanted.save_interval
    if retained is not None and interval is not None and retained % interval:
        yield (
            f"{case.given('save_retain_interval')}: must be a multiple of "
            f"{case.given('save_interval')}"
        )
    for name in (*("finetune", "reset_progress", "no_load_optim", "no_load_rng", "load_fallback"),):
        if getattr(wanted, name) and wanted.load is None:
            yield f"{flag_name(name)} needs --load FOLDER"
    # --load equal to --save resumes a run, or starts it the first time.
    if wanted.load not in (None, wanted.save) and not Path(str(wanted.load)).is_dir():
        yield f"{case.given('load')}: there is no such folder"
    reference = case.settings.adaptation.preference_reference_load
    if reference is not None and not Path(reference).is_dir():
        yield f"{case.given('preference_reference_load')}: there is no such folder"
    if wanted.save is not None and Path(wanted.save).exists() and not Path(wanted.save).is_dir():
        yield f"{case.given('save')} is a file: name a folder"


def options(case: Case) -> Iterator[str]:
    """Check files of options."""
    options = case.settings.performance.tp_comm_overlap_cfg
    if options is not None and not Path(options).is_file():
        yield f"{case.given('tp_comm_overlap_cfg')}: no such file"


def packages(case: Case) -> Iterator[str]:
    """Check optional packages."""
    logging = case.settings.logging
    if logging.wandb_project is None:
        for name in ("wandb_entity", "wandb_exp_name"):
            if getattr(logging, name) is not None:
                yield f"{case.given(name)} needs --wandb-project"
    elif installed_version("wandb") is None:
        yield f"{case.given('wandb_project')} needs the package wandb: install moetron[log]"


RULES = (data, folders, options, packages)
