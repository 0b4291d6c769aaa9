"""SentencePiece tokenizer for transformers, in one self-contained file.

Exported folders hold this file; ``AutoTokenizer.from_pretrained(folder, trust_remote_code=True)``
uses its class, which differs from transformers' ``BertGenerationTokenizer`` in two ways: decoding
is exact (white space at the ends, and characters that the model writes as bytes), and U+2581, with
which SentencePiece writes a space, is encoded as its three bytes.
"""

from typing import Any

from transformers import BertGenerationTokenizer

SPACE_MARKER = "\u2581"


class MoetronSentencePieceTokenizer(BertGenerationTokenizer):
    """SentencePiece's own pieces, with nothing added around them."""

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        """Return the pieces of a text."""
        marker = [f"<0x{byte:02X}>" for byte in SPACE_MARKER.encode()]
        if not all(self.sp_model.is_byte(self.sp_model.piece_to_id(piece)) for piece in marker):
            return list(self.sp_model.encode(text, out_type=str))
        first, *others = self.sp_model.encode(text.split(SPACE_MARKER), out_type=str)
        return first + [piece for part in others for piece in (*marker, *part)]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Decode pieces; control pieces are spelled out."""
        text = ""
        run: list[str] = []
        for token in tokens:
            if self.sp_model.is_control(self.sp_model.piece_to_id(token)):
                text += self.sp_model.decode(run) + token
                run = []
            else:
                run.append(token)
        return text + str(self.sp_model.decode(run))
