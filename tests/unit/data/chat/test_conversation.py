"""Conversations that grow, rows of prompts, and the template of a run."""

import json
from pathlib import Path
from typing import Any

import pytest

from moetron.common.errors import UserError
from moetron.data.chat.chat_stream import open_chats
from moetron.data.chat.conversation import Conversation
from moetron.data.chat.encode_chat import encode_question, encode_rendered
from moetron.data.chat.prompt_rows import read_prompt_rows
from moetron.data.chat.run_template import run_template, turn_ends
from moetron.data.chat.templates import JinjaTemplate, OlmoeTemplate, Undecidable
from tests.unit.data.chat.chat_cases import TOKENIZER, chat, prepare
from tests.unit.data.chat.test_templates import CHATML

OLMOE = OlmoeTemplate(TOKENIZER.end_text)
END = TOKENIZER.end_text


def _text(ids: list[int]) -> str:
    return "".join(END if number == TOKENIZER.eod else chr(number) for number in ids)


def test_a_question_follows_all_turns_in_the_template() -> None:
    talk = Conversation(OLMOE, TOKENIZER, 1000, system="Be short.")
    talk.ask("One?")
    talk.answered(" 1 ")
    ids = talk.ask("Two?")
    assert _text(ids) == (
        f"{END}<|system|>\nBe short.\n<|user|>\nOne?\n<|assistant|>\n1{END}\n"
        "<|user|>\nTwo?\n<|assistant|>\n"
    )
    talk.restart()
    assert "One?" not in _text(talk.ask("Three?"))


def test_a_question_has_the_tokens_of_training() -> None:
    row = chat("Who?", "I.", "You.")["messages"]
    for template in (OLMOE, JinjaTemplate(CHATML, END, "<|im_end|>")):
        ids, mask = encode_rendered(template.render(row), TOKENIZER)
        question = encode_question(row[:3], template, TOKENIZER)
        assert question == ids[: len(question)].tolist()
        assert not mask[len(question) - 1] and mask[len(question)]  # the answer is next


def test_the_oldest_turns_are_forgotten_first() -> None:
    talk = Conversation(OLMOE, TOKENIZER, 120, system="S")
    for number in range(4):
        ids = talk.ask(f"Question {number}?")
        talk.answered(f"Answer {number}.")
        assert len(ids) <= 120
    text = _text(ids)
    assert "<|system|>\nS" in text and "Question 3?" in text and "Answer 2." in text
    assert "Question 0?" not in text and talk.forgotten == 2


def test_a_question_that_cannot_be_asked_leaves_no_trace() -> None:
    talk = Conversation(OLMOE, TOKENIZER, 100)
    for wrong, words in (("x" * 100, "at most 100"), (f"a{END}b", "spells a special token")):
        with pytest.raises(Undecidable, match=words):
            talk.ask(wrong)
    assert _text(talk.ask("Yes?")) == f"{END}<|user|>\nYes?\n<|assistant|>\n"


def _rows(folder: Path, lines: list[str]) -> Any:
    file = folder / "prompts.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")
    return read_prompt_rows(
        file, TOKENIZER.encode, lambda messages: encode_question(messages, OLMOE, TOKENIZER)
    )


def test_rows_of_text_and_of_messages(tmp_path: Path) -> None:
    messages = chat("Who?", "I.")["messages"][:1]
    found = _rows(tmp_path, ['{"prompt": "ab", "id": 7}', "", json.dumps({"messages": messages})])
    assert [_text(row.ids) for row in found] == ["ab", f"{END}<|user|>\nWho?\n<|assistant|>\n"]
    assert found[0].given["id"] == 7


def test_all_bad_rows_are_named(tmp_path: Path) -> None:
    row = chat("Who?", "I.")["messages"]
    bad = {
        "{": "not JSON",
        "[1]": "either `prompt` or `messages`",
        '{"prompt": "a", "messages": []}': "either `prompt` or `messages`",
        '{"text": "a"}': "either `prompt` or `messages`",
        '{"prompt": 3}': "`prompt` must be text",
        '{"messages": []}': "`messages` must be a list",
        '{"messages": [{"role": "user"}]}': "`messages` must be a list",
        json.dumps({"messages": row}): "an answer already",
        json.dumps({"messages": [{**row[0], "role": "judge"}]}): "role judge",
        json.dumps({"messages": [{**row[0], "content": END}]}): "spells a special token",
    }
    with pytest.raises(UserError) as error:
        _rows(tmp_path, ['{"prompt": "fine"}', *bad])
    lines = str(error.value).split("\n")[1:]
    assert len(lines) == len(bad)
    for line, (number, words) in zip(lines, enumerate(bad.values(), 2), strict=True):
        assert line.startswith(f"  - line {number}: ") and words in line
    with pytest.raises(UserError, match="and 5 more"):
        _rows(tmp_path, ["{"] * 25)
    with pytest.raises(UserError, match="no rows"):
        _rows(tmp_path, [""])
    with pytest.raises(UserError, match=r"--input .*none"):
        read_prompt_rows(tmp_path / "none", TOKENIZER.encode, None)


def test_messages_need_a_template(tmp_path: Path) -> None:
    file = tmp_path / "rows"
    file.write_text(json.dumps({"messages": chat("Who?", "I.")["messages"][:1]}))
    with pytest.raises(UserError, match=r"line 1: .*give --template"):
        read_prompt_rows(file, TOKENIZER.encode, None)


def _state(folder: Path, template: Any = OLMOE) -> dict[str, Any]:
    """Return the identity of a run's samples, as ``run.json`` keeps it."""
    prepare(folder, [chat("Who?", "I.")], template=template)
    stream = open_chats([str(folder / "chats")], 64, TOKENIZER.fingerprint, TOKENIZER.pad, 1)
    state: dict[str, Any] = json.loads(json.dumps(stream.state()))
    return state


def test_a_run_keeps_the_template_of_its_chats(tmp_path: Path) -> None:
    messages = chat("Who?", "I.")["messages"]
    for number, template in enumerate((OLMOE, JinjaTemplate(CHATML, END, "<|im_end|>"))):
        folder = tmp_path / str(number)
        folder.mkdir()
        found = run_template(_state(folder, template), TOKENIZER)
        assert found is not None and found.end_of_turn == template.end_of_turn
        assert found.prompt(messages) == template.prompt(messages)
        assert found.source() == template.source()


def test_the_template_given_comes_first_and_several_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text(CHATML)
    state = _state(tmp_path)
    given = run_template(state, TOKENIZER, str(file), "<|im_end|>")
    assert given is not None and given.source() == CHATML
    [source] = state["sources"]
    other = {**source, "template": {**source["template"], "source": CHATML, "template": "jinja"}}
    with pytest.raises(UserError, match="several templates; give --template"):
        run_template({"sources": [source, other]}, TOKENIZER)
    assert run_template({"sources": [source, source]}, TOKENIZER) is not None
    assert run_template({"sources": [{"name": "pretraining"}]}, TOKENIZER) is None


def test_an_answer_ends_at_its_token_or_at_a_text() -> None:
    assert turn_ends(OLMOE, TOKENIZER).texts == ()
    several = turn_ends(JinjaTemplate(CHATML, END, "<|im_end|>"), TOKENIZER)
    assert several.ids == {TOKENIZER.eod} and several.texts == ("<|im_end|>",)
