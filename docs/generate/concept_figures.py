"""Figures of docs/concepts/: parts of each rank, capacity, stages, resume."""

from math import ceil
from pathlib import Path
from typing import Any

from docs.generate.svg import AMBER, BLUE, FAINT, GREEN, GREY, RED, VIOLET, Picture
from moetron.moe.config import recipe
from moetron.moe.config.schema.pipeline_split import stage_chunks
from moetron.moe.config.schema.settings import Settings
from moetron.moe.plan.layout import position

ROOT = Path(__file__).resolve().parents[2]
LAYERS, EXPERTS, HEADS, RANKS = 4, 8, 4, 8


def _example() -> Settings:
    """Return settings for eight ranks: TP2, PP2, EP2 with ETP1, two data-parallel copies."""
    return Settings.model_validate(
        {
            "model": {
                "num_layers": LAYERS,
                "hidden_size": 64,
                "num_attention_heads": HEADS,
                "seq_length": 128,
            },
            "moe": {"num_experts": EXPERTS},
            "parallel": {
                "tensor_model_parallel_size": 2,
                "pipeline_model_parallel_size": 2,
                "expert_model_parallel_size": 2,
                "expert_tensor_parallel_size": 1,
            },
            "training": {"train_iters": 1, "micro_batch_size": 1, "global_batch_size": 2},
            "learning_rate": {"lr": 1e-3},
        }
    )


def layout() -> str:
    """Draw the layers, heads, experts and samples of each rank."""
    settings, picture = _example(), Picture(980, 400, "What each of eight ranks holds")
    picture.text(20, 30, "TP 2, PP 2, EP 2, ETP 1, 8 ranks", size=16, bold=True)
    picture.text(20, 52, "4 layers, 4 heads, 8 experts; what differs between ranks", colour=FAINT)
    for rank in range(RANKS):
        place = position(settings, RANKS, rank)
        column = rank % 4
        x, y = 20 + 238 * column, 75 + 160 * place.pipeline
        picture.box(x, y, 226, 145, GREY)
        picture.text(x + 12, y + 22, f"rank {rank}", bold=True)
        layers = [layer for chunk in stage_chunks(settings, place.pipeline) for layer in chunk]
        heads = HEADS // 2
        first, held = place.tensor * heads, EXPERTS // 2
        rows = (
            (BLUE, f"layers {layers[0]} and {layers[-1]}"),
            (VIOLET, f"heads {first} and {first + 1}"),
            (AMBER, f"experts {place.expert * held} to {place.expert * held + held - 1}"),
            (GREEN, f"batch part {place.data}"),
        )
        for at, (colour, words) in enumerate(rows):
            picture.box(x + 10, y + 32 + 27 * at, 206, 23, colour)
            picture.text(x + 20, y + 48 + 27 * at, words, size=13)
    return picture.document()


_TOKENS = {"the": 0, "cat": 0, "sat": 1, "on": 0, "a": 3, "mat": 1, "ate": 2, "and": 0}
"""Token -> expert, in order of position."""


def capacity() -> str:
    """Draw tokens, experts with slots, and a dropped token."""
    factor, tokens, experts = 1.25, len(_TOKENS), 4
    slots = ceil(factor * tokens / experts)
    picture = Picture(980, 330, "Capacity: slots of an expert, and dropped tokens")
    title = f"{tokens} tokens, {experts} experts, top-1, capacity factor {factor}, policy position"
    picture.text(20, 28, title, bold=True, size=16)
    formula = f"slots of an expert = ceil({factor} x 1 x {tokens} / {experts}) = {slots}"
    picture.text(20, 50, formula, colour=FAINT)
    taken = [0] * experts
    for at, (name, expert) in enumerate(_TOKENS.items()):
        x, kept = 40 + 112 * at, taken[expert] < slots
        picture.box(x, 70, 92, 30, BLUE if kept else RED)
        picture.text(x + 46, 90, name, anchor="middle")
        if kept:
            slot = _slot(expert, taken[expert])
            picture.line(x + 46, 100, slot + 29, 206, arrow=True, colour=FAINT)
            picture.box(slot, 210, 58, 30, BLUE)
            picture.text(slot + 29, 230, name, anchor="middle", size=13)
        else:
            picture.text(x + 46, 118, "no slot left:", anchor="middle", size=12)
            picture.text(x + 46, 133, "residual only", anchor="middle", size=12)
        taken[expert] += 1
    for expert in range(experts):
        for slot in range(min(taken[expert], slots), slots):
            picture.box(_slot(expert, slot), 210, 58, 30, "#ffffff", FAINT)
        picture.text(_slot(expert, 1) + 29, 265, f"expert {expert}", anchor="middle", bold=True)
    picture.text(20, 305, "Dropless (no capacity factor): no token is dropped; loads differ.")
    return picture.document()


