"""Export tokenizers to a folder that HuggingFace's ``AutoTokenizer`` reads, with the same ids.

A text gets the ids of its document in a shard, however transformers is called: nothing is added
before or after it, and tokens that are spelled out in it are read as in training.

A SentencePiece model is copied, under a class of transformers that runs SentencePiece itself.
HuggingFace's own ``Unigram`` would not give the same ids: it adds scores in float64, SentencePiece
in float32, so that they split runs of more than 16 spaces differently (170 of 2,779 documents).
"""

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moetron.common.errors import UserError
from moetron.common.packages import installed_version
from moetron.tokenizers.byte_json import byte_definition
from moetron.tokenizers.byte_level import END, PAD, ByteTokenizer
from moetron.tokenizers.huggingface import TRAINING_POST_PROCESSOR, HuggingFaceTokenizer
from moetron.tokenizers.interface import Tokenizer
from moetron.tokenizers.umt5 import SentencePieceTokenizer

SENTENCEPIECE_CLASS = "BertGenerationTokenizer"
"""Class of transformers that adds nothing to SentencePiece's pieces."""
CODE, CODE_CLASS = "tokenization_sentencepiece.py", "MoetronSentencePieceTokenizer"
"""Class that transformers uses instead with trust_remote_code=True."""
FAST_CLASS = "PreTrainedTokenizerFast"
CHAT_TEMPLATE = "chat_template.jinja"
SPELLED = "<s> </s> <pad> <unk> <|endoftext|> <extra_id_0> <0x41> [CLS] <mask>x"
"""Text with the spellings of tokens."""
PROBES = (
    "one two three",
    "Hello, world!  It's 12:34,\tand I'll go\r\n\n   now.   ",
    " def f(x):\n        return x**2  # \u00e4\u00f6\u00fc\n" + "    " * 9,
    "e\u0301 \ufb01 \uff21 \u212b \u6f22\u5b57 \U0001f468\u200d\U0001f469 \u00a0\u2003\x00",
    SPELLED,
    "",
)
"""Texts on which an export is compared with its tokenizer."""
logger = logging.getLogger(__name__)
_Config = dict[str, Any]


def export(tokenizer: Tokenizer, folder: Path) -> None:
    """Write ``tokenizer_config.json`` and ``tokenizer.json`` or ``spiece.model``.

    For a SentencePiece model, two things need trust_remote_code=True: encoding U+2581, which
    SentencePiece uses for a space, as its bytes, and exact decoding.

    Raises:
        UserError: AutoTokenizer has no equivalent of the tokenizer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in export_files(tokenizer).items():
        (folder / name).write_bytes(content)


def export_files(tokenizer: Tokenizer, chat_template: str | None = None) -> dict[str, bytes]:
    """Return the files of `export` by name.

    With a chat template, tokens that are spelled out in a text become their ids, as the template
    needs; else as in training.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        name, content = "spiece.model", tokenizer.serialized
        config = _sentencepiece(tokenizer)
    elif isinstance(tokenizer, HuggingFaceTokenizer):
        definition, config = _huggingface(tokenizer)
        name, content = "tokenizer.json", _json(definition)
    elif isinstance(tokenizer, ByteTokenizer):
        name, content = "tokenizer.json", _json(byte_definition())
        config = {"tokenizer_class": FAST_CLASS, "eos_token": END, "pad_token": PAD}
        config["split_special_tokens"] = True
    else:
        raise UserError(f"tokenizer {tokenizer.name}: AutoTokenizer has no equivalent")
    # As in training, a document follows the end of another. The class's own <s> was never trained,
    # and lm-evaluation-harness would put it before every text.
    config["bos_token"] = config["eos_token"]
    config["clean_up_tokenization_spaces"] = False
    files = {name: content}
    if chat_template is not None:
        config["chat_template"] = chat_template  # read by transformers before 4.50
        config["split_special_tokens"] = False
        files[CHAT_TEMPLATE] = chat_template.encode()
    files["tokenizer_config.json"] = _json(config)
    if "auto_map" in config:
        files[CODE] = Path(__file__).with_name(CODE).read_bytes()
    return files


