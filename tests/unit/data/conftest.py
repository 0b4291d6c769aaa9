"""Fixtures that write shards; no deadlines, because machines are shared."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

from moetron.data.shards.manifest import Manifest, TokenizerRecord, write_manifest
from moetron.data.shards.shard_writer import ShardWriter

settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")

EOD = 9
MakeShard = Callable[..., str]


@pytest.fixture
def make_shard(tmp_path: Path) -> MakeShard:
    """Return ``make_shard(name, documents, vocab_size=1000, fingerprint="f" * 64)`` -> prefix."""

    def make(
        name: str,
        documents: Sequence[Sequence[int]],
        vocab_size: int = 1000,
        fingerprint: str = "f" * 64,
    ) -> str:
        prefix = str(tmp_path / name)
        with ShardWriter(prefix, vocab_size) as writer:
            for document in documents:
                writer.add(np.array(document, writer.dtype), np.array([len(document)]))
            bin_record, idx_record = writer.finish()
        tokenizer = TokenizerRecord(
            name="toy", fingerprint=fingerprint, vocab_size=vocab_size, eod=EOD
        )
        manifest = Manifest(
            tokenizer=tokenizer,
            dtype=writer.dtype.name,
            documents=writer.documents,
            tokens=writer.tokens,
            text_bytes=0,
            appended_eod=True,
            bin=bin_record,
            idx=idx_record,
        )
        write_manifest(prefix, manifest)
        return prefix

    return make
