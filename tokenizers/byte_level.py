"""Byte tokenizer: one token per UTF-8 byte, without a file."""

from collections.abc import Sequence

import numpy as np

from moetron.tokenizers.interface import Tokenizer, fingerprint_of, require_encodable

END, PAD = "<|endoftext|>", "<pad>"
"""Spellings of its markers in exported tokenizers."""
LAYOUT = "ids 0..255 are bytes, then eod, pad and 126 sentinels of which the first is the highest"


class ByteTokenizer(Tokenizer):
    """Tokenizer of UTF-8 bytes; 384 ids, a multiple of 128."""

    kind = "bytes"
    name = "bytes"
    vocab_size = 384
    eod = 256
    pad = 257
    sentinels = tuple(range(383, 257, -1))
    end_text = END
    fingerprint = fingerprint_of("bytes", LAYOUT.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the UTF-8 bytes of each text."""
        require_encodable(texts)
        return [list(text.encode()) for text in texts]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[int], list[int]]:
        """Return the bytes, and the place of each one's character."""
        require_encodable([text])
        places = [place for place, char in enumerate(text) for _ in char.encode()]
        return list(text.encode()), places, [place + 1 for place in places]

    def id_of(self, token: str) -> int | None:
        """Return the id of an ASCII character, or of a sentinel ``<extra_id_i>``."""
        names = {f"<extra_id_{i}>": number for i, number in enumerate(self.sentinels)}
        return ord(token) if len(token) == 1 and token.isascii() else names.get(token)

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the concatenated UTF-8 bytes of all texts, uint8, and their lengths."""
        require_encodable(texts)
        encoded = [text.encode() for text in texts]
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        return np.frombuffer(b"".join(encoded), np.uint8), lengths

    def decode(self, ids: Sequence[int]) -> str:
        """Decode the ids that are bytes; drop the others."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")
