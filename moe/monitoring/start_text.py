"""Lines of the start block that the report page shows too; imports no torch."""


def layout_text(layout: dict[str, int]) -> str:
    """The layout in one line: ranks, hosts, dense sizes, then those of experts."""
    text = f"{counted(layout['world_size'], 'rank')} on {counted(layout['hosts'], 'host')}"
    sizes = ("TP", "PP", "VPP", "CP", "DP", "EP", "ETP", "expert DP")
    return f"{text}: " + ", ".join(f"{name} {layout[name]:,}" for name in sizes if name in layout)


def peak_text(tflops_per_s: float | None, basis: str | None) -> str:
    """What MFU is measured against."""
    if tflops_per_s is None:
        return "none: the peak of this device is unknown, give --peak-tflops-per-s"
    return f"of {tflops_per_s:.4g} TFLOP/s a rank, {basis}"


def counted(number: int, noun: str) -> str:
    """A number and its noun, in the plural unless it is one."""
    plural = "es" if noun.endswith("ch") else "s"
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}{plural}"