def exported(
    tokenizer: Tokenizer | None, chat_template: str | None = None
) -> tuple[dict[str, int | None], dict[str, bytes]]:
    """Return the ids of document markers (no begin marker) and the files for AutoTokenizer."""
    eod, pad = (None, None) if tokenizer is None else (tokenizer.eod, tokenizer.pad)
    files = {} if tokenizer is None else export_files(tokenizer, chat_template)
    return {"bos_token_id": None, "eos_token_id": eod, "pad_token_id": pad}, files


def has_transformers() -> bool:
    """Return whether transformers is installed, without importing it."""
    return installed_version("transformers") is not None


def different_texts(
    tokenizer: Tokenizer, folder: Path, texts: Iterable[str], trust: bool = False
) -> list[str]:
    """Return the texts whose ids differ under ``AutoTokenizer``, called with its defaults.

    Args:
        tokenizer: Tokenizer that ``folder`` was exported from.
        folder: An export; a model's ``config.json`` in it can change the class used.
        texts: Texts to compare on.
        trust: Let transformers run the code of the folder (``trust_remote_code``).

    Raises:
        UserError: AutoTokenizer cannot read the folder.
    """
    from transformers import AutoTokenizer  # seconds

    try:
        theirs = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust
        )
    except Exception as error:  # of many types
        raise UserError(f"{folder}: AutoTokenizer cannot read it ({error})") from error
    return [text for text in texts if theirs(text).input_ids != tokenizer.encode(text)]


def why_not(tokenizer: Tokenizer, folder: Path) -> str | None:
    """Return why a folder's tokenizer must not stay there; None if it encodes `PROBES` the same.

    That of a chat model need not encode `SPELLED` so.

    Without transformers, warn and compare nothing.
    """
    if not has_transformers():
        logger.warning("the exported tokenizer was not checked: pip install moetron[hf]")
        return None
    try:
        is_chat = (folder / CHAT_TEMPLATE).is_file()
        probes = [text for text in PROBES if text != SPELLED or not is_chat]
        found = different_texts(tokenizer, folder, probes)
    except UserError as error:
        return str(error)
    if not found:
        return None
    version = installed_version("transformers")
    return (
        f"transformers {version} encodes {found[0]!r} differently beside this model's "
        "config.json; write the tokenizer to a folder of its own with tools/export_tokenizer.py"
    )


def _sentencepiece(tokenizer: SentencePieceTokenizer) -> _Config:
    """Return the configuration; control pieces in a text are letters, as in SentencePiece."""
    return {
        "tokenizer_class": SENTENCEPIECE_CLASS,
        "eos_token": tokenizer.piece(tokenizer.eod),
        "sep_token": tokenizer.piece(tokenizer.eod),
        "pad_token": tokenizer.piece(tokenizer.pad),
        "unk_token": tokenizer.piece(tokenizer.unknown),
        "split_special_tokens": True,
        # Also keeps transformers 5 from choosing the class that it has for the folder's model.
        "auto_map": {"AutoTokenizer": [f"{Path(CODE).stem}.{CODE_CLASS}", None]},
    }


def _huggingface(tokenizer: HuggingFaceTokenizer) -> tuple[_Config, _Config]:
    """Return ``tokenizer.json`` and configuration, without tokens added around a text."""
    definition = json.loads(tokenizer.definition)
    config: _Config = {
        "tokenizer_class": FAST_CLASS,
        "eos_token": tokenizer.piece(tokenizer.eod),
        "pad_token": tokenizer.piece(tokenizer.pad),
    }
    before = definition.get("post_processor")
    definition["post_processor"] = _without_templates(before)
    if definition["post_processor"] != before:
        config[TRAINING_POST_PROCESSOR] = json.dumps(before)
    if not any(token["special"] for token in definition.get("added_tokens") or ()):
        # transformers treats the tokens named to it as special; here they are plain text.
        config["split_special_tokens"] = True
    if (definition.get("pre_tokenizer") or {}).get("add_prefix_space"):
        config["add_prefix_space"] = True  # transformers 4 would disable it
    return definition, config


def _without_templates(processor: _Config | None) -> _Config | None:
    """Keep the parts of a post-processor that only move offsets; templates add special tokens."""
    if processor is None or processor["type"] == "ByteLevel":
        return processor
    if processor["type"] != "Sequence":
        return None
    kept = [part for part in map(_without_templates, processor["processors"]) if part is not None]
    return {**processor, "processors": kept} if kept else None


def _json(tree: _Config) -> bytes:
    return (json.dumps(tree, indent=2, ensure_ascii=False) + "\n").encode()
