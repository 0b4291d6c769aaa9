"""Small valid files of every kind that Moetron reads, from which mutations start.

    python -m tests.fuzz.seeds FOLDER

The folder then holds ``text.jsonl``; the shard ``a``; ``half``, an interrupted preprocessing;
``run``, with a checkpoint, a report and an analysis; ``hf``, its export; ``dense``, a model without
experts; ``bpe`` and ``spm``, tokenizers.
"""

import io
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

from moetron.common import run_owner

TINY = (
    *(
        "--num-layers",
        "1",
        "--hidden-size",
        "32",
        "--num-attention-heads",
        "2",
        "--seq-length",
        "32",
    ),
    *("--vocab-size", "384", "--micro-batch-size", "2"),
    *(
        "--global-batch-size",
        "4",
        "--train-iters",
        "2",
        "--lr-warmup-iters",
        "0",
        "--eval-iters",
        "1",
    ),
    *("--tokenizer-model", "bytes", "--no-mock-data", "--data-path", "a", "--valid-data-path", "a"),
    "--no-tensorboard",
)
"""Flags of a model of 40,000 parameters, after a recipe."""
EXPERTS = ("--num-experts", "4", "--moe-router-topk", "2", "--moe-ffn-hidden-size", "16")
RECIPE, DENSE = "olmoe_1b_7b/tiny", "olmo_1b/tiny"
PREPARE = (
    "prepare",
    "--input",
    "text.jsonl",
    "--tokenizer",
    "bytes",
    "--append-eod",
    "--workers",
    "1",
)


def make(folder: Path) -> None:
    """Write all files into an existing folder."""
    from tests.fuzz.cases import run

    os.chdir(folder)
    _write_text(Path("text.jsonl"))
    _write_tokenizers()
    train = ("train", "--config", RECIPE, *TINY, *EXPERTS, "--save", "run")
    for words in (
        (*PREPARE, "--output-prefix", "a"),
        train,
        (
            "analyze",
            "run",
            "--data",
            "x=a",
            "--tokens-per-class",
            "256",
            "--tokenizer-model",
            "bytes",
        ),
        ("convert", "to-hf", "--load", "run", "--output", "hf"),
        ("train", "--config", DENSE, *TINY, "--ffn-hidden-size", "16", "--save", "dense"),
        ("report", "run"),
    ):
        outcome = run(words)
        if outcome.code:
            raise RuntimeError(f"{' '.join(words)}: {outcome.fault or outcome.message}")
    dead = {**asdict(run_owner.this_process()), "pid": 1 << 22, "token": "x"}
    Path("run", run_owner.FILE).write_text(json.dumps(dead))
    _interrupted()


def _write_text(path: Path) -> None:
    rows = [{"text": f"row {n}: the quick <b>fox</b> jumps {7 * n} times. " * 3} for n in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write_tokenizers() -> None:
    import sentencepiece
    import tokenizers

    texts = Path("text.jsonl").read_text().splitlines()
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["</s>", "<pad>", "<extra_id_0>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    for name in ("bpe", "spm"):
        Path(name).mkdir()
    bpe.save("bpe/tokenizer.json")
    Path("bpe/tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=330,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    Path("spm/umt5.model").write_bytes(model.getvalue())


def _interrupted() -> None:
    """Preprocess up to the moment before the files get their names."""
    from moetron.data.prepare import preprocess
    from tests.fuzz.cases import run

    def stop(job: Any, output: Any) -> None:
        output.mark()
        raise KeyboardInterrupt

    Path("half").mkdir()
    with mock.patch.object(preprocess._Run, "_finish", stop):
        assert run((*PREPARE, "--output-prefix", "half/b")).code == 75


def make_elsewhere(folder: Path) -> None:
    """Write all files in a process of its own: training starts threads, and forks need none."""
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "tests.fuzz.seeds", str(folder)]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2], timeout=280)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
