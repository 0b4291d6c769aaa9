"""Objectives by name, set up for a tokenizer."""

from typing import Literal

from moetron.data.errors import DataError
from moetron.data.objectives.causal import Causal
from moetron.data.objectives.objective import Objective
from moetron.data.objectives.ul2 import UL2
from moetron.tokenizers.interface import Tokenizer

ObjectiveName = Literal["causal", "ul2"]


def build_objective(name: ObjectiveName, seq_length: int, tokenizer: Tokenizer) -> Objective:
    """The objective of that name for samples of ``seq_length`` tokens.

    Raises:
        DataError: UL2 does not fit the tokenizer or the length.
    """
    if name == "causal":
        return Causal(seq_length)
    if not tokenizer.sentinels:
        raise DataError(f"UL2 needs sentinels, and the tokenizer {tokenizer.name} has none")
    return UL2(seq_length, tokenizer.encode, tokenizer.sentinels, tokenizer.eod, tokenizer.pad)
