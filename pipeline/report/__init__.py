"""Shows a finished report: tables on the terminal, and one HTML file that needs nothing beside it.

A report is the plain dictionary that evaluate makes. Nothing here computes a result or reads a file, and any part of a
report may be missing: what is absent, NaN or infinite is shown as a dash.
"""

from .page import page
from .terminal import show

__all__ = ["page", "show"]
