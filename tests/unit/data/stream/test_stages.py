"""Stages: sources of samples, and epochs of each source."""

from collections import Counter
from dataclasses import replace

import pytest

from moetron.common.errors import UserError
from moetron.data.objectives.causal import Causal
from moetron.data.stream.stages import Stage, StagedStream, refuse_repetition, use_table
from moetron.data.stream.token_stream import training_stream

S = 4
CAUSAL = Causal(S)


@pytest.fixture
def two(make_shard) -> dict[str, str]:
    """Shards of 30 and 60 windows; tokens of a start at 1,000, those of b at 2,000."""
    return {
        name: make_shard(name, [list(range(first, first + S * windows + 1))], 10_000)
        for name, first, windows in (("a", 1000, 30), ("b", 2000, 60))
    }


def stages(two: dict[str, str]) -> list[Stage]:
    """Return stages: 20 samples, three of four from a; then half and half."""
    first = Stage(["3", two["a"], "1", two["b"]], CAUSAL, 7, until_tokens=20 * S)
    return [first, Stage(["1", two["b"], "1", two["a"]], CAUSAL, 7)]


def windows(stream: StagedStream, start: int, end: int) -> list[tuple[int, int]]:
    """Return (source, window) of samples, decoded from tokens; the source must agree."""
    found = []
    for n in range(start, end):
        sample = stream[n]
        source, offset = divmod(int(sample["tokens"][0]) - 1000, 1000)
        assert sample["source"] == source
        found.append((source, offset // S))
    return found


def test_stages_change_at_their_tokens(two) -> None:
    stream = StagedStream(stages(two), S)
    assert stream.source_names == ["a", "b"] and stream.starts == [0, 20]
    assert [stream.stage(n) for n in (0, 19, 20, 10**9)] == [0, 0, 1, 1]
    assert Counter(source for source, _ in windows(stream, 0, 20)) == {0: 15, 1: 5}
    assert Counter(source for source, _ in windows(stream, 20, 40)) == {0: 10, 1: 10}


def test_a_source_continues_where_the_previous_stage_stopped(two) -> None:
    stream = StagedStream(stages(two), S)
    seen = windows(stream, 0, 50)
    mine = [window for source, window in seen if source == 0]
    assert len(mine) == 30 and sorted(mine) == list(range(30))  # one epoch over both stages
    assert len({window for source, window in seen if source == 1}) == 20


def test_another_seed_or_windowing_reshuffles(two) -> None:
    first, last = stages(two)
    reshuffled = StagedStream([first, replace(last, seed=8)], S)
    fresh = StagedStream([replace(last, seed=8)], S)
    names = {"a": 0, "b": 1}
    assert [names[fresh.source_names[s]] for s in (0, 1)] == [1, 0]
    taken = {window for source, window in windows(reshuffled, 0, 20) if source == 0}
    again = {window for source, window in windows(reshuffled, 20, 50) if source == 0}
    assert taken & again


def test_one_stage_is_a_blend(two) -> None:
    path = ["3", two["a"], "1", two["b"]]
    staged, plain = StagedStream([Stage(path, CAUSAL, 7)], S), training_stream(path, S, 7)
    for n in (0, 1, 17, 10**6):
        assert staged[n]["tokens"].tolist() == plain[n]["tokens"].tolist()
    assert len(staged) == len(plain)


def test_an_until_inside_a_sample_ends_with_the_sample(two) -> None:
    first, last = stages(two)
    assert StagedStream([replace(first, until_tokens=20 * S - 1), last], S).starts == [0, 20]
    assert StagedStream([replace(first, until_tokens=20 * S + 1), last], S).starts == [0, 21]


def test_epochs_are_counted_over_all_stages_and_capped(two) -> None:
    stream = StagedStream(stages(two), S)
    assert [(u.stage, u.source, u.samples) for u in stream.uses(50)] == [
        (0, 0, 15),
        (0, 1, 5),
        (1, 1, 15),
        (1, 0, 15),
    ]
    assert sum(use.epochs for use in stream.uses(50) if use.source == 0) == 1.0
    assert [use.samples for use in stream.uses(10)][2:] == [0, 0]  # never gets to stage 2
    refuse_repetition(stream, 50, 1.0)
    over = r"--max-epochs: .* 208 tokens .* repeat a 1\.033 times \(at most 1\); change"
    with pytest.raises(UserError, match=over) as caught:
        refuse_repetition(stream, 52, 1.0)
    assert use_table(stream, 52) in str(caught.value)
    assert use_table(stream, 52).splitlines()[3].split() == [
        "a",
        "all",
        "31",
        "59.62%",
        "124",
        "1.033",
    ]


def test_a_source_may_have_a_cap_of_its_own(two) -> None:
    stream = StagedStream(stages(two), S)
    epochs = {"a": 0.0, "b": 0.0}
    for use in stream.uses(52):
        epochs[stream.source_names[use.source]] += use.epochs
    refuse_repetition(stream, 52, None)
    refuse_repetition(stream, 52, None, {"b": epochs["b"]})
    refuse_repetition(stream, 52, 1.0, {"a": epochs["a"]})
    for default, caps in ((None, {"b": 0.1}), (1.0, {"b": 0.1, "a": 2.0})):
        rule = r"^--source-max-epochs: the run .* repeat b [.0-9]+ times \(at most 0\.1\); change"
        with pytest.raises(UserError, match=rule):
            refuse_repetition(stream, 52, default, caps)
    with pytest.raises(UserError, match="no source c, d; available: a, b"):
        refuse_repetition(stream, 52, 1.0, {"d": 1.0, "c": 2.0, "a": 9.0})


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ((None, None), "stage 1 needs until_tokens"),
        ((80, 90), "ends with the run"),
        ((80, 80, None), "of stage 2 leaves no sample for it"),
    ],
)
def test_refuses_stages_that_are_not_consecutive(two, ends, message) -> None:
    wrong = [Stage([two["a"]], CAUSAL, 7, end) for end in ends]
    with pytest.raises(UserError, match=message):
        StagedStream(wrong, S)
    with pytest.raises(UserError, match="twice"):
        StagedStream([Stage([two["a"], two["a"]], CAUSAL, 7)], S)


def test_the_state_names_every_source_once(two) -> None:
    state = StagedStream(stages(two), S).state()
    assert [source["name"] for source in state["sources"]] == ["a", "b"]
    assert state["starts"] == [0, 20] and len(state["stages"]) == 2
    assert state["stages"][1]["order"]["begun"] == [5, 15]
