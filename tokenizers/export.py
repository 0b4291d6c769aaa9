"""A tokenizer's files as HuggingFace's folders hold them."""

import json

import tokenizers

from moetron.tokenizers.huggingface import HuggingFaceTokenizer
from moetron.tokenizers.interface import Tokenizer
from moetron.tokenizers.load import load_tokenizer, tokenizer_file

_BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def special_ids(tokenizer: Tokenizer | None) -> dict[str, int | None]:
    """What ``config.json`` says of document markers: ours begin with none."""
    eod, pad = (None, None) if tokenizer is None else (tokenizer.eod, tokenizer.pad)
    return {"bos_token_id": None, "eos_token_id": eod, "pad_token_id": pad}


def companions(source: str) -> dict[str, bytes]:
    """Name -> content of the files that make a folder's tokenizer; none for ``bytes``.

    A ``tokenizer.json`` comes with what lies beside it, or with the least that ``AutoTokenizer``
    asks for; a SentencePiece model comes as ``spiece.model``.

    Raises:
        TokenizerError: there is no tokenizer at ``source``.
    """
    tokenizer = load_tokenizer(source)
    if source == "bytes":
        return {}
    path = tokenizer_file(source)
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return {"spiece.model": path.read_bytes()}
    found = {name: path.with_name(name) for name in _BESIDE}
    files = {name: file.read_bytes() for name, file in found.items() if file.is_file()}
    if "tokenizer_config.json" not in files:
        files["tokenizer_config.json"] = _least_config(tokenizer)
    return {"tokenizer.json": path.read_bytes(), **files}


def _least_config(tokenizer: HuggingFaceTokenizer) -> bytes:
    names = tokenizers.Tokenizer.from_str(tokenizer.definition)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": names.id_to_token(tokenizer.eod),
        "pad_token": names.id_to_token(tokenizer.pad),
    }
    return (json.dumps(config, indent=2) + "\n").encode()
