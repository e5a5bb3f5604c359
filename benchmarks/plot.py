"""Plots of what was measured, as SVG files that belong to the project (`benchmarks/plots`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl

from benchmarks.report import Picture

mpl.use("svg")
from matplotlib import pyplot as plt

FOLDER = Path(__file__).parent / "plots"
LOOK = {
    "svg.fonttype": "none",
    "svg.hashsalt": "vmfleece",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}


def lines(
    name: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    title: str,
    x: str,
    y: str,
    logarithmic: bool = False,
) -> Picture:
    """Draw lines through points (x, y), one for each name, into `plots/NAME.svg`."""
    FOLDER.mkdir(exist_ok=True)
    with mpl.rc_context(LOOK):
        figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
        for label, points in series.items():
            axes.plot(*zip(*points, strict=True), label=label)
        axes.set(title=title, xlabel=x, ylabel=y)
        if logarithmic:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        axes.legend()
        figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None}, facecolor="white")
        plt.close(figure)
    return Picture(f"plots/{name}.svg", title)
