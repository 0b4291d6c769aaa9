"""Heat map of expert load for TensorBoard and W&B."""

from collections.abc import Mapping

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_ROWS_NAMED = 24
"""Maximum number of rows labelled with their layer."""


def draw(loads: Mapping[str, np.ndarray]) -> Figure:
    """Draw a row for each layer with experts, a column for each expert.

    Blue: idle; grey: the mean load; red: twice the mean or more.

    Args:
        loads: for each layer every expert's load over the mean load, [E].
    """
    load_LE = np.stack(list(loads.values()))
    layers, experts = load_LE.shape
    width, height = np.clip(2.5 + 0.14 * experts, 4.5, 16.0), np.clip(1.4 + 0.22 * layers, 2.2, 14)
    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(load_LE, cmap="coolwarm", vmin=0, vmax=2, aspect="auto")
    axes.set(title="Load of every expert", xlabel="expert", ylabel="layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    named = range(0, layers, -(-layers // _ROWS_NAMED))
    names = [name.removeprefix("layer_") for name in loads]
    axes.set_yticks(named, [names[row] for row in named])
    bar = figure.colorbar(
        image, ax=axes, extend="max", ticks=[0, 1, 2], aspect=4 * height, pad=0.01
    )
    bar.set_label("load / even share")
    return figure


def pixels(figure: Figure) -> np.ndarray:
    """Render a figure, uint8 [height, width, RGB]."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]
