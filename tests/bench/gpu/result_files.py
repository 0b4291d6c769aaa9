"""Files of results, rewritten after every variant: a crash loses nothing."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Result = dict[str, Any]

_COLUMNS = (
    ("variant", "name", "{}"),
    ("tokens/s", "tokens_per_s", "{:,.0f}"),
    ("wall ms", "step_ms", "{:.1f}"),
    ("device ms", "device_ms", "{:.1f}"),
    ("wall/device", "wall_over_device", "{:.3f}"),
    ("kernels", "kernels", "{}"),
    ("syncs", "syncs", "{}"),
    ("TFLOP/s", "tflops_per_s", "{:.0f}"),
    ("of peak", "of_peak", "{:.1%}"),
    ("peak GiB", "peak_gib", "{:.1f}"),
    ("loss", "loss", "{:.4f}"),
    ("x megatron", "over_megatron", "{:.2f}"),
    ("x transformers", "over_transformers", "{:.2f}"),
    ("x base", "over_base", "{:.3f}"),
    ("device - base, ms", "device_less_base_ms", "{:+.1f}"),
)


def with_ratios(rows: Sequence[Result]) -> list[Result]:
    """Return the rows with their speed over the fastest of megatron-core's and transformers'.

    Also over that of their base: the row that is named as the first word of theirs.
    """
    best = {
        kind: max((row.get("tokens_per_s", 0.0) for row in rows if row["kind"] == kind), default=0)
        for kind in ("megatron", "transformers")
    }
    measured = {row["name"]: row for row in rows if "tokens_per_s" in row}
    found = []
    for row in rows:
        ratios = {
            f"over_{kind}": row["tokens_per_s"] / rate
            for kind, rate in best.items()
            if rate and "tokens_per_s" in row
        }
        base = measured.get(row["name"].partition(" ")[0], row)
        if base is not row and "tokens_per_s" in row:
            ratios["over_base"] = row["tokens_per_s"] / base["tokens_per_s"]
            if None not in (times := (row["device_ms"], base["device_ms"])):
                ratios["device_less_base_ms"] = times[0] - times[1]
        found.append({**row, **ratios})
    return found


def markdown(head: Result, rows: Sequence[Result]) -> str:
    """Return the tables of a bench."""
    lines = [f"# GPU bench: {head['device']}", "", head["shape"], ""]
    lines += [f"- {name}: {_rounded(value)}" for name, value in head["machine"].items()]
    lines += [f"- {note}" for note in head["notes"]]
    lines += ["", _line([title for title, _, _ in _COLUMNS]), _line(["---"] * len(_COLUMNS))]
    for row in with_ratios(rows):
        if "error" in row:
            lines.append(_line([row["name"], row["error"]]))
        else:
            lines.append(_line([_cell(row, key, form) for _, key, form in _COLUMNS]))
    done = [row for row in rows if "error" not in row]
    kinds = list(dict.fromkeys(kind for row in done for kind in row["kinds_ms"]))
    if kinds:
        lines += ["", "Device ms a step, summed by kind of kernel:", ""]
        lines += [_line(["variant", *kinds]), _line(["---"] * (1 + len(kinds)))]
        for row in done:
            cells = [f"{row['kinds_ms'].get(kind, 0):.1f}" for kind in kinds]
            lines.append(_line([row["name"], *cells]))
    left = [(row["name"], row["left_gib"]) for row in rows if (row.get("left_gib") or 0) > 0.5]
    lines += ["", *(f"- memory that {name} did not free: {gib:.1f} GiB" for name, gib in left)]
    sites = [(row["name"], row["sync_sites"]) for row in done if row["sync_sites"]]
    if sites:
        lines += ["", "Blocking calls of a step, by place:", ""]
        for name, found in sites:
            text = ", ".join(f"{count} {place}" for place, count in list(found.items())[:8])
            lines.append(f"- {name}: {text}")
    lines += ["", "Flags and fields:", ""]
    lines += [f"- {row['name']}: `{row['text']}`" for row in rows]
    return "\n".join(lines) + "\n"


def write(folder: Path, head: Result, rows: Sequence[Result]) -> None:
    """Write ``bench.json`` and ``bench.md``."""
    text = json.dumps({**head, "rows": with_ratios(rows)}, indent=1)
    (folder / "bench.json").write_text(text + "\n", encoding="utf-8")
    (folder / "bench.md").write_text(markdown(head, rows), encoding="utf-8")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(row: Result, key: str, form: str) -> str:
    value = row.get(key)
    return "" if value is None else form.format(value)


def _rounded(value: Any) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)
