"""Template of a run that was fine-tuned on chats, from its checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moetron.common.errors import UserError
from moetron.data.chat.templates import JinjaTemplate, OlmoeTemplate, Template, read_template
from moetron.tokenizers.decoded_text import Ends, ends_of
from moetron.tokenizers.interface import Tokenizer

TEMPLATE = "template"
"""Key in a source of a checkpoint's stream."""


def template_record(description: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ``run.json`` keeps of the description of a shard of chats."""
    return {key: description.get(key) for key in ("template", "source", "end_of_turn")}


def run_template(
    stream: Mapping[str, Any],
    tokenizer: Tokenizer,
    given: str | None = None,
    end_of_turn: str | None = None,
) -> Template | None:
    """Return the template given, else that of a run's chats, else that of its tokenizer.

    Args:
        stream: identity of the run's samples, from ``run.json``.
        tokenizer: the run's.
        given: value of ``--template``.
        end_of_turn: value of ``--end-of-turn``.

    Raises:
        UserError: the template given cannot be used, or the run's chats had several.
    """
    end = tokenizer.end_text
    if given is not None:
        return read_template(given, end, end_of_turn)
    found = [source[TEMPLATE] for source in stream.get("sources", []) if source.get(TEMPLATE)]
    if any(each != found[0] for each in found):
        raise UserError("the run was fine-tuned on chats of several templates; give --template")
    if found:
        [record, *_] = found
        if record["template"] == OlmoeTemplate.name:
            return OlmoeTemplate(end)
        return JinjaTemplate(record["source"], end, record["end_of_turn"])
    folder = _folder_with_template(tokenizer)
    return None if folder is None else read_template(str(folder), end)


def _folder_with_template(tokenizer: Tokenizer) -> Path | None:
    """Return the folder of a HuggingFace tokenizer with a chat template."""
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        path = tokenizer.files.get(name)
        if path is not None and "chat_template" in name + path.read_text(encoding="utf-8"):
            return path.parent
    return None


def turn_ends(template: Template, tokenizer: Tokenizer) -> Ends:
    """Return what ends an answer: the end of its turn, or of the document."""
    return ends_of([template.end_of_turn], tokenizer)
