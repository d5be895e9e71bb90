"""The losses of each stage as PNG files, for what shows no pages: matplotlib draws them."""

import math
from collections.abc import Iterator
from pathlib import Path

from ..style import LIGHT
from .drawn import CurveChart, HistoryPage, StageSection

LOSSES = ("validation loss", "training loss")
COLOURS = 8
DASHES = ("-", "--", ":", "-.")


def draw_losses(page: HistoryPage, beside: Path) -> Iterator[Path]:
    """Write a picture for each stage beside a file; yield the path of each. Raises OSError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    for section in page.sections:
        charts = _losses(section)
        if not charts:
            continue
        figure = Figure(figsize=(5.2 * len(charts), 3.6), layout="constrained")
        # not pyplot, which would look for a screen
        FigureCanvasAgg(figure)
        for number, chart in enumerate(charts, 1):
            axes = figure.add_subplot(1, len(charts), number)
            for line in chart.lines:
                run = line.runs[0]
                # a gap where nothing was measured
                values = [math.nan if value is None else value for value in line.values]
                axes.plot(
                    page.axes[line.axis].step,
                    values,
                    color=LIGHT[f"c{run % COLOURS}"],
                    linestyle=DASHES[line.dash % len(DASHES)],
                    label=f"{page.runs[run].id}: {line.name}",
                    linewidth=1.3,
                )
            axes.set_title(f"{section.title}: {chart.title}", fontsize=10)
            axes.set_xlabel("steps")
            axes.set_ylabel(chart.unit)
            axes.grid(color=LIGHT["rule"])
            if len(chart.lines) <= COLOURS:
                axes.legend(fontsize=6)
        path = beside.with_name(f"{beside.stem}-{section.title}.png")
        # neither a time nor a version, so that equal pages have equal pictures
        figure.savefig(path, dpi=130, metadata={"Software": None})
        yield path


def _losses(section: StageSection) -> list[CurveChart]:
    return [chart for chart in section.charts if chart.title in LOSSES]
