"""Small tokenizers of every kind, each with a feature that an export could lose or add."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
from sentencepiece import sentencepiece_model_pb2 as model_pb2
from tokenizers import (
    AddedToken,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

END, START = "<|endoftext|>", "<s>"
TEXTS = [
    "",
    " ",
    "one two  three\n\n\tfour " + " " * 39 + "five",
    "  leading and trailing  ",
    "na\u00efve Caf\u00c9 e\u0301 \ufb01 \u6f22\u5b57 \x00 \U0001f600",
    "<s> </s> <pad> <unk> <|endoftext|> <extra_id_3> <0x41> [CLS]x",
    "def f(x):\n        return x**2  # \u00e4\n",
]


def byte_level(corpus: list[str], special: list[str], prefix: bool = False) -> Any:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(corpus[:1], trainer)
    return made


def template(corpus: list[str]) -> tuple[Any, dict[str, Any]]:
    """Train a tokenizer that adds a start and an end to every text, also in its configuration."""
    made = byte_level(corpus, [END, START])
    single = processors.TemplateProcessing(
        single=f"{START} $A {END}",
        pair=f"{START} $A {END} $B {END}",
        special_tokens=[(START, 1), (END, 0)],
    )
    made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), single])
    return made, {"bos_token": START, "add_bos_token": True, "add_eos_token": True}


def roberta(corpus: list[str]) -> tuple[Any, dict[str, Any]]:
    """Train RoBERTa's kind: two markers, and a space before the first word."""
    made = byte_level(corpus, ["</s>", START], prefix=True)
    made.post_processor = processors.RobertaProcessing(("</s>", 0), (START, 1))
    return made, {"add_prefix_space": True}


def plain_end(corpus: list[str]) -> tuple[Any, dict[str, Any]]:
    """Train a tokenizer whose end token is a normal piece: spelled out in a text it is letters."""
    made = byte_level(corpus, [])
    definition = json.loads(made.to_str())
    definition["model"]["vocab"][END] = len(definition["model"]["vocab"])
    return tokenizers.Tokenizer.from_str(json.dumps(definition)), {}


def metaspace(corpus: list[str]) -> tuple[Any, dict[str, Any]]:
    """Train Llama's kind: byte fallback, a leading space, normalisers, BERT's post-processor."""
    made = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    pieces = ["<unk>", START, "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=pieces, show_progress=False)
    made.train_from_iterator(corpus[:1], trainer)
    made.post_processor = processors.BertProcessing(("</s>", 2), (START, 1))
    return made, {}


def stripping(corpus: list[str]) -> tuple[Any, dict[str, Any]]:
    """Train a tokenizer whose added tokens strip white space, special and not; with truncation."""
    made = byte_level(corpus, [END])
    made.add_special_tokens([AddedToken("<unk>", lstrip=True, rstrip=True)])
    made.add_tokens([AddedToken(" " * n, normalized=False) for n in (4, 8)])
    made.enable_truncation(max_length=4)
    made.enable_padding(length=64, pad_token=END)
    return made, {"pad_token": {"content": "<unk>", "__type": "AddedToken"}}


KINDS: dict[str, Callable[[list[str]], tuple[Any, dict[str, Any]]]] = {
    "template": template,
    "roberta": roberta,
    "plain_end": plain_end,
    "metaspace": metaspace,
    "stripping": stripping,
}


def t5_like(model: bytes) -> bytes:
    """Return a SentencePiece model that adds a leading space, folds white space, renames pieces."""
    proto = model_pb2.ModelProto.FromString(model)
    proto.normalizer_spec.add_dummy_prefix = True
    proto.normalizer_spec.remove_extra_whitespaces = True
    unknown = next(piece for piece in proto.pieces if piece.type == piece.UNKNOWN)
    unknown.piece = proto.trainer_spec.unk_piece = "[UNK]"
    content: bytes = proto.SerializeToString()
    return content


def write(kind: str, folder: Path, corpus: list[str]) -> Path:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` of a kind."""
    made, config = KINDS[kind](corpus)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
