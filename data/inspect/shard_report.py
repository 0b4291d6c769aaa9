"""Text reports on shards and blends."""

import numpy as np

from moetron.common.text import table
from moetron.data.shards.shard import Shard
from moetron.data.stream.addresses import ShuffledAddresses
from moetron.data.stream.blend import Blend

BAR_WIDTH = 40


def shard_summary(shard: Shard) -> str:
    """Return counts, dtype, tokenizer and origin of a shard."""
    documents, tokens = len(shard), len(shard.tokens)
    lines = [
        shard.prefix,
        f"  {documents:,} documents, {tokens:,} tokens ({shard.tokens.dtype}), "
        f"{tokens / max(documents, 1):.1f} tokens a document",
    ]
    if (manifest := shard.manifest) is None:
        return "\n".join([*lines, "  no manifest: tokenizer and origin are unknown"])
    tokenizer = manifest.tokenizer
    lines += [
        f"  tokenizer {tokenizer.name} ({tokenizer.fingerprint[:12]}), "
        f"{tokenizer.vocab_size:,} ids, end of document {tokenizer.eod}"
        f"{' appended' if manifest.appended_eod else ''}",
        f"  {manifest.text_bytes:,} bytes of text, "
        f"{manifest.text_bytes / max(tokens, 1):.2f} bytes a token",
    ]
    lines += [f"  from {_pairs(source)}" for source in manifest.sources]
    return "\n".join([*lines, f"  dropped: {_pairs(manifest.filters)}"])


def length_histogram(lengths: np.ndarray) -> str:
    """Count documents by length in powers of two: int32 [documents] -> one line per power."""
    if lengths.size == 0:
        return "no documents"
    powers = np.bincount(np.ceil(np.log2(np.maximum(lengths, 1))).astype(np.int64))
    lines = []
    for power in range(int(np.flatnonzero(powers)[0]), len(powers)):
        bar = "█" * round(BAR_WIDTH * int(powers[power]) / int(powers.max()))
        lines.append(f"  <= {1 << power:>12,} tokens {int(powers[power]):>12,} {bar}")
    return "\n".join(lines)


def blend_table(blend: Blend, samples: int) -> str:
    """Return a table of each source's samples, tokens and epochs in a run of ``samples``."""
    addresses = ShuffledAddresses(blend, seed=0)
    counts, epochs = addresses.apportionment.counts(samples), addresses.epochs(samples)
    rows = [("source", "tokens", "share", "samples", "tokens drawn", "epochs")]
    for source, count, passes in zip(blend.sources, counts, epochs, strict=True):
        rows.append(
            (
                source.name,
                f"{source.tokens:,}",
                f"{count / max(samples, 1):.2%}",
                f"{count:,}",
                f"{round(count * source.windowing.mean_advance):,}",
                f"{passes:.3f}",
            )
        )
    return table(rows)


def _pairs(mapping: dict) -> str:
    """Return ``key value, key value``."""
    return ", ".join(f"{key} {value}" for key, value in mapping.items())
