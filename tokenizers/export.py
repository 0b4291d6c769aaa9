"""Our tokenizers as a folder that HuggingFace's ``AutoTokenizer`` loads, with the same ids.

A SentencePiece model goes as it is, under a class of transformers that runs SentencePiece itself.
HuggingFace's own ``Unigram`` would not give the same ids: it adds scores in float64, SentencePiece
in float32, so that they split runs of more than 16 spaces differently (170 of 2,779 documents).
"""

import json
import logging
import tempfile
from pathlib import Path

from moetron.common.errors import UserError
from moetron.tokenizers.huggingface import HuggingFaceTokenizer
from moetron.tokenizers.interface import Tokenizer
from moetron.tokenizers.umt5 import SentencePieceTokenizer

SENTENCEPIECE_CLASS = "BertGenerationTokenizer"
"""The one of transformers that adds nothing to SentencePiece's pieces."""
logger = logging.getLogger(__name__)


def export(tokenizer: Tokenizer, folder: Path) -> None:
    """Write ``tokenizer_config.json`` and ``tokenizer.json`` or ``spiece.model``.

    Control tokens such as ``</s>`` that are spelled out in a text become their ids there, where
    SentencePiece alone reads letters; U+2581 becomes a space.

    Raises:
        UserError: the tokenizer has no counterpart there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, str | bool] = {"clean_up_tokenization_spaces": False}
    if isinstance(tokenizer, SentencePieceTokenizer):
        config["tokenizer_class"] = SENTENCEPIECE_CLASS
        config["sep_token"] = tokenizer.piece(tokenizer.eod)
        (folder / "spiece.model").write_bytes(tokenizer.serialized)
    elif isinstance(tokenizer, HuggingFaceTokenizer):
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        (folder / "tokenizer.json").write_text(tokenizer.definition, encoding="utf-8")
    else:
        raise UserError(f"tokenizer {tokenizer.name}: AutoTokenizer knows nothing like it")
    config["eos_token"] = tokenizer.piece(tokenizer.eod)
    # As in training, a document follows another's end. The class's own <s> was never trained, and
    # lm-evaluation-harness would put it before every text.
    config["bos_token"] = config["eos_token"]
    config["pad_token"] = tokenizer.piece(tokenizer.pad)
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def exported(tokenizer: Tokenizer | None) -> tuple[dict[str, int | None], dict[str, bytes]]:
    """Ids of document markers (ours begin with none) and files for AutoTokenizer."""
    eod, pad = (None, None) if tokenizer is None else (tokenizer.eod, tokenizer.pad)
    files = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            if tokenizer is not None:
                export(tokenizer, Path(folder))
            files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
        except UserError as error:
            logger.warning("without a tokenizer: %s", error)
    return {"bos_token_id": None, "eos_token_id": eod, "pad_token_id": pad}, files
