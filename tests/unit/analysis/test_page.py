"""Report page: its text for synthetic runs, and rendering in a browser."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure

from moetron.common.errors import UserError
from moetron.moe.analysis import curves
from moetron.moe.analysis import figures as pictures
from moetron.moe.analysis.page import answers, overview
from moetron.moe.analysis.page import stage_charts as stages
from moetron.moe.analysis.page.build_page import write_page
from moetron.moe.analysis.page.charts import event_tokens, over_tokens
from moetron.moe.analysis.page.routing_charts import of_routing
from moetron.moe.analysis.page.runs import POINTS, Run, read, thinned

ROOT = Path(__file__).parents[3]
STEPS = 200


def test_the_page_is_written_without_torch_and_megatron() -> None:
    """Their import takes seconds, and prints warnings of what is not installed."""
    program = (
        "import sys, moetron.moe.analysis.page.build_page\n"
        "sys.exit(bool({'torch', 'megatron'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def metrics(drop: float | None = None, spike_at: int | None = None) -> list[dict[str, Any]]:
    rows = []
    for step in range(1, STEPS + 1):
        row: dict[str, Any] = {
            "step": step,
            "tokens": 100 * step,
            "lm_loss": 8.0 - step / 100 + (2.0 if step == spike_at else 0.01 * (step % 2)),
            "expert_load": {"layer_0": 1.5, "layer_1": 5.0 - step / 100},
            "grad_norm": 1.0,
            "lr": 1e-3,
            "tokens_per_s": 1000.0,
            "mfu": 0.4,
            "mfu_peak_tflops_per_s": 989.0,
            "mfu_peak_basis": "datasheet, dense bf16",
            "peak_memory_bytes": 3 * 2**30 + step,
        }
        if drop is not None:
            row |= {
                "dropped_fraction": drop,
                "dropped_fractions": {"layer_0": 0.0, "layer_1": drop},
            }
        rows.append(row)
    return rows


def start_row() -> dict[str, Any]:
    """Return a line of starts.jsonl."""
    layout = {"world_size": 4, "hosts": 2, "TP": 2, "PP": 1, "CP": 1, "DP": 2, "EP": 2, "ETP": 1}
    return {
        "step": 0,
        "origin": "random weights, seed 1",
        "parameters": 6_919_161_856,
        "active_parameters": 1_281_703_936,
        "vocab_size": 50_304,
        "layout": layout,
        "num_microbatches": 8,
        "sources": [{"name": "<b>web</b>", "tokens": 20_000, "epochs": 0.25}],
        "device": "NVIDIA H100 80GB HBM3",
        "threads": None,
        "implementation": "Transformer Engine",
        "precision": "bf16 with fp32 main parameters",
        "mfu_peak_tflops_per_s": 989.0,
        "mfu_peak_basis": "datasheet, dense bf16",
    }


def analysis() -> dict[str, Any]:
    """Return an analysis of 2 layers and 4 experts; code uses expert 2 of layer 1."""
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


def test_a_healthy_run_is_graded_good_and_a_spike_is_found() -> None:
    grades = {answer.question: answer.grade for answer in answers.health(run())}
    assert grades["Is the loss falling?"] == "good"
    assert grades["Does it spike?"] == "good"
    assert grades["Are experts balanced?"] == "watch"  # layer 1 ends at about 3.1
    assert answers.spikes(run(spike_at=120)) == [120]


@pytest.mark.parametrize(("drop", "grade"), [(0.001, "good"), (0.05, "watch"), (0.3, "bad")])
def test_drops_are_graded(drop: float, grade: str) -> None:
    assert answers.health(run(drop=drop))[-1].grade == grade


def test_routing_answers_name_experts_steps_and_places() -> None:
    text = {answer.question: answer.text for answer in answers.routing(run())}
    assert text["When did routing freeze?"] == (
        "75 % of the final experts are already chosen at step 100; 80 % at step 150 of 200"
    )
    specialist = text["Which experts specialise in code?"]
    assert specialist.startswith("expert 2 in layer 1 (95 % of its tokens, 5 % elsewhere)")
    assert text["Where are tokens dropped?"] == (
        "most in layer 1; 0.0 % at the start of a sequence, 10.0 % at its end"
    )


def test_texts_of_one_group_are_answered_together() -> None:
    """One of the two code texts uses expert 2 of layer 1 less often."""
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


def test_stages_become_bands_up_to_the_end_of_the_run() -> None:
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
    (folder / "starts.jsonl").write_text(json.dumps(start_row()) + "\n")
    return read(folder)


def own_text(page: Path) -> str:
    """Return the page without the plotting library."""
    text = page.read_text(encoding="utf-8")
    return re.sub(r"<script>.*?</script>", "", text, count=1, flags=re.DOTALL)


def test_the_page_is_self_contained_and_escaped(tmp_path: Path) -> None:
    hostile = [write_run(tmp_path / name, drop=0.1) for name in ("<script>alert(1)", "<b>b")]
    assert hostile[0].analysis is not None
    hostile[0].analysis["domains"] = ["</script><i>code", "prose"]
    write_page(hostile, tmp_path / "r.html")
    own = own_text(tmp_path / "r.html")
    assert not re.findall(r'(?:src|href)="(?!data:)', own)
    assert "&lt;b&gt;" in own and "&lt;script&gt;alert(1)" in own
    for tag in ("<b>", "<i>", "<script>alert"):
        assert tag not in own and tag.replace("<", "\\u003c").replace(">", "\\u003e") not in own


def test_the_head_of_the_page_shows_metrics_setup_and_hardware(tmp_path: Path) -> None:
    one = write_run(tmp_path / "a")
    figures = overview.glance(one)
    assert next(iter(figures)) == "validation loss"
    assert figures["parameters"] == ("6.92 B", "1.28 B active per token")
    assert figures["MFU"] == (
        "40 %",
        "of 989 TFLOP/s per rank, datasheet, dense bf16; mean of the last tenth",
    )
    assert figures["peak memory"] == ("3.00 GiB", "GPU memory of the largest rank")
    rows = overview.setup(one)
    assert rows["layout"].replace("\u00a0", " ") == (
        "4 ranks on 2 hosts: TP 2, PP 1, CP 1, DP 2, EP 2, ETP 1"
    )
    assert rows["hardware"] == "NVIDIA H100 80GB HBM3"
    assert rows["layers"] == "Transformer Engine implementation, bf16 with fp32 main parameters"
    assert rows["data"] == "1 source; epochs in the full run: <b>web</b> 0.25"
    for runs in ([one], [one, run()]):  # the other has no starts.jsonl
        write_page(runs, tmp_path / "r.html")
        own = own_text(tmp_path / "r.html")
        shown = [name for name in (*figures, *rows) if f">{name}<" in own]
        assert shown == [*figures, *rows]
    assert "not recorded" in own


def test_checkpoints_are_one_event() -> None:
    long = Run("tiny", metrics(), [], {}, list(range(1, 1001)), None, [start_row()])
    assert overview.events(long) == [
        (0, "started: 4 ranks on 2 hosts: TP 2, PP 1, CP 1, DP 2, EP 2, ETP 1"),
        (1000, "latest of 1,000 checkpoints kept: 1, 2, 3, ..., 998, 999, 1000"),
    ]


def test_every_chart_names_its_axes_and_no_scale_runs_below_zero() -> None:
    rows = metrics(drop=0.1)
    for row in rows:
        row |= {"aux_loss": 1.0, "z_loss": 2.0, "source_tokens": {"a": 1, "b": 3}}
        row["dropped_by_position"] = {"layer_1": [0.0, 0.2]}
    validation = [{"step": 9, "tokens": 9, "validation_loss": 1.0, "source_losses": {"a": 1.0}}]
    full = Run("tiny", rows, validation, {}, [100], analysis(), [start_row()])
    charts = [*over_tokens([full]), *stages.of_stages([full]), *of_routing(analysis())]
    assert len(charts) > 20
    for chart in charts:
        title, layout = chart.layout.title.text, chart.layout
        assert layout.xaxis.title.text and layout.yaxis.title.text, title
        for trace in chart.data:
            if trace.type == "heatmap":
                assert trace.colorbar.title.text, title
                assert trace.zmin >= 0 and trace.zmid is None, title
    [shares] = [chart for chart in charts if chart.layout.title.text.startswith("Tokens by source")]
    assert tuple(shares.layout.yaxis.range) == (0, 1)


def test_white_is_chance_on_the_scale_of_texts() -> None:
    [chart] = [c for c in of_routing(analysis()) if "layer 1" in c.layout.title.text
               and c.layout.title.text.startswith("Share of a text")]  # fmt: skip
    trace = chart.data[0]
    positions = [position for position, _ in trace.colorscale]
    middle = trace.colorscale[len(positions) // 2]
    assert (positions[0], positions[-1]) == (0, 1) and positions == sorted(positions)
    assert middle[0] * trace.zmax == pytest.approx(50)  # %: 2 of 4 experts
    assert middle[1] == "rgb(247, 247, 247)"


def test_every_picture_names_its_axes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = analysis() | {
        "spread": {"input": [0.1, 0.2]},
        "dropped_by_position": [[0.0, 0.1], [0.0, 0.2]],
    }
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    pictures.write(found, tmp_path)
    curves.draw(write_run(tmp_path / "a") and tmp_path / "a", tmp_path / "c.png")
    assert len(drawn) == 9
    for figure in drawn:
        named = [axes.get_ylabel() != "" for axes in figure.axes]
        assert named[0], figure.axes[0].get_title()
        for axes in figure.axes:
            is_bar = axes.get_label() == "<colorbar>"
            assert axes.get_ylabel() or (not is_bar and not axes.get_yticks().size), axes
            assert axes.get_xlabel() or is_bar, axes.get_title()


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


def test_the_quick_start_keeps_the_checkpoints_of_its_saturation_curve() -> None:
    """README and docs/analysis.md show the curve and its command."""
    recipe = yaml.safe_load((ROOT / "examples" / "quickstart" / "pretrain.yaml").read_text())
    kept = recipe["checkpoint"].get("keep_last")
    assert kept is None or kept * recipe["checkpoint"]["save_interval"] >= 700
    assert recipe["training"]["train_iters"] == 700
    page = (ROOT / "docs" / "analysis.md").read_text(encoding="utf-8")
    assert "python tools/analyze_routing.py runs/quickstart/run" in page


def event(step: int, kind: str, action: str, **extra: Any) -> dict[str, Any]:
    """Return a line of events.jsonl about a step of four samples of 25 tokens."""
    samples = [4 * (step - 1), 4 * step] if kind == "loss_spike" else None
    row = {"step": step, "kind": kind, "action": action, "text": "loss <9>", "samples": samples}
    return {**row, **extra}


def test_what_health_checks_found_is_told_and_drawn(tmp_path: Path) -> None:
    """Bands over the tokens of a skipped step, of an alarm, and of those rolled back."""
    found = [
        event(50, "loss_spike", "skip"),
        event(60, "dead_experts", "warn"),
        event(70, "straggler", "warn", ranks=[3]),
        event(90, "loss_spike", "rollback", rolled_back_to=80, next_token=9000),
        event(STEPS + 3, "hang", "stop", ranks=[1]),  # in a step that never ended
    ]
    bands = [(4900, 5000), (5900, 6000), (6900, 7000), (8000, 9000), (100 * STEPS, 100 * STEPS)]
    rows = [{**row, "samples": 4 * row["step"]} for row in metrics()]
    rows[49]["lm_loss"] = float("nan")  # of a skipped step
    for name, lines in (("metrics.jsonl", rows), ("events.jsonl", found)):
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = read(tmp_path)
    assert len(run.metrics) == STEPS - 1
    [answer] = [each for each in answers.health(run) if "health checks" in each.question]
    assert answer.grade == "bad"
    assert answer.text == "2 x loss spike, 1 x dead experts, 1 x straggler, 1 x hang"
    told = dict(overview.events(run))
    assert told[50] == "loss spike: loss <9>; skip; samples 196 to 199"
    assert "rollback to step 80" in told[90]
    assert told[STEPS + 3] == "hang: loss <9>; stop"
    assert [event_tokens(run, each) for each in found] == bands
    losses = over_tokens([run])[0]
    assert [(band.x0, band.x1) for band in losses.layout.shapes] == bands
    write_page([run], tmp_path / "report.html")
    assert "loss <9>" not in (tmp_path / "report.html").read_text(encoding="utf-8")
