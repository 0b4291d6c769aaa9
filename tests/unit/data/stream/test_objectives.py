"""Prefix language modelling and infilling recover the original; objectives by name."""

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetron.common.errors import UserError
from moetron.data.objectives.build_objective import build_objective
from moetron.data.objectives.causal import Causal
from moetron.data.objectives.fim import FillInTheMiddle, FimOptions
from moetron.data.objectives.objective import Objective
from moetron.data.objectives.prefix_lm import PrefixLM
from moetron.data.objectives.span_corruption import SpanCorruption
from moetron.data.objectives.split_text import SplitText
from moetron.data.objectives.ul2 import UL2
from moetron.data.stream.stages import Stage, StagedStream
from moetron.data.stream.token_stream import training_stream
from moetron.tokenizers.byte_level import ByteTokenizer

END, PRE, MID, SUF = 0, 1, 2, 3
OPTIONS = FimOptions(rate=0.5, spm_rate=0.5, prefix=PRE, middle=MID, suffix=SUF)


@dataclass
class Plan:
    bidirectional_prefix: bool = False
    fim_rate: float = 0.5
    fim_spm_rate: float = 0.25
    fim_prefix_token: str = "<extra_id_3>"
    fim_middle_token: str = "<extra_id_4>"
    fim_suffix_token: str = "<extra_id_5>"
    encoder_seq_length: int | None = None
    examples_per_sample: int = 1
    noise_density: float = 0.15
    mean_noise_span_length: float = 3.0


def made(objective: Objective, raw: np.ndarray, key: str, length: int) -> tuple:
    row, mask = np.empty(length + 1, np.int64), np.ones(length, np.float32)
    return objective.fill(raw, 0, key, row, mask), row, mask


def joined(document: list[int]) -> tuple[str, list[int]]:
    """Return (form, text) of one document of a sample."""
    if PRE not in document:
        return "as it was", document
    assert document[0] == PRE
    suffix, middle = document.index(SUF), document.index(MID)
    if suffix == 1:  # SPM; a PSM with an empty prefix reads the same and means the same
        return "SPM", document[middle + 1 :] + document[2:middle]
    return "PSM", document[1:suffix] + document[middle + 1 :] + document[suffix + 1 : middle]


def documents(tokens: list[int]) -> list[list[int]]:
    found: list[list[int]] = [[]]
    for token in tokens:
        if token == END:
            found.append([])
        else:
            found[-1].append(token)
    return found


