"""Runs fine-tuned on chats: tools/generate.py, and the export in transformers, on two templates."""

import io
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from moetron import api
from moetron.commands import convert_checkpoint, generate
from moetron.common.errors import UserError
from moetron.data.chat.encode_chat import encode_question, encode_rendered
from moetron.data.chat.templates import JinjaTemplate, OlmoeTemplate, Template
from moetron.data.chat.write_chats import ChatOptions, write_chats
from moetron.tokenizers.interface import Tokenizer
from moetron.tokenizers.load import load_tokenizer
from tests.unit.data.chat.test_templates import CHATML
from tests.unit.tokenizers.kinds import END, byte_level

QUESTIONS = ("Is it so?", "Who  knows?", "Why not me?", "Really?")
ANSWER = "It is so."
CHAT = [
    {"role": "user", "content": QUESTIONS[0]},
    {"role": "assistant", "content": ANSWER},
    {"role": "user", "content": QUESTIONS[1]},
]


@dataclass(frozen=True)
class Tuned:
    """A run that answers with `ANSWER`."""

    folder: Path
    tokenizer: Tokenizer
    template: Template


def _tokenizer(name: str, folder: Path) -> Tokenizer:
    if name == "olmoe":
        return load_tokenizer("bytes")
    folder.mkdir()
    corpus = [" ".join([*QUESTIONS, ANSWER]) * 9]
    made = byte_level(corpus, [END, "<|im_start|>", "<|im_end|>"])
    made.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


