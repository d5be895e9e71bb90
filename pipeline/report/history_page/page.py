"""The page of histories as one HTML file; the same histories always give the same bytes."""

import json
import re
from dataclasses import asdict
from functools import cache
from pathlib import Path

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

from ..page import FORBIDDEN
from ..style import style
from .drawn import HistoryPage
from .template import PAGE, RULES

HERE = Path(__file__).parent
LIBRARY = HERE / "uplot" / "uPlot.iife.min.js"
LIBRARY_STYLE = HERE / "uplot" / "uPlot.min.css"
SCRIPT = HERE / "script.js"
# What would end a script in the middle of a text.
ENDING = re.compile(r"<(?=[/!])")


def history_page(page: HistoryPage) -> str:
    """Return the whole file as text, to be written as UTF-8."""
    environment = Environment(
        loader=DictLoader({"page.html": PAGE}),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    values = asdict(page)
    drawn = {name: values[name] for name in ("runs", "axes", "sections")}
    text = environment.get_template("page.html").render(
        page=page,
        style=Markup(f"{style()}{_read(LIBRARY_STYLE)}{RULES}"),
        library=Markup(_read(LIBRARY)),
        script=Markup(_read(SCRIPT)),
        data=Markup(_data(drawn)),
    )
    # names may hold anything; what escaping leaves must still be writable as UTF-8
    return FORBIDDEN.sub("\ufffd", text)


def _data(values: dict) -> str:
    text = json.dumps(values, separators=(",", ":"), allow_nan=False)
    return ENDING.sub(r"\\u003c", text)


@cache
def _read(path: Path) -> str:
    return path.read_text("utf-8")
