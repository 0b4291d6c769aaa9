"""Chat templates: the text, and the place of each answer with its end-of-turn token."""

import json
from pathlib import Path

import pytest

from moetron.common.errors import UserError
from moetron.data.chat.templates import (
    JinjaTemplate,
    OlmoeTemplate,
    Template,
    Undecidable,
    read_template,
)

END = "<|endoftext|>"
CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CHAT = [
    {"role": "system", "content": "Be assistant."},
    {"role": "user", "content": " assistant? "},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Yes."},
    {"role": "assistant", "content": "No."},
]


def answers(template: Template) -> list[str]:
    rendered = template.render(CHAT)
    return [rendered.text[answer.start : answer.end] for answer in rendered.answers]


def test_olmoe() -> None:
    template = OlmoeTemplate(END)
    assert template.render(CHAT).text == (
        f"{END}<|system|>\nBe assistant.\n<|user|>\nassistant?\n<|assistant|>\nYes.{END}\n"
        f"<|user|>\nYes.\n<|assistant|>\nNo.{END}"
    )
    assert answers(template) == [f"Yes.{END}", f"No.{END}"]
    assert template.prompt(CHAT[:2]).endswith("<|user|>\nassistant?\n<|assistant|>\n")


def test_its_jinja_form_is_the_same() -> None:
    ours = OlmoeTemplate(END)
    theirs = JinjaTemplate(ours.source(), END)
    assert theirs.render(CHAT) == ours.render(CHAT)
    assert theirs.prompt(CHAT[:2]) == ours.prompt(CHAT[:2])


def test_contents_that_occur_elsewhere_are_not_mistaken() -> None:
    """The contents are also words of headers and of other messages."""
    assert answers(JinjaTemplate(CHATML, "<|im_end|>")) == ["Yes.<|im_end|>", "No.<|im_end|>"]


def test_end_of_turn_other_than_the_eos_token() -> None:
    template = JinjaTemplate(CHATML, END, end_of_turn="<|im_end|>")
    assert answers(template) == ["Yes.<|im_end|>", "No.<|im_end|>"]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (CHATML, "no end-of-turn token"),  # ends turns with another token than the eos
        (CHATML.replace("m['content']", "m['content'] | upper"), "edits"),
        ("{% for m in messages[1:] %}{{ m['content'] + eos_token }}{% endfor %}x", "depends|drops"),
        ("{{ messages[0]['content'] }}{{ raise_exception('odd') }}", "refuses it: odd"),
        (
            "{% for m in messages %}{% if m['content'] == 'No.' %}n{% else %}y{% endif %}"
            "{{ m['content'] + eos_token }}{% endfor %}",
            "edits",
        ),
    ],
)
def test_answers_without_a_sure_place(source: str, words: str) -> None:
    chat = [*CHAT[1:]] if "messages[1:]" not in source else [*CHAT[2:]]
    with pytest.raises(Undecidable, match=words):
        JinjaTemplate(source, END).render(chat)


def test_templates_run_no_code() -> None:
    with pytest.raises(Undecidable, match="refuses"):
        JinjaTemplate("{{ ''.__class__.__mro__[1].__subclasses__() }}", END).render(CHAT)


def test_read(tmp_path: Path) -> None:
    folder, file = tmp_path / "tokenizer", tmp_path / "chat.jinja"
    folder.mkdir()
    file.write_text(CHATML)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML}))
    for source in (file, folder):
        assert answers(read_template(str(source), "<|im_end|>")) == answers(
            JinjaTemplate(CHATML, "<|im_end|>")
        )
    assert read_template("olmoe", END).name == "olmoe"
    for wrong in (tmp_path / "none", tmp_path):
        with pytest.raises(UserError, match="--template"):
            read_template(str(wrong), END)
    file.write_text("{% for %}")
    with pytest.raises(UserError, match="line 1"):
        read_template(str(file), END)
