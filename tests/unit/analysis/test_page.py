"""The report page: what it says of made-up runs, and that a browser draws all of it."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moetron.common.errors import UserError
from moetron.moe.analysis.page import answers
from moetron.moe.analysis.page import stage_charts as stages
from moetron.moe.analysis.page.build_page import write_page
from moetron.moe.analysis.page.runs import POINTS, Run, read, thinned

STEPS = 200


def metrics(drop: float | None = None, leap_at: int | None = None) -> list[dict[str, Any]]:
    rows = []
    for step in range(1, STEPS + 1):
        row: dict[str, Any] = {
            "step": step,
            "tokens": 100 * step,
            "lm_loss": 8.0 - step / 100 + (2.0 if step == leap_at else 0.01 * (step % 2)),
            "expert_load": {"layer_0": 1.5, "layer_1": 5.0 - step / 100},
            "grad_norm": 1.0,
            "lr": 1e-3,
            "tokens_per_s": 1000.0,
        }
        if drop is not None:
            row |= {
                "dropped_fraction": drop,
                "dropped_fractions": {"layer_0": 0.0, "layer_1": drop},
            }
        rows.append(row)
    return rows


def analysis() -> dict[str, Any]:
    """Two layers, four experts; code goes to expert 2 of layer 1; half the drops lie at the end."""
    shares = np.full((2, 2, 4), 0.5)
    shares[1, 0] = [0.4, 0.4, 0.95, 0.25]
    shares[1, 1] = [0.6, 0.6, 0.05, 0.75]
    ids = [[[["<b>", 0.9]]] * 4] * 2
    return {
        "layers": [0, 1],
        "num_experts": 4,
        "topk": 2,
        "seq_length": 8,
        "chance": {"1": 0.25, "k": 0.5, "entropy": float(np.log(4))},
        "domains": ["code", "prose"],
        "domain_specialization": {"k": shares.tolist(), "1": shares.tolist()},
        "domain_entropy": [[1.0, 1.1], [0.9, 1.2]],
        "token_classes": {
            "names": ["words", "other"],
            "tokens": [5000, 3],
            "entropy": [[1.0, 0.1], [0.9, 0.2]],
        },
        "load": [[1.0] * 4] * 2,
        "checkpoints": [
            {
                "step": 100,
                "saturation": {"1": [0.5, 0.6], "k": [0.7, 0.8]},
                "load": [[1.0] * 4] * 2,
            },
            {
                "step": 150,
                "saturation": {"1": [0.7, 0.8], "k": [0.8, 0.9]},
                "load": [[1.0] * 4] * 2,
            },
            {
                "step": 200,
                "saturation": {"1": [1.0, 1.0], "k": [1.0, 1.0]},
                "load": [[1.0] * 4] * 2,
            },
        ],
        "coactivation": np.zeros((2, 4, 4)).tolist(),
        "vocabulary_specialization": {"input": [0.5, 0.6]},
        "similarity": {"router": [0.0, 0.1]},
        "dropped_by_position": [[0.0, 0.0], [0.0, 0.2]],
        "top_ids": {"input": ids},
    }


def run(**kind: Any) -> Run:
    return Run("tiny", metrics(**kind), [], {}, [100, 200], analysis())


def test_a_sound_run_is_called_sound_and_a_leap_is_found() -> None:
    grades = {answer.question: answer.grade for answer in answers.health(run())}
    assert grades["Is the loss falling?"] == "good"
    assert grades["Does it spike?"] == "good"
    assert grades["Are experts balanced?"] == "watch"  # layer 1 ends at about 3.1
    assert answers.spikes(run(leap_at=120)) == [120]


@pytest.mark.parametrize(("drop", "grade"), [(0.001, "good"), (0.05, "watch"), (0.3, "bad")])
def test_drops_are_graded(drop: float, grade: str) -> None:
    assert answers.health(run(drop=drop))[-1].grade == grade


def test_routing_answers_name_experts_steps_and_places() -> None:
    text = {answer.question: answer.text for answer in answers.routing(run())}
    assert text["When did routing freeze?"] == (
        "75 % of the final experts are chosen at step 100 already; 80 % at step 150 of 200"
    )
    specialist = text["Which experts specialise in code?"]
    assert specialist.startswith("expert 2 in layer 1 (95 % of its tokens, 5 % elsewhere)")
    assert text["Where are tokens dropped?"] == (
        "most in layer 1; 0.0 % at the start of a sequence, 10.0 % at its end"
    )


def test_texts_of_one_family_are_asked_about_together() -> None:
    """Half of code's two texts goes to expert 2 of layer 1 less often than the other half."""
    found = analysis()
    found["domains"] = ["code.c", "code.python", "prose.books"]
    shares = np.array(found["domain_specialization"]["k"])  # [L, code and prose, E]
    weaker = shares[:, :1].copy()
    weaker[1, 0, 2] = 0.75
    parts = np.concatenate([shares[:, :1], weaker, shares[:, 1:]], axis=1)
    found["domain_specialization"]["k"] = parts.tolist()
    given = answers.routing(Run("tiny", metrics(), [], {}, [100, 200], found))
    text = {answer.question: answer.text for answer in given}
    code = text["Which experts specialise in code?"]
    assert code.startswith("expert 2 in layer 1 (85 % of its tokens, 5 % elsewhere)")
    assert "Which experts specialise in prose?" in text and len(text) == 4


