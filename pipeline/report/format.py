"""Numbers as a reader wants them: few digits, units, thousands in steps.

Every function takes whatever a report or a history may hold and returns DASH for None, NaN,
infinity and anything not a number.
"""

import math
from collections.abc import Callable

from .schema.base import Interval

DASH = "–"
MINUS = "−"
# Decimal places that count in a comparison: 0.93 less 0.91 is above 0.02 in the seventeenth
MOST_PLACES = 12
STEPS = (
    (1e12, " T"),
    (1e9, " G"),
    (1e6, " M"),
    (1e3, " k"),
)


def finite(value: object) -> float | None:
    """Return value as a float, or None where it is no finite number."""
    # bool is an int to Python, but True is no quantity
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def fixed(value: object, places: int = 3) -> str:
    """Write value with a fixed number of decimal places."""
    number = finite(value)
    return DASH if number is None else _minus(f"{number:,.{places}f}")


def signed(value: object, places: int = 3) -> str:
    """Write value with its sign, also when it is positive."""
    number = finite(value)
    return DASH if number is None else _minus(f"{number:+,.{places}f}")


def figures(value: object) -> str:
    """Write value with three significant digits and no exponent: 8.41, 52.3, 1,234."""
    number = finite(value)
    if number is None:
        return DASH
    # the power of ten of the first digit; zero has none
    size = math.floor(math.log10(abs(number))) if number else 0
    places = max(0, 2 - size)
    places = min(6, places)
    return _minus(f"{number:,.{places}f}")


def rate(value: object) -> str:
    """Return a learning rate as people write it, or a dash."""
    number = finite(value)
    return DASH if number is None else f"{number:g}"


def count(value: object) -> str:
    """Write a count in steps of a thousand: 812, 33.6 k, 1.05 M, 67 G."""
    number = finite(value)
    if number is None:
        return DASH
    for size, suffix in STEPS:
        # 999.6 k is written with three digits, as 1 M: the step is taken where rounding takes it
        if abs(number) >= size * 0.9995:
            return _minus(f"{number / size:.3g}{suffix}")
    return _minus(f"{number:.3g}")


def share(value: object, places: int = 0) -> str:
    """Write a fraction as a percentage."""
    number = finite(value)
    return DASH if number is None else _minus(f"{100 * number:.{places}f} %")


def reaches(value: float, least: float) -> bool:
    """Return whether value is at least `least`, as far as both can be written."""
    return round(value, MOST_PLACES) >= round(least, MOST_PLACES)


def places(holds: Callable[..., bool], *values: float, least: int) -> int:
    """Return how many decimal places, at least `least`, let values be rounded without changing
    whether `holds` holds of them."""
    wanted = holds(*values)
    for number in range(least, MOST_PLACES):
        rounded = [round(value, number) for value in values]
        if holds(*rounded) == wanted:
            return number
    return MOST_PLACES


def limit(value: float) -> str:
    """Write a fraction that is asked for as a percentage, with the digits that it was given."""
    return f"{100 * value:.12g} %"


def beside_limit(value: float, least: float, decimals: int) -> str:
    """Write a fraction as a percentage with as many decimals as show whether it reaches `least`."""
    number = places(lambda each: reaches(each, least), value, least=decimals + 2)
    rounded = round(value, number)
    return f"{100 * rounded:.{number - 2}f} %"


def seconds(value: object) -> str:
    """Write a duration: 4.2 s, 3 min 20 s, 2 h 05 min."""
    number = finite(value)
    if number is None:
        return DASH
    # from here on "60.0 s" would be written
    if number < 59.95:
        return f"{number:.1f} s"
    whole = round(number)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def megabytes(value: object) -> str:
    """Write a size given in MB as MB or GB."""
    number = finite(value)
    if number is None:
        return DASH
    return f"{number:,.0f} MB" if number < 9999.5 else f"{number / 1000:.1f} GB"


def interval(pair: Interval | None) -> str:
    """Write an interval [low, high]; an empty string where either end is missing."""
    low, high = ends(pair)
    return "" if low is None or high is None else f"[{fixed(low)}, {fixed(high)}]"


def percent_interval(pair: Interval | None) -> str:
    """Write an interval of shares in whole per cent, as [74, 82]; empty as `interval` is."""
    low, high = ends(pair)
    if low is None or high is None:
        return ""
    return f"[{percent(low)}, {percent(high)}]"


def percent(value: object) -> str:
    """Write a fraction in whole per cent, without the sign for it."""
    return share(value).removesuffix(" %")


def ends(pair: Interval | None) -> tuple[float | None, float | None]:
    """Return the two ends of an interval, None for each that is missing."""
    if pair is None:
        return None, None
    low, high = pair
    return finite(low), finite(high)


def ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Return evenly spaced round numbers, the first at or below low, the last at or above high.

    There are about as many steps as wanted.
    """
    if high <= low:
        high = low + (abs(low) * 0.1 or 1.0)
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    # 0.999 and 1e-9 forgive the rounding of a range that ends on a tick
    step = 10 * power
    for factor in (5, 2.5, 2, 1):
        if factor * power >= rough * 0.999:
            step = factor * power
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _minus(text: str) -> str:
    """Use the true minus sign, and none at all before a number that was rounded to zero."""
    if text[:1] in "+-" and not text.strip("+-0.,% "):
        return text[1:]
    return text.replace("-", MINUS)
