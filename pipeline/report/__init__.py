"""Shows a finished report: tables on the terminal, one HTML file, and a bundle's model card.

A report is the plain dictionary that evaluate makes. Nothing here computes a result or reads a
file, and any part of a report may be missing: what is absent, NaN or infinite is shown as a dash.
"""

from .card import adapters_card, card
from .page import page
from .terminal import show

__all__ = ["adapters_card", "card", "page", "show"]
