"""Shows a finished report: tables on the terminal, one HTML file, and a bundle's model card.

A report is one of the models of `schema`, which evaluate builds. Nothing here computes a result,
and any table of a report may be missing: what is absent, NaN or infinite is shown as a dash.
"""

from .card import card, export_card, stock_base
from .lasting import lasting_rows, split
from .markdown import experiments_text
from .page import experiments_page, page
from .schema.experiments import ExperimentResults
from .schema.language import LanguageReport
from .schema.reading import Report, read
from .schema.requests import RequestReport
from .terminal import show, show_changes, show_experiments

__all__ = [
    "ExperimentResults",
    "LanguageReport",
    "Report",
    "RequestReport",
    "card",
    "experiments_page",
    "experiments_text",
    "export_card",
    "lasting_rows",
    "page",
    "read",
    "show",
    "show_changes",
    "show_experiments",
    "split",
    "stock_base",
]
