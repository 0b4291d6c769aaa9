"""HuggingFace tokenizers: ``tokenizer.json`` files read with the ``tokenizers`` library."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from moetron.common.errors import UserError
from moetron.common.json_files import parse_object, read_object
from moetron.tokenizers.interface import Tokenizer, fingerprint_of, require_encodable

END_TOKENS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>")
PAD_TOKENS = ("<pad>", "<|padding|>", "[PAD]", "<|pad|>")
BESIDE = ("tokenizer_config.json", "chat_template.jinja")
"""Files that belong to a ``tokenizer.json``."""
TRAINING_POST_PROCESSOR = "training_post_processor"
"""Key of ``tokenizer_config.json`` for the post-processor, as JSON text, that an export removes
from ``tokenizer.json``: the fingerprint depends on it, the ids do not."""


class HuggingFaceTokenizer(Tokenizer):
    """A ``tokenizer.json``; ``tokenizer_config.json`` beside it may name the end and pad tokens.

    Special tokens spelled out in a text become their ids, as in HuggingFace's own use.
    """

    kind = "huggingface"
    definition: str
    """The ``tokenizer.json`` without truncation and padding, which determines the ids."""

    def __init__(self, path: Path) -> None:
        described = read_object(path)
        try:
            model = tokenizers.Tokenizer.from_buffer(path.read_bytes())
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # bare Exception, and Rust's PanicException, which is none
            raise UserError(f"tokenizer {path}: not a tokenizer.json ({error})") from None
        model.no_truncation()
        model.no_padding()
        config_path, template = (path.with_name(name) for name in BESIDE)
        config = read_object(config_path) if config_path.is_file() else {}
        eod = _special(model, config, "eos_token", END_TOKENS)
        if eod is None:
            raise UserError(
                f"tokenizer {path}: no end-of-document token ({', '.join(END_TOKENS)}); "
                'put {"eos_token": "..."} into tokenizer_config.json beside it'
            )
        pad = _special(model, config, "pad_token", PAD_TOKENS)
        described.update(truncation=None, padding=None)
        self._model = model
        self.definition = json.dumps(described, ensure_ascii=False)
        self.files = {"tokenizer.json": path}
        self.files |= {p.name: p for p in (config_path, template) if p.is_file()}
        self.name = path.parent.name if path.name == "tokenizer.json" else path.name
        self.vocab_size = max(model.get_vocab(with_added_tokens=True).values()) + 1
        self.eod = eod
        self.pad = eod if pad is None else pad
        self.sentinels = tuple(_sentinels(model))
        self.end_text = str(model.id_to_token(eod))
        added = model.get_added_tokens_decoder().values()
        self.special_texts = tuple(token.content for token in added if token.special)
        described["eod"] = eod
        if TRAINING_POST_PROCESSOR in config:
            described["post_processor"] = parse_object(
                str(config[TRAINING_POST_PROCESSOR]), f"{config_path}: {TRAINING_POST_PROCESSOR}"
            )
        canonical = json.dumps(described, sort_keys=True, separators=(",", ":"))
        self.fingerprint = fingerprint_of(self.kind, canonical.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, on RAYON_NUM_THREADS threads (TOKENIZERS_PARALLELISM)."""
        require_encodable(texts)
        batch = self._model.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in batch]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[int], list[int]]:
        """Return ids, first characters and ends; a token's leading space may be left out."""
        require_encodable([text])
        encoding = self._model.encode(text, add_special_tokens=False)
        starts, ends = zip(*encoding.offsets, strict=True) if encoding.ids else ((), ())
        return encoding.ids, list(starts), list(ends)

    def piece(self, number: int) -> str:
        """Return the spelling of a token in the vocabulary."""
        text: str | None = self._model.id_to_token(number)
        assert text is not None, "an id of this tokenizer"
        return text

    def id_of(self, token: str) -> int | None:
        """Return the id of a token of the vocabulary, including special ones."""
        return self._model.token_to_id(token)

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids without special tokens."""
        return self._model.decode([int(i) for i in ids], skip_special_tokens=True)


def _special(
    model: tokenizers.Tokenizer, config: dict[str, Any], key: str, usual: Sequence[str]
) -> int | None:
    """Return the id of the token configured under ``key``, else of the first usual one."""
    named = config.get(key)
    text = named.get("content") if isinstance(named, dict) else named
    if not isinstance(text, str | None):
        raise UserError(f"tokenizer_config.json: `{key}` is {type(text).__name__}, not text")
    candidates = [text] if text is not None else usual
    ids = [model.token_to_id(candidate) for candidate in candidates]
    return next((i for i in ids if i is not None), None)


def _sentinels(model: tokenizers.Tokenizer) -> list[int]:
    """Return the ids of ``<extra_id_0>``, ``<extra_id_1>``, ... in the vocabulary."""
    found: list[int] = []
    while (number := model.token_to_id(f"<extra_id_{len(found)}>")) is not None:
        found.append(number)
    return found