def _slot(expert: int, number: int) -> int:
    """Return the left edge of an expert's slot."""
    return 40 + 232 * expert + 66 * number


def _code_share(words: list[Any]) -> float:
    """Return the percentage of a data path's weights on code."""
    pairs = list(zip(words[::2], words[1::2], strict=True))
    code = sum(weight for weight, name in pairs if "github" in name or "stack_dedup" in name)
    return 100 * code / sum(weight for weight, _ in pairs)


def stages() -> str:
    """Draw OpenMoE-8B's two stages as bars, and a source's cursor."""
    folder = ROOT / "examples" / "openmoe_8b"
    first, second = recipe.read(folder / "data.yaml")["data"]["stages"]
    run = recipe.read(folder / "pretrain.yaml")
    samples = run["training"]["train_iters"] * run["training"]["global_batch_size"]
    switch_b, end_b = first["until_tokens"] / 1e9, samples * run["model"]["seq_length"] / 1e9
    picture = Picture(980, 300, "Two stages of one run")
    picture.text(20, 28, "One run, two stages (examples/openmoe_8b)", bold=True, size=16)
    left, width = 130, 810
    switch = left + width * switch_b / end_b
    shares = [f"{_code_share(stage['data_path']):g} %" for stage in (first, second)]
    rows = (
        ("objective", first["objective"], second["objective"], VIOLET, GREEN),
        ("code", *shares, AMBER, AMBER),
    )
    for at, (name, early, late, colour, other) in enumerate(rows):
        y = 60 + 50 * at
        picture.text(20, y + 22, name)
        picture.box(left, y, switch - left, 34, colour)
        picture.box(switch, y, left + width - switch, 34, other)
        picture.text((left + switch) / 2, y + 22, early, anchor="middle")
        picture.text((switch + left + width) / 2, y + 22, late, anchor="middle")
    picture.text(20, 182, "a source")
    picture.line(left, 178, switch - 4, 178, arrow=True)
    picture.line(switch, 178, left + width, 178, arrow=True)
    picture.text(switch + 8, 200, "other windows: reshuffled", size=13, colour=FAINT)
    picture.line(switch, 52, switch, 222, colour=FAINT)
    points = ((left, "0"), (switch, f"{switch_b:g} B tokens"), (left + width, f"{end_b:,.0f} B"))
    for x, words in points:
        picture.text(x, 240, words, anchor="middle", size=13)
    picture.text(
        20,
        280,
        "The switch is inside the run, without a relaunch.",
    )
    return picture.document()


def resume() -> str:
    """Draw a run that is killed and resumed in another layout, and the order of a save."""
    picture = Picture(980, 330, "Resume")
    picture.text(20, 28, "Killed at step 137, resumed from step 100", bold=True, size=16)
    left, scale = 150, 3.6
    bars = ((60, 0, 100, BLUE, "EP 2"), (60, 100, 137, RED, "lost"), (120, 100, 200, GREEN, "TP 2"))
    for y, start, stop, colour, words in bars:
        picture.box(left + start * scale, y, (stop - start) * scale, 34, colour)
        picture.text(left + (start + stop) / 2 * scale, y + 22, words, anchor="middle")
    picture.text(20, 82, "first job")
    picture.text(20, 142, "second job")
    picture.line(left + 100 * scale, 50, left + 100 * scale, 170, colour=FAINT)
    for step in (0, 100, 200):
        picture.text(left + step * scale, 188, f"step {step}", anchor="middle", size=13)
    boxes = (
        "step_0000100.tmp written",
        "synced, SHA256SUMS",
        "renamed step_0000100",
        "latest -> step_0000100",
    )
    picture.text(
        20, 228, "A save, in this order; a crash between two steps leaves the previous checkpoint:"
    )
    for at, words in enumerate(boxes):
        x = 20 + 240 * at
        picture.box(x, 245, 210, 40, AMBER)
        picture.text(x + 105, 270, words, anchor="middle", size=13)
        if at:
            picture.line(x - 28, 265, x - 2, 265, arrow=True)
    picture.text(20, 315, "The position is one number: trained samples.", colour=FAINT)
    return picture.document()


def pages() -> dict[str, str]:
    """Return path -> text."""
    figures = {"layout": layout, "capacity": capacity, "stages": stages, "resume": resume}
    return {f"docs/images/{name}.svg": draw() for name, draw in figures.items()}
