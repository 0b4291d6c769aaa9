"""Lines of the start block that the report page also shows; imports no torch."""


def layout_text(layout: dict[str, int]) -> str:
    """Return the layout in one line: ranks, hosts, dense sizes, expert sizes."""
    text = f"{counted(layout['world_size'], 'rank')} on {counted(layout['hosts'], 'host')}"
    sizes = ("TP", "PP", "VPP", "CP", "DP", "EP", "ETP", "expert DP")
    return f"{text}: " + ", ".join(f"{name} {layout[name]:,}" for name in sizes if name in layout)


def peak_text(tflops_per_s: float | None, basis: str | None) -> str:
    """Return the reference of MFU as text."""
    if tflops_per_s is None:
        return "none: the peak of this device is unknown, give --peak-tflops-per-s"
    return f"of {tflops_per_s:.4g} TFLOP/s a rank, {basis}"


def counted(number: int, noun: str) -> str:
    """Return a number and its noun, plural unless the number is 1."""
    plural = "es" if noun.endswith("ch") else "s"
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}{plural}"
