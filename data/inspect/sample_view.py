"""Render samples as text with colours, and document lengths as a PNG."""

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from moetron.common.errors import UserError
from moetron.common.files import atomic_file
from moetron.data.shards.shard import Shard
from moetron.data.stream.stages import StagedStream
from moetron.tokenizers.interface import Tokenizer
from moetron.tokenizers.load import load_tokenizer

PREVIEW_CHARACTERS = 400

GIVEN, LOSS, MARKER, RESET = "\x1b[2m", "\x1b[32m", "\x1b[33m", "\x1b[0m"
LEGEND = {
    True: f"{GIVEN}without loss{RESET} {LOSS}with loss{RESET} {MARKER}<marker>{RESET}",
    False: "without loss \u00abwith loss\u00bb <marker>",
}


def stage_samples(
    stream: StagedStream, tokenizer: Tokenizer, samples: int, count: int, colour: bool = False
) -> str:
    """Return the first ``count`` samples of each stage in a run of ``samples`` samples."""
    blocks = [LEGEND[colour]]
    for stage, start in enumerate(stream.starts, 1):
        for n in range(start, min(start + count, samples)):
            sample = stream[n]
            source = stream.source_names[sample["source"]]
            objective = stream.objective_names[sample["objective"]]
            head = f"stage {stage}, sample {n}: {source}, {objective}"
            tokens = f"loss on {int(sample['loss_mask'].sum()):,} tokens"
            repeats = " (masked: repetitive)" if sample["filtered"] else ""
            text = sample_text(sample, tokenizer, colour)
            blocks.append(f"{head}, {tokens}{repeats}\n{text}")
    return "\n\n".join(blocks)


def sample_text(sample: Mapping[str, Any], tokenizer: Tokenizer, colour: bool) -> str:
    """Decode a sample and mark the tokens with loss.

    Args:
        sample: Sample of a stream: tokens and labels [S], loss_mask [S].
        tokenizer: Tokenizer of its source.
        colour: Use terminal colours; otherwise guillemets around tokens with loss.
    """
    row = [int(sample["tokens"][0]), *sample["labels"].tolist()]
    has_loss = [False, *(sample["loss_mask"] > 0).tolist()]  # the first is never predicted
    markers = {tokenizer.eod: "<eod>", tokenizer.pad: "<pad>"} | {
        number: f"<extra_id_{i}>" for i, number in enumerate(tokenizer.sentinels)
    }
    kinds = zip(has_loss, (markers.get(token) for token in row), row, strict=True)
    parts = []
    for (counted, marker), same in groupby(kinds, key=lambda kind: kind[:2]):
        ids = [token for _, _, token in same]
        text = tokenizer.decode(ids) if marker is None else marker * len(ids)
        if colour:
            parts.append(f"{MARKER if marker else LOSS if counted else GIVEN}{text}{RESET}")
        else:
            parts.append(f"\u00ab{text}\u00bb" if counted else text)
    return "".join(parts).replace("\u00bb\u00ab", "")


def documents(shard: Shard, tokenizer_path: str, count: int) -> str:
    """Return the starts of ``count`` documents, evenly spread over a shard.

    Raises UserError if the shard was made with another tokenizer.
    """
    tokenizer = load_tokenizer(tokenizer_path)
    if shard.manifest and shard.manifest.tokenizer.fingerprint != tokenizer.fingerprint:
        raise UserError(f"{shard.prefix}: not made with the tokenizer {tokenizer_path}")
    lines = []
    for number in range(0, len(shard), max(1, len(shard) // max(count, 1)))[:count]:
        ids = shard.document(number)
        text = tokenizer.decode(ids[:PREVIEW_CHARACTERS].tolist())[:PREVIEW_CHARACTERS]
        lines.append(f"  document {number}, {len(ids)} tokens: {text!r}")
    return "\n".join(lines)


def draw_lengths(lengths: Mapping[str, np.ndarray], path: Path) -> None:
    """Write a PNG with a histogram of document lengths per shard, on logarithmic scales.

    Args:
        lengths: Tokens of each document, integers [documents], by shard.
        path: Output file.
    """
    from matplotlib.figure import Figure  # half a second of imports

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    longest = max((int(values.max(initial=1)) for values in lengths.values()), default=1)
    bins = 2.0 ** np.arange(0, np.ceil(np.log2(longest)) + 1.5, 0.5)
    for name, values in lengths.items():
        axes.hist(np.maximum(values, 1), bins=bins.tolist(), histtype="step", label=name)
    axes.set(yscale="log", xlabel="tokens of a document", ylabel="documents")
    axes.set_xscale("log", base=2)
    axes.legend()
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=150)
