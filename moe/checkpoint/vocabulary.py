"""Check that a checkpoint's vocabulary matches the model's; imports no torch.

Vocabulary matrices are padded to a multiple of the tensor ranks, so megatron-core lets their rows
differ between a save and a load: surplus rows are dropped, missing rows become zeros, whether they
are padding or not. So the numbers of ids are compared here; for older checkpoints without this
number, the rows of the embedding.
"""

from pathlib import Path

from moetron.common.errors import UserError
from moetron.moe.checkpoint.run_folder import Checkpoint, Record
from moetron.moe.config.schema.derived import padded_to
from moetron.moe.config.schema.settings import Settings


def saved_vocabulary(record: Record) -> int | None:
    """Return the ids before padding; None: an older checkpoint that took them from a tokenizer.

    Older runs on mock data record the number with the stream.
    """
    size: int | None = record.settings.get("model", {}).get("vocab_size")
    return size or record.stream.get("mock", {}).get("vocab_size")


def vocabulary_problem(record: Record, vocab_size: int, rows: int | None = None) -> str | None:
    """Return why a model of ``vocab_size`` ids cannot load a checkpoint's weights, None if it can.

    Args:
        record: the checkpoint's.
        vocab_size: ids before padding.
        rows: of the checkpoint's embedding; None: not checked.
    """
    model, parallel = (record.settings.get(group, {}) for group in ("model", "parallel"))
    multiple = model.get("make_vocab_size_divisible_by", 1)
    multiple *= parallel.get("tensor_model_parallel_size", 1)
    saved, wanted_rows = saved_vocabulary(record), padded_to(multiple, vocab_size)
    if saved == vocab_size or (saved is None and rows in (None, wanted_rows)):
        return None
    source = record.settings.get("data", {}).get("tokenizer_model")
    flags = [f"--tokenizer-model {source}"] if source else []
    flags += [f"--vocab-size {saved}"] if saved else []
    found = f"{rows:,} rows" if saved is None else f"{saved} ({padded_to(multiple, saved):,} rows)"
    return (
        f"--vocab-size {vocab_size}, given or the tokenizer's ({wanted_rows:,} rows of the "
        f"embedding): the checkpoint has {found}; give what its run had: {' and '.join(flags)}"
    )


def require_vocabulary(checkpoint: Checkpoint, vocab_size: int) -> None:
    """Raise UserError unless the checkpoint's vocabulary has ``vocab_size`` ids before padding."""
    problem = vocabulary_problem(checkpoint.record, vocab_size, checkpoint.embedding_rows)
    if problem is not None:
        raise UserError(f"--load {checkpoint.folder}: {problem}")


def vocabulary_of(path: Path, settings: Settings, tokenizer_size: int | None) -> int:
    """Return the ids of a checkpoint's model before padding, after a check of the tokenizer's.

    Args:
        path: the checkpoint, for the message.
        settings: the checkpoint's; without a size, the tokenizer's is used.
        tokenizer_size: ids of the tokenizer to use; None: there is none.

    Raises:
        UserError: the tokenizer has more ids than the model, or neither has a size.
    """
    size = settings.model.vocab_size or tokenizer_size
    if size is None:
        raise UserError("the run names no tokenizer: give --tokenizer-model")
    if tokenizer_size is not None and tokenizer_size > size:
        raise UserError(
            f"--load {path}: its vocabulary has {size} ids and the tokenizer {tokenizer_size}; "
            "give the --tokenizer-model that the run was trained with"
        )
    return size
