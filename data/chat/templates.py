"""Chat templates: one text of a conversation, and the places of its answers in it."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Protocol

from moetron.common.errors import UserError
from moetron.common.json_files import read_object
from moetron.common.packages import installed_version

Message = Mapping[str, Any]
"""``role`` and ``content``, both text."""

_GENERATION = re.compile(r"{%-?\s*(end)?generation\s*-?%}")
"""Tags of transformers that mark answers; most templates lack them, so they are not relied on."""
_MARK = re.compile("\ue000([0-9]+)\ue001")
"""Stand-in of a message's content, in private-use characters."""


class Undecidable(Exception):
    """The places of the answers cannot be told; the text says why, without the content."""


@dataclass(frozen=True)
class Answer:
    """Place of an assistant's turn in the text, in characters."""

    start: int
    """First character of the content."""
    end: int
    """After the end-of-turn token."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as one text."""

    text: str
    answers: list[Answer]


class Template(Protocol):
    """Form of conversations."""

    name: str
    end_of_turn: str
    """Spelling of the token that ends an answer."""

    def render(self, messages: Sequence[Message]) -> Rendered:
        """Return the text of a conversation; `Undecidable` if an answer has no sure place."""
        ...

    def prompt(self, messages: Sequence[Message]) -> str:
        """Return the text up to where the assistant's next answer begins."""
        ...

    def source(self) -> str:
        """Return the template in Jinja, for exported tokenizers."""
        ...


class OlmoeTemplate:
    """OLMoE's (Tulu's): role markers of ordinary text, the end-of-document token around.

    <|endoftext|><|user|>\\nQuestion\\n<|assistant|>\\nAnswer<|endoftext|>\\n<|user|>\\n ...
    """

    name = "olmoe"

    def __init__(self, end: str) -> None:
        """Take the spelling of the tokenizer's end-of-document token."""
        self._end = self.end_of_turn = end

    def render(self, messages: Sequence[Message]) -> Rendered:
        """Return the text; contents are stripped, as is the last newline."""
        text, answers = self._end, []
        for message in messages:
            role, content = message["role"], message["content"].strip()
            if role not in ("system", "user", "assistant"):
                raise Undecidable(f"role {role}")
            text += f"<|{role}|>\n"
            start = len(text)
            text += content
            if role == "assistant":
                text += self._end
                answers.append(Answer(start, len(text)))
            text += "\n"
        return Rendered(text.removesuffix("\n"), answers)

    def prompt(self, messages: Sequence[Message]) -> str:
        """Return the text with the header of the next answer."""
        text = self.render(messages).text
        return f"{text}\n<|assistant|>\n"

    def source(self) -> str:
        """Return the same in Jinja; ``eos_token`` is the tokenizer's."""
        return (
            "{{ eos_token }}{% for message in messages %}"
            "{{ '<|' + message['role'] + '|>\\n' + (message['content'] | trim) }}"
            "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
            "{% if not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}{{ '\\n<|assistant|>\\n' }}{% endif %}"
        )


class JinjaTemplate:
    """A HuggingFace chat template.

    Contents are found by rendering the conversation twice: with its contents, and with a mark in
    place of each. What surrounds the marks must occur in the first text, in order, with the
    contents (or their stripped forms) between. A template that edits contents is `Undecidable`.
    """

    name = "jinja"

    def __init__(self, source: str, end: str, end_of_turn: str | None = None) -> None:
        """Compile the template; ``end_of_turn`` ends an answer, unset: ``end``, the eos token."""
        if installed_version("jinja2") is None:
            raise UserError("chat templates need the package jinja2: pip install jinja2")
        from jinja2 import TemplateSyntaxError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
        environment.globals["raise_exception"] = _refuse
        self._source, self._end, self.end_of_turn = source, end, end_of_turn or end
        try:
            self._template = environment.from_string(_GENERATION.sub("", source))
        except TemplateSyntaxError as error:
            raise UserError(f"chat template, line {error.lineno}: {error.message}") from None

    def render(self, messages: Sequence[Message]) -> Rendered:
        """Return the text and the places of the answers."""
        text = self._text(messages)
        marked = [{**m, "content": f"\ue000{n}\ue001"} for n, m in enumerate(messages)]
        parts = _MARK.split(self._text(marked))  # literal, number, literal, number, ..., literal
        literals, numbers = parts[::2], [int(number) for number in parts[1::2]]
        if not text.startswith(literals[0]):
            raise Undecidable("the template depends on the contents")
        place, answers = len(literals[0]), []
        for number, after in zip(numbers, literals[1:], strict=True):
            content, role = messages[number]["content"], messages[number]["role"]
            end = place + len(_as_rendered(text, place, content, after))
            if role == "assistant":
                answers.append(Answer(place, end + self._turn_end(after)))
            place = end + len(after)
        expected = sum(message["role"] == "assistant" for message in messages)
        if place != len(text) or len(answers) != expected:
            raise Undecidable("the template drops or repeats messages")
        return Rendered(text, answers)

    def _turn_end(self, after: str) -> int:
        """Return the length of what follows an answer up to the end of its end-of-turn token."""
        before, found, _ = after.partition(self.end_of_turn)
        if not found or before.strip():
            raise Undecidable(f"no end-of-turn token {self.end_of_turn} after an answer")
        return len(before) + len(found)

    def prompt(self, messages: Sequence[Message]) -> str:
        """Return the text with the template's generation prompt."""
        return self._text(messages, add_generation_prompt=True)

    def source(self) -> str:
        """Return the template."""
        return self._source

    def _text(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        from jinja2 import TemplateError

        try:
            return self._template.render(
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                bos_token=self._end,
                eos_token=self._end,
                tools=None,
            )
        except TemplateError as error:
            raise Undecidable(f"the template refuses it: {error}") from None


def _refuse(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _as_rendered(text: str, place: int, content: str, after: str) -> str:
    """Return the form in which ``content`` stands at ``place``, before ``after``."""
    for form in (content, content.strip(), content.lstrip(), content.rstrip()):
        if text.startswith(form + after, place):
            return form
    raise Undecidable("the template edits a content")


def read_template(source: str, end: str, end_of_turn: str | None = None) -> Template:
    """Return the template named by ``source``: olmoe, a Jinja file, or a tokenizer's folder.

    Raises:
        UserError: there is no template.
    """
    if source == "olmoe":
        return OlmoeTemplate(end)
    path = Path(source)
    if path.is_dir():
        jinja, config = path / "chat_template.jinja", path / "tokenizer_config.json"
        text = read_object(config).get("chat_template") if config.is_file() else None
        if jinja.is_file():
            text = jinja.read_text(encoding="utf-8")
        if not isinstance(text, str):
            raise UserError(f"--template {source}: the folder has no single chat_template")
        return JinjaTemplate(text, end, end_of_turn)
    if not path.is_file():
        raise UserError(f"--template {source}: give olmoe, a Jinja file or a tokenizer's folder")
    return JinjaTemplate(path.read_text(encoding="utf-8"), end, end_of_turn)
