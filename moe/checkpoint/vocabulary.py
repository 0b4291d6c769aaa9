"""Whether a checkpoint's vocabulary is the one that is to read it; imports no torch.

Rows of vocabulary matrices are padded for tensor ranks to share, so megatron-core lets their number
differ between a save and a load: rows too many are cut off, rows too few become zeros, whether they
are padding or not. So numbers of ids are compared here, and of older checkpoints that do not name
theirs, the rows of the embedding.
"""

from pathlib import Path

from moetron.common.errors import UserError
from moetron.moe.checkpoint.run_folder import Checkpoint, Record
from moetron.moe.config.schema.derived import padded_to
from moetron.moe.config.schema.settings import Settings


def saved_vocabulary(record: Record) -> int | None:
    """Ids before padding; None: an older checkpoint, whose run had them from its tokenizer.

    Even then mock data were drawn from so many ids.
    """
    size: int | None = record.settings.get("model", {}).get("vocab_size")
    return size or record.stream.get("mock", {}).get("vocab_size")


def vocabulary_problem(record: Record, vocab_size: int, rows: int | None = None) -> str | None:
    """Why a model of ``vocab_size`` ids cannot take a checkpoint's weights, or None if it can.

    Args:
        record: the checkpoint's.
        vocab_size: ids before padding.
        rows: of the checkpoint's embedding; None: not looked at.
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
    """``UserError`` unless the checkpoint's vocabulary has ``vocab_size`` ids before padding."""
    problem = vocabulary_problem(checkpoint.record, vocab_size, checkpoint.embedding_rows)
    if problem is not None:
        raise UserError(f"--load {checkpoint.folder}: {problem}")


def vocabulary_of(path: Path, settings: Settings, tokenizer_size: int | None) -> int:
    """Ids of a checkpoint's model before padding, of which a tokenizer uses no other.

    Args:
        path: where the checkpoint lies, for the message.
        settings: the checkpoint's; where they name no size, it is the tokenizer's.
        tokenizer_size: ids of the tokenizer that is to serve it; None: there is none.

    Raises:
        UserError: the tokenizer has ids that the model does not know, or neither says a size.
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
