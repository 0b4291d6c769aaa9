"""Head of the page: key metrics, model, data and hardware of a run."""

import re
from collections.abc import Mapping, Sequence

from moetron.moe.analysis.page.answers import spikes
from moetron.moe.analysis.page.runs import Row, Run
from moetron.moe.monitoring.start_text import counted, layout_text, peak_text

UNKNOWN = "not recorded"
LAST = "mean of the last tenth"
SHOWN_SOURCES = 6
SHOWN_CHECKPOINTS = 12


def glance(run: Run) -> dict[str, tuple[str, str]]:
    """Return the (value, basis) of each key metric, validation loss first."""
    last, start = run.metrics[-1], _start(run)
    steps = run.settings.get("training", {}).get("train_iters")
    found = {
        "validation loss": _validation(run),
        "training loss": (f"{run.tail('lm_loss').mean():.4f}", f"nats per token, {LAST}"),
        "step": (f"{last['step']:,}", f"of {steps:,}" if steps else "done"),
        "tokens": (_short(last["tokens"]), "trained on"),
        "parameters": _parameters(start),
        "tokens/s": (f"{run.tail('tokens_per_s').mean():,.0f}", f"all ranks, {LAST}"),
        "MFU": _mfu(run),
        "peak memory": _memory(run),
    }
    return found


def setup(run: Run) -> dict[str, str]:
    """Return model, batch, data, layout and hardware of the latest start, or nothing."""
    start = _start(run)
    if not start:
        return {}
    threads = f", {counted(start['threads'], 'thread')} per rank" if start["threads"] else ""
    return {
        "parameters": f"{start['parameters']:,}, {start['active_parameters']:,} active per token",
        **_of_settings(run.settings, start),
        "data": _data(start["sources"]),
        "layout": re.sub(r"(\w+) (\d+)", "\\1\u00a0\\2", layout_text(start["layout"])),
        "hardware": start["device"] + threads,
        "layers": f"{start['implementation']} implementation, {start['precision']}",
        "MFU": peak_text(start["mfu_peak_tflops_per_s"], start["mfu_peak_basis"]),
        "started from": start["origin"],
    }


def _of_settings(settings: Mapping[str, Row], start: Row) -> dict[str, str]:
    """Return architecture and batch from the settings of a checkpoint, or nothing."""
    if not settings:
        return {}
    model, moe, training = settings["model"], settings["moe"], settings["training"]
    count = moe["num_experts"]
    kind = f"{count:,} experts, top {moe['moe_router_topk']}" if count else "dense"
    return {
        "architecture": (
            f"{counted(model['num_layers'], 'layer')} of width {model['hidden_size']:,}, {kind}, "
            f"vocabulary {start['vocab_size']:,}"
        ),
        "batch": (
            f"{training['global_batch_size']:,} samples of {model['seq_length']:,} tokens: "
            f"{counted(start['num_microbatches'], 'micro-batch')} of "
            f"{training['micro_batch_size']:,} per data-parallel rank"
        ),
    }


def events(run: Run) -> list[tuple[int, str]]:
    """Return starts, stage changes, findings, loss spikes and checkpoints, by step."""
    found = [(row["step"], f"started: {layout_text(row['layout'])}") for row in run.starts]
    found += [(row["step"], finding(row)) for row in run.events]
    told = {row["step"] for row in run.events if row["kind"] == "loss_spike"}
    found += [(step, "loss spike") for step in spikes(run) if step not in told]
    for number, stage in enumerate(run.stages[1:], start=2):
        step = next(row["step"] for row in run.metrics if row["tokens"] > stage.first_token)
        found.append((step, f"stage {number} begins: {stage.objective}"))
    if saved := run.checkpoints:
        some = list(map(str, saved))
        if len(some) > SHOWN_CHECKPOINTS:
            some = [*some[:3], "...", *some[-3:]]
        text = f"latest of {counted(len(saved), 'checkpoint')} kept: {', '.join(some)}"
        found.append((saved[-1], text))
    return sorted(found)


def finding(event: Row) -> str:
    """Return an event of events.jsonl in words."""
    text = f"{event['kind'].replace('_', ' ')}: {event['text']}; {event['action']}"
    if "rolled_back_to" in event:
        text += f" to step {event['rolled_back_to']}"
    if event["samples"]:
        text += f"; samples {event['samples'][0]:,} to {event['samples'][1] - 1:,}"
    return text


def _start(run: Run) -> Row:
    return run.starts[-1] if run.starts else {}


def _validation(run: Run) -> tuple[str, str]:
    if not run.validation:
        return "none", "no evaluation yet"
    row = run.validation[-1]
    bits = f", {row['bits_per_byte']:.3f} bits per byte" if "bits_per_byte" in row else ""
    return f"{row['validation_loss']:.4f}", f"nats per token at step {row['step']:,}{bits}"


def _mfu(run: Run) -> tuple[str, str]:
    values, last = run.tail("mfu"), run.metrics[-1]
    if not values.size:
        return UNKNOWN, "peak of the device unknown"
    peak = last.get("mfu_peak_tflops_per_s")
    basis = f"{last['mfu_peak_basis'].partition(':')[0]}" if peak else "its basis is not recorded"
    of = f"of {peak:.4g} TFLOP/s per rank, {basis}" if peak else basis
    return f"{100 * values.mean():.3g} %", f"{of}; {LAST}"


def _memory(run: Run) -> tuple[str, str]:
    peak = max((row.get("peak_memory_bytes", 0) for row in run.metrics), default=0)
    if not peak:
        return UNKNOWN, "in this run's metrics.jsonl"
    kind = "host" if _start(run).get("device", "CPU").startswith("CPU") else "GPU"
    return f"{peak / 2**30:.2f} GiB", f"{kind} memory of the largest rank"


def _parameters(start: Row) -> tuple[str, str]:
    if not start:
        return UNKNOWN, "the run has no starts.jsonl"
    return _short(start["parameters"]), f"{_short(start['active_parameters'])} active per token"


def _data(sources: Sequence[Row]) -> str:
    if not sources:
        return "synthetic samples"
    most = sorted(sources, key=lambda use: -use["tokens"])
    parts = [f"{use['name']} {use['epochs']:.3g}" for use in most[:SHOWN_SOURCES]]
    more = f", {len(most) - SHOWN_SOURCES} more" if len(most) > SHOWN_SOURCES else ""
    count = counted(len(most), "source")
    return f"{count}; epochs in the full run: {', '.join(parts)}{more}"


def _short(number: int) -> str:
    """Format a count with three digits and a unit letter."""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g} {letter}"
    return str(number)
