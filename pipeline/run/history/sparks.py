"""Curves that are a few characters wide, for terminals."""

from collections.abc import Sequence

BLOCKS = "▁▂▃▄▅▆▇█"
WIDTH = 24


def spark(values: Sequence[float], width: int = WIDTH) -> str:
    """Return values as a line of blocks, the lowest to the highest; of many the mean of those that
    share a place."""
    if not values:
        return ""
    places = min(width, len(values))
    means = []
    for place in range(places):
        start = place * len(values) // places
        end = (place + 1) * len(values) // places
        part = values[start:end]
        means.append(sum(part) / len(part))
    low = min(means)
    span = max(means) - low
    line = ""
    for mean in means:
        # a level line lies at the bottom
        share = (mean - low) / span if span else 0.0
        line += BLOCKS[round(share * (len(BLOCKS) - 1))]
    return line
