"""Prompts in UL2's format, and answers inserted into their holes."""

import numpy as np
import pytest

from moetron.common.errors import UserError
from moetron.data.objectives.prompts import filled, prompt_ids
from moetron.data.objectives.ul2 import UL2, Denoiser
from moetron.tokenizers.byte_level import ByteTokenizer

TOKENIZER = ByteTokenizer()
FIRST, SECOND = TOKENIZER.sentinels[:2]


def test_plain_text_is_its_tokens_and_empty_text_is_eod() -> None:
    assert prompt_ids("ab", "causal", TOKENIZER) == TOKENIZER.encode("ab")
    assert prompt_ids("", "causal", TOKENIZER) == [TOKENIZER.eod]


def test_a_prefix_is_encoded_as_in_training() -> None:
    """The prompt is UL2's row of the same text, up to its targets."""
    ul2 = UL2(
        40,
        TOKENIZER.encode,
        TOKENIZER.sentinels,
        TOKENIZER.eod,
        TOKENIZER.pad,
        [Denoiser(1, "[S2S] ")],
    )
    text = "the quick brown fox jumps over the lazy dog"[: ul2.windowing.advances[0]]
    row, mask = np.zeros(41, np.int64), np.zeros(40, np.float32)
    ul2.fill(np.array(TOKENIZER.encode(text)), 0, "key", row, mask)
    inputs = row[: int(mask.argmax()) + 1]
    prefix = TOKENIZER.decode(inputs[1:-1].tolist()).removeprefix("[S2S] ")
    assert text.startswith(prefix)
    assert prompt_ids(prefix, "s2s", TOKENIZER) == inputs.tolist()


def test_holes_become_sentinels() -> None:
    ids = prompt_ids("a<extra_id_0>b<extra_id_1>", "nlu", TOKENIZER)
    encode = TOKENIZER.encode
    expected = [*encode("[NLU] a"), FIRST, *encode("b"), SECOND]
    assert ids == [TOKENIZER.pad, *expected, TOKENIZER.eod]


def test_answers_fill_their_holes() -> None:
    text = "a<extra_id_0>b<extra_id_1>"
    new = [FIRST, *TOKENIZER.encode("xy"), SECOND, *TOKENIZER.encode("z")]
    assert filled(text, new, TOKENIZER) == "axybz"
    assert filled(text, new[:3], TOKENIZER) == "axyb<extra_id_1>"


@pytest.mark.parametrize(
    ("text", "mode", "message"),
    [
        ("a<extra_id_0>", "s2s", "must have no holes"),
        ("a", "nlg", "must have <extra_id_0>"),
        ("<extra_id_1><extra_id_0>", "nlu", "in this order"),
        ("".join(f"<extra_id_{n}>" for n in range(127)), "nlu", "has 126 sentinels"),
    ],
)
def test_prompts_that_fit_no_mode_are_refused(text: str, mode: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        prompt_ids(text, mode, TOKENIZER)  # type: ignore[arg-type]
