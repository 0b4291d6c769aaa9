"""tools/ngram_baseline.py evaluates on the windows that models are evaluated on."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from moetron.data.inspect.ngrams import NgramModels

ROOT = Path(__file__).resolve().parents[4]


def tool(name: str) -> ModuleType:
    return importlib.import_module(f"moetron.commands.{name}")


def test_windows_are_the_validation_streams(make_shard: Callable[..., str], tmp_path: Path) -> None:
    generator = np.random.default_rng(5)
    train = make_shard("train", generator.integers(0, 50, (20, 30)).tolist(), vocab_size=64)
    valid = generator.integers(0, 50, (1, 45)).tolist()
    prefix = make_shard("valid", valid, vocab_size=64)
    output = tmp_path / "figures" / "baseline.json"
    arguments = ["--train-data-path", train, "--valid-data-path", prefix, "--seq-length", "10"]
    assert tool("ngram_baseline").main([*arguments, "--windows", "3", "--output", str(output)]) == 0
    figures = json.loads(output.read_text())
    stream = np.fromfile(f"{train}.bin", np.uint16)
    models = NgramModels([stream], 64)
    ids = np.array(valid[0])
    assert figures["validation_tokens"] == 30
    assert figures["training_tokens"] == 600
    expected = -np.log(models.bigram(ids[:30], ids[1:31])).mean()
    assert figures["bigram_cross_entropy"] == pytest.approx(expected)
    expected = -np.log(models.unigram[ids[1:31]]).mean()
    assert figures["unigram_cross_entropy"] == pytest.approx(expected)