@settings(max_examples=60)
@given(
    ends=st.sets(st.integers(0, 396), max_size=12),
    key=st.text(max_size=4),
    rate=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_fim_documents_can_be_recovered(ends: set[int], key: str, rate: float) -> None:
    raw = [END if place in ends else 10 + place for place in range(397)]
    objective = FillInTheMiddle(403, END, replace(OPTIONS, rate=rate))
    assert objective.windowing.advances == (397,)
    (kind, prefix, _), row, mask = made(objective, np.array(raw, np.uint16), key, 403)
    assert row[0] == END and prefix == 0
    filled = int(mask.sum())
    assert (mask[:filled] == 1).all() and (row[1 + filled :] == END).all()
    found = documents(row[1 : 1 + filled].tolist())
    assert [joined(document)[1] for document in found] == documents(raw)
    moved = sum(form != "as it was" for form, _ in map(joined, found))
    assert filled == 397 + 3 * moved and moved <= 2
    assert objective.kinds[kind] == ("fim" if moved else "causal")
    texts = sum(map(bool, documents(raw)))
    assert rate == 0.5 or moved == (min(2, texts) if rate else 0)


def test_fim_moves_documents_at_its_rate() -> None:
    forms: Counter[str] = Counter()
    for number in range(300):
        raw = np.tile(np.append(np.arange(10, 209), END), 1)
        objective = FillInTheMiddle(203, END, replace(OPTIONS, rate=0.75, spm_rate=0.2))
        _, row, mask = made(objective, raw, str(number), 203)
        forms[joined(documents(row[1 : 1 + int(mask.sum())].tolist())[0])[0]] += 1
    assert forms["as it was"] / 300 == pytest.approx(0.25, abs=0.07)
    assert forms["SPM"] / 300 == pytest.approx(0.15, abs=0.06)


def test_every_raw_token_of_an_infilling_run_has_loss_once(make_shard) -> None:
    text = [10 + i % 900 for i in range(2000)]
    prefix = make_shard("a", [[*text[i : i + 39], END] for i in range(0, 2000, 39)])
    stream = training_stream([prefix], 67, 1, objective=FillInTheMiddle(67, END, OPTIONS))
    tokens = stream.sources[0].shards[0].tokens
    used = stream.sources[0].windows * 64
    seen: Counter[int] = Counter()
    for n in range(stream.sources[0].windows):
        sample = stream[n]
        seen.update(sample["labels"][sample["loss_mask"] == 1].tolist())
    expected = Counter(tokens[:used].tolist())
    assert {token: seen[token] for token in expected} == dict(expected)


@given(length=st.integers(2, 60), key=st.text(max_size=4))
def test_a_prefix_lm_predicts_what_follows_its_prefix(length: int, key: str) -> None:
    raw = np.arange(100, 101 + length)
    (_, prefix, _), row, mask = made(PrefixLM(length), raw, key, length)
    assert row.tolist() == raw.tolist()
    assert 1 <= prefix < length
    targets = row[1:][mask == 1]
    assert row[:prefix].tolist() + targets.tolist() == raw.tolist()


def test_prefixes_are_uniform() -> None:
    raw = np.arange(101)
    splits = [made(PrefixLM(100), raw, str(n), 100)[0].prefix for n in range(500)]
    assert np.mean(splits) == pytest.approx(50, abs=4)
    assert min(splits) < 5 and max(splits) > 95


def test_a_ul2_prefix_ends_where_the_targets_begin() -> None:
    objective = build_objective("ul2", 512, ByteTokenizer(), Plan())
    for slot, length in enumerate(objective.windowing.advances):
        row, mask = np.empty(513, np.int64), np.ones(512, np.float32)
        result = objective.fill(np.full(length, 65), slot, "key", row, mask)
        assert row[result.prefix - 1] == ByteTokenizer.eod
        assert int(np.argmax(mask)) == result.prefix - 1
    assert len(set(objective.kinds)) == 6


def test_objectives_by_name() -> None:
    tokenizer, plan = ByteTokenizer(), Plan()
    assert build_objective("causal", 8, tokenizer, plan).state() == {"name": "causal"}
    assert build_objective("prefix_lm", 8, tokenizer, plan).state() == {"name": "prefix_lm"}
    fim = build_objective("fim", 8, tokenizer, plan).state()
    assert fim == {"name": "fim", "rate": 0.5, "spm_rate": 0.25} | {
        "prefix": 380,
        "middle": 379,
        "suffix": 378,
    }
    ul2 = build_objective("ul2", 2048, tokenizer, plan)
    assert isinstance(ul2, UL2) and ul2.examples == 4  # 126 sentinels are too few for one text
    stacks = Plan(encoder_seq_length=512)
    spans = build_objective("span_corruption", 626, tokenizer, stacks)
    assert isinstance(spans, SpanCorruption) and spans.raw_tokens == 568
    assert isinstance(build_objective("prefix_lm", 626, tokenizer, stacks), SplitText)


@pytest.mark.parametrize(
    ("name", "length", "plan", "message"),
    [
        ("fim", 8, Plan(fim_middle_token="<nope>"), "no token for --fim-middle-token <nope>"),
        ("fim", 8, Plan(fim_middle_token="<extra_id_3>"), "three different tokens"),
        ("fim", 5, Plan(), "no room"),
        ("prefix_lm", 1, Plan(), "too short"),
        ("ul2", 2048, Plan(bidirectional_prefix=True), "holds 4 texts for lack of sentinels"),
        ("ul2", 9, Plan(), "no room"),
    ],
)
def test_unsuitable_objectives_are_refused(name, length, plan, message) -> None:
    with pytest.raises(UserError, match=message):
        build_objective(name, length, ByteTokenizer(), plan)


def test_a_tokenizer_without_sentinels_has_no_ul2() -> None:
    without = ByteTokenizer()
    without.sentinels = ()
    with pytest.raises(UserError, match=r"has no sentinels \(tokens named <extra_id_0>"):
        build_objective("ul2", 512, without, Plan())


def test_stages_name_every_kind_of_sample_once(make_shard) -> None:
    prefix = make_shard("a", [list(range(10, 600))])
    infilling = FillInTheMiddle(8, END, replace(OPTIONS, rate=1.0))
    first = Stage([prefix], PrefixLM(8), 1, until_tokens=16)
    stream = StagedStream(
        [
            first,
            replace(first, objective=infilling, until_tokens=32),
            Stage([prefix], Causal(8), 1),
        ],
        8,
    )
    assert stream.objective_names == ["prefix_lm", "causal", "fim"]
    kinds = [stream.objective_names[stream[n]["objective"]] for n in (0, 1, 2, 3, 4)]
    assert kinds == ["prefix_lm"] * 2 + ["fim"] * 2 + ["causal"]
    assert stream[0]["prefix"] > 0 == stream[2]["prefix"] == stream[4]["prefix"]
