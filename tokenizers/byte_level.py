"""The tokenizer that needs no file: one token a UTF-8 byte."""

from collections.abc import Sequence

from moetron.tokenizers.interface import Tokenizer, fingerprint_of, require_encodable

LAYOUT = "ids 0..255 are bytes, then eod, pad and 126 sentinels of which the first is the highest"


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes; 384 ids, a multiple of 128."""

    kind = "bytes"
    name = "bytes"
    vocab_size = 384
    eod = 256
    pad = 257
    sentinels = tuple(range(383, 257, -1))
    fingerprint = fingerprint_of("bytes", LAYOUT.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """UTF-8 bytes of each text."""
        require_encodable(texts)
        return [list(text.encode()) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids that are bytes; the others are dropped."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")