@pytest.fixture(scope="module", params=["olmoe", "chatml"])
def tuned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    work = tmp_path_factory.mktemp(request.param)
    tokenizer = _tokenizer(request.param, work / "tok")
    template: Template = OlmoeTemplate(tokenizer.end_text)
    if request.param == "chatml":
        template = JinjaTemplate(CHATML, tokenizer.end_text, "<|im_end|>")
    answer = {"role": "assistant", "content": ANSWER}
    rows: list[Any] = [
        {"messages": [{"role": "user", "content": question}, answer]} for question in QUESTIONS
    ]
    rows += [{"messages": [*CHAT, answer]}]
    options = ChatOptions("chats", "correct", 128)
    write_chats(iter(rows), template, tokenizer, options, work / "chats")
    settings = api.load_settings(
        "olmoe_1b_7b/tiny",
        **{"sft": True, "mock_data": False, "data_path": [str(work / "chats")]},
        **{"tokenizer_model": "bytes" if request.param == "olmoe" else str(work / "tok")},
        **{"vocab_size": None, "seq_length": 128, "train_iters": 60, "lr_warmup_iters": 5},
        **{"lr": 1e-2, "min_lr": 0.0, "micro_batch_size": 2, "global_batch_size": 2},
        **{"eval_iters": 0, "save": work / "run", "tensorboard": False, "cpu_threads": 1},
        **{"moe_aux_loss_coeff": 0.0, "moe_z_loss_coeff": None, "max_epochs": None},
    )
    rows = api.train(settings)
    assert rows[-1]["lm_loss"] < 0.1
    return Tuned(work / "run", tokenizer, template)


Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process; return what it printed."""

    def call(main: Callable[[], int], *arguments: object, questions: str = "") -> str:
        monkeypatch.setattr(sys, "argv", ["tool", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(questions))
        assert main() == 0
        return capsys.readouterr().out

    return call


def test_chat_answers_in_the_template_and_stops(tuned: Tuned, run: Run) -> None:
    chat = ("--load", tuned.folder, "--chat", "--temperature", 0, "--max-new-tokens", 40)
    lines = f"{QUESTIONS[0]}\n\n{QUESTIONS[1]}\n/reset\n{QUESTIONS[2]}\n"
    talk = [f"> {QUESTIONS[0]}", ANSWER, f"> {QUESTIONS[1]}", ANSWER]
    assert run(generate.main, *chat, questions=lines).splitlines() == [
        *talk,
        "> /reset",
        f"> {QUESTIONS[2]}",
        ANSWER,
    ]
    given = (word for question in QUESTIONS[:2] for word in ("--prompt", question))
    assert run(generate.main, *chat, *given).splitlines() == talk
    stopped = run(generate.main, *chat, "--prompt", QUESTIONS[0], "--stop", "s s")
    assert stopped == f"> {QUESTIONS[0]}\nIt i\n"


def test_rows_in_and_out(tuned: Tuned, run: Run, tmp_path: Path) -> None:
    given, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [
        {"messages": CHAT, "id": "a"},
        {"messages": CHAT[:1]},
        {"prompt": tuned.template.prompt(CHAT)[:-1]},
    ]
    given.write_text("\n".join(map(json.dumps, rows)))
    base = ("--load", tuned.folder, "--input", given, "--temperature", 0, "--max-new-tokens", 30)
    run(generate.main, *base, "--output", out, "--num-samples", 2)
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["row"], row["sample"]) for row in found] == [
        (n, s) for n in range(3) for s in (0, 1)
    ]
    assert [row.get("id") for row in found] == ["a", "a", None, None, None, None]
    for row in found[:4]:
        assert (row["text"], row["finish_reason"]) == (ANSWER, "eos")
        assert row["tokens"] == len(tuned.tokenizer.encode(ANSWER)) + 1
        assert -0.5 < row["log_probability"] < 0
    lengths = [len(encode_question(CHAT[:n], tuned.template, tuned.tokenizer)) for n in (3, 1)]
    assert [found[0]["prompt_tokens"], found[2]["prompt_tokens"]] == lengths
    alone = run(generate.main, *base, "--batch-size", 1, "--stop", "is")
    cut = [json.loads(line) for line in alone.splitlines()]
    assert [row["finish_reason"] for row in cut[:2]] == ["stop", "stop"]
    assert [row["text"] for row in cut[:2]] == ["It ", "It "]
    short = run(generate.main, *base[:4], "--max-new-tokens", 2)
    assert {json.loads(line)["finish_reason"] for line in short.splitlines()} == {"length"}


def test_samples_have_seeds_of_their_own(tuned: Tuned, run: Run, tmp_path: Path) -> None:
    """Sample n is what seed S + n gives, whatever else is in the batch."""
    base = ("--load", tuned.folder, "--temperature", 9.0, "--top-p", 1, "--max-new-tokens", 8)
    given = tmp_path / "in.jsonl"
    given.write_text('{"prompt": "It"}\n{"prompt": "Who knows"}\n')
    rows = run(generate.main, *base, "--input", given, "--num-samples", 3, "--seed", 4)
    texts = [json.loads(line)["text"] for line in rows.splitlines()]
    assert len(set(texts)) > 3
    printed = run(generate.main, *base, "--prompt", "Who knows", "--seed", 5)
    assert printed == f"Who knows{texts[4]}\n"


def test_mistakes_are_named_at_once(tuned: Tuned, run: Run, tmp_path: Path) -> None:
    given = tmp_path / "in.jsonl"
    given.write_text('{"prompt": 1}\n{"prompt": "a"}\n[]\n')
    with pytest.raises(UserError, match=r"(?s)line 1.*line 3"):
        run(generate.main, "--load", tuned.folder, "--input", given)
    wrong = {
        (
            "--batch-size",
            0,
            "--num-samples",
            0,
            "--stop",
            "",
        ): r"(?s)--num-samples 0.*--batch-size 0.*--stop",
        ("--chat", "--input", given): "--chat: one conversation",
        ("--input", given, "--prompt", "a"): "--input: give no --prompt",
        ("--output", tmp_path / "no" / "file"): "(?s)--output: is for --input.*no folder",
        ("--template", "olmoe", "--system", "s"): "(?s)--system: is for.*--template: is for",
        ("--end-of-turn", "x"): "--end-of-turn: needs --template",
    }
    for arguments, words in wrong.items():
        with pytest.raises(UserError, match=words):
            run(generate.main, "--load", tuned.folder, *arguments)


def test_the_export_has_the_template_and_the_answers(
    tuned: Tuned, run: Run, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "hf"
    run(
        convert_checkpoint.main,
        "to-hf",
        "--load",
        tuned.folder,
        "--output",
        folder,
        "--dtype",
        "float32",
    )
    theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert theirs.chat_template == tuned.template.source()
    for messages in (CHAT[:1], CHAT):
        question = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert question == encode_question(messages, tuned.template, tuned.tokenizer)
    whole = theirs.apply_chat_template(CHAT[:2])["input_ids"]
    assert whole == encode_rendered(tuned.template.render(CHAT[:2]), tuned.tokenizer)[0].tolist()

    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    turn_end = tuned.tokenizer.id_of(tuned.template.end_of_turn)
    eod = tuned.tokenizer.eod
    assert ends == (eod if turn_end in (None, eod) else [turn_end, eod])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for number, messages in enumerate((CHAT[:1], CHAT)):
        given = theirs.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**given, do_sample=False, max_new_tokens=40)
        answer = theirs.decode(out[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
        asked = [m["content"] for m in messages if m["role"] == "user"]
        chat = ("--load", tuned.folder, "--chat", "--temperature", 0, "--max-new-tokens", 40)
        flags = (word for question in asked for word in ("--prompt", question))
        assert run(generate.main, *chat, *flags).splitlines()[2 * number + 1] == answer == ANSWER