def test_stages_become_bands_up_to_where_the_run_is() -> None:
    stages = [{"objective": "ul2", "until_tokens": 5_000}, {"objective": "causal"}]
    staged = Run("tiny", metrics(), [], {"data": {"stages": stages}}, [], None)
    found = [(stage.first_token, stage.last_token, stage.objective) for stage in staged.stages]
    assert found == [(0, 5_000, "ul2"), (5_000, 20_000, "causal")]


def test_stages_show_their_sources_objectives_and_drops() -> None:
    """The second stage begins in the middle; drops of a stage's first half do not count."""
    rows = metrics(drop=0.1)
    for row in rows:
        late, code = row["step"] > STEPS // 2, row["step"] % 2
        shares = (1 - code, code) if late else (1, 3)
        row |= {
            "stage": 1 + late,
            "source_tokens": dict(zip(("code", "prose"), shares, strict=True)),
        }
        settled = row["step"] > 3 * STEPS // 4
        row["dropped_by_position"] = {"layer_1": [0.0, 0.2 if settled else 0.1]}
    planned = [{"objective": "ul2", "until_tokens": 50 * STEPS}, {"objective": "causal"}]
    staged = Run("tiny", rows, [], {"data": {"stages": planned}}, [], None)
    found = [answer.text for answer in stages.answers(staged)]
    assert found == [
        "ul2; code 25.0 %, prose 75.0 %",
        "0.0 % of choices in the first part of a sequence, 10.0 % in the last of 2",
        "causal; code 50.0 %, prose 50.0 %",
        "0.0 % of choices in the first part of a sequence, 20.0 % in the last of 2",
    ]
    sources, drops = stages.of_stages([staged])
    assert [trace.name for trace in sources.data] == ["code", "prose"]
    assert [trace.name for trace in drops.data] == ["stage 1: ul2", "stage 2: causal"]
    assert stages.answers(run()) == [] and stages.of_stages([run()]) == []


def test_long_runs_are_thinned_to_means() -> None:
    rows = [{"tokens": n, "lm_loss": float(n % 2)} for n in range(10 * POINTS)]
    tokens, values = thinned(rows, "lm_loss")
    assert len(tokens) == POINTS and tokens[-1] == 10 * POINTS - 1
    assert values == [0.5] * POINTS
    assert thinned(rows, "absent") == ([], [])


def test_a_folder_without_metrics_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no metrics\.jsonl"):
        read(tmp_path)


def write_run(folder: Path, **kind: Any) -> Run:
    (folder / "analysis").mkdir(parents=True)
    lines = [json.dumps(row) for row in metrics(**kind)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "analysis" / "analysis.json").write_text(json.dumps(analysis()))
    return read(folder)


def test_the_page_stands_alone_and_escapes_what_it_shows(tmp_path: Path) -> None:
    write_page(
        [write_run(tmp_path / "a"), write_run(tmp_path / "b", drop=0.1)], tmp_path / "r.html"
    )
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    own = re.sub(r"<script>.*?</script>", "", page, count=1, flags=re.DOTALL)  # but for plotly
    assert not re.findall(r'(?:src|href)="(?!data:)', own)
    assert "&lt;b&gt;" in own and "<b>" not in own


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium to draw the page")
def test_chromium_draws_every_chart_without_an_error(tmp_path: Path) -> None:
    write_page([write_run(tmp_path / "a", drop=0.1)], tmp_path / "r.html")
    shown = subprocess.run(
        [
            *("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"),
            *("--enable-logging=stderr", "--virtual-time-budget=20000", "--window-size=390,900"),
            (tmp_path / "r.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    charts, drawn = shown.stdout.count('<div class="chart">'), shown.stdout.count("main-svg")
    assert charts > 10 and drawn >= charts
    assert "CONSOLE" not in shown.stderr
