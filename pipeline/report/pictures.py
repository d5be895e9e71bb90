"""Pictures made of boxes: means on a ruler with their intervals, and time cut into its parts.

They are grids of text and coloured boxes, not drawings: names stay readable on a phone.
"""

from .format import DASH, ends, finite, fixed, seconds, ticks
from .markup import Markup, join, small, tag

PARTS = (
    ("data_s", "data"),
    ("forward_s", "forward"),
    ("backward_s", "backward"),
    ("optimizer_s", "optimizer"),
)
FAR = 3.0  # the picture ends at this many times the distance between the best row and the trunk


def forest(rows: list[dict]) -> Markup:
    """Return every row's mean as a dot on one common ruler, its interval as a bar; far rows become
    an arrow."""
    rows = [row for row in rows if finite(row.get("mean")) is not None]
    if len(rows) < 2:
        return Markup("")
    low = min(
        v for row in rows for v in (row["mean"], ends(row.get("interval"))[0]) if v is not None
    )
    marks = ticks(low, _far(rows, low), 5)
    stack = next((row["mean"] for row in rows if row.get("is_stack")), None)
    ruler = [tag("i", f"{mark:g}", style=f"left:{_percent(mark, marks)}") for mark in marks]
    top = tag(
        "div",
        tag("span", "bits per byte, mean"),
        tag("span", tag("div", *ruler, class_="plot"), class_="track"),
        tag("span"),
        class_="ruler",
    )
    lines = [_forest_row(row, marks, stack) for row in rows]
    reading = (
        "Further left is better. Dot: mean over domains; bar: its 95 % interval; "
        "dashed: the stack; hollow: the oracle; arrow: off the scale."
    )
    return join(tag("div", top, *lines, class_="forest"), tag("p", reading, class_="read"))


def _forest_row(row: dict, marks: list[float], stack: float | None) -> Markup:
    mean, (low, high) = row["mean"], ends(row.get("interval"))
    parts = (
        [tag("i", class_="at", style=f"left:{_percent(stack, marks)}")]
        if finite(stack) is not None
        else []
    )
    if mean > marks[-1]:
        parts.append(tag("i", "→", class_="out"))
    else:
        if low is not None and high is not None:
            left, right = (min(max(v, marks[0]), marks[-1]) for v in (low, high))
            width = f"{100 * (right - left) / (marks[-1] - marks[0]):.2f}%"
            parts.append(
                tag("i", class_="span", style=f"left:{_percent(left, marks)};width:{width}")
            )
        parts.append(tag("i", class_="dot", style=f"left:{_percent(mean, marks)}"))
    look = " ".join(
        word
        for word, on in (("main", row.get("is_stack")), ("oracle", row.get("kind") == "oracle"))
        if on
    )
    name = tag("span", str(row.get("row", DASH)), small(str(row.get("axis") or "")), class_="name")
    track = tag("span", tag("div", *parts, class_="plot"), class_="track")
    return tag("div", name, track, tag("span", fixed(mean), class_="value"), class_=look)


def _far(rows: list[dict], low: float) -> float:
    """Return the right end of the ruler: rows much worse than the trunk would squeeze all others
    together."""
    means = [row["mean"] for row in rows]
    trunk = next((row["mean"] for row in rows if row.get("kind") == "part"), max(means))
    limit = low + FAR * max(trunk - low, 1e-3)
    near = [row for row in rows if row["mean"] <= limit]
    return max(
        v for row in near for v in (row["mean"], ends(row.get("interval"))[1]) if v is not None
    )


def _percent(value: float, marks: list[float]) -> str:
    return f"{100 * (value - marks[0]) / (marks[-1] - marks[0]):.2f}%"


def bars(report: dict) -> Markup:
    """Return one bar per job, as long as its time, cut into what the time went to."""
    jobs = [
        job for job in (report.get("speed") or {}).get("jobs") or () if finite(job.get("seconds"))
    ]
    longest = max((job["seconds"] for job in jobs), default=0)
    out = []
    for job in jobs:
        spans = [finite(job.get(key)) or 0.0 for key, _ in PARTS]
        spans.append(max(0.0, job["seconds"] - sum(spans)))
        pieces = [
            tag("i", class_=f"c{_colour(i)}", style=f"width:{100 * span / longest:.2f}%")
            for i, span in enumerate(spans)
            if span
        ]
        out += [
            tag("span", str(job.get("job", DASH))),
            tag("div", *pieces, class_="bar"),
            tag("span", seconds(job["seconds"])),
        ]
    names = [name for _, name in PARTS] + ["other"]
    keys = [
        tag("span", tag("i", class_=f"key block c{_colour(i)}"), name)
        for i, name in enumerate(names)
    ]
    return (
        join(tag("div", *out, class_="bars"), tag("div", *keys, class_="legend"))
        if out
        else Markup("")
    )


def _colour(part: int) -> int:
    return (5, 0, 4, 1, 7)[part]
