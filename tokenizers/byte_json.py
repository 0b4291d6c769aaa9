"""The byte tokenizer as a ``tokenizer.json``: byte-level BPE without merges."""

import json
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers

from moetron.tokenizers.byte_level import END, PAD, ByteTokenizer


def byte_definition() -> dict[str, Any]:
    """Return the content of the file.

    All tokens other than the bytes are special: with ``split_special_tokens`` a text that spells
    one of them is encoded as its bytes, as `ByteTokenizer` does.
    """
    markers = {END: ByteTokenizer.eod, PAD: ByteTokenizer.pad}
    sentinels = {f"<extra_id_{i}>": number for i, number in enumerate(ByteTokenizer.sentinels)}
    special = sorted((number, name) for name, number in {**markers, **sentinels}.items())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": name, **flags, "special": True} for number, name in special
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {**_characters(), **{name: number for number, name in special}},
            "merges": [],
        },
    }


def holds_bytes(path: Path) -> bool:
    """Return whether a ``tokenizer.json`` is an export of the byte tokenizer."""
    if path.stat().st_size > 1 << 17:  # the export has 30 kB; do not parse large vocabularies twice
        return False
    try:
        return bool(json.loads(path.read_text(encoding="utf-8")) == byte_definition())
    except ValueError:
        return False


def _characters() -> dict[str, int]:
    """Return the character of each byte in byte-level BPE (GPT-2's table)."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    table = {byte: chr(byte) for byte in visible}
    table.update({byte: chr(0x100 + i) for i, byte in enumerate(others)})
    assert set(table.values()) == set(pre_tokenizers.ByteLevel.alphabet())
    return {table[byte]: byte for byte in range(256)}
