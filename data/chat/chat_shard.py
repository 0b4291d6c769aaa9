"""Shards of conversations: a token shard, and one of the same documents with the mask of labels.

``PREFIX.bin/.idx`` hold a conversation a document, ``PREFIX.mask.bin/.idx`` a number for each
token: `UNTRAINED`, `WANTED` or `UNWANTED`. Pairs are two documents in a row, the chosen one first.
"""

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from moetron.common.errors import UserError
from moetron.data.shards.manifest import Manifest, TokenizerRecord, write_manifest
from moetron.data.shards.shard import Shard
from moetron.data.shards.shard_writer import ShardWriter
from moetron.tokenizers.interface import Tokenizer

UNTRAINED, WANTED, UNWANTED = range(3)
"""No loss; loss; loss of a rejected or undesirable answer."""
MASK_VALUES = 3
_KEY = "chats"


class ChatShardWriter:
    """Writer of both shards; nothing has its final name before `finish`."""

    def __init__(self, prefix: Path, tokenizer: Tokenizer) -> None:
        self._prefix, self._tokenizer = prefix, tokenizer
        self._tokens = ShardWriter(prefix, tokenizer.vocab_size)
        self._mask = ShardWriter(Path(f"{prefix}.mask"), MASK_VALUES)
        self._text_bytes = 0

    def add(self, ids: np.ndarray, mask: np.ndarray, wanted: bool, text_bytes: int) -> None:
        """Append a conversation: ``ids`` [n], ``mask`` bool [n]."""
        values = mask * (WANTED if wanted else UNWANTED)
        length = np.array([len(ids)])
        self._tokens.add(ids.astype(self._tokens.dtype), length)
        self._mask.add(values.astype(self._mask.dtype), length)
        self._text_bytes += text_bytes

    def finish(self, description: dict[str, Any], counts: dict[str, int]) -> Manifest:
        """Write indices and manifests; return the manifest of the token shard."""
        tokenizer = self._tokenizer
        manifests = []
        for writer, ids in ((self._mask, MASK_VALUES), (self._tokens, tokenizer.vocab_size)):
            files = writer.finish()
            record = TokenizerRecord(
                name=tokenizer.name,
                fingerprint=tokenizer.fingerprint,
                vocab_size=ids,
                eod=tokenizer.eod,
            )
            manifest = Manifest(
                tokenizer=record,
                dtype=writer.dtype.name,
                documents=writer.documents,
                tokens=writer.tokens,
                text_bytes=self._text_bytes,
                max_id=writer.max_id,
                appended_eod=False,
                bin=files[0],
                idx=files[1],
                filters=counts,
                settings={_KEY: description},
            )
            write_manifest(writer.prefix, manifest)
            manifests.append(manifest)
        return manifests[-1]

    def __enter__(self) -> "ChatShardWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for writer in (self._tokens, self._mask):
            writer.close()


class ChatShard:
    """Conversations of one prefix.

    Raises:
        UserError: a shard is missing or damaged, the two do not fit, or it was not made by
            tools/prepare_chats.py with this tokenizer.
    """

    def __init__(self, prefix: str, fingerprint: str) -> None:
        self.prefix = prefix
        self.tokens, self.mask = Shard(prefix), Shard(f"{prefix}.mask")
        manifest = self.tokens.manifest
        if manifest is None or _KEY not in manifest.settings:
            raise UserError(f"{prefix}: not a shard of chats; make one with tools/prepare_chats.py")
        if manifest.tokenizer.fingerprint != fingerprint:
            raise UserError(f"{prefix}: made with another tokenizer than --tokenizer-model")
        if not np.array_equal(self.tokens.document_lengths, self.mask.document_lengths):
            raise UserError(f"{prefix}: its mask is of other conversations; prepare it again")
        self.description: dict[str, Any] = manifest.settings[_KEY]
        self.sha256 = [manifest.bin.sha256]
        if self.mask.manifest is not None:
            self.sha256.append(self.mask.manifest.bin.sha256)

    @property
    def lengths(self) -> Sequence[int]:
        """Return the tokens of each conversation."""
        found: list[int] = self.tokens.document_lengths.tolist()
        return found
