"""Infilling for named sources only: the other sources of a stage stay causal."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moetron.common.errors import UserError
from moetron.data.objectives.causal import Causal
from moetron.data.objectives.prefix_lm import PrefixLM
from moetron.data.shards.manifest import write_manifest
from moetron.data.shards.shard import Shard
from moetron.data.stream.open_streams import open_training, open_validation
from moetron.data.stream.stages import Stage, StagedStream
from moetron.moe.config.schema.data import DataSettings
from moetron.tokenizers.byte_level import ByteTokenizer

S, RAW = 67, 64  # a fim sample keeps room for three markers
TOKENIZER = ByteTokenizer()
PRE, MID, SUF = (TOKENIZER.id_of(f"<extra_id_{i}>") for i in range(3))
MARKERS = {
    "fim_prefix_token": "<extra_id_0>",
    "fim_middle_token": "<extra_id_1>",
    "fim_suffix_token": "<extra_id_2>",
}
FIM = {"name": "fim", "rate": 1.0, "spm_rate": 0.0, "prefix": PRE, "middle": MID, "suffix": SUF}


@pytest.fixture
def two(make_shard, tmp_path: Path) -> dict[str, str]:
    """Return prefixes of code and prose by name, and of validation shards."""
    (tmp_path / "valid").mkdir()
    found = {}
    for number, name in enumerate(("code", "prose", "valid/code", "code.valid", "code.x")):
        chance = np.random.default_rng(number)
        documents = [[*chance.integers(32, 127, 49).tolist(), TOKENIZER.eod] for _ in range(40)]
        found[name] = make_shard(name, documents, 384, TOKENIZER.fingerprint)
    return found


def plan(stages: Sequence[dict[str, Any]], fim_sources: list[str] | None) -> DataSettings:
    fim = {"fim_rate": 1.0, "fim_spm_rate": 0.0, "fim_sources": fim_sources, **MARKERS}
    return DataSettings.model_validate({"stages": stages, **fim})


def mixed(two: dict[str, str], fim_sources: list[str] | None, **stage: Any) -> StagedStream:
    """Open one stage, half code and half prose; a fim stage by default."""
    path = ["1", two["prose"], "1", two["code"]]
    settings = plan([{"objective": "fim", "data_path": path, **stage}], fim_sources)
    return open_training(settings, S, 5, TOKENIZER)


def restored(sample: dict[str, Any]) -> list[int]:
    """Return the raw tokens of a fim sample whose first text has its middle last."""
    row = sample["labels"][sample["loss_mask"] == 1].tolist()
    pre, suf, mid = (row.index(marker) for marker in (PRE, SUF, MID))
    end = row.index(TOKENIZER.eod, mid) if TOKENIZER.eod in row[mid:] else len(row)
    middle = row[mid + 1 : end]
    return row[:pre] + row[pre + 1 : suf] + middle + row[suf + 1 : mid] + row[end:]


def of(stream: Any, source: str, count: int) -> list[tuple[int, dict[str, Any]]]:
    """Return (number, sample) of those among ``count`` samples that are from one source."""
    samples = ((n, stream[n]) for n in range(count))
    return [(n, s) for n, s in samples if stream.source_names[s["source"]] == source]


def test_the_others_stay_causal_window_for_window(two) -> None:
    stream, causal = mixed(two, ["code"]), mixed(two, None, objective="causal")
    windows = (2000 - 1) // S
    prose = of(stream, "prose", 2 * windows)
    assert len(prose) == windows
    for n, sample in prose:
        for name in ("tokens", "labels", "loss_mask"):
            assert sample[name].tolist() == causal[n][name].tolist()
        assert stream.objective_names[sample["objective"]] == "causal"
    starts = {sample["tokens"].tobytes() for _, sample in prose}
    assert len(starts) == windows  # one epoch is every window once


def test_named_sources_are_infilled_and_every_token_comes_back_once_an_epoch(two) -> None:
    stream = mixed(two, ["code"])
    tokens = Shard(two["code"]).tokens
    windows = len(tokens) // RAW
    code = of(stream, "code", 2 * windows)
    assert {stream.objective_names[sample["objective"]] for _, sample in code} == {"fim"}
    expected = [tokens[RAW * i : RAW * (i + 1)].tolist() for i in range(windows)]
    assert sorted(restored(sample) for _, sample in code) == sorted(expected)


def test_the_state_names_objectives_by_source_only_where_they_differ(two) -> None:
    def objective(stream: StagedStream) -> Any:
        return stream.state()["stages"][0]["objective"]

    assert objective(mixed(two, ["code"])) == {
        "by_source": {"prose": {"name": "causal"}, "code": FIM}
    }
    assert objective(mixed(two, None)) == FIM
    assert mixed(two, ["code", "prose"]).state() == mixed(two, None).state()
    assert mixed(two, ["prose"]).state() != mixed(two, ["code"]).state()


def test_the_next_stage_continues_a_source_with_the_same_windows(two) -> None:
    path = ["1", two["prose"], "1", two["code"]]
    first = {"objective": "fim", "data_path": path, "until_tokens": 20 * S}
    settings = plan([first, {"data_path": path}], ["code"])
    stream = open_training(settings, S, 5, TOKENIZER)
    assert stream.state()["stages"][1]["order"]["begun"] == [10, 0]
    settings = plan([first, {"objective": "fim", "data_path": path}], ["code"])
    stream = open_training(settings, S, 5, TOKENIZER)
    assert stream.state()["stages"][1]["order"]["begun"] == [10, 10]


def test_kinds_are_numbered_over_all_sources_and_stages(two) -> None:
    causal, prefix_lm = Causal(S), PrefixLM(S)
    path = ["1", two["prose"], "1", two["code"]]
    last = Stage(path, causal, 5, own_objectives={"code": prefix_lm})
    for first, names in ((causal, ["causal", "prefix_lm"]), (prefix_lm, ["prefix_lm", "causal"])):
        before = Stage(path, first, 5, until_tokens=2 * S)
        stream = StagedStream([before, last], S)
        assert stream.objective_names == names
        expected = {"prose": "causal", "code": "prefix_lm"}
        for n in range(2, 12):
            sample = stream[n]
            kind = names[sample["objective"]]
            assert kind == expected[stream.source_names[sample["source"]]]
            assert (sample["prefix"] > 0) == (kind == "prefix_lm")
    assert StagedStream([replace(last, data_path=[two["code"]])], S).objective_names == [
        "prefix_lm"
    ]


def test_unknown_names_are_refused_and_known_ones_listed(two) -> None:
    rule = "no such source in a stage with the objective fim; available: prose, code"
    with pytest.raises(UserError, match=f"--fim-sources cod valid: {rule}$"):
        mixed(two, ["cod", "code", "valid"])
    stages = [
        {"objective": "fim", "data_path": [two["code"]], "until_tokens": 5 * S},
        {"data_path": [two["prose"]]},
    ]
    with pytest.raises(UserError, match=r"--fim-sources prose: .* available: code$"):
        open_training(plan(stages, ["prose"]), S, 5, TOKENIZER)


def test_validation_is_infilled_by_the_same_names(two) -> None:
    for prefix in two.values():
        manifest = Shard(prefix).manifest
        assert manifest is not None
        write_manifest(prefix, manifest.model_copy(update={"text_bytes": 1960}))
    path = [two["valid/code"], two["code.valid"], two["code.x"]]
    fim = {"objective": "fim", "data_path": [two["code"]]}
    stream = open_validation(plan([fim], ["code"]), path, S, TOKENIZER)
    infilled, causal = 2000 // RAW, (2000 - 1) // S
    kinds = [stream.objective_names[stream[n]["objective"]] for n in range(len(stream))]
    assert kinds == ["fim"] * 2 * infilled + ["causal"] * causal
    assert stream.bytes_per_token == [None, None, 1960 / 2000]  # bits per byte of plain text alone
    for n, prefix in ((1, path[0]), (infilled + 1, path[1])):
        assert restored(stream[n]) == Shard(prefix).tokens[RAW : 2 * RAW].tolist()
    stages = [{**fim, "until_tokens": 5 * S}, {"data_path": [two["code"]]}]
    stream = open_validation(plan(stages, ["code"]), path, S, TOKENIZER)
    assert stream.objective_names == ["causal"] and len(stream) == 3 * causal


def test_a_training_source_is_not_taken_for_anothers_validation(two) -> None:
    fim = {"objective": "fim", "data_path": [two["code"], two["code.valid"]]}
    stream = open_validation(plan([fim], ["code"]), [two["code.valid"]], S, TOKENIZER)
    assert stream.objective_names == ["causal"]


def test_names_without_any_stage_of_infilling_are_refused(two) -> None:
    with pytest.raises(UserError, match=r"^--fim-sources code: needs --objective fim$"):
        open_training(plan([{"data_path": [two["code"]]}], ["code"]), S, 5, TOKENIZER)
