"""tools/generate.py and the API with an encoder-decoder."""

import json
import sys
from pathlib import Path

import pytest

from moetron import api
from moetron.assembly import train
from moetron.commands import generate
from moetron.common.errors import UserError
from tests.unit.data.chat.chat_cases import TOKENIZER, prepare
from tests.unit.encoder_decoder.stack_cases import stack_settings

ROWS = [{"inputs": letter * 3, "targets": letter.upper()} for letter in "abcd"]
PROMPTS = ["aaa", "ccc", "a longer prompt"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run that has learnt ROWS."""
    folder = tmp_path_factory.mktemp("run")
    prepare(folder, ROWS, "text_to_text")
    settings = stack_settings(
        {"vocab_size": TOKENIZER.vocab_size, "init_method_std": 0.1},
        {"num_experts": 2, "moe_layer_freq": [0, 1, 0, 1, 1], "moe_expert_capacity_factor": 2.0},
        training={"train_iters": 25, "micro_batch_size": 1, "global_batch_size": 2},
        learning_rate={"lr": 1e-2},
        adaptation={"sft": True},
        logging={"tensorboard": False, "peak_tflops_per_s": 1.0},
        checkpoint={"save": str(folder / "run")},
        data={
            "mock_data": False,
            "data_path": [str(folder / "chats")],
            "tokenizer_model": "bytes",
        },
    )
    assert train(settings, TOKENIZER, TOKENIZER.vocab_size) == 0
    return folder / "run"


def _main(monkeypatch: pytest.MonkeyPatch, run: Path, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["generate", "--load", str(run), *arguments])
    assert generate.main() == 0


def test_prompts_are_answered(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One by one, in a batch, from rows, and by the API: the answers alone, without the prompts."""
    greedy = ("--temperature", "0", "--max-new-tokens", "5")
    _main(monkeypatch, run, *greedy, *(x for each in PROMPTS for x in ("--prompt", each)))
    together = capsys.readouterr().out.splitlines()
    assert together[:2] == ["A", "C"]
    _main(monkeypatch, run, *greedy, "--prompt", PROMPTS[1])
    assert capsys.readouterr().out == "C\n"
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": each}) + "\n" for each in PROMPTS))
    _main(monkeypatch, run, *greedy, "--input", str(rows))
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["text"] for row in found] == together
    assert found[0]["prompt_tokens"] == 4, "with the end"
    assert found[0]["finish_reason"] == "eos"
    with api.load_run(run) as opened:
        assert api.generate(opened, PROMPTS, temperature=0, max_new_tokens=5) == together


def test_what_needs_a_decoder_alone_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, words in (
        (("--chat",), "has no chats"),
        (("--mode", "nlu", "--prompt", "a <extra_id_0>"), "has no modes"),
    ):
        with pytest.raises(UserError, match=words):
            _main(monkeypatch, run, *arguments)
    with api.load_run(run) as opened, pytest.raises(UserError, match="decoders only"):
        api.analyze_routing(opened, {"text": "shard"})
