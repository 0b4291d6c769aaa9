"""Masks of answers: OLMoE's log sample 26225 in both modes, and edges of tokens."""

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import Regex, models, pre_tokenizers

from moetron.data.chat.encode_chat import encode_rendered, refuse_special
from moetron.data.chat.templates import Answer, OlmoeTemplate, Rendered, Undecidable
from moetron.tokenizers.byte_level import ByteTokenizer
from moetron.tokenizers.huggingface import HuggingFaceTokenizer

END = "<|endoftext|>"
FIRST = [50279, 29, 93, 4537, 49651, 187, 688, 436, 4836, 13]
LAST = [29, 93, 515, 5567, 49651, 187, 4374, 50279]
"""Ids of the released run's log (allenai/OLMoE, logs/olmoe-sft-logs.txt)."""
PIECES = {
    "<": 29,
    "|": 93,
    "user": 4537,
    "|>": 49651,
    "\n": 187,
    "In": 688,
    " this": 436,
    " task": 4836,
    ",": 13,
    "ass": 515,
    "istant": 5567,
    "Yes": 4374,
}
"""The pieces of these ids in gpt-neox-olmo-dolma-v1_5."""
CHAT = [{"role": "user", "content": "In this task,"}, {"role": "assistant", "content": "Yes"}]


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceTokenizer:
    """A tokenizer of the released pieces and ids alone."""
    model = tokenizers.Tokenizer(models.WordLevel({**PIECES, END: 50279, "?": 0}, unk_token="?"))
    pattern = Regex(
        "|".join(sorted(PIECES, key=len, reverse=True)).replace("|>", r"\|>").replace("||", r"|\||")
    )
    model.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")
    model.add_special_tokens([END])
    path = tmp_path_factory.mktemp("released") / "tokenizer.json"
    model.save(str(path))
    return HuggingFaceTokenizer(path)


@pytest.mark.parametrize(
    ("rule", "labels"),
    [("correct", [4374, 50279]), ("as_released", [187, 4374, 50279])],
)
def test_log_sample_26225(released: HuggingFaceTokenizer, rule: str, labels: list[int]) -> None:
    rendered = OlmoeTemplate(released.end_text).render(CHAT)
    ids, mask = encode_rendered(rendered, released, rule)  # type: ignore[arg-type]
    assert ids[: len(FIRST)].tolist() == FIRST and ids[-len(LAST) :].tolist() == LAST
    assert ids[mask].tolist() == labels and mask[-len(labels) :].all()


def test_every_answer_of_a_conversation_and_its_end() -> None:
    tokenizer = ByteTokenizer()
    chat = [*CHAT, {"role": "user", "content": "?"}, {"role": "assistant", "content": "Nö"}]
    ids, mask = encode_rendered(OlmoeTemplate(END).render(chat), tokenizer)
    trained = ids[mask].tolist()
    assert trained == [*b"Yes", tokenizer.eod, *"Nö".encode(), tokenizer.eod]
    assert mask[-1]  # the end of the last turn
    assert not mask[ids == ord("\n")].any()


def test_tokens_across_the_edge_of_an_answer(tmp_path: Path) -> None:
    """``:A`` joins header and answer; ``B!`` joins the end of an answer and what follows."""
    model = tokenizers.Tokenizer(
        models.WordLevel({":A": 0, "B!": 1, "x": 2, END: 3}, unk_token="x")
    )
    model.pre_tokenizer = pre_tokenizers.Split(Regex(":A|B!|x"), "isolated")
    model.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    tokenizer = HuggingFaceTokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(Undecidable, match="begins in its header"):
        encode_rendered(Rendered(":Ax", [Answer(1, 3)]), tokenizer)
    with pytest.raises(Undecidable, match="runs past"):
        encode_rendered(Rendered("xB!", [Answer(0, 2)]), tokenizer)


def test_contents_do_not_spell_special_tokens(released: HuggingFaceTokenizer) -> None:
    refuse_special(["<|user|>", "fine"], released)  # ordinary text in OLMoE's tokenizer
    with pytest.raises(Undecidable, match="special"):
        refuse_special(["fine", f"a{END}b"], released)
